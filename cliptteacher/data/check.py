"""Say what is wrong with a data set in the folder format, all of it and not only the first thing.

Sketch: the description; the split files; which listed images and labels are missing; then every
pair is read as training would read it, in parallel. Problems stop a training run or spoil it;
notes are worth knowing. Cost: the decoding of every image once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..files import OnProgress, read_text
from .benchmark import Benchmark
from .folder import FolderDataset, composed, image_suffixes
from .parallel import parallel_map
from .prepare import missing_archives

_SHOWN = 10  # examples of one kind of problem
_RANGES = 16  # per process; each opens the data set anew


@dataclass
class Report:
    """What a check has found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # images of each split


def check_folder(
    root: str | Path, *, workers: int = 1, progress: OnProgress | None = None
) -> Report:
    """Check a data set of one's own.

    Args:
        root: its folder, see `FolderDataset`.
        workers: processes that read.
        progress: called with the name of the split, images read and images in total.
    """
    root, report = Path(root), Report()
    if not root.is_dir():
        report.problems.append(f"{root} must be a folder, but there is none; check --root")
        return report
    names = _read_splits(root, report)
    for split in ("train", "val"):
        if split not in names:
            report.problems.append(
                f"{root / split}.txt must list the images of split {split!r}, but there is no "
                "such file; write one name a line, without its extension"
            )
    incomplete = _compare_files(root, names, report)
    _compare_splits(names, report)
    report.counts = {split: len(names[split]) for split in sorted(names)}
    datasets = _open_splits(root, report, incomplete)
    _read_pairs(root, datasets, report, workers, progress)
    report.problems = list(dict.fromkeys(report.problems))  # each split tells of dataset.json
    return report


def check_benchmark(
    benchmark: Benchmark,
    root: str | Path,
    *,
    workers: int = 1,
    progress: OnProgress | None = None,
) -> Report:
    """Check a benchmark that `prepare_benchmark` has written, or say what it would have to fetch.

    Args: as in `check_folder`.
    """
    root = Path(root)
    if not (root / "dataset.json").exists():
        lacking = [f"{a.yields} (from {a.file})" for a in missing_archives(benchmark, root)]
        what = f"missing: {', '.join(lacking)}" if lacking else "the labels are not converted yet"
        return Report([f"{root} must hold {benchmark.name}, prepared; {what}; run without --check"])
    report = check_folder(root, workers=workers, progress=progress)
    for split, count in benchmark.counts.items():
        found = report.counts.get(split, 0)
        if found != count:
            report.problems.append(f"{split}.txt must list {count} images, got {found}")
    try:
        dataset = FolderDataset(root, next(iter(benchmark.counts)))
    except (OSError, ValueError):
        return report  # check_folder has told of it
    unseen = tuple(dataset.class_names[index] for index in dataset.unseen)
    if (dataset.class_names, unseen) != (benchmark.class_names, benchmark.unseen):
        report.problems.append(
            f"{root / 'dataset.json'} must hold the classes of {benchmark.name}, got others; "
            "delete it and run without --check"
        )
    return report


def _read_splits(root: Path, report: Report) -> dict[str, list[str]]:
    """Read the names of each split; a text file that names no image is none."""
    images = {composed(path.stem) for path in root.glob("images/*")}
    names: dict[str, list[str]] = {}
    for path in sorted(root.glob("*.txt")):
        try:
            lines = read_text(path).splitlines()
        except ValueError as error:
            report.problems.append(str(error))
            continue
        listed = [composed(line.strip()) for line in lines if line.strip()]
        if path.stem in ("train", "val") or images.intersection(listed):
            names[path.stem] = listed
        else:
            report.notes.append(f"{path.name} names none of the images and is not a split")
    return names


def _compare_files(root: Path, names: dict[str, list[str]], report: Report) -> set[str]:
    """Look for both halves of every pair, and for files in no split; returns incomplete splits."""
    incomplete: set[str] = set()
    listed = {name for split in names.values() for name in split}
    for folder, suffixes in (("images", image_suffixes()), ("labels", (".png",))):
        if not (root / folder).is_dir():
            report.problems.append(f"{root / folder} must be a folder, but there is none")
            incomplete.update(names)
            continue
        files = [path for path in (root / folder).iterdir() if path.name[0] != "."]
        other = sorted(path.name for path in files if path.suffix.lower() not in suffixes)
        if other:
            report.notes.append(f"{folder}: {len(other)} that cannot be read: {_some(other)}")
        files = [path for path in files if path.suffix.lower() in suffixes]
        existing = {composed(path.stem) for path in files if path.exists()}  # no broken links
        for split, wanted in sorted(names.items()):
            missing = [name for name in wanted if name not in existing]
            if missing:
                incomplete.add(split)
                report.problems.append(
                    f"{folder}: {len(missing)} of {len(wanted)} files of {split}.txt are missing: "
                    f"{_some(missing)}"
                )
        unused = sorted(existing - listed)
        if unused:
            report.notes.append(f"{folder}: {len(unused)} in no split: {_some(unused)}")
    return incomplete


def _compare_splits(names: dict[str, list[str]], report: Report) -> None:
    for split, listed in sorted(names.items()):
        twice = [name for name, count in Counter(listed).items() if count > 1]
        if twice:
            report.problems.append(f"{split}.txt lists images more than once: {_some(twice)}")
    both = sorted(set(names.get("train", ())) & set(names.get("val", ())))
    if both:
        report.problems.append(
            f"{len(both)} images are in train.txt and in val.txt, so that scores would be of "
            f"images trained on: {_some(both)}"
        )


def _open_splits(root: Path, report: Report, incomplete: set[str]) -> dict[str, FolderDataset]:
    """Open the splits that can be opened; says what is wrong with the others."""
    datasets: dict[str, FolderDataset] = {}
    for split in report.counts:
        try:
            datasets[split] = FolderDataset(root, split)
        except (OSError, ValueError) as error:
            # What is missing in an incomplete split was told already, with the names of all.
            if split not in incomplete or "dataset.json" in str(error):
                report.problems.append(str(error))
            report.notes.append(f"{split}: its pairs are read when the above is put right")
    return datasets


def _read_pairs(
    root: Path,
    datasets: dict[str, FolderDataset],
    report: Report,
    workers: int,
    progress: OnProgress | None,
) -> None:
    """Read every pair of every split, in parallel."""
    tasks: list[tuple[str, range]] = []
    for split, dataset in datasets.items():
        step = -(-len(dataset) // (_RANGES * workers))
        indices = range(len(dataset))
        tasks += [(split, indices[start : start + step]) for start in indices[::step]]
    errors: dict[str, list[str]] = {split: [] for split in datasets}
    present: dict[str, set[int]] = {split: set() for split in datasets}
    results = parallel_map(partial(_read_range, root), tasks, workers)
    for (split, read), (wrong, found) in zip(tasks, results, strict=True):
        errors[split] += wrong
        present[split] |= found
        if progress is not None:
            progress(split, read.stop, len(datasets[split]))
    for split, dataset in datasets.items():
        _tell(split, errors[split], dataset.class_names, present[split], report)


def _tell(
    split: str, errors: list[str], names: Sequence[str], present: set[int], report: Report
) -> None:
    """Report what is wrong with the pairs of a split, and which classes it lacks."""
    report.problems += [f"{split}: {error}" for error in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        report.problems.append(f"{split}: and {len(errors) - _SHOWN} more like these")
    absent = [name for i, name in enumerate(names) if i not in present]
    if absent and not errors:
        report.notes.append(f"{split}: no pixel of {_some(absent)}; such a class has no score")


def _read_range(root: Path, task: tuple[str, range]) -> tuple[list[str], set[int]]:
    """Read some pairs of a split; returns what is wrong, and the classes that were seen."""
    split, indices = task
    dataset = FolderDataset(root, split)
    errors: list[str] = []
    present: set[int] = set()
    for index in indices:
        try:
            _, label = dataset[index]
        except (ValueError, OSError, SyntaxError) as error:  # Pillow raises the last
            errors.append(f"{dataset.image_name(index)}: {error}")
        else:
            present.update(torch.unique(label).tolist())
    return errors, present


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
