"""SegNeXt: the convolutional student of the paper (section 4.2, arXiv:2310.02296v1).

    images in [0, 1] -> ImageNet normalisation
      -> four stages; each: 3x3 convolutions of stride 2 (two in the first), then blocks of
         x = x + scale * attention(norm(x)), strip convolutions of three lengths gate the map
         x = x + scale * mlp(norm(x)), with a 3x3 depthwise convolution in the hidden layer
      -> head: stages 2-4 to 1/8, concatenate, squeeze to D channels,
         x = relu(x + out(nmf(relu(in(x))))), align, 1x1 to `channels`

The architecture is that of arXiv:2209.08575 (MSCAN and the light Hamburger head) with its parameter
shapes and, inside a stage, its parameter names: published weights load (see `segnext_weights.py`).
With N pixels in a map every layer costs O(N), the matrix decomposition O(N D rank) a step.

Deviation: the published head draws its initial bases at random in evaluation too, so that no two
runs agree. Here evaluation starts from fixed bases, the same for every image: an image has one
result, alone or in any batch. Training draws them at random, as published.

Deviation: gradients follow the Hamburger paper (arXiv:2109.04553), which differentiates the last
update only, at less time and memory; the code published with SegNeXt differentiates all of them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .segformer import DropPath
from .student import Student, drop_path_rates, run_stages

_GROUPS = 32  # of the group norms in the head
_EPS = 1e-6  # keeps the multiplicative updates away from 0 / 0
_LAYER_SCALE = 1e-2  # initial weight of every branch of the backbone
_BASES_SEED = 0  # of the fixed bases that evaluation starts from


@dataclass(frozen=True, kw_only=True)
class SegNeXtConfig:
    """Describe a SegNeXt; the four-tuples run from the finest stage to the coarsest.

    Args:
        dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratios: Hidden width of the MLPs of each stage over the width of the stage.
        decoder_channels: Width D of the head, a multiple of 32.
        rank: Number of bases of the matrix decomposition.
        train_steps: Updates of bases and coefficients in training.
        eval_steps: The same in evaluation.
        stride: 8, or 4 to let the head read the first stage too.
        drop_path: Probability of skipping a branch of the last block, rising linearly from 0.
        dropout: Probability of dropping a whole channel before the last layer of the head.

    Assumption: `rank` is 16 for every size, as in the toolbox of the paper; the authors of SegNeXt
    released their B and L with 64.
    """

    dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 3, 12, 3)
    mlp_ratios: tuple[int, int, int, int] = (8, 8, 4, 4)
    decoder_channels: int = 512
    rank: int = 16
    train_steps: int = 6
    eval_steps: int = 7
    stride: int = 8
    drop_path: float = 0.1
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for field in ("dims", "depths", "mlp_ratios"):
            if len(getattr(self, field)) != 4:
                raise ValueError(
                    f"`{field}` must have 4 entries, one a stage, got {getattr(self, field)}"
                )
        if self.stride not in (4, 8):
            raise ValueError(f"`stride` must be 8, as published, or 4, got {self.stride}")
        if self.decoder_channels < 1 or self.decoder_channels % _GROUPS:
            raise ValueError(
                f"`decoder_channels` must be a multiple of {_GROUPS}, the groups of its norms, "
                f"got {self.decoder_channels}"
            )


SEGNEXT_CONFIGS = {
    "segnext_nano": SegNeXtConfig(
        dims=(24, 48, 80, 112),
        depths=(1, 1, 2, 1),
        mlp_ratios=(4, 4, 4, 4),
        decoder_channels=64,
        stride=4,
    ),
    "segnext_t": SegNeXtConfig(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2), decoder_channels=256),
    "segnext_s": SegNeXtConfig(depths=(2, 2, 4, 2), decoder_channels=256),
    "segnext_b": SegNeXtConfig(),
    "segnext_l": SegNeXtConfig(depths=(3, 5, 27, 3), decoder_channels=1024, drop_path=0.3),
}


class Stem(nn.Module):
    """Halve an image twice: (B, 3, H, W) -> (B, dim, H/4, W/4), rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.proj(images)
        return x


class MultiScaleGate(nn.Module):
    """Multiply a map by a map of its surroundings, Eq. (1)-(2), arXiv:2209.08575.

    near = conv0(x);  gate = conv3(near + sum_i conv_i2(conv_i1(near)));  output = gate * x

    A pair of depthwise strips, 1 x k then k x 1 for k = 7, 11, 21, stands for a k x k kernel.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = _depthwise(dim, (5, 5))
        self.conv0_1, self.conv0_2 = _depthwise(dim, (1, 7)), _depthwise(dim, (7, 1))
        self.conv1_1, self.conv1_2 = _depthwise(dim, (1, 11)), _depthwise(dim, (11, 1))
        self.conv2_1, self.conv2_2 = _depthwise(dim, (1, 21)), _depthwise(dim, (21, 1))
        self.conv3 = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv0(x)
        around = near + self.conv0_2(self.conv0_1(near))
        around = around + self.conv1_2(self.conv1_1(near))
        around = around + self.conv2_2(self.conv2_1(near))
        gated: Tensor = self.conv3(around) * x
        return gated


class ConvolutionalAttention(nn.Module):
    """Add to a map its projected, gated and projected self."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, kernel_size=1)
        self.spatial_gating_unit = MultiScaleGate(dim)
        self.proj_2 = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))
        return attended + x


class MLP(nn.Module):
    """Mix channels pixel by pixel, and neighbours by a depthwise convolution between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, kernel_size=1)
        self.dwconv = _depthwise(hidden, (3, 3))
        self.fc2 = nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x))))
        return mixed


class Block(nn.Module):
    """Add attention, then an MLP, both pre-norm and scaled channel by channel."""

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = ConvolutionalAttention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = MLP(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.layer_scale_1[:, None, None] * self.attn(self.norm1(x))
        x = x + self.drop_path(attended)
        mixed = self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))
        x = x + self.drop_path(mixed)
        return x


class Stage(nn.Module):
    """Reduce a map and run the blocks of one resolution: (B, C, H, W) -> (B, dim, H/s, W/s)."""

    def __init__(self, index: int, config: SegNeXtConfig, drop_paths: Sequence[float]) -> None:
        super().__init__()
        dim, mlp_ratio = config.dims[index], config.mlp_ratios[index]
        self.patch_embed = Stem(dim) if index == 0 else _embedding(config.dims[index - 1], dim)
        self.blocks = nn.Sequential(*(Block(dim, mlp_ratio, drop_path) for drop_path in drop_paths))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch_embed(x))
        grid: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return grid.permute(0, 3, 1, 2)


class MSCAN(nn.Module):
    """Encode normalised images as maps of stride 4, 8, 16 and 32."""

    def __init__(self, config: SegNeXtConfig) -> None:
        super().__init__()
        rates = drop_path_rates(config.drop_path, config.depths)
        self.stages = nn.ModuleList(Stage(index, config, rates[index]) for index in range(4))

    def forward(self, images: Tensor) -> list[Tensor]:
        return run_stages(self.stages, images)


def factorize(x: Tensor, bases: Tensor, steps: int) -> Tensor:
    """Approximate non-negative matrices by products of low rank, by multiplicative updates.

    From C = softmax(X^T D), `steps` times, then the first line once more:

        C <- C * X^T D / (C D^T D + eps)
        D <- D * X C / (D C^T C + eps)

    lower |X - D C^T|^2 and keep D and C non-negative. Only the last line carries a gradient.

    Args:
        x: Non-negative matrices X (B, D, N), one a map: D channels of N pixels.
        bases: Non-negative initial bases (B, D, R).
        steps: Updates without gradient, at least 0.

    Returns:
        The products D C^T (B, D, N).
    """
    pixels = x.transpose(1, 2)  # (B, N, D)
    with torch.no_grad():
        codes = (pixels @ bases).softmax(dim=-1)  # (B, N, R)
        for _ in range(steps):
            codes = _update(codes, pixels @ bases, bases)
            bases = _update(bases, x @ codes, codes)
    codes = _update(codes, pixels @ bases, bases)
    return bases @ codes.transpose(1, 2)


class NMF(nn.Module):
    """Replace a non-negative map (B, D, H, W) by its approximation of rank R."""

    bases: Tensor

    def __init__(self, channels: int, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        self.train_steps = train_steps
        self.eval_steps = eval_steps
        # Drawn on the CPU by a generator of its own: the same on every device and in every process.
        generator = torch.Generator().manual_seed(_BASES_SEED)
        bases = torch.rand(channels, rank, generator=generator, device="cpu")
        self.register_buffer("bases", F.normalize(bases, dim=0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, D, H, W = x.shape
        # In half precision the sums over pixels overflow, and eps vanishes.
        matrices = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))  # (B, D, N)
        bases, steps = self.bases.expand(B, -1, -1), self.eval_steps
        if self.training:
            bases, steps = F.normalize(torch.rand_like(bases), dim=1), self.train_steps
        with torch.autocast(x.device.type, enabled=False):
            smooth = factorize(matrices, bases.to(matrices.dtype), steps)
        return smooth.view(B, D, H, W).to(x.dtype)


class Hamburger(nn.Module):
    """Add the global context of a map, its approximation of low rank between two 1x1 layers."""

    def __init__(self, config: SegNeXtConfig) -> None:
        super().__init__()
        D = config.decoder_channels
        self.ham_in = nn.Conv2d(D, D, kernel_size=1)
        self.ham = NMF(D, config.rank, config.train_steps, config.eval_steps)
        self.ham_out = _pointwise(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)))))


class LightHamHead(nn.Module):
    """Join the maps at the resolution of the finest and project them to `channels`."""

    def __init__(self, config: SegNeXtConfig, channels: int) -> None:
        super().__init__()
        D = config.decoder_channels
        self.finest = 0 if config.stride == 4 else 1
        self.squeeze = _pointwise(sum(config.dims[self.finest :]), D)
        self.hamburger = Hamburger(config)
        self.align = _pointwise(D, D)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(D, channels, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        finest, *coarser = maps[self.finest :]
        size = finest.shape[2:]
        enlarged = [F.interpolate(x, size=size, mode="bilinear") for x in coarser]
        joined = torch.cat((finest, *enlarged), dim=1)
        x = self.hamburger(F.relu(self.squeeze(joined)))
        features: Tensor = self.classifier(self.dropout(F.relu(self.align(x))))
        return features


class SegNeXt(Student):
    """Turn images into dense features of the joint image-text space.

    Args:
        config: The architecture; `SEGNEXT_CONFIGS` holds the named ones.
        channels: C, the width of the joint space.

    `forward` takes images (B, 3, H, W) in [0, 1], of any size, and returns features (B, C, H/s,
    W/s), rounded up, where `stride` s is 8 but for `segnext_nano`, whose features are finer: 4.
    `backbone` and `head` separate the parameters for the optimiser. In evaluation the features of
    an image depend on nothing else than the image.

    Raises:
        TypeError: If the images are not floating point.
        ValueError: If the images do not have shape (B, 3, H, W), or `channels` is not positive.

    >>> model = SegNeXt(SEGNEXT_CONFIGS["segnext_nano"], channels=16)
    >>> model(torch.rand(2, 3, 64, 50)).shape
    torch.Size([2, 16, 16, 13])
    """

    def __init__(self, config: SegNeXtConfig, channels: int) -> None:
        super().__init__(channels)
        self.config = config
        self.stride = config.stride
        self.backbone = MSCAN(config)
        self.head = LightHamHead(config, channels)
        self.apply(_initialize)
        nn.init.normal_(self.head.classifier.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.backbone(self.normalize(images)))
        return features


def _update(factor: Tensor, numerator: Tensor, other: Tensor) -> Tensor:
    """Scale a factor (B, n, R) by one multiplicative update against the other (B, m, R)."""
    return factor * numerator / (factor @ (other.transpose(1, 2) @ other) + _EPS)


def _embedding(before: int, dim: int) -> nn.Sequential:
    """Halve a map: (B, before, H, W) -> (B, dim, H/2, W/2), rounded up."""
    proj = nn.Conv2d(before, dim, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(proj=proj, norm=nn.BatchNorm2d(dim)))


def _depthwise(dim: int, kernel: tuple[int, int]) -> nn.Conv2d:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Conv2d(dim, dim, kernel, padding=padding, groups=dim)


def _pointwise(before: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(before, width, kernel_size=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, gn=nn.GroupNorm(_GROUPS, width)))


def _initialize(module: nn.Module) -> None:
    """Draw the initial weights of one convolution; norms keep their ones and zeros."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2 * module.groups / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
