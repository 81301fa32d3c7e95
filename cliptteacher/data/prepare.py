"""Turn a benchmark into the folder format, once: download, unpack, convert, link, verify.

    root/archives/        what was downloaded
    root/VOCdevkit/ ...   the official files, as they were unpacked; never written to
    root/images/NAME.jpg  links to the official photographs
    root/labels/NAME.png  train ids 0..A-1, 255 = ignore
    root/train.txt val.txt, then dataset.json when all the rest is complete

Sketch: skip what is there; check the disk; fetch and unpack what is missing; list the official
splits and compare their sizes with the published ones; convert the labels in parallel. Every file
is written under another name and renamed, so that a run which was interrupted can be repeated.
Cost: the downloads, and about 3 ms of one core per label.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import IGNORE_INDEX
from ..download import download
from ..files import (
    OnProgress,
    make_folder,
    read_json,
    write_json,
    write_text,
    write_whole,
)
from .benchmark import Archive, Benchmark, Item
from .images import orientation, turned
from .parallel import parallel_map
from .unpack import unpack

_CHUNK = 32  # labels handed to a process at a time
_SHOWN = 5  # examples in a message


def prepare_benchmark(
    benchmark: Benchmark,
    root: str | Path,
    *,
    mirror: str | None = None,
    workers: int = 1,
    attempts: int = 5,
    delete_archives: bool = False,
    progress: OnProgress | None = None,
) -> None:
    """Download and convert a benchmark; what an earlier run has done is not done again.

    Args:
        benchmark: which one.
        root: its folder; one that already holds the unpacked official files is not downloaded.
        mirror: address of a folder with the archives, tried before the official addresses.
        workers: processes that convert labels.
        attempts: how often each address is tried.
        delete_archives: delete each archive when it is unpacked.
        progress: called with what is going on, how much is done, and of how much (0: unknown).

    Raises:
        OSError: if the disk is too small or cannot be written.
        FileNotFoundError: if files are missing, or a download failed.
        ValueError: if an archive, a split or a label is not what was published, or `root` holds
            another data set.
    """
    root = make_folder(root)
    _refuse_other_data(benchmark, root)
    missing = missing_archives(benchmark, root)
    _check_space(benchmark, root, missing)
    for archive in missing:
        _fetch(archive, root, mirror, attempts, delete_archives, progress)
    splits = benchmark.list_items(root)
    _check_counts(benchmark, splits)
    items = list({item.name: item for split in splits.values() for item in split}.values())
    _check_sources(items)
    _link_images(items, root / "images")
    _convert_labels(benchmark, items, root / "labels", workers, progress)
    for split, listed in splits.items():
        write_text("".join(f"{item.name}\n" for item in listed), root / f"{split}.txt")
    write_json(description(benchmark), root / "dataset.json")


def description(benchmark: Benchmark) -> dict[str, object]:
    """Return the content of ``dataset.json``."""
    return {
        "benchmark": benchmark.name,
        "classes": list(benchmark.class_names),
        "unseen": list(benchmark.unseen),
        "ignore_index": IGNORE_INDEX,
    }


def missing_archives(benchmark: Benchmark, root: Path) -> list[Archive]:
    """List the archives whose content is not below the root yet."""
    return [
        archive
        for archive in benchmark.archives
        if not any((root / path).exists() for path in (archive.yields, archive.instead) if path)
    ]


def _refuse_other_data(benchmark: Benchmark, root: Path) -> None:
    path = root / "dataset.json"
    if not path.exists():
        return
    try:
        found = read_json(path)
    except ValueError:
        found = None
    if found != description(benchmark):
        raise ValueError(
            f"{root} must be empty or hold {benchmark.name}, but {path.name} describes another "
            "data set; choose another --root"
        )


def _check_space(benchmark: Benchmark, root: Path, missing: Iterable[Archive]) -> None:
    """Compare the free space with what the missing parts will take."""
    need = 0 if (root / "dataset.json").exists() else benchmark.label_megabytes
    for archive in missing:
        need += archive.megabytes + archive.unpacked
        for name in (archive.file, f"{archive.file}.part"):
            path = root / "archives" / name
            need -= path.stat().st_size // 10**6 if path.exists() else 0
    free = shutil.disk_usage(root).free // 10**6
    if free < need:
        raise OSError(
            f"{root} must have about {need / 1000:.1f} GB of free space for {benchmark.name}, got "
            f"{free / 1000:.1f} GB; free some or choose a --root on another disk"
        )


def _fetch(
    archive: Archive,
    root: Path,
    mirror: str | None,
    attempts: int,
    delete: bool,
    progress: OnProgress | None,
) -> None:
    urls = [*([f"{mirror.rstrip('/')}/{archive.file}"] if mirror else []), *archive.urls]
    target = root / archive.yields
    file = target if archive.inside is None else root / "archives" / archive.file
    try:
        download(
            urls,
            file,
            digest=archive.md5,
            algorithm="md5",
            megabytes=archive.megabytes,
            attempts=attempts,
            progress=progress,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or name a mirror") from error
    if archive.inside is None:
        return
    unpack(file, archive.inside, target, progress=progress)
    if delete:
        file.unlink()


def _check_counts(benchmark: Benchmark, splits: Mapping[str, Sequence[Item]]) -> None:
    found = {split: len(splits[split]) for split in benchmark.counts}
    if found != dict(benchmark.counts):
        raise ValueError(
            f"the splits of {benchmark.name} must have the sizes {dict(benchmark.counts)}, got "
            f"{found}; the unpacked official files are incomplete or of another release, delete "
            "them and run again"
        )


def _check_sources(items: Iterable[Item]) -> None:
    """Look for every file; each folder is listed once."""
    listed: dict[Path, set[str]] = {}
    missing: list[str] = []
    for path in (path for item in items for path in (item.image, item.label)):
        if path.parent not in listed:
            folder = path.parent
            listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if path.name not in listed[path.parent]:
            missing.append(str(path))
    if missing:
        raise FileNotFoundError(
            f"every image and label of the splits must exist, but {len(missing)} are missing: "
            f"{_some(missing)}; delete the unpacked folder and run again"
        )


def _link_images(items: Iterable[Item], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    existing = set(os.listdir(folder))
    for item in items:
        name = f"{item.name}{item.image.suffix}"
        if name in existing:
            continue
        try:
            (folder / name).symlink_to(os.path.relpath(item.image, folder))
        except OSError:  # Windows lets few users do that
            os.link(item.image, folder / name)


def _convert_labels(
    benchmark: Benchmark,
    items: Sequence[Item],
    folder: Path,
    workers: int,
    progress: OnProgress | None,
) -> None:
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob(".*"):  # of a process that was killed
        unfinished.unlink()
    existing = set(os.listdir(folder))
    todo = [item for item in items if f"{item.name}.png" not in existing]
    convert = partial(_convert, read_label=benchmark.read_label, folder=folder)
    errors: list[str] = []
    for done, error in enumerate(parallel_map(convert, todo, workers, _CHUNK), start=1):
        errors += [error] if error else []
        if progress is not None:
            progress("labels", done, len(todo))
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(todo)} labels could not be converted: {_some(errors)}"
        )


def _convert(
    item: Item, read_label: Callable[[Path], NDArray[np.uint8]], folder: Path
) -> str | None:
    """Write the index PNG of one item; returns what is wrong with it, if anything."""
    try:
        with Image.open(item.image) as photo:
            stored, turn = photo.size, orientation(photo)
        label = Image.fromarray(read_label(item.label))
    except (ValueError, OSError, SyntaxError) as error:  # Pillow raises the last for broken PNGs
        return f"{item.name}: {error}"
    if label.size != stored:
        return (
            f"{item.label} must be as large as its image, got {label.size} for {stored} "
            "(width, height)"
        )
    # The labels belong to the pixels as stored, but photographs are read upright.
    with write_whole(folder / f"{item.name}.png", flush=False) as file:  # 118,000 for COCO-Stuff
        turned(label, turn).save(file, "PNG")
    return None


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more
