"""Divide the classes of a data set into seen and unseen, and hide the unseen ones from training.

Zero-shot segmentation, sections 3.1 and 4.1 of arXiv:2310.02296v1: A classes, of which S are seen
(annotated while training) and U are unseen (only named at inference). The setting here is the
inductive one: training code knows neither the labels nor the names of the unseen classes.

    dataset   labels in 0..A-1, 255 = ignore        what evaluation reads
       | SeenOnly: one 256-entry table look-up, *before* any augmentation
    training  labels in 0..S-1, 255 = ignore or unseen

The order matters: a crop that is chosen by class frequency, applied to labels which still show
the unseen classes, would leak them. Cost: one gather over the pixels of a label map.
"""

import html
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import IGNORE_INDEX, PADDING_INDEX

MAX_CLASSES = PADDING_INDEX  # a label is one byte; 254 means "padding" and 255 "ignore"


class SegmentationDataset(Protocol):
    """Describe what every data set of this package offers: images, full label maps and names."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all A classes, in the order of the label values."""

    @property
    def unseen(self) -> tuple[int, ...]:
        """Label values of the U classes that training must not see."""

    @property
    def ignore_index(self) -> int:
        """Label value of pixels without a class (255)."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 (3, H, W), and its full label map, uint8 (H, W)."""

    def image_name(self, index: int) -> str:
        """Return the name of an image, for messages and for the files written about it."""


@dataclass(frozen=True)
class ClassSplit:
    """Hold the names of all classes and which of them are unseen.

    Args:
        names: names of all A classes; the position is the label value.
        unseen: label values of the unseen classes, each in 0..A-1.

    Raises:
        ValueError: if names repeat or are more than 254, or if `unseen` repeats an index,
            leaves the range or covers every class.

    >>> split = ClassSplit(("cat", "dog", "cow"), unseen=(1,))
    >>> split.seen_names, split.unseen_names
    (('cat', 'cow'), ('dog',))
    >>> split.seen_lookup()[:4].tolist()
    [0, 255, 1, 255]
    """

    names: tuple[str, ...]
    unseen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "unseen", tuple(int(index) for index in self.unseen))
        _check_names(self.names)
        _check_unseen(self.unseen, len(self.names))

    @property
    def seen(self) -> tuple[int, ...]:
        """Label values of the seen classes, ascending."""
        hidden = set(self.unseen)
        return tuple(index for index in range(len(self.names)) if index not in hidden)

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Names of the seen classes, in the order of `seen`."""
        return tuple(self.names[index] for index in self.seen)

    @property
    def unseen_names(self) -> tuple[str, ...]:
        """Names of the unseen classes, in the order of `unseen`."""
        return tuple(self.names[index] for index in self.unseen)

    def seen_lookup(self) -> Tensor:
        """Return the table from a label value to its rank among the seen classes.

        Returns:
            Table, uint8 (256,): 0..S-1 for the seen classes, 255 for everything else.
        """
        table = torch.full((256,), IGNORE_INDEX, dtype=torch.uint8)
        table[list(self.seen)] = torch.arange(len(self.seen), dtype=torch.uint8)
        return table


class SeenOnly(Dataset[tuple[Tensor, Tensor]]):
    """Show a data set as training may see it: seen classes 0..S-1, everything else 255.

    The wrapper follows the protocol of the data set it wraps, but knows the seen names only:
    whatever is handed to training code does not hold the names of the unseen classes.

    Args:
        dataset: the data set with all A classes.
        closed_set: keep every label and name: the supervised upper bound, no zero-shot result.
    """

    def __init__(self, dataset: SegmentationDataset, *, closed_set: bool = False) -> None:
        split = ClassSplit(dataset.class_names, () if closed_set else dataset.unseen)
        self.class_names = split.seen_names
        self.unseen: tuple[int, ...] = ()
        self.ignore_index = IGNORE_INDEX
        self._dataset = dataset
        self._lookup = split.seen_lookup()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 (3, H, W), and the labels of its seen classes, uint8 (H, W).

        Raises:
            ValueError: a label is neither a class nor 255.
        """
        image, label = self._dataset[index]
        outside = (label != IGNORE_INDEX) & (
            (label < 0) | (label >= len(self._dataset.class_names))
        )
        if outside.any():
            raise ValueError(
                f"the labels of {self.image_name(index)} must be 0.."
                f"{len(self._dataset.class_names) - 1} or {IGNORE_INDEX}, got "
                f"{torch.unique(label[outside])[:8].tolist()}"
            )
        return image, self._lookup.index_select(0, label.flatten().int()).view_as(label)

    def image_name(self, index: int) -> str:
        """Return the name of an image."""
        return self._dataset.image_name(index)


def most_varied(dataset: SegmentationDataset, among: int, count: int) -> list[int]:
    """Choose the images with the most seen and unseen classes, whichever are fewer.

    Args:
        dataset: images with the labels of all classes.
        among: only the first so many are looked at.
        count: how many are chosen, at most.
    """

    def variety(index: int) -> tuple[int, int]:
        present = set(torch.unique(dataset[index][1]).tolist()) - {IGNORE_INDEX}
        unseen = len(present & set(dataset.unseen))
        return min(unseen, len(present) - unseen), len(present)

    return sorted(range(min(among, len(dataset))), key=variety, reverse=True)[:count]


def _check_names(names: tuple[str, ...]) -> None:
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(
            f"`names` must hold 1 to {MAX_CLASSES} classes, got {len(names)}; "
            "label maps are stored in one byte"
        )
    blank = [name for name in names if not any(map(str.isalnum, html.unescape(name)))]
    if blank:
        raise ValueError(f"a class name must hold a letter or digit, got {blank[0]!r}; rename it")
    repeated = [name for name, count in Counter(map(_spelling, names)).items() if count > 1]
    if repeated:
        raise ValueError(f"class names must be unique, got {repeated} more than once; rename them")


def _spelling(name: str) -> str:
    """Spell a name as its prompt does: case, hyphens and underscores make no difference."""
    return " ".join(name.replace("-", " ").replace("_", " ").split()).casefold()


def _check_unseen(unseen: tuple[int, ...], num_classes: int) -> None:
    if len(set(unseen)) != len(unseen):
        raise ValueError(f"`unseen` must list each class once, got {unseen}; drop the repetitions")
    outside = [index for index in unseen if not 0 <= index < num_classes]
    if outside:
        raise ValueError(
            f"`unseen` must hold label values in 0..{num_classes - 1}, got {outside}; "
            "it takes indices, not names"
        )
    if len(unseen) == num_classes:
        raise ValueError(
            f"at least one class must be seen, got all {num_classes} in `unseen`; "
            "training needs labels"
        )
