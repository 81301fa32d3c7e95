"""Images with captions made of labels, to train a small CLIP on (`examples/pretrain_clip.py`).

A caption names classes that its image shows, all of them or, as people do, a part. Several
captions of a batch can therefore be true of one image; a batch says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from .miniworld import CLASS_NAMES, caption_of, draw_scene, draw_single_class, present_classes
from .splits import SegmentationDataset

_KEPT = 1024  # decoded photographs


class MiniWorldCaptions:
    """Scenes of the endless ``pretrain`` split, a third of them with one class alone.

    Args:
        length: scenes to draw; all are kept, length * size * size * 4 bytes.
        size: side of a scene in pixels.
        progress: called with (scenes drawn, length) now and then.
    """

    def __init__(
        self, length: int, size: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.class_names = CLASS_NAMES
        self.images = torch.empty(length, 3, size, size, dtype=torch.uint8)
        self.labels = torch.empty(length, size, size, dtype=torch.uint8)
        for i in range(length):
            generator = Generator().manual_seed(i)  # the other splits start at 2^30
            single = i % 3 == 0
            self.images[i], self.labels[i] = (
                draw_single_class(generator, size, i // 3 % len(CLASS_NAMES))
                if single
                else draw_scene(generator, size)
            )
            if progress is not None and i % 4000 == 3999:
                progress(i + 1, length)

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw a scene, half of the time mirrored."""
        i = int(torch.randint(len(self.images), (), generator=generator))
        image, labels = self.images[i], self.labels[i]
        if torch.rand((), generator=generator) < 0.5:
            return image.flip(-1), labels.flip(-1)
        return image, labels


class FolderCaptions:
    """Random resized crops of the training photographs of a folder data set.

    Args:
        dataset: photographs with the labels of all classes.
        size: side of a crop in pixels.
    """

    def __init__(self, dataset: SegmentationDataset, size: int) -> None:
        self.class_names = tuple(dataset.class_names)
        self.length = len(dataset)
        self.read = lru_cache(_KEPT)(dataset.__getitem__)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.06, 1.0), ratio=(0.75, 1.33), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3, 0.3, 0.05),
                v2.RandomGrayscale(0.05),
            ]
        )

    def sample(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw an augmented crop."""
        i = int(torch.randint(self.length, (), generator=generator))
        image, labels = self.read(i)
        image, labels = self.transform(Image(image), Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


Captions = MiniWorldCaptions | FolderCaptions


class CaptionBatch(NamedTuple):
    """Images, one caption each, and which caption is true of which image."""

    images: Tensor  # (B, 3, H, W) uint8
    texts: list[str]
    true: Tensor  # (B, B) bool: caption j names only classes that image i shows


def caption_batches(captions: Captions, batch_size: int, seed: int) -> Iterator[CaptionBatch]:
    """Draw batches without end; a caption names all classes of its image, or a part of them.

    Args:
        captions: where images and labels come from.
        batch_size: B.
        seed: of the order and the captions; crops of photographs draw from the global generator.
    """
    generator = Generator().manual_seed(seed)
    num_classes = len(captions.class_names)
    while True:
        images: list[Tensor] = []
        texts: list[str] = []
        shown = torch.zeros(batch_size, num_classes)
        named = torch.zeros(batch_size, num_classes)
        while len(images) < batch_size:
            image, labels = captions.sample(generator)
            present = present_classes(labels, num_classes)
            if not present:
                continue
            chosen = choose_mentioned(present, generator)
            shown[len(images), present] = 1
            named[len(images), chosen] = 1
            images.append(image)
            texts.append(caption_of([captions.class_names[i] for i in chosen], generator))
        yield CaptionBatch(torch.stack(images), texts, (1 - shown) @ named.T == 0)


def choose_mentioned(present: list[int], generator: Generator) -> list[int]:
    """Choose what a caption mentions: everything, or, as people do, a part of it."""
    if torch.rand((), generator=generator) < 0.3:
        return present
    count = 1 + int(torch.randint(len(present), (), generator=generator))
    order = torch.randperm(len(present), generator=generator)[:count].tolist()
    return [present[i] for i in order]
