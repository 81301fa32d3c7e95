"""Score dense features against classifiers: Eq. (9), arXiv:2310.02296v1, for all who need it.

The classifiers are text features of class names (training on seen classes, prediction of all) or
those that the Vision-Language Adapter makes for potential classes. "dot" compares both sides as
they are, "cosine" at unit length.

Cost: B h w C K multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Similarity = Literal["dot", "cosine"]
_ABSENT = -1e4  # bias of absent classifiers; finite, and within float16
_CLASSES_AT_ONCE = 32  # classes upsampled together when only labels are asked for
_VALUES_AT_ONCE = 2**25  # logits upsampled together in training: 128 MiB


def pixel_logits(
    features: Tensor,
    classifiers: Tensor,
    scale: float = 1.0,
    similarity: Similarity = "dot",
    present: Tensor | None = None,
) -> Tensor:
    """Compute x = scale * R^T W at every position, Eq. (9), arXiv:2310.02296v1.

    Args:
        features: R (B, C, h, w), dense features of the student.
        classifiers: W (K, C) for all images, or (B, K, C), one set per image.
        scale: factor of the logits.
        similarity: "dot" takes both sides as they are, "cosine" at unit length.
        present: (K,) or (B, K) bool; absent classifiers score about -10^4 and cannot win.

    Returns:
        (B, K, h, w) in the dtype of ``features``.

    Raises:
        ValueError: ``similarity`` is unknown.

    >>> pixel_logits(torch.ones(1, 2, 1, 1), torch.eye(2), scale=3.0).flatten()
    tensor([3., 3.])
    """
    if similarity not in ("dot", "cosine"):
        raise ValueError(f'`similarity` must be "dot" or "cosine", got {similarity!r}')
    if similarity == "cosine":
        features, classifiers = F.normalize(features, dim=1), F.normalize(classifiers, dim=-1)
    classifiers = (scale * classifiers).to(features.dtype)
    equation = "bchw,kc->bkhw" if classifiers.ndim == 2 else "bchw,bkc->bkhw"
    logits: Tensor = torch.einsum(equation, features, classifiers)
    if present is None:
        return logits
    bias = torch.where(present, 0.0, _ABSENT).to(logits.dtype)
    return logits + bias[..., None, None]  # (K, 1, 1) or (B, K, 1, 1)


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, X, h, w) to (B, X, *size), bilinear with align_corners False."""
    return maps if maps.shape[-2:] == tuple(size) else _interpolate(maps, size)


def upsampled_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return `upsample(logits, size).argmax(1)` with a bounded number of classes in memory.

    A photograph of 12 million pixels times 171 classes would take 8 GB at once.

    Args:
        logits: (B, A, h, w).
        size: height and width of the result.

    Returns:
        Labels, int64 (B, *size).
    """
    # No question whether the sizes differ: a traced program would freeze the answer.
    best, labels = _interpolate(logits[:, :_CLASSES_AT_ONCE], size).max(dim=1)
    for first in range(_CLASSES_AT_ONCE, logits.shape[1], _CLASSES_AT_ONCE):
        chunk = _interpolate(logits[:, first : first + _CLASSES_AT_ONCE], size)
        value, index = chunk.max(dim=1)
        labels = torch.where(value > best, index + first, labels)
        best = torch.maximum(best, value)
    return labels


def class_chunks(logits: Tensor, size: Sequence[int]) -> list[slice]:
    """Split the classes of logits (B, K, h, w) so that each part at ``size`` fits into 128 MiB."""
    at_once = max(1, _VALUES_AT_ONCE // (logits.shape[0] * size[0] * size[1]))
    return [slice(i, i + at_once) for i in range(0, logits.shape[1], at_once)]


def upsampled_logsumexp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both parts of a cross entropy, log(sum_k exp(x_k)) - x_y, at the size of the labels.

    Equal to ``upsample`` and then ``logsumexp`` and ``gather``, with a bounded number of classes in
    memory: 272 classes for two crops of 512 pixels would take 0.5 GiB, three times over.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) int64 y; x_y is 0 where y is none of [0, K).

    Returns:
        log-sum-exp and x_y, both (B, H, W), at least float32.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    both: tuple[Tensor, Tensor] = _LogSumExp.apply(wide, labels)
    return both


class _LogSumExp(torch.autograd.Function):
    """Keeps the small logits for the backward pass, and makes the large ones again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = labels.shape[1:]
        own = logits.new_zeros(labels.shape)
        total = torch.full_like(own, -torch.inf)
        for part in class_chunks(logits, size):
            x = upsample(logits[:, part], size)
            total = torch.logaddexp(total, x.logsumexp(dim=1))
            index, inside = _within(labels, part.start, x.shape[1])
            own += x.gather(1, index).squeeze(1) * inside
        ctx.save_for_backward(logits, labels, total)
        return total, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, own_gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, total = ctx.saved_tensors
        size = labels.shape[1:]
        gradients: list[Tensor] = []
        for part in class_chunks(logits, size):
            with torch.enable_grad():
                small = logits[:, part].detach().requires_grad_()
                x = upsample(small, size)
            slope = (x.detach() - total.unsqueeze(1)).exp_().mul_(total_gradient.unsqueeze(1))
            index, inside = _within(labels, part.start, x.shape[1])
            slope.scatter_add_(1, index, (own_gradient * inside).unsqueeze(1))
            gradients += [slope] if x is small else torch.autograd.grad(x, small, slope)
        return torch.cat(gradients, dim=1), None


def _within(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Index of every label among the classes from ``first`` on, (B, 1, H, W), and if it is one."""
    index = labels - first
    return index.clamp(0, count - 1).unsqueeze(1), (index >= 0) & (index < count)


def _interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
