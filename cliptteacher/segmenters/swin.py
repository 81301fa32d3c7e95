"""Swin + UPerNet: the largest student of the paper (Table 1 of arXiv:2310.02296v1).

    images in [0, 1] -> ImageNet normalisation, padded to whole patches of 4 x 4
      -> four stages; each: blocks of
         x = x + attention(norm(x)) inside windows of 7 x 7, shifted by 3 in every second block
         x = x + mlp(norm(x))
         and between stages 2 x 2 tokens merge into one of twice the width; a norm per output
      -> UPerNet head: pyramid pooling of the coarsest map, top-down sums, 3x3 fusion at 1/4, 1x1
      -> in training, if asked for: a small auxiliary head on the third map

The backbone is torchvision's Swin (arXiv:2103.14030) with `swin_attention.py` in its blocks; grids
are padded to whole windows, so every image size will do. Attention costs 49 N for N tokens. Most of
the arithmetic lies in the head, whose last 3x3 convolution reads four maps of 512 channels at 1/4
(arXiv:1807.10221). Published weights: `swin_weights.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .student import Student

_PATCH = 4
_POOL_SIZES = (1, 2, 3, 6)


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Describe a Swin with its UPerNet head; the four-tuples run from finest to coarsest stage.

    Args:
        dim: Channels of the first stage; every further stage has twice as many.
        depths: Blocks of each stage.
        heads: Attention heads of each stage; each divides the channels of its stage.
        window: Side of the attention windows in tokens.
        mlp_ratio: Hidden width of the MLP over the width of its stage.
        drop_path: Probability of skipping a branch of the last block, rising linearly from 0.
        head_channels: Width D of the UPerNet head; the auxiliary head has half of it.
        dropout: Probability of dropping a whole channel before the last layer of either head.
        auxiliary: Whether there is an auxiliary head, see `Swin.forward_with_auxiliary`.

    Assumption: `drop_path` is 0.3 for every published size, as in the toolbox of the paper; the
    text of arXiv:2103.14030 says 0.2 for segmentation.
    """

    dim: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    drop_path: float = 0.3
    head_channels: int = 512
    dropout: float = 0.1
    auxiliary: bool = False

    def __post_init__(self) -> None:
        for field in ("depths", "heads"):
            if len(getattr(self, field)) != 4 or min(getattr(self, field)) < 1:
                raise ValueError(
                    f"`{field}` must have 4 positive entries, one a stage, got "
                    f"{getattr(self, field)}"
                )
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise ValueError(
                f"`heads` must divide the channels stage by stage, got {self.heads} and {self.dims}"
            )
        if self.window < 2:
            raise ValueError(f"`window` must be at least 2 tokens, got {self.window}")
        if self.head_channels < 2:
            raise ValueError(f"`head_channels` must be at least 2, got {self.head_channels}")

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Channels of each stage."""
        return self.dim, 2 * self.dim, 4 * self.dim, 8 * self.dim


SWIN_CONFIGS = {
    "swin_nano": SwinConfig(
        dim=16,
        depths=(2, 2, 2, 1),  # at 128 pixels the last grid is one window: nothing to shift
        heads=(1, 2, 4, 8),
        window=4,
        mlp_ratio=2.0,
        drop_path=0.1,
        head_channels=48,
    ),
    "swin_t": SwinConfig(),
    "swin_s": SwinConfig(depths=(2, 2, 18, 2)),
    "swin_b": SwinConfig(dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)),
}


class SwinBackbone(nn.Module):
    """Encode normalised images as maps of stride 4, 8, 16 and 32.

    `features` is that of torchvision, under its names: patch embedding, then blocks and merging by
    turns. `norms` holds a layer norm per output; the last is the final norm of the ImageNet model.

    Deviation: the toolbox starts the last norm afresh; here it comes with the published weights,
    which never saw their last stage without it.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock

        from .swin_attention import WindowAttention  # torchvision is slow to import

        swin = SwinTransformer(
            patch_size=[_PATCH, _PATCH],
            embed_dim=config.dim,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=[config.window, config.window],
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=config.drop_path,
            num_classes=1,  # its classifier is not used
            block=partial(SwinTransformerBlock, attn_layer=WindowAttention),
        )
        self.features: nn.Sequential = swin.features
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in config.dims)

    def forward(self, images: Tensor) -> list[Tensor]:
        H, W = images.shape[2:]
        # Zeros after normalisation, right and below: a map has a quarter of the side, rounded up.
        grid = self.features[0](F.pad(images, (0, -W % _PATCH, 0, -H % _PATCH)))  # (B, h, w, C)
        maps: list[Tensor] = []
        for stage, norm in enumerate(self.norms):
            if stage > 0:
                grid = self.features[2 * stage](grid)  # merge 2 x 2 tokens
            grid = self.features[2 * stage + 1](grid)
            maps.append(norm(grid).permute(0, 3, 1, 2))
        return maps


class UPerNetHead(nn.Module):
    """Merge four maps from coarse to fine and project them to `channels` at the finest size.

    With P = pyramid pooling of the coarsest map m_4 and up = bilinear enlargement:

        P = conv3([m_4, up(conv1(pool_s(m_4))) for s in 1, 2, 3, 6])
        y_4 = P;  y_i = conv1(m_i) + up(y_(i+1))
        features = conv1(conv3([conv3(y_1), up(conv3(y_2)), up(conv3(y_3)), up(y_4)]))

    where every convolution but the last has a batch norm and a ReLU.
    """

    def __init__(self, dims: Sequence[int], width: int, channels: int, dropout: float) -> None:
        super().__init__()
        finer = dims[:-1]
        self.pooled = nn.ModuleList(_convolution(dims[-1], width, 1) for _ in _POOL_SIZES)
        self.bottleneck = _convolution(dims[-1] + len(_POOL_SIZES) * width, width, 3)
        self.laterals = nn.ModuleList(_convolution(dim, width, 1) for dim in finer)
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in finer)
        self.fuse = _convolution(len(dims) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps from fine to coarse, (B, C_i, H_i, W_i), into features (B, C, H_1, W_1)."""
        merged = self._pool_pyramid(maps[-1])
        outputs = [merged]
        for level in reversed(range(len(self.laterals))):
            merged = self.laterals[level](maps[level]) + _enlarge(merged, maps[level])
            outputs.append(self.smooth[level](merged))
        finest_first = [_enlarge(output, maps[0]) for output in reversed(outputs)]
        fused = self.fuse(torch.cat(finest_first, dim=1))
        features: Tensor = self.classifier(self.dropout(fused))
        return features

    def _pool_pyramid(self, x: Tensor) -> Tensor:
        self._check_batch(x)
        pyramid = [x]
        for size, layer in zip(_POOL_SIZES, self.pooled, strict=True):
            pyramid.append(_enlarge(layer(pool_to_grid(x, size)), x))
        pooled: Tensor = self.bottleneck(torch.cat(pyramid, dim=1))
        return pooled

    def _check_batch(self, x: Tensor) -> None:
        """Refuse a single image in training: pooled to 1 x 1 it has no variance to divide by."""
        norm = self.pooled[0].get_submodule("1")
        if norm.training and isinstance(norm, nn.BatchNorm2d) and x.shape[0] == 1:
            raise ValueError(
                "UPerNet must train on at least 2 images per process, got 1; raise the batch "
                "size, convert the model to SyncBatchNorm, or call .eval()"
            )


def pool_to_grid(x: Tensor, size: int) -> Tensor:
    """Average a map over a grid of cells, as ``F.adaptive_avg_pool2d`` does.

    A product with a matrix of averages along each axis: ONNX has no adaptive pooling for a size
    that is known only when the program runs.

    Args:
        x: (B, C, H, W).
        size: cells along either side; where the map is smaller, they overlap.

    Returns:
        (B, C, size, size).

    >>> pool_to_grid(torch.arange(6.0).view(1, 1, 2, 3), 1).item()
    2.5
    """
    rows, columns = (_averages(side, size, x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _averages(side: int, size: int, like: Tensor) -> Tensor:
    """Weights (size, side): row i is the mean of i side / size up to (i + 1) side / size."""
    cells = torch.arange(size, device=like.device)[:, None]
    first = cells * side // size
    end = ((cells + 1) * side + size - 1) // size
    positions = torch.arange(side, device=like.device)
    inside = (positions >= first) & (positions < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


class FCNHead(nn.Sequential):
    """Project one map to `channels` after one 3x3 convolution; used in training only."""

    def __init__(self, dim: int, width: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.convolution = _convolution(dim, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, channels, 1)


class Swin(Student):
    """Turn images into dense features of the joint image-text space.

    Args:
        config: The architecture; `SWIN_CONFIGS` holds the named ones.
        channels: C, the width of the joint space.

    `forward` takes images (B, 3, H, W) in [0, 1], of any size, and returns features (B, C, H/4,
    W/4), rounded up. `backbone`, `head` and `auxiliary` (None unless asked for) separate the
    parameters for the optimiser; `stride` is 4. State dicts with an auxiliary head also load into
    a model without one.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If the images do not have shape (B, 3, H, W), are a single one in training, or
            `channels` is not positive.

    >>> model = Swin(SWIN_CONFIGS["swin_nano"], channels=16)
    >>> model(torch.rand(2, 3, 64, 50)).shape
    torch.Size([2, 16, 16, 13])
    """

    stride = 4

    def __init__(self, config: SwinConfig, channels: int) -> None:
        super().__init__(channels)
        self.config = config
        self.backbone = SwinBackbone(config)  # initialised by torchvision as in the Swin paper
        self.head = UPerNetHead(config.dims, config.head_channels, channels, config.dropout)
        self.head.apply(_initialize)
        self.auxiliary: FCNHead | None = None
        if config.auxiliary:
            self.auxiliary = FCNHead(
                config.dims[2], config.head_channels // 2, channels, config.dropout
            )
            self.auxiliary.apply(_initialize)

    def forward(self, images: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the features, or those of both heads; see `forward_with_auxiliary`."""
        maps: list[Tensor] = self.backbone(self.normalize(images))
        features: Tensor = self.head(maps)
        if not auxiliary:
            return features
        if self.auxiliary is None:
            raise RuntimeError(
                "the model must have an auxiliary head, got none; build it with auxiliary=True"
            )
        return features, self.auxiliary(maps[2])

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features and those of the auxiliary head, for a second loss in training.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            The features (B, C, H/4, W/4) of `forward`, and the auxiliary ones (B, C, H/16, W/16).

        Raises:
            RuntimeError: If the model was built without `auxiliary=True`.
        """
        features, auxiliary = self(images, auxiliary=True)  # so that a compiled `forward` runs
        return features, auxiliary

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A student trained with an auxiliary head is used without it.
        if self.auxiliary is None:
            for key in [key for key in state if key.startswith(f"{prefix}auxiliary.")]:
                del state[key]
        super()._load_from_state_dict(state, prefix, *rest)


def _convolution(before: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _initialize(module: nn.Module) -> None:
    """Draw the initial weights of a head; norms keep their ones and zeros."""
    if isinstance(module, nn.Conv2d):
        if module.bias is None:  # a batch norm follows
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
