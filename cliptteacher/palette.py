"""Colours that stay apart for every eye, and one colour per word.

Two colours are as far apart as the eye that confuses them most sees them: distances in CIELAB are
taken in normal vision and as simulated for protanopia, deuteranopia and tritanopia (the matrices of
Machado, Oliveira and Fernandes, 2009), and the smallest counts. Greys, black and white are left to
the picture itself. Cost: 0.3 s for 256 colours, once per process.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_SLOTS = 64  # colours that words choose from
_APART = 12.0  # CIELAB distance from which two of few colours are told apart
# Linear RGB as seen with one kind of cones missing; the first is normal vision.
_VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    ]
)


def class_palette(num_classes: int) -> Pixels:
    """Return distinct colours, the same ones every time.

    Each colour is the one farthest from all before it, so a larger palette begins with the smaller
    one.

    Args:
        num_classes: number of colours, at most 256.

    Returns:
        Colours, uint8 (num_classes, 3).

    Raises:
        ValueError: if `num_classes` is out of range.
    """
    if not 0 <= num_classes <= 256:
        raise ValueError(f"`num_classes` must lie in 0..256, got {num_classes}")
    return _all_colours()[:num_classes].copy()


def word_palette(words: Sequence[str]) -> Pixels:
    """Return one colour per word, which is the word's own in every picture and every run.

    A word's letters choose one of 64 colours. Where two words of one list choose the same, or two
    that are hard to tell apart, the later one of the alphabet takes the colour farthest from those
    in use.

    Args:
        words: A different words, at most 256.

    Returns:
        Colours, uint8 (A, 3).

    Raises:
        ValueError: if there are more than 256 words.

    >>> cat, dog = word_palette(["cat", "dog"])
    >>> bool((word_palette(["sky", "dog", "cat"])[2] == cat).all())
    True
    """
    if len(words) > 256:
        raise ValueError(f"`words` must be at most 256, got {len(words)}")
    colours, distances = _all_colours(), _all_distances()
    slots: dict[int, int] = {}  # position in the list -> colour
    displaced: list[int] = []

    def nearest() -> NDArray[np.float64]:
        """Distance of every colour to the nearest one in use, (256,)."""
        taken = list(slots.values())
        distance: NDArray[np.float64] = distances[:, taken].min(axis=1, initial=np.inf)
        distance[taken] = -1.0
        return distance

    apart = _APART if len(words) <= 20 else 0.0
    for k in sorted(range(len(words)), key=lambda k: words[k].lower()):
        slot = zlib.crc32(words[k].lower().encode()) % _SLOTS
        if nearest()[slot] > apart:
            slots[k] = slot
        else:
            displaced.append(k)
    for k in displaced:
        free = nearest()
        slots[k] = int((free[:_SLOTS] if len(slots) < _SLOTS else free).argmax())
    return colours[[slots[k] for k in range(len(words))]]


@lru_cache(maxsize=1)
def _all_colours() -> Pixels:
    steps = np.linspace(0, 255, 12).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _seen_by(colours, _VISIONS[0])
    vivid = (np.hypot(lab[:, 1], lab[:, 2]) > 30) & (lab[:, 0] > 30) & (lab[:, 0] < 90)
    colours = colours[vivid]
    seen = np.stack([_seen_by(colours, vision) for vision in _VISIONS])  # (4, n, 3)
    chosen: list[int] = []
    distance = -np.abs(colours.astype(int) - (31, 119, 180)).sum(axis=1)  # begin with a blue
    for _ in range(256):
        chosen.append(int(distance.argmax()))
        newest = np.linalg.norm(seen - seen[:, chosen[-1:]], axis=-1).min(axis=0)
        distance = newest if len(chosen) == 1 else np.minimum(distance, newest)
        distance[chosen] = -1.0
    return colours[chosen]


@lru_cache(maxsize=1)
def _all_distances() -> NDArray[np.float64]:
    """Distance of every two colours to the eye that confuses them most, (256, 256)."""
    seen = np.stack([_seen_by(_all_colours(), vision) for vision in _VISIONS])
    distances = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1)  # (4, 256, 256)
    return np.asarray(distances.min(axis=0))


def _seen_by(colours: Pixels, vision: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB, 0..255, (n, 3) to CIELAB under D65, as one of `_VISIONS` sees it."""
    rgb = colours.astype(np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = (linear @ vision.T).clip(0, 1) @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
