"""Let a network see whole cells only: images enlarged to a multiple of its coarsest stride.

The coarsest cells of a network with stride 32 cover 32 x 32 pixels. Training crops are a multiple
of that; an image of any other size ends in cells of which the network sees a part, filled up with
zeros by every padded convolution: something it never met in training. Mirrored pixels are closer
to what it knows than zeros, the mean colour or the repeated last row (benchmarks/borders.md).
"""

import torch
from torch import Tensor, nn


def features_of_multiple(segmenter: nn.Module, images: Tensor, divisor: int) -> Tensor:
    """Compute dense features of images that are mirrored to a multiple of `divisor` first.

    Args:
        segmenter: network from images (B, 3, H, W) to features (B, C, h, w).
        images: (B, 3, H, W).
        divisor: the coarsest stride of the network, in pixels; 1 changes nothing.

    Returns:
        Features (B, C, h, w) of the images alone: cells that hold mirrored pixels only are cut
        off.
    """
    height, width = images.shape[-2:]
    mirrored = mirror_to_multiple(images, divisor)
    features: Tensor = segmenter(mirrored)
    if mirrored is images:
        return features
    rows = _cells(height, mirrored.shape[-2], features.shape[-2])
    columns = _cells(width, mirrored.shape[-1], features.shape[-1])
    return features[..., :rows, :columns]


def mirror_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Continue images below and to the right by reflection, the border row itself not repeated.

    Args:
        images: (..., H, W), of any size; what is smaller than its continuation is mirrored to
            and fro.
        divisor: both sides become the next multiple of it.

    Returns:
        The images themselves if both sides are multiples already, else larger copies.

    >>> mirror_to_multiple(torch.tensor([[1, 2, 3]]), 4)[0]
    tensor([1, 2, 3, 2])
    """
    for dim in (-2, -1):
        side = images.shape[dim]
        if side % divisor:
            there = torch.arange(side + -side % divisor, device=images.device)
            there = there % max(1, 2 * side - 2)  # to and fro
            images = images.index_select(dim, torch.minimum(there, 2 * side - 2 - there))
    return images


def _cells(side: int, mirrored: int, cells: int) -> int:
    """How many of the cells over the mirrored side touch the image."""
    return -(-side * cells // mirrored)
