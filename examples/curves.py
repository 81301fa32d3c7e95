"""Panels of curves drawn with Pillow: axes with ticks, a legend, smooth lines.

Everything is drawn several times as large and reduced, since Pillow's lines have no soft edges.
Sizes are in points; a panel is 330 x 230 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

DRAWN, KEPT = 4, 2  # pixels a point while drawing and in the file
WIDTH, HEIGHT, COLUMNS, MARGIN = 330, 230, 3, 16
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 26  # around the area of a panel
PAPER, INK, SOFT, GRID = (255, 255, 255), (38, 42, 48), (112, 120, 130), (230, 233, 237)
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow.
COLOURS: tuple[Colour, ...] = (
    *((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)),
    *((230, 159, 0), (86, 180, 233), (90, 90, 90), (120, 60, 160)),
)


class Curve(NamedTuple):
    """Points of one run: a "line", a "pale" one behind it, "dots" on a line, or "diamonds"."""

    points: Sequence[Point]
    colour: int
    style: str


class Panel(NamedTuple):
    """One figure of all runs."""

    title: str
    curves: Sequence[Curve]
    log: bool = False


class Scale(NamedTuple):
    """Maps values to a length of the drawing, in points."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log10 if self.log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.begin + share * (self.end - self.begin)


def draw_figure(panels: Sequence[Panel], names: Sequence[str]) -> Image.Image:
    """Draw all panels under a legend of the runs."""
    columns = min(2 if len(panels) == 4 else COLUMNS, len(panels))
    width = max(columns * WIDTH, 360) + 2 * MARGIN
    pen = Pen()
    lines = legend_lines(pen, names, width - 2 * MARGIN)
    head = MARGIN + 18 * len(lines)
    height = head + -(-len(panels) // columns) * HEIGHT + MARGIN
    pen.begin(width, height)
    draw_legend(pen, lines)
    pen.text((width - MARGIN - RIGHT, height - MARGIN + 1), "iterations", 9.5, SOFT, "ra")
    last = max((p[0] for panel in panels for c in panel.curves for p in c.points), default=1)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        draw_panel(pen, panel, MARGIN + column * WIDTH, head + row * HEIGHT, last)
    return pen.image.resize((width * KEPT, height * KEPT), Image.Resampling.LANCZOS)


class Pen:
    """Draws in points."""

    def __init__(self) -> None:
        self.begin(1, 1)

    def begin(self, width: float, height: float) -> None:
        """Take a new sheet."""
        self.image = Image.new("RGB", (int(width * DRAWN), int(height * DRAWN)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self, at: Point, text: str, size: float, colour: Colour = INK, anchor: str = "la"
    ) -> None:
        place = (at[0] * DRAWN, at[1] * DRAWN)
        self.draw.text(place, text, colour, self.font(size), anchor=anchor)

    def length(self, text: str, size: float) -> float:
        return float(self.font(size).getlength(text)) / DRAWN

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        return ImageFont.load_default(size * DRAWN)  # type: ignore[return-value]

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        scaled = [(x * DRAWN, y * DRAWN) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(width * DRAWN)), joint="curve")

    def shape(self, points: Sequence[Point], colour: Colour, edge: Colour | None = None) -> None:
        scaled = [(x * DRAWN, y * DRAWN) for x, y in points]
        self.draw.polygon(scaled, colour, edge or colour, width=DRAWN)


def legend_lines(pen: Pen, names: Sequence[str], width: float) -> list[list[tuple[str, int]]]:
    """Break the names into lines that fit."""
    lines: list[list[tuple[str, int]]] = [[]]
    used = 0.0
    for number, name in enumerate(names):
        needed = 18 + pen.length(name, 11) + 16
        if used + needed > width and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append((name, number))
        used += needed
    return lines


def draw_legend(pen: Pen, lines: Sequence[Sequence[tuple[str, int]]]) -> None:
    for row, line in enumerate(lines):
        x, y = MARGIN + 4.0, MARGIN + 18.0 * row
        for name, number in line:
            pen.line([(x, y + 6), (x + 13, y + 6)], colour_of(number), 3)
            pen.text((x + 18, y), name, 11)
            x += 18 + pen.length(name, 11) + 16


def draw_panel(pen: Pen, panel: Panel, x: float, y: float, last: float) -> None:
    """Draw one panel, iterations 0 to ``last``, with its upper left corner at (x, y)."""
    left, right, top, bottom = x + LEFT, x + WIDTH - RIGHT, y + TOP, y + HEIGHT - BOTTOM
    across = Scale(0, last, left, right)
    values = [p[1] for c in panel.curves for p in c.points]
    log = panel.log and bool(values) and min(values) > 0
    upright = fit(values, bottom, top, 0.06, log)
    pen.text((left, y + 8), panel.title + (", logarithmic" if log else ""), 12)
    for value in ticks(upright):
        height = upright(value)
        pen.line([(left, height), (right, height)], GRID, 0.75)
        pen.text((left - 6, height), show(value), 9.5, SOFT, "rm")
    for value in ticks(across):
        pen.line([(across(value), bottom), (across(value), bottom + 3)], SOFT, 0.75)
        pen.text((across(value), bottom + 6), show(value), 9.5, SOFT, "ma")
    pen.line([(left, bottom), (right, bottom)], SOFT, 0.75)
    for curve in sorted(panel.curves, key=lambda c: c.style != "pale"):
        draw_curve(pen, curve, [(across(a), upright(b)) for a, b in curve.points])


def draw_curve(pen: Pen, curve: Curve, places: Sequence[Point]) -> None:
    colour = colour_of(curve.colour)
    if curve.style == "pale":
        pale = tuple(round(255 - 0.3 * (255 - part)) for part in colour)
        pen.line(places, (pale[0], pale[1], pale[2]), 1)
        return
    if curve.style != "diamonds" and len(places) > 1:
        pen.line(places, colour, 1.5)
    size = {"dots": 2.6, "diamonds": 5.0}.get(curve.style, 1.5 if len(places) == 1 else 0)
    for x, y in places if size else ():
        corners = 4 if curve.style == "diamonds" else 16
        turns = [2 * math.pi * k / corners for k in range(corners)]
        ring = [(x + size * math.sin(turn), y + size * math.cos(turn)) for turn in turns]
        pen.shape(ring, colour, PAPER if corners == 4 else None)


def colour_of(number: int) -> Colour:
    return COLOURS[number % len(COLOURS)]


def fit(values: Sequence[float], begin: float, end: float, room: float, log: bool = False) -> Scale:
    """A scale around the values, with some room; one value alone stands in the middle."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
        factor = max((high / low) ** room, 1.05)
        return Scale(low / factor, high * factor, begin, end, True)
    space = (high - low) * room or (0.0 if high > low else abs(high) * 0.1 or 1.0)
    return Scale(low - space, high + space, begin, end)


def ticks(scale: Scale) -> list[float]:
    """Round numbers on a scale: 1, 2 or 5 times a power of ten, about five of them."""
    if scale.log:
        first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        marks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    else:
        raw = (scale.high - scale.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
        begin, finish = math.ceil(scale.low / step), math.floor(scale.high / step)
        marks = [number * step for number in range(begin, finish + 1)]
    return [mark for mark in marks if scale.low <= mark <= scale.high]


def show(value: float) -> str:
    """Write a tick briefly: 1500, 0.002, 2e-5, 20k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("e-0", "e-")
