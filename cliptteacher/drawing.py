"""Words on pictures: fonts for every script, names inside regions, outlines, legends.

    font_for    Pillow's own font, or one of the system where that lacks a letter
    draw_names  the name of each class where it fits into its region
    outline     lines between regions
    draw_legend swatch and text of each class, in as many lines as they need

Cost: milliseconds; the first word of another script looks through the fonts of the system.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from . import IGNORE_INDEX

Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Entry = tuple[str, Colour, bool]  # text, swatch, marked as unseen

MARGIN = 12
_PAPER, _INK, _ACCENT = (255, 255, 255), (40, 40, 40), (200, 48, 32)
_MARK = "unseen"
_MISSING = "\U0010ffff"  # a character that no font has
_FOLDERS = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
}
# Upright faces with many scripts; the others follow by name.
_FIRST = ("NotoSansCJK-Regular", "NotoSans-Regular", "DejaVuSans.", "Arial Unicode", "arialuni")


@lru_cache(maxsize=256)
def font_for(text: str, size: int) -> Font:
    """Return a font that has every letter of a text: Pillow's own, or one of the system.

    Where none has, it is Pillow's own, which draws boxes.
    """
    own = ImageFont.load_default(size=float(size))
    letters = {letter for letter in text if letter.isprintable() and letter != " "}
    if letters <= set(map(chr, range(33, 127))) or _has_letters(own, letters):
        return own
    for path in _system_fonts():
        try:
            font = ImageFont.truetype(path, size)
        except (OSError, ValueError):
            continue
        if _has_letters(font, letters):
            return font
    return own


def _has_letters(font: Font, letters: set[str]) -> bool:
    blank = _glyph(font, _MISSING)
    return all(_glyph(font, letter) != blank for letter in letters)


def _glyph(font: Font, letter: str) -> bytes:
    mask = font.getmask(letter)
    return bytes(mask) + repr(mask.size).encode()


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[Path, ...]:
    folders = _FOLDERS.get(sys.platform, _FOLDERS["linux"])
    found = sorted(
        path
        for folder in folders
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    )

    def rank(path: Path) -> int:
        return next((k for k, name in enumerate(_FIRST) if path.name.startswith(name)), len(_FIRST))

    return tuple(sorted(found, key=rank))


def line_height(font: Font) -> int:
    """Height of a line of Latin text, in pixels."""
    return round(font.getbbox("Ag", anchor="ls")[3] - font.getbbox("Ag", anchor="ls")[1]) or 10


def shortened(text: str, font: Font, width: float) -> str:
    """Cut a text to a width in pixels; what is cut shows as an ellipsis."""
    if font.getlength(text) <= width:
        return text
    kept = next((n for n in range(len(text), 0, -1) if font.getlength(text[:n] + "…") <= width), 0)
    return text[:kept].rstrip() + "…"


def outline(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mark the pixels (H, W) whose right or lower neighbour has another label."""
    edge = np.zeros(values.shape, dtype=bool)
    edge[:, :-1] |= values[:, :-1] != values[:, 1:]
    edge[:-1] |= values[:-1] != values[1:]
    return edge


def draw_names(
    canvas: Image.Image, values: NDArray[np.uint8], names: Sequence[str], size: int
) -> None:
    """Write the name of every class into its region, where it fits as a whole.

    Args:
        canvas: the picture, as large as the labels.
        values: labels (H, W); 255 has no name.
        names: names of the labels.
        size: of the font, in pixels.
    """
    draw = ImageDraw.Draw(canvas)
    for k in np.unique(values):
        if k == IGNORE_INDEX:
            continue
        font = font_for(names[k], size)
        width, height = font.getlength(names[k]) + 4, 1.4 * size
        place = find_room(values == k, round(width), round(height))
        if place is not None:
            x, y = place
            draw.text((x, y), names[k], _PAPER, font, anchor="mm", stroke_width=2, stroke_fill=_INK)


def find_room(mask: NDArray[np.bool_], width: int, height: int) -> tuple[int, int] | None:
    """Find the centre of a box that lies inside a mask, as far from its borders as it can.

    Args:
        mask: (H, W).
        width, height: of the box, in pixels.

    Returns:
        x and y of the centre, or None if there is no room.
    """
    step = max(1, max(mask.shape) // 400)  # large pictures are looked at coarsely
    small = mask[::step, ::step]
    w, h = -(-width // step) + (step > 1), -(-height // step) + (step > 1)
    if w > small.shape[1] or h > small.shape[0]:
        return None
    inside = _box_sums(small, w, h) == w * h  # by their upper left corners
    if not inside.any():
        return None
    # As deep as possible, with as much of the mask around as there is; then near the middle.
    around = _box_sums(np.pad(small, h), w + 2 * h, 3 * h).astype(np.float64)
    rows, columns = np.indices(inside.shape)
    middle_y, middle_x = (axis.mean() for axis in np.nonzero(inside))
    around -= np.hypot(rows - middle_y, columns - middle_x) / (1 + inside.size)
    y, x = np.unravel_index(np.where(inside, around, -np.inf).argmax(), inside.shape)
    return int((x + w / 2) * step), int((y + h / 2) * step)


def _box_sums(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.int64]:
    """Sums of all boxes of one size, by their upper left corners, from one table."""
    table = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return np.asarray(
        table[height:, width:] - table[:-height, width:] - table[height:, :-width]
        + table[:-height, :-width]
    )  # fmt: skip


def legend_height(entries: Sequence[Entry], width: int, size: int) -> int:
    """Height that `draw_legend` needs, in pixels."""
    lines = len(list(_legend_lines(entries, width, size)))
    return round(lines * 1.5 * line_height(font_for("Ag", size))) + MARGIN


def draw_legend(canvas: Image.Image, entries: Sequence[Entry], top: int, size: int) -> None:
    """Draw swatch and text of each entry below `top`; texts wider than the picture are cut."""
    draw, height = ImageDraw.Draw(canvas), line_height(font_for("Ag", size))
    for number, line in enumerate(_legend_lines(entries, canvas.width, size)):
        y = top + (number + 0.5) * 1.5 * height
        for left, (text, colour, is_unseen) in line:
            font = font_for(text, size)
            box = (left, y - height / 2, left + height, y + height / 2)
            draw.rectangle(box, colour, _ACCENT if is_unseen else None, width=2)
            draw.text((left + 1.4 * height, y), text, _INK, font, anchor="lm")
            if is_unseen:
                right = left + 1.4 * height + font.getlength(text) + _mark_width(size)
                draw.text((right, y), _MARK, _ACCENT, font_for(_MARK, size), anchor="rm")


def _legend_lines(
    entries: Sequence[Entry], width: int, size: int
) -> Iterator[list[tuple[float, Entry]]]:
    """Break the legend into lines; every entry with the x coordinate of its swatch."""
    line: list[tuple[float, Entry]] = []
    height, left = line_height(font_for("Ag", size)), float(MARGIN)
    for text, colour, is_unseen in entries:
        around = 1.6 * height + MARGIN + (_mark_width(size) if is_unseen else 0)
        font = font_for(text, size)
        text = shortened(text, font, width - 2 * MARGIN - around)
        needed = around + font.getlength(text)
        if line and left + needed > width - MARGIN + 1:
            yield line
            line, left = [], float(MARGIN)
        line.append((left, (text, colour, is_unseen)))
        left += needed
    if line:
        yield line


def _mark_width(size: int) -> float:
    font = font_for(_MARK, size)
    return font.getlength(_MARK) + 0.4 * line_height(font)
