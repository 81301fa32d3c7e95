"""Two processes compute what one does with both halves of the batch, where the method allows it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_clip, tiny_student
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cliptteacher.distributed import gather_rows, share_buffers, sum_over_processes
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.training.finite import FiniteCheck
from cliptteacher.training.interruption import StopSignal

SMALL: dict[str, Any] = {"scales": (1, 2), "kmeans_iterations": 3}
LITERAL = {"ce": "none", "generate_weight": 0.0}  # what needs no option to be exact
STEPS = 3


def build(**options: Any) -> CLIPTeacher:
    config = CLIPTeacherConfig(**SMALL, **options)
    return CLIPTeacher(tiny_clip(), tiny_student(), ("cat", "dog", "cow"), config).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Four images; the halves have other classes, and other numbers of labelled pixels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (4, 1, 4), generator=generator).repeat_interleave(8, 2)
    labels = labels.expand(4, 32, 32).clone()
    labels[:, 12:] = 255
    labels[0, :, :] = 0
    labels[2, :28] = 255
    return images, labels


def learn(model: CLIPTeacher, wrapped: Any, half: slice) -> list[dict[str, Tensor]]:
    """Losses and gradients of some steps, with plain gradient descent between them."""
    told = []
    for step in range(STEPS):
        images, labels = batch(step)
        losses = wrapped(images[half], labels[half])
        model.zero_grad()
        losses["total"].backward()
        record = {f"loss {name}": value.detach() for name, value in losses.items()}
        for name, parameter in model.named_parameters():
            record[name] = parameter.grad.clone()
            parameter.data -= 0.02 * parameter.grad
        told.append(record)
    return told


def share_steps(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, options in cases.items():
        model = build(**options)
        half = slice(2 * rank, 2 * rank + 2)
        told = learn(model, DistributedDataParallel(model), half)
        torch.save(told, f"{folder}/{name}-{rank}.pt")
    summed_and_shared(rank, folder)
    torch.save({"stop": stop_signals(rank), **bad_image(rank)}, f"{folder}/agreed-{rank}.pt")
    dist.destroy_process_group()


def summed_and_shared(rank: int, folder: str) -> None:
    """What the pieces do: a sum with its gradient, rows, buffers."""
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    x.requires_grad_()
    total = sum_over_processes(x)
    (total * torch.tensor([3.0, 5.0]) * (rank + 1)).sum().backward()
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += rank + 7
    norm.num_batches_tracked += rank + 7
    share_buffers(norm)
    rows, first = gather_rows(torch.full((2, 1), float(rank)))
    torch.save(
        {
            "sum": total.detach(), "gradient": x.grad, "mean": norm.running_mean,
            "counted": norm.num_batches_tracked, "rows": rows, "first": first,
        },
        f"{folder}/pieces-{rank}.pt",
    )  # fmt: skip


def stop_signals(rank: int) -> list[bool]:
    """The second process alone gets a signal, before the second question."""
    answers = []
    with StopSignal() as stop:
        for step in range(5):
            if (rank, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
            if answers[-1]:
                break
    return answers


def times(output: Any, factor: Tensor) -> Any:
    """Multiply a tensor, or every tensor of a tuple."""
    if isinstance(output, Tensor):
        return output * factor
    parts = [times(part, factor) for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)


def bad_image(rank: int) -> dict[str, Any]:
    """The second process alone meets what is not finite, in the second of three steps."""
    model, finite = build(), FiniteCheck(torch.device("cpu"))
    wrapped, found = DistributedDataParallel(model), []
    factor = torch.ones(())
    model.segmenter.register_forward_hook(lambda *call: call[2] * factor)
    model.clip.visual.register_forward_hook(lambda *call: times(call[2], factor))
    for step in range(3):
        images, labels = batch(step)
        factor.fill_(torch.nan if (rank, step) == (1, 1) else 1.0)
        losses = wrapped(images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2])
        model.zero_grad()
        finite.add(losses)
        losses["total"].backward()
        finite.end_step(step, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        found.append(finite.check())
    return {
        "found": [step for step, record in enumerate(found) if record],
        "step": found[1].step,
        "terms": {r: list(terms) for r, terms in found[1].terms.items()},
    }


CASES: dict[str, dict[str, Any]] = {
    "literal": LITERAL,
    "global": {"over_processes": True},
    "own images": {"over_processes": True, "potential_scope": "image", "potential_slots": 3},
    "seen": {"over_processes": True, "ce": "seen", "generate_loss": "bce"},
    "per process": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    mp.spawn(share_steps, (str(folder), CASES), nprocs=2)
    return folder


def compare(folder: Path, name: str, check: Callable[..., None]) -> None:
    """Hand every loss and gradient to ``check``: (name, of two processes, of one)."""
    one = build(**CASES[name])
    whole = learn(one, one, slice(0, 4))
    halves = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    for step in range(STEPS):
        for key, expected in whole[step].items():
            check(key, (halves[0][step][key] + halves[1][step][key]) / 2, expected)


def assert_same_sum(key: str, found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of some thousand additions in float64."""
    scale = expected.abs().max().item()
    tolerance = 8192 * torch.finfo(torch.float64).eps * max(scale, 1e-3)
    assert (found - expected).abs().max().item() <= tolerance, key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "per process"])
def test_two_processes_equal_one_with_the_double_batch(folder: Path, name: str) -> None:
    compare(folder, name, assert_same_sum)


@pytest.mark.slow
def test_prototypes_of_each_process_are_another_loss(folder: Path) -> None:
    """Without the option they are not equal: else the tests above would show nothing."""
    far: dict[str, float] = {}

    def note(key: str, found: Tensor, expected: Tensor) -> None:
        difference = (found - expected).abs().max() / expected.abs().max()
        far.setdefault(key, float(difference))  # of the first step

    compare(folder, "per process", note)
    assert min(far["loss ce"], far["loss generate"]) > 1e-6, far
    assert max(far["loss global"], far["loss focal"], far["loss dice"]) < 1e-12


@pytest.mark.slow
def test_the_pieces(folder: Path) -> None:
    for rank in range(2):
        found = torch.load(folder / f"pieces-{rank}.pt", weights_only=True)
        assert found["sum"].tolist() == [3.0, 6.0]
        assert found["gradient"].tolist() == [9.0, 15.0]  # 3 (1 + 2), 5 (1 + 2)
        assert found["mean"].tolist() == [7.0, 7.0] and found["counted"].item() == 7
        assert found["rows"].flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
        assert found["first"] == 2 * rank


@pytest.mark.slow
def test_all_processes_learn_what_one_of_them_met(folder: Path) -> None:
    """A signal ends both behind the same step; a bad image of one stops both at once, by name."""
    for rank in range(2):
        found = torch.load(folder / f"agreed-{rank}.pt", weights_only=True)
        assert found["stop"] == [False, False, True]
        assert found["found"][0] == found["step"] == 1
        assert found["terms"][1] == ["global", "ce", "focal", "dice", "generate"]
        assert found["terms"][0] == ["global"]  # whose negatives are the tokens of all images


def test_alone_there_is_nothing_to_share() -> None:
    x = torch.ones(2)
    assert sum_over_processes(x) is x
    rows, first = gather_rows(x)
    assert torch.equal(rows, x) and first == 0
    found, expected = (build(over_processes=flag)(*batch(0)) for flag in (True, False))
    for key, value in found.items():
        assert_same_sum(key, value.detach(), expected[key].detach())
