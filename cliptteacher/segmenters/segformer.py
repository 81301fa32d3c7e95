"""SegFormer: the student of most of the paper's experiments (section 4.2, arXiv:2310.02296v1).

    images in [0, 1] -> ImageNet normalisation
      -> four stages; each: overlapping patch embedding, then blocks of
         x = x + attention(norm(x)), keys and values read from a reduced grid
         x = x + mix_ffn(norm(x)), a 3x3 depthwise convolution carries position
      -> head: every level to D channels, BN, ReLU, bilinear to 1/4; fuse, BN, ReLU, 1x1 to C

Inside a stage a feature map is a grid (B, H, W, C): linear layers and norms read its last axis, and
its permuted view is a channels-last map, so that convolutions need no copy. Every other map is
(B, C, H, W). With N = H*W tokens and reduction r, attention costs N^2 / r^2.

The architecture is that of arXiv:2105.15203, with its parameter shapes: published weights load
(see `weights.py`). Its head has no BN and ReLU on the levels; the paper's toolbox has them, and so
do we unless published weights of a head are loaded (`head_norms`). The head computes its function
in a cheaper order: fusing commutes with the bilinear interpolation, hence is done before it, on the
small maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .student import Student, drop_path_rates, run_stages


@dataclass(frozen=True, kw_only=True)
class SegformerConfig:
    """Describe a SegFormer; the four-tuples run from the finest stage to the coarsest.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        heads: Attention heads of each stage; each divides its entry of `dims`.
        reductions: Stride at which keys and values are sampled from the grid of each stage.
        mlp_ratio: Hidden width of the Mix-FFN over the width of its stage.
        decoder_channels: Width D of the head.
        head_norms: BatchNorm and ReLU on every level of the head, as in the toolbox of the paper;
            False: none, as in the original release.
        drop_path: Probability of skipping a branch of the last block, rising linearly from 0.
        dropout: Probability of dropping a whole channel before the last layer of the head.
        layer_norm_eps: Epsilon of all layer norms.

    Assumption: D is 256 for every size, as in the toolbox of the paper; the models published for
    ADE20K have 768 from B2 on.
    """

    dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)
    mlp_ratio: int = 4
    decoder_channels: int = 256
    head_norms: bool = True
    drop_path: float = 0.1
    dropout: float = 0.1
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("dims", "depths", "heads", "reductions"):
            if len(getattr(self, field)) != 4:
                raise ValueError(
                    f"`{field}` must have 4 entries, one a stage, got {getattr(self, field)}"
                )
        if any(dim % heads for dim, heads in zip(self.dims, self.heads, strict=True)):
            raise ValueError(
                f"`heads` must divide `dims` stage by stage, got {self.heads} and {self.dims}"
            )


SEGFORMER_CONFIGS = {
    "segformer_nano": SegformerConfig(
        dims=(24, 48, 96, 128), heads=(1, 2, 4, 4), mlp_ratio=2, decoder_channels=96
    ),
    "segformer_b0": SegformerConfig(dims=(32, 64, 160, 256)),
    "segformer_b1": SegformerConfig(),
    "segformer_b2": SegformerConfig(depths=(3, 4, 6, 3)),
    "segformer_b3": SegformerConfig(depths=(3, 4, 18, 3)),
    "segformer_b4": SegformerConfig(depths=(3, 8, 27, 3)),
    "segformer_b5": SegformerConfig(depths=(3, 6, 40, 3)),
}


class PatchEmbedding(nn.Module):
    """Cut a map into overlapping patches and embed each: (B, C, H, W) -> (B, H/s, W/s, D)."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        grid: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return grid


class EfficientAttention(nn.Module):
    """Attend from every token to the tokens of a grid `reduction` times coarser."""

    def __init__(self, dim: int, heads: int, reduction: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, grid: Tensor) -> Tensor:
        query = self._split_heads(self.q(grid))  # (B, heads, N, C / heads)
        key, value = self.kv(self._reduce(grid)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            query, self._split_heads(key), self._split_heads(value)
        )
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(grid.shape))
        return projected

    def _reduce(self, grid: Tensor) -> Tensor:
        if self.reduction == 1:
            return grid
        _, H, W, _ = grid.shape
        if min(H, W) < self.reduction:
            # A grid smaller than one kernel still gives one token; the rest of it is zeros.
            right, bottom = max(0, self.reduction - W), max(0, self.reduction - H)
            grid = F.pad(grid, (0, 0, 0, right, 0, bottom))
        reduced: Tensor = self.norm(self.sr(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return reduced

    def _split_heads(self, grid: Tensor) -> Tensor:
        B, H, W, C = grid.shape
        return grid.reshape(B, H * W, self.heads, C // self.heads).transpose(1, 2)


class MixFFN(nn.Module):
    """Mix channels token by token, and neighbours by a depthwise convolution in the hidden layer.

    The zero padding of the convolution tells tokens where they are: there is no positional table,
    hence no preferred image size.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, grid: Tensor) -> Tensor:
        hidden = self.dwconv(self.fc1(grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed: Tensor = self.fc2(F.gelu(hidden))
        return mixed


class DropPath(nn.Module):
    """Zero a residual branch for whole images with probability `p`; scale the others by 1/(1-p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return branch
        kept: Tensor = F.dropout(branch.new_ones(branch.shape[0], 1, 1, 1), self.p)
        return branch * kept


class Block(nn.Module):
    """Add efficient attention, then a Mix-FFN, both pre-norm: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, dim: int, heads: int, reduction: int, config: SegformerConfig, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = EfficientAttention(dim, heads, reduction, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MixFFN(dim, config.mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, grid: Tensor) -> Tensor:
        grid = grid + self.drop_path(self.attn(self.norm1(grid)))
        mixed: Tensor = grid + self.drop_path(self.mlp(self.norm2(grid)))
        return mixed


class Stage(nn.Module):
    """Embed a map and run the blocks of one resolution: (B, C, H, W) -> (B, dim, H/s, W/s)."""

    def __init__(
        self, index: int, in_channels: int, config: SegformerConfig, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        dim, eps = config.dims[index], config.layer_norm_eps
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.patch_embed = PatchEmbedding(in_channels, dim, kernel, stride, eps)
        self.blocks = nn.Sequential(
            *(
                Block(dim, config.heads[index], config.reductions[index], config, drop_path)
                for drop_path in drop_paths
            )
        )
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        grid: Tensor = self.norm(self.blocks(self.patch_embed(x)))
        return grid.permute(0, 3, 1, 2)


class MixTransformer(nn.Module):
    """Encode normalised images as maps of stride 4, 8, 16 and 32 (the MiT of the literature)."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        stages: list[Stage] = []
        for index, rates in enumerate(drop_path_rates(config.drop_path, config.depths)):
            in_channels = 3 if index == 0 else config.dims[index - 1]
            stages.append(Stage(index, in_channels, config, rates))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        return run_stages(self.stages, images)


class SegformerHead(nn.Module):
    """Fuse the four maps at the resolution of the finest and project them to `channels`.

    Published order: `linears` (one a level, with `norms` and ReLU behind them if there are any) ->
    upsample -> concatenate, coarsest first -> `fuse`. A 1x1 convolution of a concatenation is a sum
    of one 1x1 convolution a level, which commutes with the interpolation, whose weights sum to one;
    without norms it merges with the linear layer of the level into one matrix.
    """

    def __init__(self, config: SegformerConfig, channels: int) -> None:
        super().__init__()
        D = config.decoder_channels
        with_norms = config.head_norms
        self.linears = nn.ModuleList(nn.Linear(dim, D, bias=not with_norms) for dim in config.dims)
        self.norms = nn.ModuleList(nn.BatchNorm2d(D) for _ in config.dims if with_norms)
        self.fuse = nn.Linear(len(config.dims) * D, D, bias=False)
        self.norm = nn.BatchNorm2d(D)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Linear(D, channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fused = self._fuse_level(0, maps[0])
        for level in range(1, len(maps)):
            small = self._fuse_level(level, maps[level])
            fused = fused + F.interpolate(small, size=maps[0].shape[2:], mode="bilinear")
        fused = self.dropout(F.relu(self.norm(fused)))
        features: Tensor = self.classifier(fused.permute(0, 2, 3, 1))
        return features.permute(0, 3, 1, 2)

    def _fuse_level(self, level: int, x: Tensor) -> Tensor:
        linear = self.linears[level]
        assert isinstance(linear, nn.Linear)
        coarsest_first = self.fuse.weight.chunk(len(self.linears), dim=1)
        fuse = coarsest_first[len(self.linears) - 1 - level]  # (D, D)
        grid = x.permute(0, 2, 3, 1)
        if self.norms:
            levels = self.norms[level](linear(grid).permute(0, 3, 1, 2))
            grid = F.linear(F.relu(levels).permute(0, 2, 3, 1), fuse)
        else:
            grid = F.linear(grid, fuse @ linear.weight, fuse @ linear.bias)
        return grid.permute(0, 3, 1, 2)


class Segformer(Student):
    """Turn images into dense features of the joint image-text space.

    Args:
        config: The architecture; `SEGFORMER_CONFIGS` holds the named ones.
        channels: C, the width of the joint space.

    `forward` takes images (B, 3, H, W) in [0, 1], of any size, and returns features (B, C, H/4,
    W/4), rounded up. `backbone` and `head` separate the parameters for the optimiser; `stride`
    is 4.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If the images do not have shape (B, 3, H, W), or `channels` is not positive.

    >>> import torch
    >>> model = Segformer(SEGFORMER_CONFIGS["segformer_nano"], channels=16)
    >>> model(torch.rand(2, 3, 64, 50)).shape
    torch.Size([2, 16, 16, 13])
    """

    stride = 4

    def __init__(self, config: SegformerConfig, channels: int) -> None:
        super().__init__(channels)
        self.config = config
        self.backbone = MixTransformer(config)
        self.head = SegformerHead(config, channels)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.backbone(self.normalize(images)))
        return features


def _initialize(module: nn.Module) -> None:
    """Draw the initial weights of one layer; norms keep their ones and zeros."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2 * module.groups / fan_out) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
