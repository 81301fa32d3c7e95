"""PASCAL VOC 2012 with the labels of SBD: 20 classes, 15 seen and 5 unseen, without background.

Training uses "trainaug": (train + SBD train + SBD val) minus val, 10,582 images; 1,464 of them have
VOC's own labels, the others those of SBD, whose train and val sets overlap with VOC's val set.
Evaluation uses val, 1,449 images.

    value in the file   0 background   1..20 class   255 border   (SBD has no border)
    train id                 255          0..19         255

Section 4.1 of arXiv:2310.02296v1. The PNGs of VOC have a palette: their indices are read, never
their colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import IGNORE_INDEX
from .benchmark import (
    Archive,
    Benchmark,
    Item,
    encode,
    forbid,
    label_table,
    read_names,
)
from .images import read_indices
from .matlab import read_matlab_array

CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
UNSEEN = (
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_TABLE = label_table({value: value - 1 for value in range(1, 21)}, IGNORE_INDEX)
_TABLE = forbid(_TABLE, range(21, 255))
_VOC, _SBD = Path("VOCdevkit/VOC2012"), Path("benchmark_RELEASE/dataset")
_AUGMENTED = _VOC / "SegmentationClassAug"


def list_items(root: Path) -> dict[str, list[Item]]:
    """List trainaug (as "train") and val; where both have a label, VOC's own is taken.

    ``SegmentationClassAug`` beside VOC's ``SegmentationClass``, the converted labels of trainaug
    that circulate, is taken instead of the archive of SBD; its PNGs hold the same values.
    """
    splits = root / _VOC / "ImageSets" / "Segmentation"
    own, val = read_names(splits / "train.txt"), read_names(splits / "val.txt")
    if (root / _AUGMENTED).is_dir():
        added = {path.stem for path in (root / _AUGMENTED).glob("[!.]*.png")}
        other_label = _augmented_label
    else:
        added = {*read_names(root / _SBD / "train.txt"), *read_names(root / _SBD / "val.txt")}
        other_label = _sbd_label
    added -= {*own, *val}
    train = {**dict.fromkeys(own, _own_label), **dict.fromkeys(added, other_label)}
    return {
        "train": [_item(root, name, train[name](root, name)) for name in sorted(train)],
        "val": [_item(root, name, _own_label(root, name)) for name in val],
    }


def read_label(path: Path) -> NDArray[np.uint8]:
    """Read train ids, uint8 (H, W), from a palette PNG of VOC or a ``.mat`` file of SBD."""
    if path.suffix == ".mat":
        return encode(read_matlab_array(path, "GTcls.Segmentation"), _TABLE, path)
    return encode(read_indices(path), _TABLE, path)


def _item(root: Path, name: str, label: Path) -> Item:
    return Item(name, root / _VOC / "JPEGImages" / f"{name}.jpg", label)


def _own_label(root: Path, name: str) -> Path:
    return root / _VOC / "SegmentationClass" / f"{name}.png"


def _augmented_label(root: Path, name: str) -> Path:
    return root / _AUGMENTED / f"{name}.png"


def _sbd_label(root: Path, name: str) -> Path:
    return root / _SBD / "cls" / f"{name}.mat"


VOC = Benchmark(
    name="voc",
    class_names=CLASS_NAMES,
    unseen=UNSEEN,
    counts={"train": 10_582, "val": 1_449},
    archives=(
        Archive(
            urls=(
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            ),
            yields=str(_VOC),
            inside="VOCdevkit/VOC2012",
            megabytes=2_000,
            unpacked=2_100,
            md5="6cd6e144f989b92b3379bac3b3de84fd",
        ),
        Archive(
            urls=(
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
                "semantic_contours/benchmark.tgz",
            ),
            yields=str(_SBD),
            inside="benchmark_RELEASE/dataset",
            megabytes=1_420,
            unpacked=1_700,
            md5="82b4d87ceb2ed10f6038a1cba92111cb",
            instead=str(_AUGMENTED),
        ),
    ),
    list_items=list_items,
    read_label=read_label,
    label_megabytes=100,
    terms="photographs from Flickr under Flickr's terms of use; cite VOC 2012 and SBD",
)
