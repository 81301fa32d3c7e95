"""Draw what the model does: overlays with a legend, prediction panels, attention and clusters.

The material of Figures 5-7 of arXiv:2310.02296v1. Every function takes tensors as the rest of the
package makes them (images (3, H, W), label maps (H, W)) and returns a `PIL.Image`; `overlay` takes
PIL images and arrays as well:

    overlay           image with its classes in colour, their names, and a legend with their area
    prediction_panel  rows of image | label | prediction | unseen classes alone
    heat_map          the attention of the GLM over the image
    cluster_map       the groups of the PLM over the image

Small images are enlarged, so that a 128-pixel crop is readable. Cost: milliseconds per image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from . import IGNORE_INDEX
from .data.images import ImageLike, to_image
from .drawing import MARGIN as _MARGIN
from .drawing import Colour, Entry, draw_legend, draw_names, font_for, legend_height, outline
from .files import write_whole
from .palette import Pixels, class_palette, word_palette

_PAPER, _INK, _IGNORED = (255, 255, 255), (40, 40, 40), (70, 70, 70)
_GAP = 8
_READABLE = 256  # pixels of the long side up to which images are enlarged
_CELL = 512  # pixels of the long side above which a panel shrinks its images
# Dark violet over red to light yellow: monotone in lightness, readable in grey.
_HEAT = np.array([(8, 6, 40), (96, 20, 110), (196, 52, 80), (246, 140, 36), (252, 250, 180)])


def overlay(
    image: ImageLike,
    labels: Tensor | NDArray[np.generic],
    class_names: Sequence[str],
    palette: Pixels | None = None,
    alpha: float = 0.5,
    unseen: Sequence[int] = (),
    annotate: bool = True,
) -> Image.Image:
    """Draw a label map over its image, with a legend of the classes present.

    Args:
        image: a path, a PIL image, an array (H, W, 3), or a tensor (3, H, W).
        labels: (H, W) label values; 255 keeps the bare image.
        class_names: names of all A classes.
        palette: uint8 (A, 3); `word_palette(class_names)` if left out, in which a word has the
            same colour in all pictures.
        alpha: opacity of the colours, 0..1.
        unseen: label values marked as unseen in the legend.
        annotate: outline the regions, and write the names inside where they fit.

    Returns:
        Picture, RGB. The legend names the share of the area, largest first.

    Raises:
        ValueError: if image and labels differ in size or a label has no name.
    """
    colours = word_palette(class_names) if palette is None else palette
    pixels, values = _prepare(to_image(image), torch.as_tensor(labels), len(class_names))
    size = _display_size(pixels, _READABLE, None)
    shown = _resize_labels(values, size)
    painted = _paint(_resize(pixels, size), shown, colours, alpha)
    counts = np.bincount(values[values != IGNORE_INDEX], minlength=len(class_names))
    entries: list[Entry] = [
        (f"{class_names[k]} {_percent(counts[k] / values.size)}", _colour(colours, k), k in unseen)
        for k in np.argsort(-counts, kind="stable")
        if counts[k]
    ]
    letters = int(np.clip(size[0] // 45, 13, 40))
    if annotate:
        painted = np.where(outline(shown)[..., None], np.array(_PAPER, np.uint8), painted)
    sheet, top = Image.fromarray(painted), _MARGIN + size[1] + _GAP
    if annotate:
        draw_names(sheet, shown, class_names, letters)
    width = max(size[0], 240) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, top + legend_height(entries, width, letters)), _PAPER)
    canvas.paste(sheet, ((width - size[0]) // 2, _MARGIN))
    draw_legend(canvas, entries, top, letters)
    return canvas


def prediction_panel(
    images: Sequence[Tensor] | Tensor,
    labels: Sequence[Tensor] | Tensor,
    predictions: Sequence[Tensor] | Tensor,
    class_names: Sequence[str],
    unseen: Sequence[int] = (),
) -> Image.Image:
    """Draw rows of image, label, prediction, and the prediction where unseen classes are.

    In the last column everything is dimmed but the pixels labelled or predicted as unseen.

    Args:
        images: each (3, H, W), uint8 or float in [0, 1].
        labels: each (H, W) label values, 255 = ignore.
        predictions: each (H, W) label values.
        class_names: names of all A classes.
        unseen: label values of the unseen classes.

    Returns:
        Picture, RGB, with column titles and a legend of all classes that occur.

    Raises:
        ValueError: if there are no images, the lengths differ, or a label has no name.
    """
    if not 0 < len(images) == len(labels) == len(predictions):
        raise ValueError(
            "images, labels and predictions must be equally many and at least one, "
            f"got {len(images)}, {len(labels)} and {len(predictions)}"
        )
    colours, present = word_palette(class_names), np.zeros(256, dtype=bool)
    rows: list[list[Pixels]] = []
    for image, label, prediction in zip(images, labels, predictions, strict=True):
        pixels, truth = _prepare(image, label, len(class_names))
        predicted = _prepare(image, prediction, len(class_names))[1]
        present[truth], present[predicted] = True, True
        rows.append(_panel_row(pixels, truth, predicted, colours, unseen))
    entries: list[Entry] = [
        (class_names[k], _colour(colours, k), k in unseen)
        for k in range(len(class_names))
        if present[k]
    ]
    entries += [("no label", _IGNORED, False)] if present[IGNORE_INDEX] else []
    return _draw_grid(rows, ["image", "label", "prediction", "unseen classes"], entries)


def heat_map(image: Tensor, weights: Tensor, alpha: float = 0.6) -> Image.Image:
    """Draw weights over the image, for example the attention W of Eq. (1), arXiv:2310.02296v1.

    Args:
        image: (3, H, W), uint8 or float in [0, 1].
        weights: (h, w) of any scale; stretched from their minimum to their maximum.
        alpha: opacity of the colours, 0..1.

    Returns:
        Picture, RGB: violet = low, yellow = high.

    Raises:
        ValueError: if `weights` is not a finite matrix.
    """
    heat = weights.detach().float().cpu().numpy()
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise ValueError(f"`weights` must be a finite (h, w) map, got shape {tuple(heat.shape)}")
    pixels = _pixels(image)
    size = _display_size(pixels, _READABLE, None)
    spread = float(heat.max() - heat.min())
    heat = (heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)
    heat = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(heat, stops, _HEAT[:, c]) for c in range(3)], axis=-1)
    return Image.fromarray(_blend(_grey(_resize(pixels, size)), colour, alpha))


def cluster_map(image: Tensor, groups: Tensor, alpha: float = 0.6) -> Image.Image:
    """Draw K-Means clusters or fused groups over the image, one colour each.

    Args:
        image: (3, H, W), uint8 or float in [0, 1].
        groups: (h, w) group of each token, enlarged by nearest; negative = none, drawn in grey.
        alpha: opacity of the colours, 0..1.

    Returns:
        Picture, RGB.

    Raises:
        ValueError: if `groups` is not a matrix.
    """
    values = groups.detach().cpu().numpy()
    if values.ndim != 2:
        raise ValueError(f"`groups` must have shape (h, w), got {tuple(values.shape)}")
    ids, ranks = np.unique(values[values >= 0], return_inverse=True)
    numbered = np.full(values.shape, IGNORE_INDEX, dtype=np.uint8)
    numbered[values >= 0] = ranks % IGNORE_INDEX  # colours repeat after 255 groups
    pixels = _pixels(image)
    size = _display_size(pixels, _READABLE, None)
    numbered = _resize_labels(numbered, size)
    palette = class_palette(min(len(ids), IGNORE_INDEX))
    resized = _resize(pixels, size)
    painted = _paint(resized, numbered, palette, alpha)
    none = (numbered == IGNORE_INDEX)[..., None]
    return Image.fromarray(np.where(none, _blend(_grey(resized), _IGNORED, 0.4), painted))


def write_png(image: Image.Image, path: str | Path) -> None:
    """Write a picture as PNG; an interrupted program leaves the old file or none, never half."""
    with write_whole(path) as file:
        image.save(file, format="PNG")


def _panel_row(
    pixels: Pixels, truth: Pixels, predicted: Pixels, colours: Pixels, unseen: Sequence[int]
) -> list[Pixels]:
    """Return the four pictures of one row of the panel, equally large."""
    size = _display_size(pixels, _READABLE, _CELL)
    pixels = _resize(pixels, size)
    truth, predicted = _resize_labels(truth, size), _resize_labels(predicted, size)
    label = _paint(pixels, truth, colours, 0.65, ignored=_IGNORED)
    prediction = _paint(pixels, predicted, colours, 0.65)
    chosen = np.isin(truth, unseen) | np.isin(predicted, unseen)
    dimmed = _blend(_grey(pixels), _PAPER, 0.7)
    vivid = _paint(pixels, predicted, colours, 0.85)
    return [pixels, label, prediction, np.where(chosen[..., None], vivid, dimmed)]


def _draw_grid(rows: list[list[Pixels]], titles: list[str], entries: list[Entry]) -> Image.Image:
    letters = 14
    cell = max(row[0].shape[1] for row in rows)
    width = 2 * _MARGIN + len(titles) * cell + (len(titles) - 1) * _GAP
    first = _MARGIN + 24
    below = first + sum(row[0].shape[0] + _GAP for row in rows)
    canvas = Image.new("RGB", (width, below + legend_height(entries, width, letters)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        left, top = _MARGIN + column * (cell + _GAP), first
        draw.text((left + cell / 2, _MARGIN), title, _INK, font_for(title, 15), anchor="ma")
        for row in rows:
            canvas.paste(Image.fromarray(row[column]), (left + (cell - row[0].shape[1]) // 2, top))
            top += row[0].shape[0] + _GAP
    draw_legend(canvas, entries, below, letters)
    return canvas


def _prepare(image: Tensor, labels: Tensor, num_classes: int) -> tuple[Pixels, Pixels]:
    pixels, values = _pixels(image), labels.detach().cpu().numpy()
    if values.shape != pixels.shape[:2]:
        raise ValueError(
            f"labels must be as large as the image, got {tuple(values.shape)} for "
            f"{tuple(pixels.shape[:2])}; predict at the original size"
        )
    unnamed = np.setdiff1d(values, [*range(num_classes), IGNORE_INDEX])
    if unnamed.size:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1} or be {IGNORE_INDEX}, got "
            f"{unnamed[:8].tolist()}; `class_names` needs one name per class"
        )
    return pixels, values.astype(np.uint8)


def _pixels(image: Tensor) -> Pixels:
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"`image` must have shape (3, H, W), got {tuple(image.shape)}")
    if image.dtype != torch.uint8:
        image = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())


def _display_size(pixels: Pixels, readable: int, limit: int | None) -> tuple[int, int]:
    """Return (width, height): a whole multiple of a small image, a large one fitted to `limit`."""
    height, width = pixels.shape[:2]
    factor: float = max(1, round(readable / max(height, width)))
    if limit is not None:
        factor = min(factor, limit / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _resize_labels(labels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def _paint(
    pixels: Pixels, labels: Pixels, palette: Pixels, alpha: float, ignored: Colour | None = None
) -> Pixels:
    """Blend the colour of each label into the image; ignored pixels stay, or take a colour.

    The image fades to grey as the colour comes in, or red bricks painted blue would turn violet
    and match no swatch of the legend.
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    painted = _blend(_blend(pixels, _grey(pixels), alpha), table[labels], alpha)
    bare = (labels == IGNORE_INDEX)[..., None]
    return np.where(bare, pixels if ignored is None else np.array(ignored, np.uint8), painted)


def _blend(pixels: Pixels, colour: NDArray[np.generic] | Colour, alpha: float) -> Pixels:
    mixed = (1 - alpha) * pixels + alpha * np.asarray(colour, dtype=np.float64)
    return mixed.round().astype(np.uint8)


def _grey(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))


def _colour(palette: Pixels, index: int) -> Colour:
    red, green, blue = (int(value) for value in palette[index])
    return red, green, blue


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
