"""COCO-Stuff 164k: 171 classes, 156 seen and 15 unseen, in 118,287 + 5,000 images.

    value in the file   0..181, COCO id - 1, of which 11 are no class   255 unlabelled
    train id            rank among the 171 that are; 255 for the 11          255

Section 4.1 of arXiv:2310.02296v1. The 11 values belong to ids that COCO numbered but never
released ("street sign", "hat", "shoe", ...): whoever takes the value for the class shifts every
class behind the first of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import IGNORE_INDEX
from .benchmark import Archive, Benchmark, Item, encode, forbid, label_table
from .images import read_indices

CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "banner", "blanket",
    "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard",
    "curtain", "desk-stuff", "dirt", "door-stuff", "fence", "floor-marble", "floor-other",
    "floor-stone", "floor-tile", "floor-wood", "flower", "fog", "food-other", "fruit",
    "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light",
    "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing",
    "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf",
    "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw",
    "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable",
    "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
UNSEEN = (
    "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard",
    "clouds", "grass", "playingfield", "river", "road", "tree", "wall-concrete",
)  # fmt: skip
UNUSED_VALUES = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
CLASS_VALUES = tuple(value for value in range(182) if value not in UNUSED_VALUES)

_TABLE = forbid(
    label_table({value: rank for rank, value in enumerate(CLASS_VALUES)}, IGNORE_INDEX),
    range(182, 255),
)


def list_items(root: Path) -> dict[str, list[Item]]:
    """List both splits; COCO has no split files, the folders of the label maps are the splits."""
    return {split: _list_folder(root, f"{split}2017") for split in ("train", "val")}


def read_label(path: Path) -> NDArray[np.uint8]:
    """Read train ids, uint8 (H, W), from a PNG of ``stuffthingmaps``."""
    return encode(read_indices(path), _TABLE, path)


def _list_folder(root: Path, folder: str) -> list[Item]:
    labels = root / "stuffthingmaps" / folder
    if not labels.is_dir():
        raise FileNotFoundError(
            f"{labels} must hold the label maps, but there is no such folder; unpack "
            "stuffthingmaps_trainval2017.zip there"
        )
    names = sorted(path.stem for path in labels.iterdir() if path.suffix == ".png")
    return [Item(name, root / folder / f"{name}.jpg", labels / f"{name}.png") for name in names]


def _images(split: str, megabytes: int, md5: str) -> Archive:
    url = f"http://images.cocodataset.org/zips/{split}2017.zip"
    return Archive((url,), f"{split}2017", f"{split}2017", megabytes, megabytes, md5)


COCO_STUFF = Benchmark(
    name="coco_stuff",
    class_names=CLASS_NAMES,
    unseen=UNSEEN,
    counts={"train": 118_287, "val": 5_000},
    archives=(
        Archive(
            urls=(
                "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
                "stuffthingmaps_trainval2017.zip",
            ),
            yields="stuffthingmaps",
            inside=".",
            megabytes=700,
            unpacked=1_000,
        ),
        _images("val", 816, "442b8da7639aecaf257c1dceb8ba8c80"),
        _images("train", 19_337, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    ),
    list_items=list_items,
    read_label=read_label,
    label_megabytes=1_000,
    terms="labels CC BY 4.0, photographs from Flickr under Flickr's terms of use; cite COCO-Stuff",
)
