"""Sliding windows, as the toolbox of the paper evaluates large images.

Windows of 512 pixels every 426, the last one aligned to the border; where windows overlap, the
maps are averaged. Cost: one pass per window, and the maps of all classes at the size of the image.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def slide(
    predict: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int, batch: int
) -> Tensor:
    """Average the maps of overlapping windows.

    Args:
        predict: windows (N, 3, h, w) -> maps (N, A, h, w) of the same size.
        images: (B, 3, H, W).
        window: side of a window in pixels; the image's own where that is smaller.
        stride: step between windows in pixels.
        batch: most windows, of all images, that are predicted together; at least one of each image.

    Returns:
        Maps (B, A, H, W).
    """
    H, W = images.shape[-2:]
    height, width = min(window, H), min(window, W)
    corners = [
        (top, left)
        for top in window_starts(H, height, stride)
        for left in window_starts(W, width, stride)
    ]
    total: Tensor | None = None
    count = images.new_zeros(H, W)
    at_once = max(1, batch // len(images))
    for first in range(0, len(corners), at_once):
        chunk = corners[first : first + at_once]
        maps = predict(torch.cat([images[:, :, y : y + height, x : x + width] for y, x in chunk]))
        if total is None:
            total = maps.new_zeros(len(images), maps.shape[1], H, W)
        for (y, x), part in zip(chunk, maps.chunk(len(chunk)), strict=True):
            total[:, :, y : y + height, x : x + width] += part
            count[y : y + height, x : x + width] += 1
    assert total is not None  # an image has at least one window
    return total.div_(count)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side; the last one ends at the border.

    >>> window_starts(1000, 512, 426)
    [0, 426, 488]
    """
    last = max(length - window, 0)
    steps = -(-last // stride)
    return [min(step * stride, last) for step in range(steps + 1)]


def check_windows(window: int, stride: int, batch: int) -> None:
    """Check the settings of ``slide``.

    Raises:
        ValueError: the stride leaves gaps, or a number is below 1.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"`stride` must lie in 1..window, got stride {stride} for windows of {window} pixels; "
            "a larger one leaves gaps"
        )
    if batch < 1:
        raise ValueError(f"`window_batch` must be at least 1, got {batch}")
