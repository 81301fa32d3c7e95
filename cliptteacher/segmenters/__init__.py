"""The trainable students: any network from images to dense features of the joint space.

Section 3.1 of arXiv:2310.02296v1 asks of the student only that it maps images (B, 3, H, W) to
features (B, C, h, w), with C the width of the CLIP space. `build_segmenter` builds one by name,
`adapt_segmenter` turns a foreign network into one. Either has `head` (the layers with random
weights, which may get a higher learning rate), `stride` and `channels`. README.md in this folder
lists them all.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from .adapt import AdaptedSegmenter, adapt_segmenter
from .fpn import FPNSegmenter
from .segformer import SEGFORMER_CONFIGS, Segformer, SegformerConfig
from .segnext import SEGNEXT_CONFIGS, SegNeXt, SegNeXtConfig
from .segnext_weights import SEGNEXT_IMAGENET, load_segnext_weights, read_segnext_weights
from .student import BuildArguments, Student
from .swin import SWIN_CONFIGS, Swin, SwinConfig
from .swin_weights import SWIN_IMAGENET, load_swin_weights, read_swin_weights
from .weights import (
    SEGFORMER_IMAGENET,
    MisfitError,
    cached,
    load_segformer_weights,
    read_segformer_weights,
)
from .zoo import TORCHVISION_NETWORKS, build_torchvision

__all__ = [
    "AdaptedSegmenter",
    "FPNSegmenter",
    "SegNeXt",
    "SegNeXtConfig",
    "Segformer",
    "SegformerConfig",
    "Swin",
    "SwinConfig",
    "adapt_segmenter",
    "build_segmenter",
    "imagenet_file",
    "list_segmenters",
    "rebuild_segmenter",
]


def list_segmenters() -> list[str]:
    """List the names that `build_segmenter` knows, from small to large in each family."""
    return list(_BUILDERS)


def build_segmenter(
    name: str, channels: int, weights: str | Path | None = None, **options: object
) -> Student | AdaptedSegmenter:
    """Build a student by name.

    The result carries its name, `channels` and `options` as `build_arguments`, from which
    `load_segmenter` builds the same network again.

    Args:
        name: One of `list_segmenters()`.
        channels: C, the width of the joint space, `clip.embed_dim`.
        weights: `"imagenet"` for the published backbone, a file, or None for random weights.
        options: Fields of the configuration of the family, such as `drop_path=0.0`: numbers,
            booleans and tuples of them.

    Returns:
        A network from images (B, 3, H, W) in [0, 1] to features (B, C, H/s, W/s), s its `stride`.

    Raises:
        ValueError: If the name or an option is unknown, or the weights do not fit.
        FileNotFoundError: If the file of weights does not exist and cannot be downloaded.

    >>> build_segmenter("segformer_nano", channels=64).stride
    4
    """
    if name not in _BUILDERS:
        raise ValueError(
            f"`name` must be a known segmenter, got {name!r}; {_suggest(name, list_segmenters())}"
        )
    try:
        model = _BUILDERS[name](channels, weights, options)
    except MisfitError as error:
        raise ValueError(f"{weights} does not fit {name}: {error}") from error
    model.build_arguments = BuildArguments(
        name=name, channels=channels, options={key: _plain(v) for key, v in options.items()}
    )
    return model


def imagenet_file(name: str) -> Path | None:
    """Return where the ImageNet weights of a student lie or would lie; None if it has none."""
    file = {**SEGFORMER_IMAGENET, **SEGNEXT_IMAGENET}.get(name)
    if file is not None:
        return cached(file)
    network = TORCHVISION_NETWORKS.get(name)
    enumeration = SWIN_IMAGENET.get(name) or (network and network.weights)
    if enumeration is None:
        return None
    from torchvision.models import get_weight  # slow to import

    return cached(get_weight(f"{enumeration}.IMAGENET1K_V1").url)


def rebuild_segmenter(content: Mapping[str, Any], path: str | Path) -> Student | AdaptedSegmenter:
    """Build the student of a checkpoint again, with random weights.

    Args:
        content: of the checkpoint.
        path: of the checkpoint, for the sentence.

    Raises:
        ValueError: `build_segmenter` did not build the student.
    """
    name, cause = content["segmenter_name"], "was not built by build_segmenter"
    if name is not None:
        try:
            return build_segmenter(name, content["channels"], **content["segmenter_options"])
        except (TypeError, ValueError) as error:
            cause = f"cannot be built again: {error}"
    raise ValueError(
        f"the student in {path} {cause}; pass the network that it was trained in: "
        "load_segmenter(path, segmenter=network)"
    )


def _plain(value: object) -> object:
    """Write an option as JSON would."""
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _build_segformer(
    name: str, channels: int, weights: str | Path | None, options: dict[str, object]
) -> Segformer:
    _check_options(name, options, [field.name for field in fields(SegformerConfig)])
    state = {} if weights is None else read_segformer_weights(name, weights)
    if "head.fuse.weight" in state and state["head.fuse.weight"].ndim:
        # Heads differ in width between releases of the same size, and in the norms on their levels.
        # Both become options, so that the student can be built again without that file.
        options.setdefault("decoder_channels", len(state["head.fuse.weight"]))
        options.setdefault("head_norms", "head.norms.0.weight" in state)
    config = replace(SEGFORMER_CONFIGS[name], **options)  # type: ignore[arg-type]
    model = Segformer(config, channels)
    if weights is not None:
        load_segformer_weights(model, state)
    return model


def _build_segnext(
    name: str, channels: int, weights: str | Path | None, options: dict[str, object]
) -> SegNeXt:
    _check_options(name, options, [field.name for field in fields(SegNeXtConfig)])
    model = SegNeXt(replace(SEGNEXT_CONFIGS[name], **options), channels)  # type: ignore[arg-type]
    if weights is not None:
        load_segnext_weights(model, read_segnext_weights(name, weights))
    return model


def _build_swin(
    name: str, channels: int, weights: str | Path | None, options: dict[str, object]
) -> Swin:
    _check_options(name, options, [field.name for field in fields(SwinConfig)])
    model = Swin(replace(SWIN_CONFIGS[name], **options), channels)  # type: ignore[arg-type]
    if weights is not None:
        load_swin_weights(model, read_swin_weights(name, weights))
    return model


def _build_fpn(
    channels: int, weights: str | Path | None, options: dict[str, object]
) -> FPNSegmenter:
    if weights is not None:
        raise ValueError(f"fpn_small has no published weights, got {weights!r}; leave them out")
    _check_options("fpn_small", options, list(inspect.signature(FPNSegmenter).parameters)[1:])
    return FPNSegmenter(channels, **options)  # type: ignore[arg-type]


def _build_torchvision(
    name: str, channels: int, weights: str | Path | None, options: dict[str, object]
) -> AdaptedSegmenter:
    _check_options(name, options, [])
    return build_torchvision(name, channels, weights)


def _check_options(name: str, options: dict[str, object], known: list[str]) -> None:
    for option in options:
        if option not in known:
            hint = _suggest(option, known) if known else "it has no options"
            raise ValueError(f"{name} has no option {option!r}; {hint}")


def _suggest(unknown: str, known: list[str]) -> str:
    """Name the nearest known word, then all of them."""
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.0)[0]
    return f"did you mean {nearest!r}? Known: {', '.join(known)}"


_Builder = Callable[[int, str | Path | None, dict[str, object]], Student | AdaptedSegmenter]
_BUILDERS: dict[str, _Builder] = {
    "fpn_small": _build_fpn,
    **{name: partial(_build_segformer, name) for name in SEGFORMER_CONFIGS},
    **{name: partial(_build_segnext, name) for name in SEGNEXT_CONFIGS},
    **{name: partial(_build_swin, name) for name in SWIN_CONFIGS},
    **{name: partial(_build_torchvision, name) for name in TORCHVISION_NETWORKS},
}
