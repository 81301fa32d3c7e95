"""Global Learning Module (GLM): dense features aligned with CLIP's CLS token.

Section 3.2 of arXiv:2310.02296v1. Only the CLS token of CLIP was trained against text, so it is
what a student can learn words from. The token asks, the student's dense features answer:

    W     = softmax_N(s . R / sqrt(C))     Eq. (1), no learned query, key or value
    s_hat = W . R^T                        Eq. (2)
    loss  = InfoNCE(s_hat, s, bank)        Eq. (3), tau = 0.07

The bank holds the CLS tokens of the last n = 24 iterations, which serve as negatives. The module
has no parameters. Beyond the paper, ``split_windows`` lets windows of an image have CLS tokens of
their own, for a token says little about objects that are small in its image.

Cost: 2 B N C multiply-adds for the pooling, 24 B^2 C for the loss.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import full_precision, info_nce

Pooling = Literal["attention", "mean", "max"]


def attention_weights(features: Tensor, cls: Tensor) -> Tensor:
    """Weigh every position by its similarity with the CLS token, Eq. (1), arXiv:2310.02296v1.

    Args:
        features: R (B, C, h, w), not normalised.
        cls: s (B, C); brought to unit length here.

    Returns:
        W (B, h, w) in full precision (float32, or float64 for float64), each map sums to 1.
    """
    B, C, h, w = features.shape
    query = F.normalize(full_precision(cls), dim=1).to(features.dtype)
    scores = full_precision(torch.einsum("bc,bchw->bhw", query, features)) / C**0.5
    weights: Tensor = scores.flatten(1).softmax(dim=1)
    return weights.reshape(B, h, w)


def pool_features(features: Tensor, cls: Tensor, pooling: Pooling = "attention") -> Tensor:
    """Predict the CLS token from dense features, Eq. (1)-(2), arXiv:2310.02296v1.

    Args:
        features: R (B, C, h, w).
        cls: s (B, C).
        pooling: "attention" is the paper's; "mean" and "max" are the variants of Table 4.

    Returns:
        s_hat (B, C) in full precision

    Raises:
        ValueError: the shapes do not fit, or ``pooling`` is unknown.
    """
    if features.ndim != 4 or cls.shape != features.shape[:2]:
        raise ValueError(
            f"`features` (B, C, h, w) and `cls` (B, C) must agree, got {tuple(features.shape)} and "
            f"{tuple(cls.shape)}; build the segmenter with channels=clip.embed_dim"
        )
    if pooling == "mean":
        return full_precision(features).mean(dim=(2, 3))
    if pooling == "max":
        return full_precision(features).amax(dim=(2, 3))
    if pooling == "attention":
        weights = attention_weights(features, cls).to(features.dtype)
        return full_precision(torch.einsum("bhw,bchw->bc", weights, features))
    raise ValueError(f'`pooling` must be "attention", "mean" or "max", got {pooling!r}')


def split_windows(maps: Tensor, n: int) -> Tensor:
    """Cut every map into n x n windows, row by row; n = 1 gives the maps themselves.

    Args:
        maps: images or features (B, C, H, W).
        n: windows along one side.

    Returns:
        (B * n * n, C, H / n, W / n), the windows of an image one after the other.

    Raises:
        ValueError: n does not divide H and W.

    >>> split_windows(torch.arange(4.0).reshape(1, 1, 2, 2), 2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    B, C, H, W = maps.shape
    if H % n or W % n:
        raise ValueError(
            f"{n} x {n} windows must divide maps of {H} x {W} evenly; choose another `glm_windows` "
            "or a crop that is a multiple of it"
        )
    windows = maps.reshape(B, C, n, H // n, n, W // n).permute(0, 2, 4, 1, 3, 5)
    return windows.reshape(B * n * n, C, H // n, W // n)


def gather_cls(cls: Tensor) -> tuple[Tensor, int]:
    """Gather the CLS tokens of all ranks, without gradient.

    Args:
        cls: (B, C) of this rank; every rank holds as many.

    Returns:
        (world * B, C) in rank order, and the first row of this rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return cls.detach(), 0
    B, C = cls.shape
    gathered = cls.new_empty(dist.get_world_size() * B, C)
    dist.all_gather_into_tensor(gathered, cls.detach().contiguous())
    return gathered, dist.get_rank() * B


class CLSBank:
    """The CLS tokens of the last ``size`` iterations, the current one included.

    Every rank inserts the same global batch, so the bank is the same on every rank.

    Args:
        size: n, iterations to keep; 1 (or 0) keeps the current batch alone.
    """

    def __init__(self, size: int = 24) -> None:
        if size < 0:
            raise ValueError(f"the size of the CLS bank must be at least 0, got {size}")
        self._batches: deque[Tensor] = deque(maxlen=max(1, size))

    def insert(self, cls: Tensor) -> None:
        """Insert the CLS tokens of one iteration (B, C) and drop the oldest, if full."""
        self._batches.appendleft(full_precision(cls.detach()))

    def rows(self) -> Tensor:
        """All tokens (M, C), the newest iteration first."""
        return torch.cat(tuple(self._batches))

    def state_dict(self) -> list[Tensor]:
        """The batches, newest first, on the CPU."""
        return [batch.cpu() for batch in self._batches]

    def load_state_dict(self, batches: list[Tensor], device: torch.device | str = "cpu") -> None:
        """Take back what ``state_dict`` gave."""
        self._batches.clear()
        self._batches.extend(batch.to(device) for batch in batches)


class GlobalLearningModule(nn.Module):
    """Align the pooled dense features of a student with CLIP's CLS tokens.

    Args:
        pooling: how Eq. (1)-(2) pool; see ``pool_features``.
        bank_size: n of the CLS bank, in iterations.
        temperature: tau of Eq. (3).
    """

    def __init__(
        self, pooling: Pooling = "attention", bank_size: int = 24, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.temperature = temperature
        self.bank = CLSBank(bank_size)

    def forward(self, features: Tensor, cls: Tensor) -> Tensor:
        """Compute L_global, Eq. (3), arXiv:2310.02296v1, and remember the CLS tokens.

        Args:
            features: R (B, C, h, w) of this rank's images.
            cls: s (B, C) of the same images.

        Returns:
            scalar, the mean over the images of this rank

        Deviation: the current batch enters the bank before the loss, so that the other images of
        the batch are negatives too; each image's own token is the positive, once.
        """
        pooled = pool_features(features, cls, self.pooling)
        everyone, first = gather_cls(cls)
        self.bank.insert(everyone)
        own = torch.arange(first, first + cls.shape[0], device=cls.device)
        return info_nce(
            pooled, cls, self.bank.rows(), temperature=self.temperature, target_rows=own
        )
