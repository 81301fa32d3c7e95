"""Vision-Language Adapter (VLA): from visual prototypes to classifier weights.

Section 3.3 and Figure 4b of arXiv:2310.02296v1. The prototypes of a batch (one per present seen
class and one per potential object) are the queries of a transformer decoder, the CLS tokens of the
batch are keys and values; the outputs are trained towards CLIP's text features and serve as
classifiers. Table 5 compares the decoder with an MLP and with the prototypes themselves.

    x = x + SelfAttention(norm(x))            among the present prototypes
    x = x + CrossAttention(norm(x), cls)      the sets are unordered: no positional embedding
    x = x + MLP(norm(x))

Used in training only. Cost: 16 L C^2 + 2 L^2 C + 2 L B C multiply-adds for L prototypes and B
images, little beside the forward pass of a student.
"""

from __future__ import annotations

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

Adapter = Literal["decoder", "mlp", "identity"]


def build_adapter(kind: Adapter, channels: int, heads: int = 8) -> nn.Module:
    """Build one of the three designs of Table 5.

    Every adapter is called as ``adapter(prototypes (L, C), cls (B, C), present (L,))`` and returns
    (L, C).

    Args:
        kind: "decoder" (the paper's), "mlp" or "identity" (the prototypes as they are).
        channels: C.
        heads: attention heads of the decoder; must divide C.

    Raises:
        ValueError: the kind is unknown, or ``heads`` does not divide ``channels``.
    """
    if kind == "decoder":
        return DecoderAdapter(channels, heads)
    if kind == "mlp":
        return MLPAdapter(channels)
    if kind == "identity":
        return IdentityAdapter()
    raise ValueError(f'`kind` must be "decoder", "mlp" or "identity", got {kind!r}')


class Attention(nn.Module):
    """Multi-head attention from one set of rows to another."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, memory: Tensor, keep: Tensor | None = None) -> Tensor:
        """Attend from queries (L, C) to those rows of memory (M, C) that ``keep`` (M,) marks."""
        L, C = queries.shape
        M = memory.shape[0]
        q = self.query(queries).reshape(L, self.heads, C // self.heads).transpose(0, 1)
        k, v = self.key_value(memory).reshape(M, 2, self.heads, C // self.heads).permute(1, 2, 0, 3)
        mask = None if keep is None else keep.expand(L, M)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)
        return cast(Tensor, self.out(out[0].transpose(0, 1).reshape(L, C)))


class DecoderAdapter(nn.Module):
    """One pre-norm transformer decoder layer: width C, GELU MLP of 4C, no dropout.

    Args:
        channels: C.
        heads: attention heads; must divide C.
    """

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"`heads` must divide the {channels} channels, got {heads}; choose a divisor"
            )
        self.norm_self = nn.LayerNorm(channels)
        self.attend_self = Attention(channels, heads)
        self.norm_cross = nn.LayerNorm(channels)
        self.attend_cross = Attention(channels, heads)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, prototypes: Tensor, cls: Tensor, present: Tensor) -> Tensor:
        """Adapt prototypes (L, C), given CLS tokens (B, C); absent rows are not attended."""
        keep = present | ~present.any()  # a step without any prototype stays finite
        x = prototypes
        normed = self.norm_self(x)
        x = x + self.attend_self(normed, normed, keep)
        x = x + self.attend_cross(self.norm_cross(x), cls)
        return cast(Tensor, x + self.mlp(self.norm_mlp(x)))


class MLPAdapter(nn.Module):
    """Linear, ReLU, linear on each prototype alone (Table 5, "MLP")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        )

    def forward(self, prototypes: Tensor, cls: Tensor, present: Tensor) -> Tensor:
        """Map prototypes (L, C) to (L, C); the CLS tokens are not used."""
        return cast(Tensor, self.mlp(prototypes))


class IdentityAdapter(nn.Module):
    """The prototypes themselves (Table 5, "Original features")."""

    def forward(self, prototypes: Tensor, cls: Tensor, present: Tensor) -> Tensor:
        """Return the prototypes (L, C) unchanged."""
        return prototypes
