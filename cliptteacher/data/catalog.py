"""Open a split of a data set by the name that the programs use for ``--data``."""

from __future__ import annotations

from pathlib import Path

from .folder import FolderDataset
from .miniworld import MiniWorld
from .splits import SegmentationDataset


def open_dataset(
    kind: str, root: str | Path | None, split: str, *, cache: bool = True
) -> SegmentationDataset:
    """Open a split of a data set.

    Args:
        kind: "miniworld" (needs no root) or "folder".
        root: folder of the data set.
        split: such as "train" or "val".
        cache: keep decoded images in memory; for small data sets.

    Raises:
        ValueError: the kind is unknown, or it needs a root and none was given.
    """
    if kind == "miniworld":
        return MiniWorld(split, cache=cache)
    if kind != "folder":
        raise ValueError(f'the kind of data must be "miniworld" or "folder", got {kind!r}')
    if root is None:
        raise ValueError("data of the kind 'folder' needs a root, got none; give its folder")
    return FolderDataset(root, split, cache=cache)
