"""What a training run costs, from counted operations, launches and bytes: hours and memory.

    seconds = iterations * the longer of  crops * operations of a crop / throughput
                                          launches * what the host takes for one
    memory  = weights and both moments of AdamW     12 bytes a trainable parameter
            + the frozen teacher                     4 bytes a parameter
            + the most that a step needs at one time: what autograd saves for the backward pass,
              gradients, and what operations make and drop
            + with several GPUs, DDP's buckets: all gradients, from the first step on

A step is counted without doing it, by the rules of CUDA: its tensors have sizes but no numbers.
Throughput and the time of a launch are assumed: hours to plan with, not measurements. Left out:
evaluation, waiting for data or for other GPUs, the workspaces and the reserves of the libraries,
and the CUDA context (about half a GiB).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..framework import CLIPTeacher

# Of the 312 that an A100 can reach in bf16: small convolutions, norms and attention over few
# channels are bound by memory.
ASSUMED_TFLOPS = 40.0
# Python, autograd and the driver, for one kernel: with few crops a GPU waits for its host.
ASSUMED_LAUNCH_SECONDS = 6e-6


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A training step of one process: teacher, student, modules, losses and backward pass."""

    crops: int
    gflop: float  # 1e9 operations a crop; a multiply-add is two
    launches: int  # operations that make or change a tensor, about one kernel each
    saved_gib: float  # 2**30 bytes alive between forward and backward pass
    peak_gib: float  # the most alive at one time: saved tensors, gradients and temporaries
    trainable: float  # 1e6 parameters of student and adapter
    frozen: float  # 1e6 parameters of the teacher

    def seconds(self) -> float:
        """Seconds of a step, at ``ASSUMED_TFLOPS`` and ``ASSUMED_LAUNCH_SECONDS``."""
        operations = self.crops * self.gflop / (ASSUMED_TFLOPS * 1e3)
        return max(operations, self.launches * ASSUMED_LAUNCH_SECONDS)

    def memory_gib(self, processes: int = 1) -> float:
        """Memory of a GPU among so many, in 2**30 bytes."""
        return self.state_gib + self.peak_gib + (self.buckets_gib if processes > 1 else 0.0)

    @property
    def buckets_gib(self) -> float:
        """Gradients that DistributedDataParallel always holds, in 2**30 bytes."""
        return 4 * self.trainable * 1e6 / 2**30

    @property
    def state_gib(self) -> float:
        """Weights, moments and teacher, always there, in 2**30 bytes."""
        return (12 * self.trainable + 4 * self.frozen) * 1e6 / 2**30


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


@contextmanager
def autocast_of_cuda(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast as CUDA does, on an imagined CPU; None is no autocast.

    CUDA computes norms, softmax and sums in float32 and gives float32 back: with them the residual
    stream of a transformer is float32 too, which on a CPU is half as large.
    """
    with torch.autocast("cpu", dtype, enabled=dtype is not None), _InFloat32():
        yield


class _InFloat32(TorchFunctionMode):
    """Widens what goes into the functions that CUDA's autocast widens and the CPU's does not."""

    FUNCTIONS = frozenset(
        {
            *(F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.normalize),
            *(F.softplus, F.cosine_similarity, F.logsigmoid, torch.exp, Tensor.exp, torch.sum),
            *(Tensor.sum, torch.logsumexp, Tensor.logsumexp, Tensor.square, Tensor.pow),
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _widen(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def count_step(
    step: Callable[[], Tensor],
    teacher_pass: Callable[[], object],
    model: nn.Module,
    teacher: nn.Module,
    crops: int,
) -> StepCost:
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

    def count_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as frozen, torch.no_grad():
        teacher_pass()
    with FlopCounterMode(display=False, custom_mapping=fused) as both, _LiveBytes() as live:
        total = step()
        saved, forward = live.now, both.get_total_flops()
        total.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    operations = 3 * forward - 2 * frozen.get_total_flops()
    return StepCost(
        crops=crops,
        gflop=operations / crops / 1e9,
        launches=live.launches,
        saved_gib=saved / 2**30,
        peak_gib=live.peak / 2**30,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        frozen=sum(p.numel() for p in teacher.parameters()) / 1e6,
    )


def count_model(
    model: CLIPTeacher, crops: Sequence[int], crop: int, dtype: torch.dtype | None
) -> list[StepCost]:
    """Count a step of each batch size by the rules of CUDA; the model cannot train afterwards.

    Args:
        model: loses the numbers of its parameters.
        crops: batch sizes.
        crop: side of a crop in pixels.
        dtype: of autocast; None is none.
    """
    counts = []
    with without_numbers(model.train()), autocast_of_cuda(dtype):
        for number in crops:
            images = torch.empty(number, 3, crop, crop)
            labels = torch.empty(number, crop, crop, dtype=torch.uint8)
            step = partial(_total, model, images, labels)
            counts.append(
                count_step(step, partial(model.encode, images), model, model.clip, number)
            )
    return counts


def _total(model: CLIPTeacher, images: Tensor, labels: Tensor) -> Tensor:
    total: Tensor = model(images, labels)["total"]
    return total


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make until they are dropped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = self.launches = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            self.launches += 1
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:  # no view
                self._follow(storage)
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
