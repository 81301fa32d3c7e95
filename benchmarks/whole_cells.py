"""What padding gains on images whose sides are no multiple of the student's coarsest stride.

    python benchmarks/whole_cells.py RUN [RUN ...] --cut 0 31 [--divisors 1 32] [--json FILE]

Evaluates each run on a split, its images cut by so many pixels below and to the right, with
images left as they are (1) or mirrored to a multiple of 32 before the student sees them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliptteacher.data import SegmentationDataset, open_dataset
from cliptteacher.distributed import Process
from cliptteacher.evaluation import SCORES, evaluate, scores_as_percent
from cliptteacher.files import write_json
from cliptteacher.inference import load_segmenter
from cliptteacher.training.records import describe_environment


class Cut:
    """A data set whose images miss some pixels below and to the right."""

    def __init__(self, dataset: SegmentationDataset, pixels: int) -> None:
        self._dataset, self._pixels = dataset, pixels
        self.class_names, self.unseen = dataset.class_names, dataset.unseen
        self.ignore_index = dataset.ignore_index

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._dataset[index]
        height, width = (side - self._pixels for side in label.shape)
        return image[:, :height, :width], label[:height, :width]

    def image_name(self, index: int) -> str:
        """Name of an image, without folder and suffix."""
        return self._dataset.image_name(index)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--split", default="val")
    parser.add_argument("--cut", type=int, nargs="+", default=[0], help="pixels cut from each side")
    parser.add_argument("--divisors", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--json", type=Path, help="write the scores here")
    args = parser.parse_args()
    rows = [row for run in args.runs for row in measure(run, args.split, args.cut, args.divisors)]
    if args.json is not None:
        found = describe_environment(Process(0, 0, 1, torch.device("cpu")))
        about = {name: found[name] for name in ("command", "commit", "date")}
        write_json({**about, "rows": rows}, args.json)


def measure(run: Path, split: str, cuts: list[int], divisors: list[int]) -> list[dict[str, Any]]:
    """Score the student of a run for every cut and divisor; prints a line for each."""
    trained, rows = load_segmenter(run), []
    config = trained.checkpoint["config"]
    dataset = open_dataset(config["data"], config["root"], split)
    unseen = trained.unseen or dataset.unseen
    for pixels in cuts:
        for divisor in divisors:
            predictor = trained.predictor(size_divisor=divisor)
            result = evaluate(predictor, Cut(dataset, pixels), batch_size=8, unseen=unseen)
            scores = scores_as_percent(result, dataset.class_names)
            four = {name: round(scores[name], 2) for name in SCORES}
            rows.append({"run": str(run), "cut": pixels, "divisor": divisor, **four})
            values = "  ".join(f"{name} {value:.1f}" for name, value in four.items())
            print(f"{run}  cut {pixels}  divisor {divisor}:  {values}", flush=True)
    return rows


if __name__ == "__main__":
    main()
