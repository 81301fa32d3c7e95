"""CLIP, the frozen teacher: a vision transformer and a text transformer with one joint space.

Section 3.1 of arXiv:2310.02296v1 uses CLIP ViT-B/16 (Radford et al., 2021). Parameter names are
OpenAI's own, so their weights load without renaming; every size is read from the weights.

One pass over an image yields three views of the last block:

1. patchify -> add the positional table, resized to the grid -> transformer
2. ``ln_post`` on *all* tokens, not on the CLS token alone        -> ``final``  (width-dimensional)
3. the projection into the joint space, again on all tokens       -> ``cls`` and ``dense``

Only ``cls`` was trained by CLIP; ``dense`` is what the Pixel Learning Module clusters.

Cost of ``encode_image`` per image: 12 * layers * N * width^2 + 2 * layers * N^2 * width
multiply-adds for N tokens (ViT-B/16 at 512 x 512: N = 1025, 106 G).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["quick_gelu", "gelu"]
_ACTIVATIONS = ("quick_gelu", "gelu")
_MAX_BLOCKS = 1000  # the largest published transformers have 56

# The weights whose shapes give every size, and how many dimensions each has.
_SIZED_BY = {
    "visual.positional_embedding": 2,
    "visual.conv1.weight": 4,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
}


class ImageFeatures(NamedTuple):
    """What one pass of the image encoder yields; ``h * w`` patches, ``C`` joint width."""

    cls: Tensor  # (B, C) the CLS token in the joint space, not normalised
    dense: Tensor  # (B, C, h, w) every patch token in the joint space, not normalised
    final: Tensor  # (B, width, h, w) every patch token after ln_post, before the projection


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of a CLIP; the defaults are those of ViT-B/16.

    Heads that are None follow CLIP's rule, one for every 64 channels.
    """

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    activation: Activation = "quick_gelu"
    vision_heads: int | None = None
    text_heads: int | None = None

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}"
            )
        for tower, heads in zip(("vision", "text"), self.heads, strict=True):
            width = getattr(self, f"{tower}_width")
            if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
                raise ValueError(
                    f"`{tower}_width` must be a multiple of its {heads!r} attention heads, "
                    f"got {width}; give the heads that the model was trained with"
                )

    @property
    def heads(self) -> tuple[int, int]:
        """Attention heads of the vision and the text transformer."""
        vision, text = self.vision_heads, self.text_heads
        return (
            max(1, self.vision_width // 64) if vision is None else vision,
            max(1, self.text_width // 64) if text is None else text,
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        activation: Activation = "quick_gelu",
        vision_heads: int | None = None,
        text_heads: int | None = None,
    ) -> CLIPConfig:
        """Read every size from weights with OpenAI's names.

        Args:
            state_dict: names and tensors of a CLIP with a vision transformer.
            activation: not visible in the weights. OpenAI's CLIPs use QuickGELU, most CLIPs that
                were trained with open_clip use GELU.
            vision_heads, text_heads: not visible either; None for one per 64 channels.

        Raises:
            ValueError: a name that gives a size is missing or has another number of dimensions.
        """
        for name, dimensions in _SIZED_BY.items():
            if name not in state_dict:
                raise ValueError(
                    f"the weights of a CLIP with a vision transformer must hold {name!r}, got "
                    f"{len(state_dict)} other names; give OpenAI, open_clip or Hugging Face weights"
                )
            shape = tuple(state_dict[name].shape)
            if len(shape) != dimensions or 0 in shape:
                raise ValueError(
                    f"{name!r} must have {dimensions} dimensions, none of them empty, got {shape}"
                )
        patches = max(1, state_dict["visual.positional_embedding"].shape[0] - 1)
        vision_width, _, _, patch_size = state_dict["visual.conv1.weight"].shape
        context_length, text_width = state_dict["positional_embedding"].shape
        return cls(
            embed_dim=state_dict["text_projection"].shape[1],
            image_size=patch_size * round(patches**0.5),
            patch_size=patch_size,
            vision_width=vision_width,
            vision_layers=_count_blocks(state_dict, "visual.transformer.resblocks."),
            context_length=context_length,
            vocab_size=state_dict["token_embedding.weight"].shape[0],
            text_width=text_width,
            text_layers=_count_blocks(state_dict, "transformer.resblocks."),
            activation=activation,
            vision_heads=None if vision_heads == vision_width // 64 else vision_heads,
            text_heads=None if text_heads == text_width // 64 else text_heads,
        )


def _count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    blocks = {name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)}
    if len(blocks) > _MAX_BLOCKS:
        raise ValueError(f"a CLIP must have at most {_MAX_BLOCKS} blocks, got {len(blocks)}")
    return len(blocks)


_LARGE = CLIPConfig(
    embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, text_width=768
)
# OpenAI's four; all were trained with QuickGELU and heads of 64 channels.
OPENAI_SIZES = {
    "ViT-B/16": CLIPConfig(),
    "ViT-B/32": CLIPConfig(patch_size=32),
    "ViT-L/14": _LARGE,
    "ViT-L/14@336px": replace(_LARGE, image_size=336),
}


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.reshape(B, N, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).reshape(B, N, width)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: Activation, causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU() if activation == "quick_gelu" else nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(
        self, width: int, layers: int, heads: int, activation: Activation, causal: bool
    ) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, activation, causal) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.resblocks(x))


class VisionTransformer(nn.Module):
    """The image encoder; works at any size that is a multiple of the patch."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.patch_size = patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        tokens = (config.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.heads[0], config.activation, False
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """Encode normalised pixels (B, 3, H, W)."""
        patches = self.conv1(pixels)  # (B, width, h, w)
        B, width, h, w = patches.shape
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, width)
        cls = self.class_embedding.to(tokens.dtype).expand(B, 1, width)
        positions = resize_positions(self.positional_embedding, (h, w)).to(tokens.dtype)
        x = self.ln_pre(torch.cat((cls, tokens), dim=1) + positions)
        x = self.ln_post(self.transformer(x))  # (B, 1 + N, width)
        joint = x @ self.proj.to(x.dtype)  # (B, 1 + N, C)
        return ImageFeatures(
            cls=joint[:, 0], dense=_to_map(joint[:, 1:], h, w), final=_to_map(x[:, 1:], h, w)
        )


def _to_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """Turn tokens (B, N, C) into a map (B, C, h, w)."""
    B, _, C = tokens.shape
    return tokens.transpose(1, 2).reshape(B, C, h, w)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a positional table to another patch grid, bicubically; the CLS row stays.

    Args:
        table: (1 + n * n, width), the CLS row first, then a square grid in row-major order.
        grid: (h, w) of the patches to come.

    Returns:
        (1 + h * w, width)
    """
    n = round((table.shape[0] - 1) ** 0.5)
    h, w = grid
    if (h, w) == (n, n):
        return table
    square = table[1:].reshape(1, n, n, table.shape[1]).permute(0, 3, 1, 2)
    square = square.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(square, size=(h, w), mode="bicubic", align_corners=False)
    rows = resized[0].flatten(1).T.to(table.dtype)  # (h * w, width)
    return torch.cat((table[:1], rows))


class CLIP(nn.Module):
    """CLIP with a vision transformer; parameter names are OpenAI's own.

    Args:
        config: the sizes. Weights start as random numbers of CLIP's published initialisation.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(
            config.text_width, config.text_layers, config.heads[1], config.activation, True
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(
            torch.empty(config.context_length, config.text_width)
        )
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(torch.empty(config.text_width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        self.register_buffer("image_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(3, 1, 1), persistent=False)
        self._initialise()

    @property
    def embed_dim(self) -> int:
        """C, the width of the joint space."""
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a patch."""
        return self.config.patch_size

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Encode images into one CLS token and a map of dense tokens each, in one pass.

        Args:
            images: (B, 3, H, W) float in [0, 1]; H and W multiples of the patch size. CLIP's own
                mean and standard deviation are applied here.

        Returns:
            ``cls`` (B, C), ``dense`` (B, C, h, w), ``final`` (B, width, h, w); not normalised.

        Raises:
            ValueError: ``images`` has another shape, or a side is no multiple of the patch.
            TypeError: ``images`` is not floating point.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"`images` must be float in [0, 1], got {images.dtype}; divide uint8 by 255 first"
            )
        H, W = images.shape[-2:]
        if H % self.patch_size or W % self.patch_size or not H or not W:
            raise ValueError(
                f"the sides of `images` must be multiples of the patch size {self.patch_size}, "
                f"got {H} x {W}; resize or crop the images"
            )
        pixels = (images - self.image_mean) / self.image_std
        return cast(ImageFeatures, self.visual(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Encode token ids into the joint space.

        Attention is causal and the feature is read at the end-of-text token, so columns behind the
        last end of text may be cut off without changing the result.

        Args:
            ids: (n, T) int64 from ``tokenize``, T at most the context length.

        Returns:
            (n, C), not normalised.

        Raises:
            ValueError: ``ids`` is not a matrix or longer than the context.
        """
        if ids.ndim != 2 or ids.shape[1] > self.config.context_length:
            raise ValueError(
                f"`ids` must have shape (n, T) with T at most {self.config.context_length}, "
                f"got {tuple(ids.shape)}; use `tokenize`"
            )
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        end = ids.argmax(dim=1)  # the end-of-text token has the largest id of all
        rows = torch.arange(ids.shape[0], device=ids.device)
        return cast(Tensor, x[rows, end] @ self.text_projection)

    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        visual, width = self.visual, self.config.vision_width
        for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
            nn.init.normal_(parameter, std=width**-0.5)
        for transformer in (visual.transformer, self.transformer):
            for block in transformer.resblocks:
                _initialise_block(cast(ResidualAttentionBlock, block), len(transformer.resblocks))


def _initialise_block(block: ResidualAttentionBlock, layers: int) -> None:
    width = block.ln_1.normalized_shape[0]
    residual_std = width**-0.5 * (2 * layers) ** -0.5  # keeps the sum over 2 * layers bounded
    nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
    for name, std in (("c_fc", (2 * width) ** -0.5), ("c_proj", residual_std)):
        nn.init.normal_(cast(nn.Linear, block.mlp.get_submodule(name)).weight, std=std)
    nn.init.zeros_(block.attn.out_proj.bias)
