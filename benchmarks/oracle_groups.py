"""Train with perfect pseudo labels: are the groups to blame, or what can be made of them?

    python benchmarks/oracle_groups.py image --output runs/oracle [flags of examples/train.py]
    python benchmarks/oracle_groups.py class --potential-scope batch --output runs/oracle_class

An experiment, not a zero-shot result: the groups of the Pixel Learning Module are replaced by the
hidden labels of the unseen classes, at the resolution of CLIP's tokens. Their names stay hidden,
and all else is train.py, in one process. With `image` a class in two images is two potential
classes, as in the paper; with `class` it is one; `ground` is `image` with one more group in every
image, of the pixels that have no label at all, which the module groups too.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import cliptteacher.data
import cliptteacher.framework
from cliptteacher import IGNORE_INDEX
from cliptteacher.data import SeenOnly
from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.framework import CLIPTeacher
from cliptteacher.plm import NO_LABEL, PixelTargets, merge_labels, resize_nearest

HIDDEN = 200  # labels from here on are the unseen classes; augmentation sees them, which is a leak
SLOTS = IGNORE_INDEX - HIDDEN
KINDS = ("image", "class", "ground")
TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train.py"


class HiddenLabels(SeenOnly):
    """Labels of the seen classes, and those of unseen class u as HIDDEN + u."""

    def __init__(self, dataset: SegmentationDataset, *, closed_set: bool = False) -> None:
        super().__init__(dataset, closed_set=closed_set)
        for number, value in enumerate(dataset.unseen):
            self._lookup[value] = HIDDEN + number
        if OracleTeacher.kind == "ground":
            self._lookup[dataset.ignore_index] = HIDDEN + len(dataset.unseen)


class OracleTeacher(CLIPTeacher):
    """The method with the hidden labels as groups."""

    kind = "image"

    def forward(self, images: Tensor, labels: Tensor, parts: int = 1) -> dict[str, Tensor]:
        is_hidden = (labels >= HIDDEN) & (labels != IGNORE_INDEX)
        hidden = torch.where(is_hidden, labels.long() - HIDDEN, NO_LABEL)

        def perfect_targets(
            dense: Tensor, seen_labels: Tensor, size: tuple[int, int], num_seen: int
        ) -> PixelTargets:
            groups = resize_nearest(resize_nearest(hidden, (dense.shape[2], dense.shape[3])), size)
            near_labels = resize_nearest(seen_labels, size)
            slots = self.plm.config.potential_slots or SLOTS
            ids = merge_labels(near_labels, groups, num_seen, slots)
            if self.kind == "class":  # in every image the ids of the first
                ids = torch.where(ids < num_seen, ids, num_seen + (ids - num_seen) % slots)
            return PixelTargets(ids, slots)

        self.plm.make_targets = perfect_targets
        return super().forward(images, labels.masked_fill(is_hidden, IGNORE_INDEX), parts)


def main() -> None:
    if sys.argv[1:2] not in [[kind] for kind in KINDS]:
        print(__doc__)
        raise SystemExit("--help" not in sys.argv)
    OracleTeacher.kind = sys.argv.pop(1)
    with (  # train.py runs as it is, with other classes in the package
        patch.object(cliptteacher.data, "SeenOnly", HiddenLabels),
        patch.object(cliptteacher.framework, "CLIPTeacher", OracleTeacher),
    ):
        runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
