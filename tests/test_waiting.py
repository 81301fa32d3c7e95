"""A training step never waits for the device: no number is read, no shape depends on one.

Two kinds of evidence. On the CPU, steps of the real program run under a mode that counts every
operation whose result a GPU would have to tell the host, and with the methods counted that read
memory without an operation. And the forward pass runs on a CUDA device that is only imagined:
there nothing has a number, and a tensor left on the host shows as a copy. On the CPU K-Means and
fusion are operations that are not looked into: other forms take their place on other devices.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_clip
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter
from cliptteacher.training.config import TrainConfig, resolve_config
from cliptteacher.training.recipes import get_recipe
from cliptteacher.training.run import TrainingRun

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CASES = [  # the two recipes differ in the pixel learning module
    *(("fpn_small", "miniworld"), ("segformer_nano", "paper")),
    *(("segnext_nano", "miniworld"), ("swin_nano", "paper")),
]
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__array__")
TELLING = {
    *(
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "allclose",
        "nonzero",
        "argwhere",
        "masked_select",
    ),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "histogram"),
    *("repeat_interleave", "combinations"),
}


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.found.copy()
        result = func(*args, **(kwargs or {}))
        if func.namespace == "cliptteacher":  # of the CPU alone: what it read was never elsewhere
            self.found.clear()
            self.found.update(before)
        name = func._schema.name.removeprefix("aten::")
        places = {t.device.type for t in tree_leaves((args, kwargs, result)) if is_tensor(t)}
        if name in TELLING and self.device in places:
            self.found[name] += 1
        if name in ("_to_copy", "copy_") and len(places) > 1:
            self.found["copy between host and device"] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.found["mask as index"] += len(masks)
        return result


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def counted(device: str = "cpu") -> Iterator[Counter[str]]:
    """Count what waits inside, by operation and, as a mode cannot see them, by method."""
    waits = Waits(device)
    with pytest.MonkeyPatch.context() as patch, waits:
        for name in READING:

            def read(self: Tensor, *args: Any, name: str = name, **kwargs: Any) -> Any:
                waits.found[name] += 1
                return original[name](self, *args, **kwargs)

            patch.setattr(Tensor, name, read)
        yield waits.found


original = {name: getattr(Tensor, name) for name in READING}


def wait_in_backward(x: Tensor) -> None:
    x.requires_grad_().register_hook(lambda gradient: gradient * gradient.nonzero().shape[0])
    x.sum().backward()


# --- the counter counts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: "yes" if x.any() else "no",
        lambda x: range(20)[x.sum().int()],  # __index__
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x[x > 1],
        lambda x: x.clone().__setitem__(x > 1, torch.zeros(3)),
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.long().bincount(),
        lambda x: nn.functional.one_hot(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: wait_in_backward(x),
    ],
)
def test_what_waits_is_counted(wait: Any) -> None:
    x = torch.arange(5.0)
    with counted() as found:
        wait(x)
    assert found.total() >= 1


def test_what_does_not_wait_is_not_counted() -> None:
    x = torch.arange(5.0, requires_grad=True)
    with counted() as found:
        y = torch.where(x > 1, x, 0.0)[torch.arange(2)].masked_fill(x[:2] > 3, 1.0)
        y.sum().backward()
        torch.zeros(5).index_add(0, torch.arange(5), x.detach())[1:3] = 0.0
    assert not +found


# --- steps of the program -----------------------------------------------------------------------


class EnoughError(Exception):
    """Raised after the steps that a test wants to see."""


def step_of_program(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> Counter[str]:
    """Run two steps of train.py; returns what waited in the second, which has a CLS bank."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train = importlib.import_module("train")
    seen: list[Counter[str]] = []
    counting = ExitStack()

    class Watched(TrainingRun):
        """Counts from the batch to the end of the step, the notes for the log included."""

        def steps(self, loader: Any) -> Iterator[Any]:
            for item in super().steps(loader):
                seen.append(counting.enter_context(counted()))
                yield item

        def end_step(self, step: int, gradient_norm: Tensor) -> None:
            super().end_step(step, gradient_norm)
            counting.close()
            if len(seen) == 2:
                raise EnoughError

    monkeypatch.setattr(train, "TrainingRun", Watched)
    with counting, pytest.raises(EnoughError):
        train.main(options)
    return +seen[1]


@pytest.mark.parametrize(("student", "recipe"), CASES)
def test_a_step_waits_for_nothing(
    student: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auxiliary = "0.4" if student.startswith("swin") else "0"
    options = f"""--recipe {recipe} --data miniworld --clip miniworld --segmenter {student}
        --device cpu --batch-size 2 --crop 64 --resize 64 64 --log-interval 1000
        --auxiliary-weight {auxiliary} --clip-gradient 1 --precision bf16 --workers 0
        --segmenter-weights none --output {tmp_path}"""
    assert step_of_program(monkeypatch, options.split()) == {}


@pytest.mark.parametrize(("student", "recipe"), CASES)
def test_the_forward_pass_stays_on_its_device(student: str, recipe: str) -> None:
    """All losses and the bank, on a device without numbers, twice."""
    changes = {"auxiliary_weight": 0.4 if student.startswith("swin") else 0.0}
    classes = (TrainConfig, CLIPTeacherConfig)
    _, method = resolve_config(classes, (get_recipe(recipe), changes))
    extra = {"auxiliary": True} if student.startswith("swin") else {}
    model = CLIPTeacher(
        tiny_clip(), build_segmenter(student, 16, **extra), ("cat", "dog"), method
    ).train()
    with FakeTensorMode():
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="cuda")
        labels = torch.empty(2, 64, 64, dtype=torch.uint8, device="cuda")
        with counted("cuda") as found:
            for _ in range(2):
                losses = model(images, labels)
    assert {value.device.type for value in losses.values()} == {"cuda"}
    assert not +found
