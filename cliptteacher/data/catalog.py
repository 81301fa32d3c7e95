"""Open a split of a data set by the name that the programs use for ``--data``."""

from __future__ import annotations

from pathlib import Path

from .benchmark import Benchmark
from .coco_stuff import COCO_STUFF
from .folder import FolderDataset
from .miniworld import MiniWorld
from .pascal_context import PASCAL_CONTEXT
from .splits import SegmentationDataset
from .voc import VOC

BENCHMARKS = {benchmark.name: benchmark for benchmark in (VOC, COCO_STUFF, PASCAL_CONTEXT)}


def open_dataset(kind: str, root: str | Path | None, split: str) -> SegmentationDataset:
    """Open a split of a data set.

    Args:
        kind: "miniworld" (needs no root), "folder", or a benchmark that
            ``examples/prepare_data.py`` has prepared: "voc", "coco_stuff", "pascal_context".
        root: folder of the data set.
        split: such as "train" or "val"; "train" of VOC is its augmented training set.

    Raises:
        ValueError: the kind is unknown, it needs a root and none was given, or the root holds
            another data set.
        FileNotFoundError: the benchmark has not been prepared there.
    """
    if kind == "miniworld":
        return MiniWorld(split)
    if kind != "folder" and kind not in BENCHMARKS:
        kinds = ", ".join(f'"{name}"' for name in ("miniworld", "folder", *BENCHMARKS))
        raise ValueError(f"the kind of data must be one of {kinds}, got {kind!r}")
    if root is None:
        raise ValueError(f"data of the kind {kind!r} needs a root, got none; give its folder")
    if kind == "folder":
        return FolderDataset(root, split)
    return _open_benchmark(BENCHMARKS[kind], Path(root), split)


def _open_benchmark(benchmark: Benchmark, root: Path, split: str) -> FolderDataset:
    if not (root / "dataset.json").is_file():
        program = benchmark.name.replace("_", "-").removeprefix("pascal-")
        raise FileNotFoundError(
            f"{root} must hold {benchmark.name}, prepared; run "
            f"examples/prepare_data.py {program} --root {root}"
        )
    dataset = FolderDataset(root, split)
    unseen = tuple(dataset.class_names[index] for index in dataset.unseen)
    if (dataset.class_names, unseen) != (benchmark.class_names, benchmark.unseen):
        raise ValueError(
            f"{root} must hold the classes of {benchmark.name}, got {len(dataset.class_names)} "
            f"classes of which {len(unseen)} are unseen; use --data folder for another data set"
        )
    return dataset
