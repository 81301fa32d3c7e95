"""What a training run costs, from counted operations: GPU hours and memory.

    hours  = iterations * batch * operations of a crop / throughput
    memory = weight, gradient and both moments of AdamW   16 bytes a trainable parameter
           + the frozen teacher                            4 bytes a parameter
           + what autograd saves for the backward pass     counted, times the crops of a GPU

The operations are counted, the throughput is assumed: figures to plan with, not measurements.
Left out: evaluation, waiting for data or for other GPUs, and the workspace of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
        """Memory of a GPU that trains so many crops at a time, in 2**30 bytes."""
        fixed = (16 * self.trainable + 4 * self.frozen) * 1e6 / 2**30
        return fixed + crops * self.saved_gib


# Crops of 512 pixels, CLIP ViT-B/16, 49 seen classes. Lines of
# python benchmarks/step_cost.py segformer_b0 segformer_b4 segnext_b swin_b
STEP_COSTS = {
    "segformer_b0": StepCost(gflop=262.8, saved_gib=0.19, trainable=8.0, frozen=149.6),
    "segformer_b4": StepCost(gflop=566.0, saved_gib=0.76, trainable=65.7, frozen=149.6),
    "segnext_b": StepCost(gflop=423.0, saved_gib=0.73, trainable=32.0, frozen=149.6),
    "swin_b": StepCost(gflop=2049.3, saved_gib=1.15, trainable=125.8, frozen=149.6),
}
COUNTED_FOR = {"clip": "ViT-B/16", "crop": 512, "precision": "bf16"}


def count_step(
    step: Callable[[], Tensor], teacher_pass: Callable[[], object], model: nn.Module, crops: int
) -> tuple[float, float]:
    """Count one training step; its backward pass, which need not run, is twice its forward pass.

    A counted backward pass would be wrong: torch.utils.flop_counter takes the gradients of a
    depthwise convolution for those of a dense one. Nor does it know the CPU's fused attention.

    Args:
        step: computes the total loss of ``model``, the pass of the teacher included.
        teacher_pass: that pass alone, which has no backward pass.
        model: what is trained; its parameters are no memory of the step.
        crops: size of the batch.

    Returns:
        1e9 operations a crop, and 2**30 bytes a crop that autograd saves.
    """
    saved: dict[int, int] = {}  # a storage that several operations save counts once

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def count_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as frozen, torch.no_grad():
        teacher_pass()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False, custom_mapping=fused) as both, hooks:
        total = step()  # held, or later tensors could take the places of those saved
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    memory = sum(saved[key] for key in saved.keys() - own)
    del total
    operations = 3 * both.get_total_flops() - 2 * frozen.get_total_flops()
    return operations / crops / 1e9, memory / crops / 2**30
