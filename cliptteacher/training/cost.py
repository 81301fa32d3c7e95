"""What a training run costs, from counted operations and bytes: GPU hours and memory.

    hours  = iterations * batch * operations of a crop / throughput
    memory = weights and both moments of AdamW     12 bytes a trainable parameter
           + the frozen teacher                     4 bytes a parameter
           + the most that a step needs at one time: gradients, what autograd saves for the
             backward pass, and what operations make and drop

A step is counted without doing it: its tensors have sizes but no numbers. The operations are
counted, the throughput is assumed: figures to plan with, not measurements. Left out: evaluation,
waiting for data or for other GPUs, the workspaces and the reserves of the libraries, and the
CUDA context (about half a GiB).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Of the 312 that an A100 can reach in bf16: small convolutions, norms and attention over few
# channels are bound by memory.
ASSUMED_TFLOPS = 40.0


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a training step takes: teacher, student, both modules, losses and backward pass."""

    gflop: float  # 1e9 operations a crop; a multiply-add is two
    saved_gib: float  # 2**30 bytes a crop, saved by autograd under bf16 autocast
    trainable: float  # 1e6 parameters of student and adapter
    frozen: float  # 1e6 parameters of the teacher

    def gpu_hours(self, crops: int) -> float:
        """Hours of one GPU for so many crops, at ``ASSUMED_TFLOPS``."""
        return crops * self.gflop / (ASSUMED_TFLOPS * 1e3) / 3600

    def crops_per_second(self) -> float:
        """Crops that one GPU takes in a second, at ``ASSUMED_TFLOPS``."""
        return ASSUMED_TFLOPS * 1e3 / self.gflop

    def memory_gib(self, crops: int) -> float:
        """Memory of a GPU that trains so many crops at a time, in 2**30 bytes.

        Without the temporaries of the operations, which ``StepCount`` knows.
        """
        fixed = (16 * self.trainable + 4 * self.frozen) * 1e6 / 2**30
        return fixed + crops * self.saved_gib


@dataclass(frozen=True, kw_only=True)
class StepCount(StepCost):
    """A step that was counted for so many crops at a time."""

    crops: int
    peak_gib: float  # the most alive at one time: gradients, saved tensors and temporaries

    @property
    def state_gib(self) -> float:
        """Weights, moments and teacher, always there, in 2**30 bytes."""
        return (12 * self.trainable + 4 * self.frozen) * 1e6 / 2**30


# Crops of 512 pixels, CLIP ViT-B/16, 49 seen classes. Lines of
# python benchmarks/step_cost.py segformer_b0 segformer_b4 segnext_b swin_b
STEP_COSTS = {
    "segformer_b0": StepCost(gflop=258.9, saved_gib=0.17, trainable=8.0, frozen=149.6),
    "segformer_b4": StepCost(gflop=562.2, saved_gib=0.74, trainable=65.7, frozen=149.6),
    "segnext_b": StepCost(gflop=419.1, saved_gib=0.73, trainable=32.0, frozen=149.6),
    "swin_b": StepCost(gflop=2045.5, saved_gib=1.12, trainable=125.8, frozen=149.6),
}
COUNTED_FOR = {"clip": "ViT-B/16", "crop": 512, "precision": "bf16"}


@contextmanager
def without_numbers(*modules: nn.Module) -> Iterator[None]:
    """Make every tensor inside one that has a size but no numbers, on an imagined CPU.

    Networks of any size can be run so, in seconds and in no memory. Those given lose their
    parameters for good: count on networks that are not needed afterwards.
    """
    with FakeTensorMode():
        for module in modules:
            module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))  # type: ignore[no-untyped-call]
        yield


def count_step(
    step: Callable[[], Tensor],
    teacher_pass: Callable[[], object],
    model: nn.Module,
    teacher: nn.Module,
    crops: int,
) -> StepCount:
    """Count one training step; the operations of its backward pass are twice the forward ones.

    A counted backward pass would be wrong: torch.utils.flop_counter takes the gradients of a
    depthwise convolution for those of a dense one. Nor does it know the CPU's fused attention.

    Args:
        step: computes the total loss of ``model``, the pass of the teacher included.
        teacher_pass: that pass alone, which has no backward pass.
        model: what is trained; its parameters are no memory of the step, their gradients are.
        teacher: what is not trained.
        crops: size of the batch.
    """
    saved: dict[int, int] = {}  # a storage that several operations save counts once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    def count_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as frozen, torch.no_grad():
        teacher_pass()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _LiveBytes() as live:
        for parameter in parameters:  # always there: DDP keeps its buckets
            parameter.grad = torch.empty_like(parameter)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False, custom_mapping=fused) as both, hooks:
            total = step()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        memory = sum(saved[key] for key in saved.keys() - own)
        total.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    operations = 3 * both.get_total_flops() - 2 * frozen.get_total_flops()
    return StepCount(
        gflop=operations / crops / 1e9,
        saved_gib=memory / crops / 2**30,
        trainable=sum(p.numel() for p in parameters) / 1e6,
        frozen=sum(p.numel() for p in teacher.parameters()) / 1e6,
        crops=crops,
        peak_gib=live.peak / 2**30,
    )


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make until they are dropped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
