"""Decode and augment a photograph: ours, against Pillow and torchvision's transforms on floats.

    OMP_NUM_THREADS=1 python benchmarks/speed/loader.py

Ours is what training runs: the folder format, `SeenOnly`, `TrainingStream` and the transform of
the default schedule. The first peer is what one writes first, with Pillow: open, resize, crop,
flip, ImageEnhance for brightness, contrast and saturation, HSV for the hue, pad. The second has the
order of torchvision's reference training: Pillow decodes, transforms v2 work on floats, whole
images are resized before the crop, and one crop is taken where the others look for a varied one.
All draw the same kind of random numbers and make 512-pixel crops of the same synthetic 640 x 480
JPEGs and index PNGs, on one thread.
"""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from race import finish, race, report, start
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from cliptteacher.data import FolderDataset, SeenOnly, TrainingStream, training_transform

CROP, HEIGHT, WIDTH, CLASSES, IMAGES = 512, 480, 640, 20, 32
MEAN_COLOUR = (124, 116, 104)
FILL = {tv_tensors.Image: [value / 255 for value in MEAN_COLOUR], tv_tensors.Mask: 255}


def measure(rounds: int) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root, IMAGES)
        dataset = SeenOnly(FolderDataset(root, "train"))
        stream = TrainingStream(dataset, training_transform(CROP), seed=0)
        paths = sorted((root / "images").iterdir())
        samples: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
            "ours": lambda n: stream[n],
            "Pillow": lambda n: pillow_sample(paths[n % IMAGES]),
            "torchvision v2, floats": lambda n: torchvision_sample(paths[n % IMAGES]),
        }
        for sample in samples.values():
            image, labels = sample(0)
            assert (image.shape, labels.shape) == ((3, CROP, CROP), (CROP, CROP))
        ways = {
            name: lambda s=sample: [s(n) for n in range(IMAGES)] for name, sample in samples.items()
        }
        times = race(ways, rounds)
    each = {name: time / IMAGES for name, time in times.items()}
    return [report("loader, a 512-pixel crop", each, 2.0)]


def torchvision_sample(path: Path) -> tuple[Tensor, Tensor]:
    """Decode and augment one photograph in the order of torchvision's reference training."""
    image = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(path).convert("RGB")))
    label = Image.open(path.parent.parent / "labels" / f"{path.stem}.png")
    seen = tv_tensors.Mask(v2.functional.pil_to_tensor(label)[0])
    seen[seen < 5] = 255  # the first five classes are unseen
    factor = random.uniform(0.5, 2.0)
    scale = factor * min(2048 / max(image.shape[1:]), 512 / min(image.shape[1:]))
    transform = v2.Compose(
        [
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Resize([round(HEIGHT * scale), round(WIDTH * scale)]),
            v2.RandomCrop(CROP, pad_if_needed=True, fill=FILL),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomPhotometricDistort(),
        ]
    )
    pixels, labels = transform(image, seen)
    return pixels, labels


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


if __name__ == "__main__":
    finish(measure(start(__doc__)))
