"""Segment images with the trained student and the names of classes, seen and unseen alike.

Section 3.4 of arXiv:2310.02296v1. CLIP's image encoder takes no part:

    features = student(image)                                (B, C, h, w)
    logits   = logit_scale * features . text of all classes  (B, A, h, w)
    logits  += gamma on the unseen columns
    labels   = argmax over A of logits, bilinear to the original size

The logits are upsampled, not the features: no tensor has C channels at full size.
Deviation: one bilinear step to the original size, where the toolbox takes a second by way of the
size of its crops.
Cost: one forward pass of the student, plus A channels at the size of the image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_student, student_content
from .clip import CLIP, DenseTokens, class_text_features, load_clip
from .clip.model import Activation
from .clip.prompts import Templates, spell_class_name, unread_words
from .clip.weights import Heads
from .data.images import ImageLike, to_batch, to_image
from .data.transforms import keep_ratio_size
from .logits import Similarity, pixel_logits, upsample, upsampled_argmax
from .options import check_value, holds
from .segmenters import rebuild_segmenter
from .segmenters.padding import features_of_multiple
from .segmenters.student import eval_view
from .sliding import check_windows, slide
from .tensors import without_prefixes

Mode = Literal["whole", "slide"]
_OPTIONS = {
    **{"unseen": tuple[int, ...], "resize": tuple[int, int] | None},
    **{"similarity": Similarity, "mode": Mode},
    **dict.fromkeys(("gamma", "logit_scale"), float),
    **dict.fromkeys(("window", "stride", "window_batch", "size_divisor"), int),
}


class Predictor(nn.Module):
    """Predict label maps with a student and text features.

    Args:
        segmenter: student, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w); a submodule.
            It predicts in eval mode and keeps the mode that it has, so it may be in training, and
            threads may share a predictor: see `eval_view`.
        text_features: (A, C), one row per class; brought to unit length here.
        unseen: label values of the unseen classes, which get the bonus `gamma`.
        gamma: bonus in logit units; 1.5 in the paper (5 in its ablation without the GLM).
        logit_scale: factor on the logits before the bonus, as in training.
        similarity: "dot" for raw features, "cosine" for features of unit length, as in training.
        mode: "whole" image at once, or overlapping windows, "slide".
        window: side of a window in pixels.
        stride: step between windows in pixels.
        window_batch: windows in one forward pass.
        resize: resize images to fit into these (long, short) sides, (2048, 512) in the
            benchmarks. Images shrink with antialiasing, as in training.
        size_divisor: pad images by reflection to a multiple of this, the student's largest stride.

    Raises:
        ValueError: an argument has another type, shape or range, or the windows leave gaps.
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
        given = locals()
        checked = {name: check_value(name, given[name], kind) for name, kind in _OPTIONS.items()}
        check_windows(window, stride, window_batch)
        sizes = (size_divisor, *(resize or ()))
        if min(sizes) < 1:
            raise ValueError(f"`size_divisor` and `resize` must be at least 1, got {sizes}")
        self.unseen: tuple[int, ...] = checked["unseen"]
        _check_classes(text_features, self.unseen)
        self.similarity, self.mode, self.logit_scale = similarity, mode, logit_scale
        self.window, self.stride, self.window_batch = window, stride, window_batch
        self.resize, self.size_divisor = resize, size_divisor
        self.segmenter = segmenter
        self._eval_view = (eval_view(segmenter),)  # in a tuple: not a submodule
        text = F.normalize(text_features.detach().float(), dim=1)
        text = text.to(next((p.device for p in segmenter.parameters()), text.device))
        self.register_buffer("text_features", text)
        self.register_buffer("bonus", torch.zeros_like(text[:, 0]))
        self.bonus[list(self.unseen)] = float(gamma)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Predict the class of every pixel.

        Args:
            image: (3, H, W) or (B, 3, H, W), uint8 or float in [0, 1], on any device.

        Returns:
            Labels in 0..A-1, int64 (H, W) or (B, H, W), on the device of the predictor.

        Raises:
            ValueError: `image` has another shape, dtype or range.
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
        logits, size = self._resized_logits(image) - self.bonus[:, None, None], image.shape[-2:]
        columns = torch.zeros_like(self.bonus[:, None, None])
        columns[list(self.unseen)] = 1.0
        labels = torch.stack([upsampled_argmax(logits + gamma * columns, size) for gamma in gammas])
        return labels if image.ndim == 4 else labels.squeeze(1)

    def _resized_logits(self, image: Tensor) -> Tensor:
        """Return logits (B, A, h, w), of whatever size the network works at."""
        images = to_batch(image).to(self.text_features.device)
        H, W = images.shape[-2:]
        size = keep_ratio_size(H, W, self.resize) if self.resize else (H, W)
        if size != (H, W):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self._slide(images) if self.mode == "slide" else self._whole(images)

    def _whole(self, images: Tensor) -> Tensor:
        features = features_of_multiple(self._eval_view[0], images, self.size_divisor)
        shape, width = tuple(features.shape), self.text_features.shape[1]
        if len(shape) != 4 or shape[1] != width:
            raise ValueError(f"the student must give features (B, {width}, h, w), got {shape}")
        logits = pixel_logits(features, self.text_features, self.logit_scale, self.similarity)
        return logits.float() + self.bonus[:, None, None]

    def _slide(self, images: Tensor) -> Tensor:
        """Return the averaged logits of overlapping windows, (B, A, H, W)."""

        def predict(windows: Tensor) -> Tensor:
            return upsample(self._whole(windows), windows.shape[-2:])

        return slide(predict, images, self.window, self.stride, self.window_batch)


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained student with its words: ``segment(image)`` gives a label map.

    Made by `load_segmenter`; predicts on the device of its student.

    Args:
        segmenter: student, in eval mode, images (B, 3, H, W) in [0, 1] -> features (B, C, h, w).
        class_names: names of all A classes, seen and unseen.
        unseen: label values of the unseen classes.
        text_features: unit rows, (A, C), in the order of `class_names`.
        settings: arguments of `Predictor`, ``gamma`` to ``size_divisor``.
        checkpoint: the other entries of the checkpoint ("step", "config", "clip", ...).
        unread: words that CLIP was not trained on; their predictions mean nothing.
    """

    segmenter: nn.Module
    class_names: tuple[str, ...]
    unseen: tuple[int, ...]
    text_features: Tensor
    settings: dict[str, Any]
    checkpoint: dict[str, Any]
    unread: tuple[str, ...] = ()

    def __repr__(self) -> str:
        name = self.checkpoint.get("segmenter_name") or type(self.segmenter).__name__
        words = ", ".join((*self.class_names[:5], *["..."] * (len(self.class_names) > 5)))
        return f"TrainedSegmenter({name}, {len(self.class_names)} words: {words})"

    def __call__(
        self,
        image: ImageLike,
        words: Sequence[str] | None = None,
        clip: CLIP | str | Path | None = None,
    ) -> Tensor:
        """Segment one image.

        Args:
            image: a path, a PIL image, an array (H, W, 3), or a tensor (3, H, W).
            words: names of the labels 0, 1, ..., instead of `class_names`.
            clip: see `with_words`, which is faster for many images.

        Returns:
            Labels, int64 (H, W), on the device of the student.
        """
        student = self if words is None else self.with_words(words, clip)
        if student.unread:
            words = ", ".join(student.unread)
            warnings.warn(f"the CLIP never read {words}: no prediction of it counts", stacklevel=2)
        labels: Tensor = student.predictor()(to_image(image))
        return labels

    def predictor(self, **settings: Any) -> Predictor:
        """Return a `Predictor` of these classes; `settings` replace its arguments."""
        arguments = {"unseen": self.unseen, **self.settings, **settings}
        return Predictor(self.segmenter, self.text_features, **arguments)

    def with_words(
        self,
        words: Sequence[str],
        clip: CLIP | str | Path | None = None,
        activation: Activation | None = None,
        heads: Heads | None = None,
        templates: Templates | None = None,
    ) -> TrainedSegmenter:
        """Return the same student for other words than those of its training run.

        Words of the training run keep their stored features; any other word is encoded by the
        CLIP that taught the student (section 3.4, arXiv:2310.02296v1). Words without labels in
        training are unseen.

        Args:
            words: names of the labels 0, 1, ...
            clip: the teacher, its name or its path; by default the one that the checkpoint names.
            activation, heads: of the teacher, see `load_clip`; by default as in training.
            templates: prompts of all words, those of the training run too; by default as there.

        Raises:
            FileNotFoundError: the CLIP is needed and does not exist.
            ValueError: a word is blank, or the CLIP is not the one that taught the student.
        """
        keys = [spell_class_name(word) for word in words]
        known = {spell_class_name(name): k for k, name in enumerate(self.class_names)}
        unread: tuple[str, ...] = ()
        if templates is None and all(key in known for key in keys):
            text = self.text_features[[known[key] for key in keys]]
        else:
            teacher = self.load_teacher(clip, activation, heads)
            stored = self.checkpoint.get("templates", "single")
            text = class_text_features(teacher, words, templates or stored)
            unread = unread_words(teacher, words)
        seen = {key for key, k in known.items() if k not in self.unseen}
        unseen = tuple(k for k, key in enumerate(keys) if key not in seen)
        return replace(
            self, class_names=tuple(words), unseen=unseen, text_features=text, unread=unread
        )

    def load_teacher(
        self,
        clip: CLIP | str | Path | None = None,
        activation: Activation | None = None,
        heads: Heads | None = None,
    ) -> CLIP:
        """Load the CLIP that taught the student; arguments and errors as in `with_words`."""
        source = clip or self.checkpoint.get("clip")
        settings: dict[str, Any] = {
            "activation": activation or self.checkpoint.get("clip_activation"),
            "heads": heads or tuple(self.checkpoint.get("clip_heads") or ()) or None,
        }
        need = "words that the student was not trained with need its teacher"
        if source is None:
            raise ValueError(f"{need}, got none; name it as `clip` (--clip)")
        try:
            teacher = source if isinstance(source, CLIP) else load_clip(source, **settings)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{need}, but {error}; name it as `clip` (--clip)") from error
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
        segmenter: the student; if `build_segmenter` did not build it, loading needs the network.
        description: ``names=``, ``unseen=``, ``text_features=``, ``gamma=`` and the other
            arguments of `checkpoint.student_content`.
    """
    save_student({"step": 0, **student_content(segmenter, **description)}, path)


def load_segmenter(path: str | Path, segmenter: nn.Module | None = None) -> TrainedSegmenter:
    """Load the student of a checkpoint, ready to predict; CLIP is not needed.

    Args:
        path: checkpoint, or the directory of a run, whose newest checkpoint is taken.
        segmenter: network to load the weights into, if `build_segmenter` did not build it.

    Returns:
        The student with its class names, text features and inference settings, on the CPU.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the file is no checkpoint, or the weights do not fit the network.
    """
    content = load_checkpoint(path)
    weights, name = content.pop("segmenter"), content["segmenter_name"]
    segmenter = rebuild_segmenter(content, path) if segmenter is None else segmenter
    try:
        expected = segmenter.state_dict()
        weights = without_prefixes(weights) if weights.keys() != expected.keys() else weights
        for key in weights.keys() & expected.keys():  # loading would convert in silence
            if expected[key].is_floating_point() != weights[key].is_floating_point():
                raise ValueError(f"{key!r} holds {weights[key].dtype}, not {expected[key].dtype}")
        segmenter.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:  # torch lists every tensor; the first says enough
        difference = " ".join(str(error).split("\n")[:2])[:200]
        raise ValueError(
            f"the weights in {path} must fit the segmenter {name!r}, but {difference}; "
            "pass the network they were trained in as `segmenter`"
        ) from None
    content.pop("training", None)  # optimiser and bank: several times the weights
    names = ("gamma", "logit_scale", "similarity", "size_divisor")
    settings = {key: content.pop(key) for key in names}
    return TrainedSegmenter(
        segmenter=segmenter.eval(),
        class_names=tuple(content.pop("class_names")),
        unseen=tuple(content.pop("unseen")),
        text_features=content.pop("text_features"),
        settings={**settings, "resize": tuple(content.pop("resize")) or None},
        checkpoint=content,
    )


def clip_segmenter(
    clip: CLIP, names: Sequence[str], templates: Templates = "single"
) -> TrainedSegmenter:
    """Segment with CLIP alone, without training: its dense tokens against the text features.

    Args:
        clip: the teacher.
        names: names of the labels 0, 1, ...
        templates: prompts of the names.
    """
    return TrainedSegmenter(
        segmenter=DenseTokens(clip).eval(),
        class_names=tuple(names),
        unseen=(),
        text_features=class_text_features(clip, names, templates),
        settings={"gamma": 0.0, "similarity": "cosine"},
        checkpoint={"segmenter_name": "dense tokens", "step": 0},
        unread=unread_words(clip, names),
    )


def _check_classes(text_features: Tensor, unseen: Sequence[int]) -> None:
    shape = tuple(getattr(text_features, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`text_features` must have shape (A, C) with A >= 1, got {shape}")
    need = "`text_features` must hold finite numbers"
    if not holds(text_features.isfinite().all(), need):
        raise ValueError(f"{need}, got NaN or infinity; check the teacher")
    outside = [index for index in unseen if not 0 <= index < len(text_features)]
    if outside:
        raise ValueError(
            f"`unseen` must hold label values in 0..{len(text_features) - 1}, got {outside}; "
            "`text_features` needs one row per class, seen and unseen"
        )
