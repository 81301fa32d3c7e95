"""Data sets, class splits and augmentation; every name below is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import Benchmark as Benchmark
    from .catalog import BENCHMARKS as BENCHMARKS
    from .catalog import open_dataset as open_dataset
    from .check import check_benchmark as check_benchmark
    from .check import check_folder as check_folder
    from .folder import FolderDataset as FolderDataset
    from .miniworld import MiniWorld as MiniWorld
    from .prepare import prepare_benchmark as prepare_benchmark
    from .splits import ClassSplit as ClassSplit
    from .splits import SeenOnly as SeenOnly
    from .splits import SegmentationDataset as SegmentationDataset
    from .stream import TrainingStream as TrainingStream
    from .stream import rank_indices as rank_indices
    from .transforms import resize_keep_ratio as resize_keep_ratio
    from .transforms import training_transform as training_transform

_HOME = {
    "BENCHMARKS": "catalog",
    "Benchmark": "benchmark",
    "ClassSplit": "splits",
    "FolderDataset": "folder",
    "MiniWorld": "miniworld",
    "SeenOnly": "splits",
    "SegmentationDataset": "splits",
    "TrainingStream": "stream",
    "check_benchmark": "check",
    "check_folder": "check",
    "open_dataset": "catalog",
    "prepare_benchmark": "prepare",
    "rank_indices": "stream",
    "resize_keep_ratio": "transforms",
    "training_transform": "transforms",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the file that defines a public name of this folder (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names next to what is loaded already."""
    return sorted({*globals(), *_HOME})
