"""Read a data set of one's own: a folder of images, index-map labels and one JSON file.

    root/dataset.json      {"classes": [...], "unseen": [names], "ignore_index": 255}
    root/images/NAME.jpg   or anything else that Pillow reads; see images.py
    root/labels/NAME.png   one class index a pixel, of any depth; a palette is not looked at
    root/train.txt         NAMEs, one a line; any other split likewise

The data half of section 4.1 of arXiv:2310.02296v1, without a data set built in. Files are paired
when the data set is opened, label values are checked whenever a label is read: a data set that is
wrong fails with a sentence, not with a score of zero. Names are compared in Unicode's composed
form (macOS decomposes accents). Cost: one decoding per item; nothing is kept.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .. import IGNORE_INDEX
from ..files import read_json, read_text
from .images import read_image, read_indices, readable_suffixes
from .splits import ClassSplit

FIRST_SUFFIXES = (".jpg", ".jpeg", ".png")  # where an image is there twice, these come first


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Open one split of a data set in the folder format.

    Args:
        root: folder with `dataset.json`, `images/`, `labels/` and the split files.
        split: name of the split; `train` reads `train.txt`.

    Raises:
        FileNotFoundError: if the folder, a file or one half of a pair is missing.
        ValueError: if `dataset.json` is not as described above or the split is empty.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = Path(root)
        self.split = split
        classes, self._stored_ignore = _read_description(self.root)
        self.class_names, self.unseen = classes.names, classes.unseen
        self.ignore_index = IGNORE_INDEX
        self._names = _read_split(self.root, split)
        self._images = _paired_files(self.root / "images", self._names, image_suffixes())
        self._labels = _paired_files(self.root / "labels", self._names, (".png",))

    def __len__(self) -> int:
        """Return the number of images of the split."""
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 (3, H, W), and its labels, uint8 (H, W), 255 = ignore.

        Raises:
            ValueError: if the label has other dimensions than the image, holds colours, or holds
                a value that is neither a class nor the ignore index.
        """
        image = read_image(self._images[index])
        path = self._labels[index]
        label = read_label(path, len(self.class_names), self._stored_ignore)
        if label.shape != image.shape[1:]:
            raise ValueError(
                f"label {path} must be as large as its image, got {_size(label)} for an image of "
                f"{_size(image)} (height x width, after the EXIF rotation)"
            )
        return image, label

    def image_name(self, index: int) -> str:
        """Return the name of an image, without its extension."""
        return self._names[index]


def image_suffixes() -> tuple[str, ...]:
    """The endings that an image may have, preferred ones first."""
    return (*FIRST_SUFFIXES, *sorted(readable_suffixes() - {*FIRST_SUFFIXES}))


def read_label(path: Path, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Read a label map of class indices; the palette of a palette image is not looked at.

    Args:
        path: PNG file.
        num_classes: number A of classes; valid indices are 0..A-1.
        ignore_index: value in the file of pixels without a class.

    Returns:
        Labels, uint8 (H, W), with 255 for pixels without a class.

    Raises:
        ValueError: if the file is damaged, holds colours, or an index that is no class.
    """
    indices = read_indices(path)
    ignored = indices == ignore_index
    _check_indices(path, indices, ignored, num_classes, ignore_index)
    return torch.from_numpy(np.where(ignored, np.uint8(IGNORE_INDEX), indices).astype(np.uint8))


def _check_indices(
    path: Path,
    indices: NDArray[np.integer[Any]],
    ignored: NDArray[np.bool_],
    num_classes: int,
    ignore_index: int,
) -> None:
    wrong = (indices >= num_classes) & ~ignored  # a PNG holds no negative numbers
    if wrong.any():
        outside = indices[wrong].astype(np.int64)
        values = ", ".join(str(value) for value in np.unique(outside)[:8])
        raise ValueError(
            f"label {path} must hold class indices 0..{num_classes - 1} or {ignore_index} "
            f"(ignore), got {values}; correct the file, or `classes` in dataset.json"
        )


def _read_description(root: Path) -> tuple[ClassSplit, int]:
    path = root / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must describe the data set, but there is no such file; "
            'write {"classes": [...], "unseen": [...], "ignore_index": 255}'
        )
    content = read_json(path)
    names = _name_list(path, content, "classes")
    unknown = [name for name in _name_list(path, content, "unseen") if name not in names]
    if unknown:
        raise ValueError(f"`unseen` in {path} must name classes of `classes`, got {unknown}")
    unseen = tuple(names.index(name) for name in _name_list(path, content, "unseen"))
    try:
        split = ClassSplit(names, unseen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return split, _ignore_index(path, content, len(names))


def _name_list(path: Path, content: Any, key: str) -> tuple[str, ...]:
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`{key}` in {path} must be a list of class names, got {names!r}")
    return tuple(names)


def _ignore_index(path: Path, content: dict[str, Any], num_classes: int) -> int:
    value = content.get("ignore_index", IGNORE_INDEX)
    if not isinstance(value, int) or isinstance(value, bool) or 0 <= value < num_classes:
        raise ValueError(
            f"`ignore_index` in {path} must be an integer that is no class (0..{num_classes - 1} "
            f"are taken), got {value!r}"
        )
    return value


def _read_split(root: Path, split: str) -> tuple[str, ...]:
    path = root / f"{split}.txt"
    if not path.is_file():
        existing = ", ".join(sorted(file.stem for file in root.glob("*.txt"))) or "none"
        raise FileNotFoundError(
            f"{path} must list the images of split {split!r}, but there is no such file; "
            f"splits found: {existing}"
        )
    lines = (composed(line.strip()) for line in read_text(path).splitlines())
    names = tuple(line for line in lines if line)
    if not names:
        raise ValueError(f"{path} must list at least one image name, got an empty file")
    return names


def _paired_files(
    folder: Path, names: tuple[str, ...], suffixes: Iterable[str]
) -> tuple[Path, ...]:
    """Return the file of each name; the folder is listed once, not asked once per name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder, but there is none; see FolderDataset")
    order = {suffix: rank for rank, suffix in enumerate(suffixes)}
    files = [f for f in folder.iterdir() if f.suffix.lower() in order and f.name[0] != "."]
    files.sort(key=lambda file: order[file.suffix.lower()], reverse=True)
    by_name = {composed(file.stem): file for file in files}  # on a tie the earlier suffix wins
    missing = [name for name in names if name not in by_name]
    if missing and Path(missing[0]).suffix.lower() in order and Path(missing[0]).stem in by_name:
        raise ValueError(
            f"the split files in {folder.parent} must list names without ending, got {missing[0]}"
        )
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]} ({' or '.join([*order][:3])}) must exist, but {len(missing)} "
            f"of {len(names)} files of the split are missing; add them or shorten the split file"
        )
    return tuple(by_name[name] for name in names)


def composed(name: str) -> str:
    """Write a name in Unicode's composed form, in which names are compared."""
    return unicodedata.normalize("NFC", name)


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]} x {tensor.shape[-1]}"
