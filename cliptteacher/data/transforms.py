"""Augment an image and its label map together, as the toolbox's default schedule does.

Section 4.2 of arXiv:2310.02296v1 names the toolbox and its default schedule; in order:

    resize   keep the ratio, fit (long, short) = (2048, 512) times U(0.5, 2)
    crop     random window; drawn again, up to 10 times, while one class dominates it
    flip     left-right, p = 0.5
    colours  brightness, contrast, saturation, hue, each p = 0.5 (image only): colours.py
    pad      right and bottom, up to the crop: image with the mean colour, labels with 254

Everything stays uint8: the networks normalise inside. Random numbers come from PyTorch's global
CPU generator alone, so whoever seeds that generator owns the result. The window is
chosen before the image is resized, and only the window is: equal to resizing and then cropping, to
the last bit. Cost: about 5 ms for a 512-pixel crop of a 640 x 480 photograph on one core, half of
it the decoding of the files; see benchmarks/augmentation.py.

Deviation: images shrink with antialiasing and label maps by the exact nearest pixel centre,
    where the toolbox aliases the one and shifts the other by up to half a pixel.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .. import IGNORE_INDEX, PADDING_INDEX
from .colours import coin, photometric_distortion, uniform

Limits = tuple[float, float]

CROP_RETRIES = 10
# round(255 * ImageNet mean): what the student's normalisation maps to 0.
PADDING_COLOUR = (124, 116, 104)


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def keep_ratio_size(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int]:
    """Return the largest size of the same aspect ratio whose sides fit into `scale`.

    Args:
        height: pixels of the image.
        width: pixels of the image.
        scale: limits of the long and of the short side, in pixels.

    Returns:
        Height and width, rounded to the nearest pixel and at least 1.

    >>> keep_ratio_size(480, 640, (2048, 512))
    (512, 683)
    """
    long, short = max(scale), min(scale)
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_keep_ratio(image: Tensor, scale: tuple[float, float] = (2048, 512)) -> Tensor:
    """Resize images for evaluation: bilinear, keeping the ratio, as large as `scale` allows.

    Args:
        image: (..., 3, H, W), uint8 or float.
        scale: limits of the long and of the short side, in pixels.

    Returns:
        Resized image of the same dtype, shrunk with antialiasing as in training.
    """
    size = keep_ratio_size(image.shape[-2], image.shape[-1], scale)
    resized: Tensor = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


def cut_to_patches(
    image: Tensor, label: Tensor, patch: int, scale: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Make a pair that CLIP takes whole: fitted into `scale`, edges cut to a multiple of `patch`.

    Args:
        image: (3, H, W), uint8.
        label: (H, W), uint8.
        patch: pixels along one side of a patch of CLIP.
        scale: limits of the long and of the short side in pixels; None keeps the size.

    Returns:
        Image and labels, cut by equal parts on both sides; no side is shorter than one patch.
    """
    if scale is not None:
        size = keep_ratio_size(label.shape[0], label.shape[1], scale)
        image, label = (
            resize_keep_ratio(image, scale),
            resize_label(label, size, Window(0, 0, *size)),
        )
    height, width = (max(side // patch, 1) * patch for side in label.shape)
    image, label = pad_to(image, label, patch, IGNORE_INDEX)
    top, left = (label.shape[0] - height) // 2, (label.shape[1] - width) // 2
    window = (slice(top, top + height), slice(left, left + width))
    return image[(slice(None), *window)], label[window]


def random_size(height: int, width: int, scale: Limits, ratio: Limits) -> tuple[int, int]:
    """Draw the size to resize to: it fits into `scale` times a random number of `ratio`."""
    factor = uniform(*ratio)
    return keep_ratio_size(height, width, (scale[0] * factor, scale[1] * factor))


def random_window(
    label: Tensor, size: tuple[int, int], crop: int, max_class_share: float
) -> tuple[Window, Tensor]:
    """Choose the part of the resized pair that is kept, avoiding windows of one class.

    A window is drawn again, up to 10 times, while one class holds more than `max_class_share` of
    its labelled pixels; the last one stands. `label` must already hide the unseen classes.

    Assumption: a window without any labelled pixel is drawn again too, as the toolbox does.

    Args:
        label: (H, W) uint8.
        size: height and width that the pair is resized to.
        crop: side of the window; a smaller side is kept whole.
        max_class_share: limit in 0..1; 1 accepts everything.

    Returns:
        The window in the resized pair, and the resized labels within it.
    """
    height, width = size
    # Where one class has all labelled pixels, only the random numbers of the ten tries matter.
    only_one_class = int(count_classes(label).count_nonzero()) <= 1
    for _ in range(1 + CROP_RETRIES):
        top = _randint(max(height - crop, 0) + 1)
        left = _randint(max(width - crop, 0) + 1)
        window = Window(top, left, min(crop, height), min(crop, width))
        if window[2:] == size or max_class_share >= 1:
            break
        resized = resize_label(label, size, window)
        if not only_one_class and not is_dominated(resized, max_class_share):
            break
    return window, resize_label(label, size, window)


def resize_label(label: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Resize labels by the exact nearest pixel centre, within a window only.

    Args:
        label: (H, W) uint8.
        size: height and width of the whole.
        window: part of the whole that is wanted.

    Returns:
        (height, width) of the window, equal to resizing everything and cutting it out. A centre
        on the border of two pixels may go to either, if there are ten pixels or fewer: PyTorch
        itself decides that by the size of the image.
    """
    rows = _nearest(label.shape[0], size[0])[window.top : window.top + window.height]
    columns = _nearest(label.shape[1], size[1])[window.left : window.left + window.width]
    # NumPy's take() is several times as fast as indexing a tensor.
    return torch.from_numpy(label.numpy().take(columns, axis=1).take(rows, axis=0))


def resize_image(image: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """Resize an image, bilinear and antialiased, within a window only.

    PyTorch resizes bytes in two passes, along the rows and then along the columns, with bytes in
    between. So do two calls; the first leaves out the rows that the window does not look at, the
    second the columns outside of it. Nothing is moved by a fraction of a pixel.

    Args:
        image: (3, H, W) uint8; it is fastest if the colours of a pixel lie together in memory.
        size: height and width of the whole.
        window: part of the whole that is wanted.

    Returns:
        (3, height, width) of the window, equal to resizing everything and cutting it out.
    """
    pixels = image.permute(1, 2, 0)
    height = pixels.shape[0]
    shrink = height / size[0]
    reach = max(shrink, 1) + 1  # rows that a row looks at, to either side; one to spare
    first = max(0, int((window.top + 0.5) * shrink - reach))
    last = min(height, int((window.top + window.height - 0.5) * shrink + reach) + 1)
    wide = _interpolate(pixels[first:last], last - first, size[1])
    columns = max(window.width, 2)  # PyTorch 2.14 resizes a single column wrongly
    tall = torch.empty(height, columns, 3, dtype=torch.uint8)  # other rows: nobody looks at them
    tall[first:last, : window.width] = wide[:, window.left : window.left + window.width]
    tall = _interpolate(tall, size[0], columns)[window.top : window.top + window.height]
    return tall[:, : window.width].permute(2, 0, 1)


def count_classes(label: Tensor) -> Tensor:
    """Count the pixels of each class: (H, W) uint8, 255 = ignore -> (255,) int64."""
    return torch.bincount(label.flatten(), minlength=256)[:IGNORE_INDEX]


def is_dominated(label: Tensor, max_class_share: float) -> bool:
    """Tell whether one class holds more than a share of the labelled pixels, or none is labelled.

    Args:
        label: (H, W) uint8, 255 = ignore.
        max_class_share: limit in 0..1; 1 accepts everything.
    """
    if max_class_share >= 1:
        return False
    counts = count_classes(label)
    largest, labelled = int(counts.max()), int(counts.sum())
    return labelled == 0 or largest > max_class_share * labelled


def random_flip(image: Tensor, label: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Mirror image and labels left-right with the given probability."""
    if coin(probability):
        return image.flip(-1), label.flip(-1)
    return image, label


def pad_to(
    image: Tensor, label: Tensor, size: int, value: int = PADDING_INDEX
) -> tuple[Tensor, Tensor]:
    """Pad right and bottom up to `size` pixels: image with the mean colour, labels with `value`."""
    height, width = label.shape
    padding = [0, 0, max(size - width, 0), max(size - height, 0)]
    if not any(padding):
        return image, label
    image = F.pad(image, padding, fill=list(PADDING_COLOUR))
    return image, F.pad(label.unsqueeze(0), padding, fill=value).squeeze(0)


class TrainingTransform(nn.Module):
    """Apply the training augmentation to an image and its labels; see `training_transform`."""

    def __init__(
        self,
        *,
        crop: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        max_class_share: float,
        flip: float,
        strength: float,
    ) -> None:
        super().__init__()
        self.crop, self.scale, self.ratio = crop, scale, ratio
        self.max_class_share, self.flip, self.strength = max_class_share, flip, strength

    def extra_repr(self) -> str:
        """Return the settings, for `print(transform)`."""
        return ", ".join(f"{key}={value}" for key, value in vars(self).items() if key[0] != "_")

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the augmented image, uint8 (3, crop, crop), and labels, uint8 (crop, crop)."""
        _check_pair(image, label)
        size = random_size(label.shape[0], label.shape[1], self.scale, self.ratio)
        window, label = random_window(label, size, self.crop, self.max_class_share)
        image = resize_image(image, size, window)
        image, label = random_flip(image, label, self.flip)
        if self.strength > 0:
            image = photometric_distortion(image, self.strength)
        image, label = pad_to(image, label, self.crop)
        return image.contiguous(), label.contiguous()


def training_transform(
    crop: int,
    *,
    scale: tuple[float, float] = (2048, 512),
    ratio: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 0.75,
    flip: float = 0.5,
    photometric: bool | float = True,
) -> TrainingTransform:
    """Build the augmentation of the default schedule.

    Args:
        crop: side of the square that comes out, in pixels.
        scale: limits of the long and of the short side before the random factor, in pixels.
        ratio: range of the random factor on `scale`.
        max_class_share: share of the labelled pixels above which a crop is drawn again; 1 = never.
        flip: probability of mirroring left-right.
        photometric: True or False, or the strength as a factor on the ranges (True is 1).

    Returns:
        Module (image uint8 (3, H, W), labels uint8 (H, W)) -> uint8 (3, crop, crop), (crop, crop).

    Raises:
        ValueError: if a setting is out of its range.
    """
    strength = float(photometric)
    if crop < 1 or min(scale) < 1:
        raise ValueError(f"`crop` and `scale` must be at least 1 pixel, got {crop} and {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"`ratio` must be (low, high) with 0 < low <= high, got {ratio}")
    if not 0 < max_class_share <= 1:
        raise ValueError(f"`max_class_share` must lie in (0, 1], got {max_class_share}")
    if not 0 <= flip <= 1:
        raise ValueError(f"`flip` must be a probability in [0, 1], got {flip}")
    if not 0 <= strength <= 2:
        raise ValueError(f"`photometric` must be a bool or a strength in [0, 2], got {photometric}")
    return TrainingTransform(
        crop=crop,
        scale=scale,
        ratio=ratio,
        max_class_share=max_class_share,
        flip=flip,
        strength=strength,
    )


def _check_pair(image: Tensor, label: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"`image` must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}; "
            "augment before scaling to [0, 1]"
        )
    if label.dtype != torch.uint8 or label.shape != image.shape[1:]:
        raise ValueError(
            f"`label` must be uint8 {tuple(image.shape[1:])} like the image, "
            f"got {label.dtype} {tuple(label.shape)}"
        )


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize bytes, bilinear and antialiased: (H, W, 3) -> (height, width, 3)."""
    # A view with the strides of channels_last, or the fast path of PyTorch is missed.
    batch = pixels.unsqueeze(0).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0)


@lru_cache(maxsize=2)  # rows and columns: a window that is drawn again asks again
def _nearest(pixels: int, resized: int) -> NDArray[np.int64]:
    """Return which of so many pixels in a row is nearest to each one of the resized row."""
    # As an image of one row, which rounds as whole images do.
    index = torch.arange(pixels, dtype=torch.float32).reshape(1, 1, 1, pixels)
    nearest = nn.functional.interpolate(index, (1, resized), mode="nearest-exact")
    return nearest.flatten().numpy().astype(np.int64)


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))
