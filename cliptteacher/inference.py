"""Segment images with the trained student and the names of classes, seen and unseen alike.

Section 3.4 of arXiv:2310.02296v1. CLIP's image encoder takes no part:

    features = student(image)                                (B, C, h, w)
    logits   = logit_scale * features . text of all classes  (B, A, h, w)
    logits  += gamma on the unseen columns
    labels   = argmax over A of logits, bilinear to the original size

Projecting to the A classes comes before upsampling: the C channels never exist at full size.
Cost: one pass of the student, plus A channels at the size of the image.

Sliding windows follow the toolbox: windows of 512 pixels every 426, the last one aligned to the
border, overlapping logits averaged by count.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.transforms import keep_ratio_size
from .segmenters import build_segmenter
from .segmenters.padding import features_of_multiple
from .training.checkpoint import load_checkpoint

LogitKind = Literal["dot", "cosine"]
Mode = Literal["whole", "slide"]
_CLASSES_AT_ONCE = 32  # classes upsampled together when only labels are asked for


def pixel_logits(
    features: Tensor, text: Tensor, logit_scale: float | Tensor = 1.0, cosine: bool = False
) -> Tensor:
    """Score every pixel against every class, the R^T T of Eq. (9), arXiv:2310.02296v1.

    Args:
        features: dense features R of the student, (B, C, h, w).
        text: one row per class, (A, C); unit text features, used as they are given.
        logit_scale: factor on the logits.
        cosine: give every pixel unit length first.

    Returns:
        Logits, (B, A, h, w).
    """
    if cosine:
        features = F.normalize(features, dim=1)
    return logit_scale * torch.einsum("bchw,ac->bahw", features, text)


class Predictor(nn.Module):
    """Predict label maps with a student and text features; an image in, labels or logits out.

    Args:
        segmenter: student, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w). It moves to
            another device together with the predictor.
        text_features: (A, C), one row per class; brought to unit length here.
        unseen: label values of the unseen classes, which get the bonus `gamma`.
        gamma: bonus in logit units; 1.5 in the paper (5 in its ablation without the GLM).
        logit_scale: factor on the logits before the bonus; the one of training.
        logits: "dot" for raw features, "cosine" for features of unit length.
        mode: "whole" image at once, or a "slide" of windows.
        window: side of a window in pixels.
        stride: step between windows in pixels.
        window_batch: windows that pass through the student together, per image.
        short_side: resize images to this short side before the student, keeping the ratio.
        resize: resize images to fit into these (long, short) sides, (2048, 512) in the
            benchmarks; not with `short_side`. Images shrink with antialiasing, as in training.
        size_divisor: mirror images to a multiple of this, the student's coarsest stride.

    Raises:
        ValueError: if the text features are no matrix, an unseen index is out of range, a mode
            is unknown, or the window settings leave gaps.
    """

    text_features: Tensor
    bonus: Tensor

    def __init__(
        self,
        segmenter: nn.Module,
        text_features: Tensor,
        *,
        unseen: Sequence[int] = (),
        gamma: float = 1.5,
        logit_scale: float = 1.0,
        logits: LogitKind = "dot",
        mode: Mode = "whole",
        window: int = 512,
        stride: int = 426,
        window_batch: int = 4,
        short_side: int | None = None,
        resize: tuple[int, int] | None = None,
        size_divisor: int = 1,
    ) -> None:
        super().__init__()
        _check_classes(text_features, unseen)
        _check_modes(logits, mode, short_side, resize)
        _check_windows(window, stride, window_batch, size_divisor)
        self.segmenter, self.unseen = segmenter, tuple(unseen)
        self.cosine, self.mode, self.logit_scale = logits == "cosine", mode, logit_scale
        self.window, self.stride, self.window_batch = window, stride, window_batch
        self.short_side, self.resize, self.size_divisor = short_side, resize, size_divisor
        text = F.normalize(text_features.detach().float(), dim=1)
        text = text.to(next((p.device for p in segmenter.parameters()), text.device))
        bonus = torch.zeros_like(text[:, 0])
        bonus[list(unseen)] = gamma
        self.register_buffer("text_features", text)
        self.register_buffer("bonus", bonus)

    @torch.inference_mode()
    def forward(self, image: Tensor) -> Tensor:
        """Predict the class of every pixel.

        Args:
            image: (3, H, W) or (B, 3, H, W), uint8 or float in [0, 1], on any device.

        Returns:
            Labels in 0..A-1, int64 (H, W) or (B, H, W), on the device of the predictor.

        Raises:
            ValueError: if `image` has another shape, dtype or range.
        """
        labels = upsampled_argmax(self._resized_logits(image), image.shape[-2:])
        return labels if image.ndim == 4 else labels.squeeze(0)

    @torch.inference_mode()
    def logits(self, image: Tensor) -> Tensor:
        """Return the logits, bonus included, at the original size.

        Args:
            image: as for `forward`.

        Returns:
            Logits, float (A, H, W) or (B, A, H, W).
        """
        logits = upsample(self._resized_logits(image), image.shape[-2:])
        return logits if image.ndim == 4 else logits.squeeze(0)

    @torch.inference_mode()
    def sweep(self, image: Tensor, gammas: Sequence[float]) -> Tensor:
        """Predict with several bonuses from one pass of the student, to choose one.

        Args:
            image: as for `forward`.
            gammas: bonuses in the place of the predictor's own.

        Returns:
            Labels, int64 (len(gammas), H, W) or (len(gammas), B, H, W).
        """
        logits = self._resized_logits(image) - self.bonus[:, None, None]
        columns = torch.zeros_like(self.bonus)
        columns[list(self.unseen)] = 1.0
        chosen = [
            upsampled_argmax(logits + gamma * columns[:, None, None], image.shape[-2:])
            for gamma in gammas
        ]
        labels = torch.stack(chosen)
        return labels if image.ndim == 4 else labels.squeeze(1)

    def _resized_logits(self, image: Tensor) -> Tensor:
        """Return logits (B, A, h, w), of whatever size the network works at."""
        images = _as_batch(image).to(self.text_features.device)
        size = self._working_size(images)
        if size != tuple(images.shape[-2:]):
            # As training shrinks them: a large photograph at a quarter of its size must not alias.
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        with _evaluating(self.segmenter):
            return self._slide(images) if self.mode == "slide" else self._whole(images)

    def _working_size(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if self.short_side is not None:
            return keep_ratio_size(height, width, (float("inf"), self.short_side))
        return keep_ratio_size(height, width, self.resize) if self.resize else (height, width)

    def _whole(self, images: Tensor) -> Tensor:
        features = features_of_multiple(self.segmenter, images, self.size_divisor)
        text = self.text_features.to(features.dtype)
        logits = pixel_logits(features, text, self.logit_scale, self.cosine).float()
        return logits + self.bonus[:, None, None]

    def _slide(self, images: Tensor) -> Tensor:
        """Average the logits of overlapping windows of one size; (B, A, H, W)."""
        B, _, H, W = images.shape
        height, width = min(self.window, H), min(self.window, W)
        corners = [
            (top, left)
            for top in window_starts(H, height, self.stride)
            for left in window_starts(W, width, self.stride)
        ]
        total = images.new_zeros(B, len(self.text_features), H, W)
        count = images.new_zeros(H, W)
        for first in range(0, len(corners), self.window_batch):
            chunk = corners[first : first + self.window_batch]
            windows = [images[:, :, y : y + height, x : x + width] for y, x in chunk]
            logits = upsample(self._whole(torch.cat(windows)), (height, width))
            for (y, x), part in zip(chunk, logits.chunk(len(chunk)), strict=True):
                total[:, :, y : y + height, x : x + width] += part
                count[y : y + height, x : x + width] += 1
        return total / count


@dataclass(frozen=True)
class TrainedSegmenter:
    """Hold a trained student and everything it needs to predict the words of its training run.

    Args:
        segmenter: student, in eval mode, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w).
        class_names: names of all A classes, seen and unseen.
        unseen: label values of the unseen classes.
        text_features: unit rows, (A, C), in the order of `class_names`.
        gamma: bonus of the unseen classes.
        logit_scale: factor on the logits.
        logits: "dot" or "cosine", as in training.
        resize: (long, short) sides that images are fitted into, or None: as they are.
        size_divisor: images are mirrored to a multiple of this.
        checkpoint: the other entries of the checkpoint ("step", "config", "clip", ...).
    """

    segmenter: nn.Module
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]
    text_features: Tensor
    gamma: float
    logit_scale: float
    logits: LogitKind
    resize: tuple[int, int] | None
    size_divisor: int
    checkpoint: dict[str, Any]

    def predictor(self, **settings: Any) -> Predictor:
        """Return a `Predictor` of these classes; `settings` add to its arguments or replace them.

        For example ``load_segmenter("runs/miniworld").predictor(mode="slide")(image)``.
        """
        stored = {
            "unseen": self.unseen,
            "gamma": self.gamma,
            "logit_scale": self.logit_scale,
            "logits": self.logits,
            "resize": None if "short_side" in settings else self.resize,
            "size_divisor": self.size_divisor,
        }
        return Predictor(self.segmenter, self.text_features, **{**stored, **settings})


def load_segmenter(path: str | Path, segmenter: nn.Module | None = None) -> TrainedSegmenter:
    """Load the student of a checkpoint, ready to predict; CLIP is not needed.

    Args:
        path: checkpoint, or the directory of a run, whose newest checkpoint is taken.
        segmenter: network to fill, if it was not made by `build_segmenter` from its name.

    Returns:
        The student with its class names, text features and inference settings, on the CPU.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is no checkpoint, or the weights do not fit the network.
    """
    content = load_checkpoint(path)
    weights, name = content.pop("segmenter"), content["segmenter_name"]
    if segmenter is None:
        segmenter = build_segmenter(name, channels=content["channels"])
    try:
        segmenter.load_state_dict(weights)
    except RuntimeError as error:  # torch lists every tensor; the first says enough
        difference = str(error).splitlines()[1].strip()[:200]
        raise ValueError(
            f"the weights in {path} must fit the segmenter {name!r}, but {difference}; "
            "pass the network they were trained in as `segmenter`"
        ) from None
    content.pop("training", None)  # optimiser and bank: several times the weights
    return TrainedSegmenter(
        segmenter=segmenter.eval(),
        class_names=tuple(content.pop("class_names")),
        unseen=tuple(content.pop("unseen")),
        text_features=content.pop("text_features"),
        gamma=content.pop("gamma"),
        logit_scale=content.pop("logit_scale"),
        logits=content.pop("logits", "dot"),
        resize=tuple(content.pop("resize", None) or ()) or None,
        size_divisor=content.pop("size_divisor", 1),
        checkpoint=content,
    )


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side; the last one ends at the border.

    >>> window_starts(1000, 512, 426)
    [0, 426, 488]
    """
    last = max(length - window, 0)
    steps = -(-last // stride)
    return [min(step * stride, last) for step in range(steps + 1)]


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, X, h, w) to (B, X, *size), bilinear with align_corners False."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def upsampled_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return `upsample(logits, size).argmax(1)` with a bounded number of classes in memory.

    A photograph of 12 million pixels times 171 classes would take 8 GB at once.

    Args:
        logits: (B, A, h, w).
        size: height and width of the result.

    Returns:
        Labels, int64 (B, *size).
    """
    best, labels = upsample(logits[:, :_CLASSES_AT_ONCE], size).max(dim=1)
    for first in range(_CLASSES_AT_ONCE, logits.shape[1], _CLASSES_AT_ONCE):
        chunk = upsample(logits[:, first : first + _CLASSES_AT_ONCE], size)
        value, index = chunk.max(dim=1)
        labels = torch.where(value > best, index + first, labels)
        best = torch.maximum(best, value)
    return labels


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, then give every part of it its own mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _as_batch(image: Tensor) -> Tensor:
    """Return images as float (B, 3, H, W) in [0, 1]."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(
            f"`image` must have shape (3, H, W) or (B, 3, H, W), got {tuple(image.shape)}; "
            "channels come before height and width"
        )
    images = image if image.ndim == 4 else image.unsqueeze(0)
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"`image` must be uint8, or float in [0, 1], got {images.dtype}")
    if float(images.max()) > 2:  # bicubic resizing may overshoot 1 a little
        raise ValueError(
            f"a float `image` must lie in [0, 1], got a maximum of {float(images.max()):g}; "
            "divide by 255 and leave normalisation to the network"
        )
    return images


def _check_classes(text_features: Tensor, unseen: Sequence[int]) -> None:
    if text_features.ndim != 2 or len(text_features) == 0:
        raise ValueError(
            "`text_features` must have shape (A, C) with at least one class, "
            f"got {tuple(text_features.shape)}"
        )
    outside = [index for index in unseen if not 0 <= index < len(text_features)]
    if outside:
        raise ValueError(
            f"`unseen` must hold label values in 0..{len(text_features) - 1}, got {outside}; "
            "`text_features` needs one row per class, seen and unseen"
        )


def _check_modes(
    logits: str, mode: str, short_side: int | None, resize: tuple[int, int] | None
) -> None:
    if logits not in ("dot", "cosine"):
        raise ValueError(f'`logits` must be "dot" or "cosine", got {logits!r}')
    if mode not in ("whole", "slide"):
        raise ValueError(f'`mode` must be "whole" or "slide", got {mode!r}')
    if short_side is not None and resize is not None:
        raise ValueError(
            f"at most one of `short_side` and `resize` may be given, got {short_side} and {resize}"
        )


def _check_windows(window: int, stride: int, window_batch: int, size_divisor: int) -> None:
    if not 1 <= stride <= window:
        raise ValueError(
            f"`stride` must lie in 1..window, got stride {stride} for windows of {window} pixels; "
            "a larger one leaves gaps"
        )
    for name, value in (("window_batch", window_batch), ("size_divisor", size_divisor)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
