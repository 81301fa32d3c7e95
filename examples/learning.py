"""One update of the student: what it needs, and what of it outlives an interruption."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliptteacher.framework import CLIPTeacher
from cliptteacher.glm import CLSBank
from cliptteacher.training.average import WeightAverage
from cliptteacher.training.config import TrainConfig
from cliptteacher.training.distributed import Process
from cliptteacher.training.nonfinite import NonFiniteGuard, gradient_norm
from cliptteacher.training.recompute import checkpoint_activations

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Learner:
    """The student in training, with everything that an update changes."""

    model: CLIPTeacher
    wrapped: nn.Module  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, for fp16
    guard: NonFiniteGuard
    average: WeightAverage | None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the student itself is stored beside them."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "bank": [module.bank.state_dict() for module in self.model.glm],
            "adapter": self.model.plm.adapter.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.guard.state_dict(),
        }
        if self.average is not None:  # the average is what a checkpoint offers as the student
            state["segmenter"] = self.model.segmenter.state_dict()
        return state

    def student_weights(self) -> dict[str, Tensor]:
        """The weights to predict with."""
        student = self.model.segmenter if self.average is None else self.average
        return dict(student.state_dict())

    def load_state_dict(self, state: dict[str, Any], student: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` and ``student_weights`` gave."""
        self.model.segmenter.load_state_dict(state.get("segmenter", student))
        if self.average is not None:
            self.average.load_state_dict(student)
        self.model.plm.adapter.load_state_dict(state["adapter"])
        for module, bank in zip(self.model.glm, state["bank"], strict=True):
            module.bank.load_state_dict(bank, self.model.seen_text.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.guard.load_state_dict(state.get("skipped", 0))

    def evaluating(self) -> AbstractContextManager[None]:
        """Put the weights to predict with into the student, within a block."""
        return nullcontext() if self.average is None else self.average.applied()


def prepare_student(segmenter: nn.Module, config: TrainConfig, process: Process) -> nn.Module:
    """Apply the options that change how the student computes, not what."""
    if config.channels_last:
        segmenter = segmenter.to(memory_format=torch.channels_last)
    if config.sync_batch_norm and process.world_size > 1:
        if process.device.type == "cuda":
            segmenter = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)
        elif process.is_main:
            warnings.warn(
                "`sync_batch_norm` needs CUDA; on the CPU every process normalises its own images",
                stacklevel=2,
            )
    if config.checkpoint_activations:
        checkpoint_activations(segmenter)
    return segmenter


def prepare_learner(
    model: CLIPTeacher, optimizer: torch.optim.Optimizer, config: TrainConfig, process: Process
) -> Learner:
    """Join the model, its optimiser and what the options ask for."""
    share = config.batch_size // process.world_size
    if share % config.accumulate:
        raise SystemExit(
            f"error: `accumulate` must divide the {share} images that each process has of a "
            f"batch, got {config.accumulate}"
        )
    if config.accumulate > 1:  # the bank counts insertions, and every part is one
        for module in model.glm:
            module.bank = CLSBank(model.config.bank_size * config.accumulate)
    if config.compile:  # in place: the names in checkpoints stay plain
        model.segmenter.compile()
        model.clip.visual.compile()
    if config.tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    scaled = config.precision == "fp16"
    return Learner(
        model=model,
        wrapped=wrap(model, process).train(),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(process.device.type, enabled=scaled),
        guard=NonFiniteGuard(config.skip_nonfinite, process.device, scaled),
        average=WeightAverage(model.segmenter, config.ema_decay) if config.ema_decay > 0 else None,
    )


def wrap(model: CLIPTeacher, process: Process) -> nn.Module:
    """Average gradients over processes, if there are several."""
    if process.world_size == 1:
        return model
    devices = [process.local_rank] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def train_step(
    learner: Learner, images: Tensor, labels: Tensor, step: int, config: TrainConfig
) -> dict[str, Tensor]:
    """Update the student once; returns the losses, detached and still on the device.

    A loss or gradient that is not finite moves nothing; ``learner.guard.check()`` tells.
    """
    optimizer, parts = learner.optimizer, config.accumulate
    statistics = remember_statistics(learner.model.segmenter) if config.skip_nonfinite else []
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for part, (some, their) in enumerate(
        zip(images.chunk(parts), labels.chunk(parts), strict=True)
    ):
        with averaging_gradients(learner.wrapped, last=part == parts - 1):
            losses = forward(learner.wrapped, some, their, config)
            seed = learner.guard.seed(losses, 1 / parts)
            learner.scaler.scale(losses["total"]).backward(seed)
        sums = {k: sums.get(k, 0) + v.detach() / parts for k, v in losses.items()}
    found_inf = learner.guard.judge(step, norm_of_gradients(learner, config))
    if not learner.scaler.is_enabled():  # a scaler finds out for itself
        optimizer.found_inf = found_inf
    learner.scaler.step(optimizer)
    learner.scaler.update()
    for buffer, before in statistics:
        buffer.copy_(torch.where(found_inf > 0, before, buffer))
    if learner.average is not None:
        learner.average.update()
    return sums


def forward(
    model: nn.Module, images: Tensor, labels: Tensor, config: TrainConfig
) -> dict[str, Tensor]:
    """The losses of one part of the batch, under autocast if asked for."""
    kind = AUTOCAST.get(config.precision)
    with torch.autocast(images.device.type, kind, enabled=kind is not None):
        return model(images, labels)


def averaging_gradients(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Let processes exchange gradients in the last part of a step only."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def norm_of_gradients(learner: Learner, config: TrainConfig) -> Tensor:
    """The norm of all gradients as they are before they are clipped."""
    learner.scaler.unscale_(learner.optimizer)
    parameters = list(learner.model.parameters())
    if config.clip_gradient > 0:
        return nn.utils.clip_grad_norm_(parameters, config.clip_gradient)
    return gradient_norm(parameters)


def remember_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every buffer, with a copy of it: a skipped step must not leave its traces there."""
    return [(buffer, buffer.clone()) for buffer in module.buffers()]
