"""A small convolutional student: residual encoder and feature pyramid, for laptops.

The method asks for any per-pixel network (Section 3.1 of arXiv:2310.02296v1). Trained from random
weights in minutes, convolutions learn from fewer images than a transformer does; this one is the
student of the CPU recipes.

    stem 1/2 -> stages 1/4, 1/8, 1/16, 1/32              residual blocks of two 3x3 convolutions
    1x1 to one width, coarse maps enlarged and added to finer ones, 3x3, 1x1 to C channels at 1/4

Cost of ``fpn_small``: 0.2 G multiply-adds at 128 x 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .student import Student, run_stages


class FPNSegmenter(Student):
    """Residual encoder with a feature pyramid; images in [0, 1] -> (B, channels, H/4, W/4).

    Args:
        channels: C of the joint space.
        widths: channels of the stages at 1/4, 1/8, 1/16 and so on.
        depth: residual blocks per stage.
        pyramid: channels of the pyramid.
    """

    stride = 4

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (32, 64, 128, 192),
        depth: int = 2,
        pyramid: int = 64,
    ) -> None:
        super().__init__(channels)
        self.stem = _convolution(3, widths[0] // 2, stride=2)
        inputs = (widths[0] // 2, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(before, width, stride=2),
                *(ResidualBlock(width, width) for _ in range(depth - 1)),
            )
            for before, width in zip(inputs, widths, strict=True)
        )
        self.head = PyramidHead(widths, pyramid, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Compute dense features (B, channels, H/4, W/4) of images (B, 3, H, W) in [0, 1]."""
        maps = run_stages(self.stages, self.stem(self.normalize(images)))
        return cast(Tensor, self.head(maps))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(before, width, stride)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class PyramidHead(nn.Module):
    """Merge the maps from coarse to fine and project to the joint space."""

    def __init__(self, widths: Sequence[int], pyramid: int, channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid, 1) for width in widths)
        self.merge = _convolution(pyramid, pyramid)
        self.classifier = nn.Conv2d(pyramid, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps from fine to coarse into features at the size of the finest."""
        merged = self.lateral[-1](maps[-1])
        for lateral, finer in zip(list(self.lateral)[-2::-1], maps[-2::-1], strict=True):
            # Twice the size, then cut: stretched to an odd size, a cell would leave its pixels.
            coarse = F.interpolate(merged, scale_factor=2.0, mode="bilinear", align_corners=False)
            merged = lateral(finer) + coarse[..., : finer.shape[2], : finer.shape[3]]
        return cast(Tensor, self.classifier(self.merge(merged)))


def _convolution(before: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )
