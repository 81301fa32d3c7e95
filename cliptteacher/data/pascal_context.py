"""PASCAL Context: 59 classes, 49 seen and 10 unseen, in 4,996 + 5,104 images of VOC 2010.

    id in the file   59 of the ids 1..459, see LABELMAP_IDS   every other id
    train id         0..58, in alphabetical order                  255

Section 4.1 of arXiv:2310.02296v1. Other papers use 60 classes, the 60th ("background") being the
400 ids that are ignored here, or hide ten other classes: their scores cannot be compared with
these. The splits are those of ``trainval_merged.json`` (3 of the 10,103 images are in neither).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .benchmark import Archive, Benchmark, Item, encode, label_table
from .matlab import read_matlab_array

LABELMAP_IDS = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25,
    "boat": 31, "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59,
    "cat": 65, "ceiling": 68, "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104,
    "curtain": 105, "dog": 113, "door": 115, "fence": 144, "floor": 158, "flower": 159,
    "food": 162, "grass": 187, "ground": 189, "horse": 207, "keyboard": 220, "light": 232,
    "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295, "platform": 296,
    "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354,
    "sign": 355, "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416,
    "tree": 420, "truck": 424, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454,
    "wood": 458,
}  # fmt: skip
CLASS_NAMES = tuple(LABELMAP_IDS)
UNSEEN = (
    "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard",
    "aeroplane",
)  # fmt: skip

_TABLE = label_table({id_: rank for rank, id_ in enumerate(LABELMAP_IDS.values())}, 459)
_VOC, _SPLITS = Path("VOCdevkit/VOC2010"), "trainval_merged.json"


def list_items(root: Path) -> dict[str, list[Item]]:
    """List both splits, by the phase of each image in ``trainval_merged.json``.

    Raises:
        FileNotFoundError: if that file is missing.
        ValueError: if it is not as expected.
    """
    path = root / _SPLITS
    if not path.is_file():
        raise FileNotFoundError(f"{path} must hold the splits, but there is no such file")
    try:
        images = json.loads(path.read_bytes(), object_pairs_hook=_keep_splits)["images"]
        phases = [(str(image["image_id"]), image["phase"]) for image in images]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must list `images` with `image_id` and `phase`, got {error!r}; "
            "delete it and run again"
        ) from error
    names: dict[str, list[str]] = {"train": [], "val": []}
    for digits, phase in phases:
        if phase in names:  # "test" has no labels
            names[phase].append(f"{digits[:4]}_{digits[4:]}")  # 2008000002 is 2008_000002
    return {split: [_item(root, name) for name in sorted(names[split])] for split in names}


def read_label(path: Path) -> NDArray[np.uint8]:
    """Read train ids, uint8 (H, W), from a ``.mat`` file with 459 labels."""
    return encode(read_matlab_array(path, "LabelMap"), _TABLE, path)


def _keep_splits(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Drop all but the image list while parsing: the outlines would take gigabytes."""
    return {key: value for key, value in pairs if key in ("images", "image_id", "phase")}


def _item(root: Path, name: str) -> Item:
    image = root / _VOC / "JPEGImages" / f"{name}.jpg"
    return Item(name, image, root / "trainval" / f"{name}.mat")


PASCAL_CONTEXT = Benchmark(
    name="pascal_context",
    class_names=CLASS_NAMES,
    unseen=UNSEEN,
    counts={"train": 4_996, "val": 5_104},
    archives=(
        Archive(
            urls=(f"https://codalabuser.blob.core.windows.net/public/{_SPLITS}",),
            yields=_SPLITS,
            inside=None,
            megabytes=700,
            unpacked=0,
            md5="3c2d0c0656b7be9eb61928ffe885d8ce",
        ),
        Archive(
            urls=("https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",),
            yields="trainval",
            inside="trainval",
            megabytes=31,
            unpacked=80,
        ),
        Archive(
            urls=(
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            ),
            yields=str(_VOC),
            inside="VOCdevkit/VOC2010",
            megabytes=1_350,
            unpacked=1_450,
            md5="da459979d0c395079b5c75ee67908abb",
        ),
    ),
    list_items=list_items,
    read_label=read_label,
    label_megabytes=150,
    terms="photographs from Flickr under Flickr's terms of use; cite VOC 2010 and PASCAL Context",
)
