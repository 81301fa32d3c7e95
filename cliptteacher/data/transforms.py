"""Augment an image and its label map together, as the toolbox's default schedule does.

Section 4.2 of arXiv:2310.02296v1 names the toolbox and its default schedule; in order:

    resize   keep the ratio, fit (long, short) = (2048, 512) times U(0.5, 2)
    crop     random window; drawn again, up to 10 times, while one class dominates it
    flip     left-right, p = 0.5
    colours  brightness, contrast, saturation, hue, each p = 0.5 (image only)
    pad      right and bottom, up to the crop: image with the mean colour, labels with 255

Everything stays uint8: the networks normalise inside. Random numbers come from PyTorch's global
CPU generator alone, so whoever seeds that generator owns the result. Cost: about 12 ms for a
512-pixel crop of a 640 x 480 photograph on one core, JPEG decoding included; see
benchmarks/augmentation.py.

Deviation: images shrink with antialiasing and label maps by the exact nearest pixel centre,
    where the toolbox aliases the one and shifts the other by up to half a pixel.
Deviation: hue moves continuously, not in steps of two degrees.
"""

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .splits import IGNORE_INDEX

CROP_RETRIES = 10
# round(255 * ImageNet mean): what the student's normalisation maps to 0.
PADDING_COLOUR = (124, 116, 104)


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


def random_resize(
    image: Tensor, label: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Resize image and labels to fit into `scale` times a random number of the range `ratio`."""
    factor = _uniform(*ratio)
    limits = (scale[0] * factor, scale[1] * factor)
    size = list(keep_ratio_size(image.shape[-2], image.shape[-1], limits))
    image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=True)
    label = F.resize(label.unsqueeze(0), size, InterpolationMode.NEAREST_EXACT).squeeze(0)
    return image, label


def random_crop(
    image: Tensor, label: Tensor, crop: int, max_class_share: float
) -> tuple[Tensor, Tensor]:
    """Cut the same random window from image and labels, avoiding windows of one class.

    A window is drawn again, up to 10 times, while one class holds more than `max_class_share` of
    its labelled pixels; the last one stands. `label` must already hide the unseen classes.

    Assumption: a window without any labelled pixel is drawn again too, as the toolbox does.
    """
    height, width = label.shape
    for _ in range(1 + CROP_RETRIES):
        top = _randint(max(height - crop, 0) + 1)
        left = _randint(max(width - crop, 0) + 1)
        window = label[top : top + crop, left : left + crop]
        if window.shape == label.shape or not is_dominated(window, max_class_share):
            break
    return image[:, top : top + crop, left : left + crop], window


def is_dominated(label: Tensor, max_class_share: float) -> bool:
    """Tell whether one class holds more than a share of the labelled pixels, or none is labelled.

    Args:
        label: (H, W) uint8, 255 = ignore.
        max_class_share: limit in 0..1; 1 accepts everything.
    """
    if max_class_share >= 1:
        return False
    counts = torch.bincount(label.flatten().int(), minlength=256)[:IGNORE_INDEX]
    largest, labelled = int(counts.max()), int(counts.sum())
    return labelled == 0 or largest > max_class_share * labelled


def random_flip(image: Tensor, label: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Mirror image and labels left-right with the given probability."""
    if _coin(probability):
        return image.flip(-1), label.flip(-1)
    return image, label


def photometric_distortion(image: Tensor, strength: float = 1.0) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, each with probability 0.5.

    Brightness adds U(-32, 32) of 255, contrast multiplies by U(0.5, 1.5), saturation is scaled by
    U(0.5, 1.5) in HSV, hue turns by U(-18, 18) of 180. Contrast comes before or after saturation
    and hue, by a fair coin. Every range is shrunk or widened about "no change" by `strength`.

    Args:
        image: (3, H, W) uint8.
        strength: factor on the ranges, 0 (no change) to 2.

    Returns:
        (3, H, W) uint8.
    """
    # In place: at this size new memory costs as much as the arithmetic.
    pixels = image.to(torch.float32, copy=True).div_(255)
    contrast_first = _coin()
    if _coin():
        pixels.add_(strength * _uniform(-32, 32) / 255).clamp_(0, 1)
    if contrast_first:
        _random_contrast(pixels, strength)
    if _coin():
        pixels = scale_saturation(pixels, 1 + strength * _uniform(-0.5, 0.5))
    if _coin():
        pixels = turn_hue(pixels, strength * _uniform(-18, 18) / 180)
    if not contrast_first:
        _random_contrast(pixels, strength)
    return pixels.mul_(255).round_().to(torch.uint8)


def scale_saturation(pixels: Tensor, factor: float) -> Tensor:
    """Multiply the HSV saturation by a factor, clipped at full saturation.

    With value v = max(r, g, b) every channel is v - s f v, where f depends on the hue alone.
    So scaling s means scaling the distance to v: no conversion to HSV and back is needed.

    Args:
        pixels: (3, H, W) float in [0, 1].
        factor: at least 0; 0 turns every pixel into a grey of its own value.

    Returns:
        (3, H, W) float in [0, 1].
    """
    value, lowest = pixels.amax(0, keepdim=True), pixels.amin(0, keepdim=True)
    chroma = (value - lowest).clamp_min_(1e-8)
    full = torch.div(value, chroma, out=chroma)  # the factor at which s reaches 1
    return (value - pixels).mul_(full.clamp_(max=factor)).neg_().add_(value).clamp_(0, 1)


def turn_hue(pixels: Tensor, turn: float) -> Tensor:
    """Turn the HSV hue by a share of the full circle, keeping value and saturation.

    With v = max(r, g, b), c = v - min(r, g, b) and the hue h in sixths of the circle, a channel is
    v - c clip(min(k, 4 - k), 0, 1) with k = (n + h) mod 6 and n = 5, 3, 1 for red, green, blue.

    Args:
        pixels: (3, H, W) float in [0, 1].
        turn: share of the circle, any sign.

    Returns:
        (3, H, W) float in [0, 1].
    """
    red, green, blue = pixels
    value, lowest = pixels.amax(0), pixels.amin(0)
    chroma = value - lowest
    scale = chroma.clamp_min(1e-8).reciprocal_()  # a grey has any hue
    hue = torch.where(
        value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)
    )
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)
    k = hue + (6 * turn + torch.tensor([5.0, 3.0, 1.0]).reshape(3, 1, 1))
    k = k.sub_((k / 6).floor_().mul_(6))  # several times as fast as remainder()
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return k.mul_(chroma).neg_().add_(value).clamp_(0, 1)


def pad_to(image: Tensor, label: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pad right and bottom up to `size` pixels: the image with the mean colour, labels with 255."""
    height, width = label.shape
    padding = [0, 0, max(size - width, 0), max(size - height, 0)]
    if not any(padding):
        return image, label
    image = F.pad(image, padding, fill=list(PADDING_COLOUR))
    return image, F.pad(label.unsqueeze(0), padding, fill=IGNORE_INDEX).squeeze(0)


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
        image, label = random_resize(image, label, self.scale, self.ratio)
        image, label = random_crop(image, label, self.crop, self.max_class_share)
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


def _random_contrast(pixels: Tensor, strength: float) -> None:
    if _coin():
        pixels.mul_(1 + strength * _uniform(-0.5, 0.5)).clamp_(0, 1)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))


def _coin(probability: float = 0.5) -> bool:
    return float(torch.rand(())) < probability
