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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_student, student_content
from .clip import CLIP, class_text_features, load_clip
from .clip.prompts import spell_class_name
from .data.images import ImageLike, to_image
from .data.transforms import keep_ratio_size
from .logits import Similarity, pixel_logits, upsample, upsampled_argmax
from .segmenters import build_segmenter
from .segmenters.padding import features_of_multiple
from .segmenters.student import evaluating

Mode = Literal["whole", "slide"]


class Predictor(nn.Module):
    """Predict label maps with a student and text features; an image in, labels or logits out.

    Args:
        segmenter: student, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w). It moves to
            another device together with the predictor.
        text_features: (A, C), one row per class; brought to unit length here.
        unseen: label values of the unseen classes, which get the bonus `gamma`.
        gamma: bonus in logit units; 1.5 in the paper (5 in its ablation without the GLM).
        logit_scale: factor on the logits before the bonus; the one of training.
        similarity: "dot" for raw features, "cosine" for features of unit length.
        mode: "whole" image at once, or a "slide" of windows.
        window: side of a window in pixels.
        stride: step between windows in pixels.
        window_batch: windows that pass through the student together, per image.
        resize: resize images to fit into these (long, short) sides, (2048, 512) in the
            benchmarks. Images shrink with antialiasing, as in training.
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
        similarity: Similarity = "dot",
        mode: Mode = "whole",
        window: int = 512,
        stride: int = 426,
        window_batch: int = 4,
        resize: tuple[int, int] | None = None,
        size_divisor: int = 1,
    ) -> None:
        super().__init__()
        _check_classes(text_features, unseen)
        _check_modes(similarity, mode)
        _check_windows(window, stride, window_batch, size_divisor)
        self.segmenter, self.unseen = segmenter, tuple(unseen)
        self.similarity: Similarity = similarity
        self.mode, self.logit_scale = mode, logit_scale
        self.window, self.stride, self.window_batch = window, stride, window_batch
        self.resize, self.size_divisor = resize, size_divisor
        text = F.normalize(text_features.detach().float(), dim=1)
        text = text.to(next((p.device for p in segmenter.parameters()), text.device))
        bonus = torch.zeros_like(text[:, 0])
        bonus[list(unseen)] = gamma
        self.register_buffer("text_features", text)
        self.register_buffer("bonus", bonus)

    @torch.no_grad()
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

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Return the logits, bonus included, at the original size.

        Args:
            image: as for `forward`.

        Returns:
            Logits, float (A, H, W) or (B, A, H, W).
        """
        logits = upsample(self._resized_logits(image), image.shape[-2:])
        return logits if image.ndim == 4 else logits.squeeze(0)

    @torch.no_grad()
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
        H, W = images.shape[-2:]
        size = keep_ratio_size(H, W, self.resize) if self.resize else (H, W)
        if size != (H, W):
            # As training shrinks them: a large photograph at a quarter of its size must not alias.
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        with evaluating(self.segmenter):
            return self._slide(images) if self.mode == "slide" else self._whole(images)

    def _whole(self, images: Tensor) -> Tensor:
        features = features_of_multiple(self.segmenter, images, self.size_divisor)
        logits = pixel_logits(features, self.text_features, self.logit_scale, self.similarity)
        return logits.float() + self.bonus[:, None, None]

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
    """A trained student and everything it needs to predict: ``segment(image)`` gives a label map.

    Made by `load_segmenter`. It predicts on the device of its student.

    Args:
        segmenter: student, in eval mode, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w).
        class_names: names of all A classes, seen and unseen.
        unseen: label values of the unseen classes.
        text_features: unit rows, (A, C), in the order of `class_names`.
        settings: arguments of `Predictor`: ``gamma``, ``logit_scale``, ``similarity``, ``resize``,
            ``size_divisor``.
        checkpoint: the other entries of the checkpoint ("step", "config", "clip", ...).
    """

    segmenter: nn.Module
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]
    text_features: Tensor
    settings: dict[str, Any]
    checkpoint: dict[str, Any]

    def __call__(
        self,
        image: ImageLike,
        words: Sequence[str] | None = None,
        clip: CLIP | str | Path | None = None,
    ) -> Tensor:
        """Segment one image.

        Args:
            image: a path, a PIL image, an array (H, W, 3), or a tensor (3, H, W).
            words: what labels 0, 1, ... shall mean, instead of `class_names`.
            clip: as for `with_words`, which is faster for many images.

        Returns:
            Labels, int64 (H, W), on the device of the student.
        """
        student = self if words is None else self.with_words(words, clip)
        return student.predictor()(to_image(image))

    def predictor(self, **settings: Any) -> Predictor:
        """Return a `Predictor` of these classes; `settings` add to its arguments or replace them.

        For example ``load_segmenter("runs/miniworld").predictor(mode="slide")(image)``.
        """
        arguments = {"unseen": self.unseen, **self.settings, **settings}
        return Predictor(self.segmenter, self.text_features, **arguments)

    def with_words(
        self, words: Sequence[str], clip: CLIP | str | Path | None = None
    ) -> TrainedSegmenter:
        """Return the same student for other words than those of its training run.

        Words of the training run keep their stored features; for any other, the text encoder of
        the CLIP that taught the student reads the words (section 3.4, arXiv:2310.02296v1). Unseen
        are the words that training had no labels for.

        Args:
            words: what labels 0, 1, ... shall mean.
            clip: the teacher, or its name or path, if it is not where the training run had it.

        Raises:
            FileNotFoundError: if the CLIP is needed and not there.
            ValueError: if a word is blank, or the CLIP is not the one that taught the student.
        """
        keys = [spell_class_name(word) for word in words]
        known = {spell_class_name(name): k for k, name in enumerate(self.class_names)}
        seen = {key for key, k in known.items() if k not in self.unseen}
        if all(key in known for key in keys):
            text = self.text_features[[known[key] for key in keys]]
        else:
            teacher = self._load_teacher(clip)
            text = class_text_features(teacher, words, self.checkpoint.get("templates", "single"))
        unseen = tuple(k for k, key in enumerate(keys) if key not in seen)
        return replace(self, class_names=tuple(words), unseen=unseen, text_features=text)

    def _load_teacher(self, clip: CLIP | str | Path | None) -> CLIP:
        source = clip or self.checkpoint.get("clip")
        if source is None:
            raise ValueError(
                "words that the student was not trained with need its teacher, got none; name it "
                "as `clip` (--clip)"
            )
        try:
            teacher = source if isinstance(source, CLIP) else load_clip(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"words that the student was not trained with need its teacher, but {error}; "
                "name it as `clip` (--clip)"
            ) from error
        width = self.text_features.shape[1]
        if teacher.embed_dim != width:
            raise ValueError(
                f"the CLIP must be the one that taught the student, with {width} channels, got "
                f"{teacher.embed_dim}; give another as `clip` (--clip)"
            )
        return teacher


def save_segmenter(path: str | Path, segmenter: nn.Module, **description: Any) -> None:
    """Save a student of any training loop, with everything that `load_segmenter` needs.

    Args:
        path: the file to write, whole or not at all.
        segmenter: the student. One of `build_segmenter` is rebuilt from its name and options; for
            any other, `load_segmenter` needs the network.
        description: ``names=``, ``unseen=``, ``text_features=``, ``gamma=`` and the further
            arguments of `checkpoint.student_content`.
    """
    save_student({"step": 0, **student_content(segmenter, **description)}, path)


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
    segmenter = _rebuild(content, path) if segmenter is None else segmenter
    try:
        segmenter.load_state_dict(weights)
    except RuntimeError as error:  # torch lists every tensor; the first says enough
        difference = str(error).splitlines()[1].strip()[:200]
        raise ValueError(
            f"the weights in {path} must fit the segmenter {name!r}, but {difference}; "
            "pass the network they were trained in as `segmenter`"
        ) from None
    content.pop("training", None)  # optimiser and bank: several times the weights
    resize = content.pop("resize") or None
    settings = {key: content.pop(key) for key in ("gamma", "logit_scale", "similarity")}
    return TrainedSegmenter(
        segmenter=segmenter.eval(),
        class_names=tuple(content.pop("class_names")),
        unseen=tuple(content.pop("unseen")),
        text_features=content.pop("text_features"),
        settings={
            **settings,
            "resize": None if resize is None else tuple(resize),
            "size_divisor": content.pop("size_divisor"),
        },
        checkpoint=content,
    )


def _rebuild(content: dict[str, Any], path: str | Path) -> nn.Module:
    """Build the student again that `build_segmenter` built for training."""
    name = content["segmenter_name"]
    if name is None:
        raise ValueError(
            f"the student in {path} was not built by build_segmenter; pass the network that it "
            "was trained in: load_segmenter(path, segmenter=network)"
        )
    try:
        return build_segmenter(name, content["channels"], **content["segmenter_options"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the student in {path} cannot be built again: {error}; pass the network that it was "
            "trained in: load_segmenter(path, segmenter=network)"
        ) from error


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along one side; the last one ends at the border.

    >>> window_starts(1000, 512, 426)
    [0, 426, 488]
    """
    last = max(length - window, 0)
    steps = -(-last // stride)
    return [min(step * stride, last) for step in range(steps + 1)]


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


def _check_modes(similarity: str, mode: str) -> None:
    if similarity not in ("dot", "cosine"):
        raise ValueError(f'`similarity` must be "dot" or "cosine", got {similarity!r}')
    if mode not in ("whole", "slide"):
        raise ValueError(f'`mode` must be "whole" or "slide", got {mode!r}')


def _check_windows(window: int, stride: int, window_batch: int, size_divisor: int) -> None:
    if not 1 <= stride <= window:
        raise ValueError(
            f"`stride` must lie in 1..window, got stride {stride} for windows of {window} pixels; "
            "a larger one leaves gaps"
        )
    for name, value in (("window_batch", window_batch), ("size_divisor", size_divisor)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
