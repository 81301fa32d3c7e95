"""Miniworld: a procedural data set with dense labels and captions, drawn from a seed at run time.

Textured *stuff* fills regions, shaped *things* lie on top, and some ground stays unlabelled. Every
scene jitters hue, scale, phase, noise, light and pose, so no class is one colour or one pattern;
things of one class share a shape and, like real objects, a range of typical hues that overlaps
with those of others. 20 classes, 15 seen and 5 unseen; nothing is downloaded.

    ground = warped Voronoi regions, each with the texture of a stuff class (or unlabelled)
    for every thing: paint surface where shape(rotated, scaled coordinates) < 0
    light, blur and noise over all

Scene ``index`` of a split depends on (split, index, size) only. Cost: some 17 ms for 128 x 128.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import IGNORE_INDEX

STUFF = ("grass", "sand", "water", "brick", "wood", "snow", "lava", "cloud", "stone", "tile")
THINGS = (
    *("disc", "ring", "star", "cross", "triangle"),
    *("moon", "heart", "arrow", "square", "flower"),
)
CLASS_NAMES = STUFF + THINGS
UNSEEN_NAMES = ("water", "brick", "arrow", "square", "flower")
SPLIT_SIZES = {"train": 2048, "val": 192, "test": 256, "pretrain": 1 << 30}
# First seed of each split. PyTorch's CPU generator reads the low 32 bits of a seed and no more.
_FIRST_SEEDS = {"pretrain": 0, "train": 1 << 30, "val": 2 << 30, "test": (3 << 30) + (1 << 28)}
_THING_HUES = (0.00, 0.08, 0.14, 0.90, 0.30, 0.58, 0.96, 0.46, 0.70, 0.82)  # typical, per thing
_MIN_CAPTION_SHARE = 0.02  # a class below this share of the pixels is not mentioned
_CAPTION_TEMPLATES = ("a photo of a {}.", "a photo of {}.", "a picture of {}.", "{}.")


class MiniWorld:
    """A split of miniworld in the data set protocol of this package.

    Args:
        split: "train", "val", "test" (fixed lengths, disjoint seeds) or "pretrain" (endless).
        size: side of the square images in pixels; things keep their size in pixels.
        length: number of scenes; default that of the split.
        cache: keep drawn scenes in memory; they are shared, so do not write into them.

    Raises:
        ValueError: the split is unknown.
    """

    class_names = CLASS_NAMES
    unseen = tuple(CLASS_NAMES.index(name) for name in UNSEEN_NAMES)
    ignore_index = IGNORE_INDEX

    def __init__(
        self, split: str = "train", size: int = 128, length: int | None = None, cache: bool = True
    ) -> None:
        if split not in SPLIT_SIZES:
            raise ValueError(f"`split` must be one of {', '.join(SPLIT_SIZES)}, got {split!r}")
        self.split, self.size = split, size
        self.length = SPLIT_SIZES[split] if length is None else length
        self._cache: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw scene ``index``: image (3, size, size) uint8 and labels (size, size) uint8."""
        if not 0 <= index < self.length:
            raise IndexError(f"miniworld {self.split} has {self.length} scenes, got index {index}")
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        scene = draw_scene(Generator().manual_seed(_FIRST_SEEDS[self.split] + index), self.size)
        if self._cache is not None:
            self._cache[index] = scene
        return scene

    def image_name(self, index: int) -> str:
        """Name of scene ``index``, for file names and messages."""
        return f"miniworld_{self.split}_{index:06d}"


def draw_scene(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
    """Draw one scene with a natural mix of regions and things."""
    side = size / 64
    num_things = round(side - 1) + _integer(generator, round(2 * side) + 1)  # 0-2 or 1-5
    things = [_integer(generator, len(THINGS)) for _ in range(num_things)]
    regions = 1 + _integer(generator, round(1 + side))  # 1-2 at 64 px, 1-3 at 128 px
    grounds = [_integer(generator, len(STUFF)) for _ in range(regions)]
    if _uniform(generator) < 0.2 and (regions > 1 or things):
        grounds[-1] = -1
    return compose_scene(generator, size, grounds, things)


def draw_single_class(generator: Generator, size: int, label: int) -> tuple[Tensor, Tensor]:
    """Draw one class alone: a stuff fills the image, a thing lies on unlabelled ground."""
    if label < len(STUFF):
        return compose_scene(generator, size, [label], [])
    return compose_scene(generator, size, [-1], [label - len(STUFF)])


def compose_scene(
    generator: Generator, size: int, grounds: Sequence[int], things: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compose a scene from given content.

    Args:
        generator: the only source of chance.
        size: side in pixels.
        grounds: one stuff index per region, -1 for unlabelled ground.
        things: thing indices, painted in this order.

    Returns:
        image (3, size, size) uint8 and labels (size, size) uint8, ``IGNORE_INDEX`` where unlabelled
    """
    image = torch.empty(3, size, size)
    labels = torch.empty(size, size, dtype=torch.uint8)
    region = _voronoi(generator, size, len(grounds))
    for i, stuff in enumerate(grounds):
        inside = region == i
        texture = _TEXTURES[stuff] if stuff >= 0 else _void
        image = torch.where(inside, texture(generator, size), image)
        labels.masked_fill_(inside, stuff if stuff >= 0 else IGNORE_INDEX)
    for thing in things:
        cover = _thing_cover(generator, size, thing)
        image = torch.lerp(image, _thing_surface(generator, size, thing), cover)
        labels.masked_fill_(cover > 0.5, len(STUFF) + thing)
    light = 1 + 0.25 * (_noise(generator, size, 2, 2) - 0.5)
    image = image * light + 0.03 * torch.randn(3, size, size, generator=generator)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8), labels


def present_classes(labels: Tensor, num_classes: int) -> list[int]:
    """List the classes that hold at least 2% of the pixels.

    Args:
        labels: (H, W) integer map, 255 unlabelled.
        num_classes: label values that count.
    """
    counts = torch.bincount(labels.flatten().long(), minlength=256)[:num_classes]
    present = counts >= _MIN_CAPTION_SHARE * labels.numel()
    return [index for index, is_present in enumerate(present.tolist()) if is_present]


def caption_of(names: Sequence[str], generator: Generator) -> str:
    """Write a caption that names classes in random order, "a photo of sand, star and ring.".

    Args:
        names: at least one class name.
        generator: chooses the order and the template.
    """
    order = torch.randperm(len(names), generator=generator).tolist()
    *first, last = [names[i] for i in order]
    listed = " and ".join(filter(None, (", ".join(first), last)))
    template = _CAPTION_TEMPLATES[_integer(generator, len(_CAPTION_TEMPLATES))]
    return template.format(listed)


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(generator: Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=generator))


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixel centres, in pixels."""
    line = torch.arange(size) + 0.5
    return line[:, None].expand(size, size), line[None, :].expand(size, size)


def _noise(generator: Generator, size: int, rows: int, columns: int) -> Tensor:
    """Smooth noise in [0, 1], (size, size), from a coarse grid of random values."""
    coarse = torch.rand(1, 1, rows + 1, columns + 1, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)[0, 0]


def _cells(size: int, pixels: float) -> int:
    """Number of noise cells of about ``pixels`` pixels along one side."""
    return max(1, round(size / pixels))


def _color(generator: Generator, hue: float, saturation: float, value: float) -> Tensor:
    """A jittered colour (3, 1, 1)."""
    h = (hue + _uniform(generator, -0.04, 0.04)) % 1.0
    s = min(1.0, max(0.0, saturation + _uniform(generator, -0.15, 0.15)))
    v = min(1.0, max(0.0, value + _uniform(generator, -0.12, 0.12)))
    return torch.tensor(colorsys.hsv_to_rgb(h, s, v)).view(3, 1, 1)


def _blend(first: Tensor, second: Tensor, t: Tensor) -> Tensor:
    """Mix two colours (3, 1, 1) by a map t (size, size) in [0, 1]."""
    return first + (second - first) * t


def _voronoi(generator: Generator, size: int, regions: int) -> Tensor:
    """Assign each pixel to the nearest of ``regions`` random points, with warped borders."""
    y, x = _grid(size)
    amplitude = 0.15 * size
    y = y + amplitude * (_noise(generator, size, 5, 5) - 0.5)
    x = x + amplitude * (_noise(generator, size, 5, 5) - 0.5)
    points = torch.rand(regions, 2, generator=generator) * size
    distances = (y - points[:, 0, None, None]) ** 2 + (x - points[:, 1, None, None]) ** 2
    return distances.argmin(dim=0)


# --- textures: (generator, size) -> (3, size, size) float in about [0, 1] ---------------------


def _void(generator: Generator, size: int) -> Tensor:
    first = _color(generator, _uniform(generator), 0.15, 0.5)
    second = _color(generator, _uniform(generator), 0.15, 0.5)
    return _blend(first, second, _noise(generator, size, 1, 1))


def _grass(generator: Generator, size: int) -> Tensor:
    blades = _noise(generator, size, _cells(size, 9), _cells(size, 2))
    patches = _noise(generator, size, _cells(size, 24), _cells(size, 24))
    dark, bright = _color(generator, 0.32, 0.7, 0.3), _color(generator, 0.26, 0.7, 0.75)
    return _blend(dark, bright, 0.7 * blades + 0.3 * patches)


def _sand(generator: Generator, size: int) -> Tensor:
    y, x = _grid(size)
    warp = 10 * _noise(generator, size, _cells(size, 30), _cells(size, 30))
    period = _uniform(generator, 9, 14)
    angle = _uniform(generator, -0.4, 0.4)
    ripples = 0.5 + 0.5 * torch.sin((y + angle * x + warp) * (2 * math.pi / period))
    grain = torch.rand(size, size, generator=generator)
    dark, bright = _color(generator, 0.11, 0.5, 0.65), _color(generator, 0.12, 0.4, 0.9)
    return _blend(dark, bright, 0.45 * ripples + 0.55 * grain)


def _water(generator: Generator, size: int) -> Tensor:
    waves = _noise(generator, size, _cells(size, 4), _cells(size, 16))
    swell = _noise(generator, size, _cells(size, 12), _cells(size, 40))
    deep, bright = _color(generator, 0.6, 0.75, 0.4), _color(generator, 0.54, 0.5, 0.85)
    return _blend(deep, bright, (0.6 * waves + 0.6 * swell - 0.1).clamp(0, 1))


def _joints(position: Tensor, period: float, width: float) -> Tensor:
    """1 on lines of ``width`` pixels every ``period`` pixels, else 0."""
    return (position.remainder(period) < width).float()


def _brick(generator: Generator, size: int) -> Tensor:
    y, x = _grid(size)
    height = _uniform(generator, 7, 11)
    y, x = y + _uniform(generator, 0, 50), x + _uniform(generator, 0, 50)
    row = (y / height).floor()
    shifted = x + (row % 2) * height
    joints = torch.maximum(_joints(y, height, 1.6), _joints(shifted, 2 * height, 1.6))
    tone = torch.frac(torch.sin(row * 12.9 + (shifted / (2 * height)).floor() * 78.2) * 43.7).abs()
    dark, bright = _color(generator, 0.02, 0.65, 0.45), _color(generator, 0.04, 0.6, 0.75)
    mortar = _color(generator, 0.08, 0.15, 0.75)
    return torch.lerp(_blend(dark, bright, tone), mortar.expand(3, size, size), joints)


def _wood(generator: Generator, size: int) -> Tensor:
    y, x = _grid(size)
    warp = 14 * _noise(generator, size, _cells(size, 40), _cells(size, 14))
    period = _uniform(generator, 6, 10)
    rings = 0.5 + 0.5 * torch.sin((x + 0.1 * y + warp) * (2 * math.pi / period))
    fibre = _noise(generator, size, _cells(size, 20), _cells(size, 2))
    dark, bright = _color(generator, 0.07, 0.7, 0.3), _color(generator, 0.08, 0.6, 0.65)
    return _blend(dark, bright, 0.65 * rings + 0.35 * fibre)


def _snow(generator: Generator, size: int) -> Tensor:
    drifts = _noise(generator, size, _cells(size, 20), _cells(size, 26))
    shade, bright = _color(generator, 0.6, 0.2, 0.75), _color(generator, 0.6, 0.05, 0.98)
    sparkle = 0.25 * (torch.rand(size, size, generator=generator) > 0.97)
    return _blend(shade, bright, drifts) + sparkle


def _lava(generator: Generator, size: int) -> Tensor:
    flow = _noise(generator, size, _cells(size, 14), _cells(size, 14))
    cracks = (1 - 7 * (flow - 0.5).abs()).clamp(0, 1)
    rock, glow = _color(generator, 0.0, 0.5, 0.15), _color(generator, 0.06, 0.95, 0.98)
    grain = 0.12 * torch.rand(size, size, generator=generator)
    return _blend(rock, glow, cracks) + grain


def _cloud(generator: Generator, size: int) -> Tensor:
    puffs = _noise(generator, size, _cells(size, 26), _cells(size, 32))
    detail = _noise(generator, size, _cells(size, 9), _cells(size, 11))
    blue, white = _color(generator, 0.57, 0.45, 0.85), _color(generator, 0.57, 0.08, 0.95)
    return _blend(blue, white, (2.4 * (0.7 * puffs + 0.3 * detail) - 0.8).clamp(0, 1))


def _stone(generator: Generator, size: int) -> Tensor:
    y, x = _grid(size)
    step = _uniform(generator, 11, 16)
    count = math.ceil(size / step) + 1
    jitter = torch.rand(2, count, count, generator=generator)
    line = torch.arange(count, dtype=torch.float32)
    py = (line[:, None] + jitter[0] - 0.5).mul(step).flatten()
    px = (line[None, :] + jitter[1] - 0.5).mul(step).flatten()
    pixels = torch.stack((y.flatten(), x.flatten()), 1)
    nearest = torch.cdist(pixels, torch.stack((py, px), 1)).topk(2, dim=1, largest=False)
    gap = (nearest.values[:, 1] - nearest.values[:, 0]).view(size, size)
    tone = torch.rand(count * count, generator=generator)[nearest.indices[:, 0]].view(size, size)
    dark, bright = _color(generator, 0.1, 0.12, 0.4), _color(generator, 0.1, 0.1, 0.7)
    return _blend(dark, bright, tone) * (gap / 2.5).clamp(0.3, 1)


def _tile(generator: Generator, size: int) -> Tensor:
    y, x = _grid(size)
    period = _uniform(generator, 8, 12)
    y, x = y + _uniform(generator, 0, 50), x + _uniform(generator, 0, 50)
    checks = ((y / period).floor() + (x / period).floor()) % 2
    dark, bright = _color(generator, 0.78, 0.35, 0.35), _color(generator, 0.75, 0.2, 0.85)
    return _blend(dark, bright, checks)


_TEXTURES: tuple[Callable[[Generator, int], Tensor], ...] = (
    *(_grass, _sand, _water, _brick, _wood),
    *(_snow, _lava, _cloud, _stone, _tile),
)


def _thing_cover(generator: Generator, size: int, thing: int) -> Tensor:
    """How much a thing of random pose covers each pixel, in [0, 1] with soft edges."""
    radius = _uniform(generator, 14, 27)
    y, x = _grid(size)
    margin = 0.6 * radius  # most of a thing stays inside
    y = (y - _uniform(generator, margin, size - margin)) / radius
    x = (x - _uniform(generator, margin, size - margin)) / radius
    angle = _uniform(generator, -0.5, 0.5)
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    return (0.5 - _SHAPES[thing](u, v) * radius).clamp(0, 1)


def _thing_surface(generator: Generator, size: int, thing: int) -> Tensor:
    """A shaded, softly mottled surface around the thing's typical hue."""
    hue = _THING_HUES[thing] + _uniform(generator, -0.05, 0.05)
    dark, bright = _color(generator, hue, 0.75, 0.55), _color(generator, hue, 0.7, 0.9)
    return _blend(dark, bright, _noise(generator, size, _cells(size, 16), _cells(size, 16)))


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.9


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.75).abs() - 0.25


def _star(u: Tensor, v: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(u, -v).remainder(fifth) - fifth / 2).abs() / (fifth / 2)  # 1 at a tip
    return 0.7 * (torch.hypot(u, v) - (0.42 + 0.68 * angle**1.5))


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 1.0, 0.33), _box(u, v, 0.33, 1.0))


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2
    return torch.maximum(slope * u.abs() - 0.5 * v, v) - 0.5


def _moon(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.5, v))


def _heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = torch.hypot(u.abs() - 0.45, v + 0.35) - 0.55
    tip = 0.72 * (u.abs() + (v - 0.02).abs() - 0.95)
    return torch.minimum(lobes, torch.maximum(tip, -(v + 0.45)))


def _arrow(u: Tensor, v: Tensor) -> Tensor:
    head = torch.maximum(0.7 * (v.abs() + u - 1.0), -u)
    return torch.minimum(head, _box(u + 0.45, v, 0.55, 0.3))


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.8, 0.8)


def _flower(u: Tensor, v: Tensor) -> Tensor:
    return 0.7 * (torch.hypot(u, v) - (0.75 + 0.27 * torch.cos(6 * torch.atan2(u, v))))


_SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(_disc, _ring, _star, _cross, _triangle),
    *(_moon, _heart, _arrow, _square, _flower),
)
