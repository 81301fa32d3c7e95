"""Global Learning Module (GLM): dense features aligned with CLIP's CLS token.

Section 3.2 of arXiv:2310.02296v1. Of all tokens of CLIP's image encoder only the CLS token was
trained against text. It is the query, the student's dense features are keys and values:

    W     = softmax_N(s . R / sqrt(C))     Eq. (1), no learned query, key or value
    s_hat = W . R^T                        Eq. (2)
    loss  = InfoNCE(s_hat, s, bank)        Eq. (3), tau = 0.07

The bank holds the CLS tokens of the last n = 24 iterations, which serve as negatives. The module
has no parameters. Beyond the paper, ``split_windows`` cuts images into windows with a CLS token
each, because the token of an image describes its small objects poorly.

Cost: 2 B N C multiply-adds for the pooling, 24 B^2 C for the loss.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import gather_rows
from .losses import full_precision, info_nce

Pooling = Literal["attention", "mean", "max"]
Query = Literal["raw", "unit"]


def attention_weights(features: Tensor, cls: Tensor, query: Query = "raw") -> Tensor:
    """Compute the attention of the CLS token over all positions, Eq. (1), arXiv:2310.02296v1.

    Args:
        features: R (B, C, h, w), not normalised.
        cls: s (B, C).
        query: "raw" takes s as it is, as the paper says; "unit" at unit length, which spreads the
            attention more evenly.

    Returns:
        W (B, h, w) in full precision (float32, or float64 for float64), each map sums to 1.

    Raises:
        ValueError: ``query`` is unknown.
    """
    B, C, h, w = features.shape
    if query not in ("raw", "unit"):
        raise ValueError(f'`query` must be "raw" or "unit", got {query!r}')
    s = full_precision(cls)
    s = F.normalize(s, dim=1) if query == "unit" else s
    scores = torch.einsum("bc,bchw->bhw", s.to(features.dtype), features)
    scores = full_precision(scores) / C**0.5
    weights: Tensor = scores.flatten(1).softmax(dim=1)
    return weights.reshape(B, h, w)


def pool_features(
    features: Tensor, cls: Tensor, pooling: Pooling = "attention", query: Query = "raw"
) -> Tensor:
    """Predict the CLS token from dense features, Eq. (1)-(2), arXiv:2310.02296v1.

    Args:
        features: R (B, C, h, w).
        cls: s (B, C).
        pooling: "attention" is the paper's; "mean" and "max" are the variants of Table 4.
        query: of the attention, see ``attention_weights``.

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
        weights = attention_weights(features, cls, query).to(features.dtype)
        return full_precision(torch.einsum("bhw,bchw->bc", weights, features))
    raise ValueError(f'`pooling` must be "attention", "mean" or "max", got {pooling!r}')


def split_windows(maps: Tensor, n: int) -> Tensor:
    """Cut every map into n x n windows, row by row; n = 1 returns the maps.

    Args:
        maps: images or features (B, C, H, W).
        n: windows along one side.

    Returns:
        (B * n * n, C, H / n, W / n), all windows of the first image, then of the second, ...

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


class CLSBank(nn.Module):
    """The CLS tokens of the last ``size`` iterations, the current one included.

    Two buffers, so that ``state_dict()`` of any module around it holds the bank. Every rank inserts
    the same global batch, so the bank is the same on every rank. The first iteration, or the first
    one after ``load_state_dict``, fixes the number of rows: ``size`` batches. A later batch that is
    larger enlarges it, a smaller one (the last of an epoch) displaces as many rows as it has.

    Args:
        size: n, iterations to keep; 1 (or 0) keeps the current batch alone.

    Raises:
        ValueError: ``size`` is negative.
    """

    tokens: Tensor  # (M, C), the newest first
    filled: Tensor  # scalar int64, how many rows of ``tokens`` hold a token

    def __init__(self, size: int = 24) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"the size of the CLS bank must be at least 0, got {size}")
        self.size = max(1, size)
        self.register_buffer("tokens", torch.zeros(0, 0))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._rows_fixed = False

    @torch.no_grad()
    def insert(self, cls: Tensor, parts: int = 1) -> None:
        """Insert the CLS tokens of one iteration, or of a part of it; a full bank drops the oldest.

        Args:
            cls: (B, C).
            parts: parts that make one iteration (gradient accumulation).
        """
        cls = full_precision(cls)
        rows = self.size * parts * len(cls)
        if not self._rows_fixed or rows > len(self.tokens):
            held = self.tokens if len(self.tokens) else cls[:0]
            self.tokens = torch.cat((held, cls.new_zeros(rows, cls.shape[1])))[:rows].clone()
            self._rows_fixed = True
        rows = len(self.tokens)
        self.tokens.copy_(torch.cat((cls, self.tokens))[:rows])
        self.filled.add_(len(cls)).clamp_(max=rows)

    def valid(self) -> Tensor:
        """Mark the rows of ``tokens`` that hold a token, (M,) bool."""
        return torch.arange(len(self.tokens), device=self.tokens.device) < self.filled

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state.get(f"{prefix}tokens")
        if stored is not None:  # another size or batch has another number of rows
            self.tokens = torch.zeros_like(stored, device=self.tokens.device)
            self._rows_fixed = False
        super()._load_from_state_dict(state, prefix, *args)


class GlobalLearningModule(nn.Module):
    """Align the pooled dense features of a student with CLIP's CLS tokens.

    Args:
        pooling: how Eq. (1)-(2) pool; see ``pool_features``.
        bank_size: n of the CLS bank, in iterations.
        temperature: tau of Eq. (3).
        query: s of Eq. (1); see ``attention_weights``.
    """

    def __init__(
        self,
        pooling: Pooling = "attention",
        bank_size: int = 24,
        temperature: float = 0.07,
        query: Query = "raw",
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.query: Query = query
        self.temperature = temperature
        self.bank = CLSBank(bank_size)

    def forward(self, features: Tensor, cls: Tensor, parts: int = 1) -> Tensor:
        """Compute L_global, Eq. (3), arXiv:2310.02296v1, and insert the CLS tokens into the bank.

        Args:
            features: R (B, C, h, w) of this rank's images.
            cls: s (B, C) of the same images.
            parts: calls that make one iteration (gradient accumulation).

        Returns:
            scalar, the mean over the images of this rank

        Every call inserts, in eval mode too.

        Deviation: the current batch enters the bank before the loss, so that the other images of
        the batch are negatives too; each image's own token is the positive, once.
        """
        pooled = pool_features(features, cls, self.pooling, self.query)
        everyone, first = gather_rows(cls)
        self.bank.insert(everyone, parts)
        return info_nce(
            pooled,
            cls,
            self.bank.tokens,
            temperature=self.temperature,
            target_rows=torch.arange(first, first + cls.shape[0], device=cls.device),
            bank_valid=self.bank.valid(),
        )
