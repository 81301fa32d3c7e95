"""A bar chart drawn with Pillow: rows of three bars with error bars and the paper's marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Sizes are in points of a chart 760 wide, drawn SCALE times as large.
SCALE, WIDTH, MARGIN = 2, 760, 24
BAR, BAR_GAP, ROW_GAP = 11, 2, 13
HEAD, AXIS = 92, 28
SERIES: tuple[tuple[str, Colour], ...] = (
    ("mIoU(S)", (176, 190, 203)),
    ("mIoU(U)", (229, 149, 66)),
    ("hIoU", (36, 84, 132)),
)
PAPER, INK, SOFT, GRID = (255, 255, 255), (38, 42, 48), (112, 120, 130), (228, 231, 235)


class Bar(NamedTuple):
    """One bar in percent; None where there is nothing to draw."""

    mean: float | None
    spread: float | None
    paper: float | None


class ChartRow(NamedTuple):
    """The bars of one row, in the order of ``SERIES``."""

    title: str
    seeds: int
    bars: Sequence[Bar]


def draw_chart(title: str, note: str, rows: Sequence[ChartRow]) -> Image.Image:
    """Draw the chart; its height follows the number of rows."""
    row_height = len(SERIES) * (BAR + BAR_GAP) + ROW_GAP
    height = HEAD + len(rows) * row_height + AXIS + MARGIN
    canvas = Canvas(height)
    labels = max(canvas.length(row.title, 12) for row in rows)
    left = MARGIN + min(max(labels, 60), 260) + 12
    bottom = HEAD + len(rows) * row_height
    axis = Axis(left, WIDTH - MARGIN - 40, HEAD, bottom, largest_percent(rows))
    canvas.text((MARGIN, MARGIN), title, 18, INK)
    canvas.text((MARGIN, MARGIN + 25), note, 11, SOFT)
    draw_legend(canvas, MARGIN + 46, any(bar.paper is not None for r in rows for bar in r.bars))
    draw_grid(canvas, axis)
    for position, row in enumerate(rows):
        draw_row(canvas, axis, HEAD + position * row_height + ROW_GAP / 2, row)
    return canvas.image


class Axis(NamedTuple):
    """Where 0 and the largest percentage lie, and from where to where the rows go."""

    left: float
    right: float
    top: float
    bottom: float
    largest: int

    def x(self, percent: float) -> float:
        return self.left + (self.right - self.left) * percent / self.largest


def largest_percent(rows: Sequence[ChartRow]) -> int:
    """The end of the axis: the next 20 above everything that is drawn."""
    bars = [bar for row in rows for bar in row.bars]
    values = [bar.paper or 0 for bar in bars]
    values += [bar.mean + (bar.spread or 0) for bar in bars if bar.mean is not None]
    return min(100, max(20, 20 * math.ceil(max(values, default=0) / 20)))


class Canvas:
    """Pillow in points."""

    def __init__(self, height: float) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, round(height * SCALE)), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts: dict[float, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def font(self, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return self.fonts.setdefault(size, ImageFont.load_default(size * SCALE))

    def length(self, text: str, size: float) -> float:
        return self.font(size).getlength(text) / SCALE

    def text(
        self, place: tuple[float, float], text: str, size: float, colour: Colour, anchor: str = "la"
    ) -> None:
        x, y = place
        self.draw.text((x * SCALE, y * SCALE), text, colour, self.font(size), anchor=anchor)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        corners = (left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1)
        if corners[2] >= corners[0]:
            self.draw.rectangle(corners, colour)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(width * SCALE)))

    def diamond(self, x: float, y: float, radius: float) -> None:
        corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)]
        scaled = [(a * SCALE, b * SCALE) for a, b in corners]
        self.draw.polygon(scaled, PAPER, INK, width=SCALE)


def draw_legend(canvas: Canvas, y: float, with_paper: bool) -> None:
    x = float(MARGIN)
    for name, colour in SERIES:
        canvas.box(x, y, x + 11, y + 11, colour)
        canvas.text((x + 16, y + 6), name, 11, INK, "lm")
        x += 16 + canvas.length(name, 11) + 18
    if with_paper:
        canvas.diamond(x + 5, y + 5.5, 4.5)
        text = "the paper (PASCAL Context, SegFormer-B0, one run)"
        canvas.text((x + 16, y + 6), text, 11, INK, "lm")


def draw_grid(canvas: Canvas, axis: Axis) -> None:
    for percent in range(0, axis.largest + 1, 20 if axis.largest > 40 else 10):
        x = axis.x(percent)
        canvas.line([(x, axis.top), (x, axis.bottom)], GRID if percent else SOFT, 0.5)
        canvas.text((x, axis.bottom + 6), str(percent), 10, SOFT, "ma")


def draw_row(canvas: Canvas, axis: Axis, top: float, row: ChartRow) -> None:
    """Draw the title and the bars of one row."""
    middle = top + (len(SERIES) * (BAR + BAR_GAP) - BAR_GAP) / 2
    canvas.text((axis.left - 10, middle - 1), row.title, 12, INK, "rm")
    for position, ((_, colour), bar) in enumerate(zip(SERIES, row.bars, strict=True)):
        y = top + position * (BAR + BAR_GAP)
        center = y + BAR / 2
        end = axis.left
        if bar.mean is not None:
            end = axis.x(bar.mean)
            canvas.box(axis.left, y, end, y + BAR, colour)
        if bar.mean is not None and bar.spread is not None:
            low, high = axis.x(max(0, bar.mean - bar.spread)), axis.x(bar.mean + bar.spread)
            draw_spread(canvas, low, high, center)
            end = max(end, high)
        if bar.paper is not None:
            canvas.diamond(axis.x(bar.paper), center, 4.5)
            if abs(axis.x(bar.paper) - end) < 34:
                end = max(end, axis.x(bar.paper) + 4)
        label = "not finished" if bar.mean is None else f"{bar.mean:.1f}"
        if bar.mean is not None or position == 0:
            canvas.text((end + 5, center), label, 9.5, INK if bar.mean is not None else SOFT, "lm")


def draw_spread(canvas: Canvas, low: float, high: float, y: float) -> None:
    """Draw an error bar with a light rim, which shows on dark bars too."""
    for colour, width in ((PAPER, 2.5), (INK, 1)):
        canvas.line([(low, y), (high, y)], colour, width)
        for x in (low, high):
            canvas.line([(x, y - 3), (x, y + 3)], colour, width)
