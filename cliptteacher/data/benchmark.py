"""Describe a benchmark: its archives, its splits, and how its labels are encoded.

A `Benchmark` is a table of facts and two functions; `voc.py`, `coco_stuff.py` and
`pascal_context.py` hold one each, and `prepare.py` turns any of them into the folder format that
`folder.py` reads. Nothing here needs PyTorch, so that the processes which convert start quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import IGNORE_INDEX
from ..files import read_text

_INVALID = -1


class Item(NamedTuple):
    """One image of a split in the official files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Archive:
    """A file that the data set is published in.

    Args:
        urls: official addresses.
        yields: path below the root that it becomes: a folder, or the file itself if `inside` is
            None.
        inside: folder within the archive that is wanted, None if it is no archive.
        megabytes: about how large the file is, 0 if that is not known.
        unpacked: about how many megabytes it becomes.
        md5: checksum, where one is published.
        instead: path below the root that makes the archive unnecessary, if there is one.
    """

    urls: tuple[str, ...]
    yields: str
    inside: str | None
    megabytes: int
    unpacked: int
    md5: str | None = None
    instead: str | None = None

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.urls[0].rsplit("/", 1)[1]


@dataclass(frozen=True)
class Benchmark:
    """What preparing and opening a benchmark takes.

    Args:
        name: kind of data, as in ``--data``.
        class_names: names of all A classes, in the order of the train ids 0..A-1.
        unseen: names of the U classes without labels in training.
        counts: images of each split.
        archives: what to download.
        list_items: root -> items of each split, from the official split files.
        read_label: path -> train ids, uint8 (H, W), 255 = ignore; checks what it reads.
        label_megabytes: about the size of all index PNGs.
        terms: what a user must know about the licence.
    """

    name: str
    class_names: tuple[str, ...]
    unseen: tuple[str, ...]
    counts: Mapping[str, int]
    archives: tuple[Archive, ...]
    list_items: Callable[[Path], dict[str, list[Item]]]
    read_label: Callable[[Path], NDArray[np.uint8]]
    label_megabytes: int
    terms: str


def label_table(train_ids: Mapping[int, int], largest: int) -> NDArray[np.int16]:
    """Build the table from the values of official label files to train ids.

    Args:
        train_ids: value in the file -> class, for the values that have one.
        largest: largest value that a file may hold; it and the others become 255 (ignore).

    Returns:
        Table, int16 (largest + 1,).
    """
    table = np.full(largest + 1, IGNORE_INDEX, dtype=np.int16)
    table[list(train_ids)] = list(train_ids.values())
    return table


def forbid(table: NDArray[np.int16], values: Sequence[int]) -> NDArray[np.int16]:
    """Mark values that no correct file holds; `encode` refuses them."""
    table = table.copy()
    table[list(values)] = _INVALID
    return table


def encode(values: NDArray[np.generic], table: NDArray[np.int16], path: Path) -> NDArray[np.uint8]:
    """Look the values of an official label map up in the table of `label_table`.

    Raises:
        ValueError: if a value lies outside the table, is forbidden, or is no integer.
    """
    indices = values.astype(np.int64)
    outside = (indices < 0) | (indices >= len(table)) | (indices != values)
    indices[outside] = 0
    encoded = table[indices]
    outside |= encoded == _INVALID
    if outside.any():
        wrong = ", ".join(str(value) for value in np.unique(values[outside])[:8])
        raise ValueError(
            f"label {path} must hold the values of its data set, got {wrong}; "
            "it was changed or belongs to another release, fetch the official file"
        )
    return encoded.astype(np.uint8)


def read_names(path: Path) -> list[str]:
    """Read an official split file: one name a line.

    Raises:
        FileNotFoundError: if it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must list the images of a split, but there is no such file; "
            "the official archive has it"
        )
    return read_text(path).split()
