"""Score dense features against classifiers: Eq. (9), arXiv:2310.02296v1, for all who need it.

The classifiers are text features of class names (training on seen classes, prediction of all) or
those that the Vision-Language Adapter makes for potential classes. "dot" compares both sides as
they are, "cosine" at unit length.

Cost: B h w C K multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Similarity = Literal["dot", "cosine"]
_ABSENT = -1e4  # bias of absent classifiers; finite, and within float16
_CLASSES_AT_ONCE = 32  # classes upsampled together when only labels are asked for


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


def _interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
