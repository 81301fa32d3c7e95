r"""Decode and augment photographs: images per second and core, against the obvious pipeline.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --images 64 --rounds 5 --profile

Ours is what training runs: the folder format, `SeenOnly`, `TrainingStream` and the transform of
the default schedule. The other is what one writes first, with Pillow: open, resize, crop, flip,
ImageEnhance for brightness, contrast and saturation, HSV for the hue, pad. Both draw the same kind
of random numbers, make 512-pixel crops of the same synthetic 640 x 480 JPEGs and index PNGs, and
take turns, one round each, on one core. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from cliptteacher.data import FolderDataset, SeenOnly, TrainingStream, training_transform

CROP, HEIGHT, WIDTH, CLASSES = 512, 480, 640, 20
MEAN_COLOUR = (124, 116, 104)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="say where our time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root, args.images)
        dataset = SeenOnly(FolderDataset(root, "train"))
        stream = TrainingStream(dataset, training_transform(CROP), seed=0)
        paths = sorted((root / "images").iterdir())
        ways: dict[str, Callable[[int], object]] = {
            "ours": lambda n: stream[n],
            "pillow": lambda n: pillow_sample(paths[n % len(paths)]),
        }
        if args.profile:
            profile(ways["ours"], args.images)
        report(compare(ways, args.images, args.rounds))


def write_photographs(root: Path, count: int) -> None:
    """Write JPEGs as large as COCO's (blurred noise with regions) and labels of 30 regions."""
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    names = [f"{number:04d}" for number in range(count)]
    for name in names:
        regions = generator.integers(CLASSES, size=(5, 6), dtype=np.uint8)
        label = Image.fromarray(regions).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        coarse = generator.integers(256, size=(HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noise = generator.integers(-12, 13, size=(HEIGHT, WIDTH, 3))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg", quality=90)
        label.save(root / "labels" / f"{name}.png")
    (root / "train.txt").write_text("\n".join(names) + "\n")
    classes = [f"class {number}" for number in range(CLASSES)]
    description = {"classes": classes, "unseen": classes[:5], "ignore_index": 255}
    (root / "dataset.json").write_text(json.dumps(description))


def pillow_sample(path: Path) -> tuple[Tensor, Tensor]:
    """Decode and augment one photograph in the obvious way."""
    image = Image.open(path).convert("RGB")
    label = Image.open(path.parent.parent / "labels" / f"{path.stem}.png")
    factor = random.uniform(0.5, 2.0)
    scale = factor * min(2048 / max(image.size), 512 / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR)
    label = label.resize(size, Image.Resampling.NEAREST)
    seen = np.asarray(label).copy()
    seen[seen < 5] = 255  # the first five classes are unseen
    for _ in range(11):
        left = random.randint(0, max(size[0] - CROP, 0))
        top = random.randint(0, max(size[1] - CROP, 0))
        window = seen[top : top + CROP, left : left + CROP]
        values, counts = np.unique(window, return_counts=True)
        counts = counts[values != 255]
        if counts.size and counts.max() <= 0.75 * counts.sum():
            break
    right, bottom = min(left + CROP, size[0]), min(top + CROP, size[1])
    image = image.crop((left, top, right, bottom))
    if random.random() < 0.5:
        image, window = ImageOps.mirror(image), window[:, ::-1]
    image = pillow_colours(image)
    padded = Image.new("RGB", (CROP, CROP), MEAN_COLOUR)
    padded.paste(image, (0, 0))
    labels = np.full((CROP, CROP), 255, dtype=np.uint8)
    labels[: window.shape[0], : window.shape[1]] = window
    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).contiguous()
    return pixels, torch.from_numpy(labels)


def pillow_colours(image: Image.Image) -> Image.Image:
    """Change brightness, contrast, saturation and hue, each with probability 0.5."""
    if random.random() < 0.5:
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.87, 1.13))
    if random.random() < 0.5:
        image = ImageEnhance.Contrast(image).enhance(random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        image = ImageEnhance.Color(image).enhance(random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(random.randint(-25, 25) % 256)
        image = Image.fromarray(hsv, "HSV").convert("RGB")
    return image


def compare(
    ways: dict[str, Callable[[int], object]], images: int, rounds: int
) -> dict[str, list[float]]:
    """Time rounds of both ways by turns: images per second of processor time."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, make in ways.items():
            began = time.process_time()  # of this process: other work on the machine is no matter
            for n in range(turn * images, (turn + 1) * images):
                make(n)
            if turn:  # the first round warms up
                speeds[name].append(images / (time.process_time() - began))
    return speeds


def report(speeds: dict[str, list[float]]) -> None:
    """Print both speeds and their ratio."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:<7} {medians[name]:6.1f} images per second and core ({spread})")
    ratio = medians["ours"] / medians["pillow"]
    print(f"ratio   {ratio:6.2f}")
    result = {"images_per_second_and_core": medians, "ratio": ratio}
    print(json.dumps({**result, "torch": torch.__version__, "machine": platform.platform()}))


def profile(make: Callable[[int], object], images: int) -> None:
    """Print the functions that take most of our time."""
    import cProfile
    import pstats

    with cProfile.Profile() as recorded:
        for n in range(images):
            make(n)
    pstats.Stats(recorded).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
