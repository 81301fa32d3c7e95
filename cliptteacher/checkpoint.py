"""Checkpoints: written whole or not at all, checked when read, read without running code.

A checkpoint is a dictionary of tensors and plain values, so ``torch.load(weights_only=True)``
reads it. What may happen at any moment, and what is left then:

    write to a temporary file            killed, disk full: the temporary file is rubbish
    add its digest to SHA256SUMS         killed: a digest of a file that is not there yet
    fsync, rename, fsync the folder      killed: before or after, nothing between
    point last.pt (a hard link) to it    killed: last.pt is older than the newest numbered file
    delete the oldest                    killed: one file too many until the next time

A file whose bytes have none of the digests that SHA256SUMS holds for its name is damaged; whoever
asks for the newest checkpoint of a run gets the one before it, with a warning. By hand:
``sha256sum -c SHA256SUMS``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast, get_args

import torch
from torch import Tensor, nn

from .files import FULL_DISK, file_digest, flush_folder, make_folder, write_text, write_whole
from .logits import Similarity
from .tensors import check_sizes, read_torch

FORMAT = "cliptteacher-checkpoint-2"
KEEP = 2  # newest checkpoints that stay: the newest may turn out damaged
SUMS = "SHA256SUMS"
_NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(content: dict[str, Any], folder: str | Path) -> Path:
    """Write ``step_XXXXXXXX.pt``, point ``last.pt`` to it and delete old ones.

    Args:
        content: tensors and plain values; must hold ``step``.
        folder: directory of the checkpoints; made if missing. One process at a time writes there.

    Returns:
        The path of the new file.

    Raises:
        OSError: the file could not be written; the older checkpoints are as they were.
    """
    folder = make_folder(folder)
    for rubbish in folder.glob("*.tmp*"):  # of a process that was killed while writing
        rubbish.unlink()
    path = folder / f"step_{content['step']:08d}.pt"
    try:
        _write_whole({"format": FORMAT, **content}, path)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"no room for the checkpoint {path} ({os.strerror(error.errno)}; {free / 2**20:.0f} "
            "MiB free); the older ones are intact: make room and start again with --resume",
        ) from error
    _point_last_to(path)
    flush_folder(folder)
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def student_content(
    segmenter: nn.Module,
    *,
    names: Sequence[str],
    text_features: Tensor,
    unseen: Sequence[int] = (),
    gamma: float = 1.5,
    logit_scale: float = 1.0,
    similarity: Similarity = "dot",
    resize: tuple[int, int] | None = None,
    size_divisor: int = 1,
    templates: str = "single",
    clip: str | None = None,
    clip_activation: str | None = None,
    clip_heads: Sequence[int] | None = None,
    setting: str = "inductive",
) -> dict[str, Any]:
    """Collect what a checkpoint holds of a student: weights, words and settings of inference.

    Args:
        segmenter: the student.
        names: names of all A classes, in label order.
        text_features: (A, C) of these names.
        unseen: label values of the classes without labels in training.
        gamma, logit_scale, similarity, resize, size_divisor: see ``inference.Predictor``.
        templates: prompts of the text features, for other words.
        clip: name or path of the teacher, for other words.
        clip_activation, clip_heads: of the teacher, where its files may not say them.
        setting: what training knew of the unseen classes: nothing ("inductive"), their names
            ("transductive"), their labels ("closed_set").

    Raises:
        ValueError: names and text features are not equally many.
    """
    if len(names) != len(text_features):
        raise ValueError(
            f"`text_features` must have one row per name, got {len(text_features)} rows for "
            f"{len(names)} names"
        )
    built = getattr(segmenter, "build_arguments", None) or {}
    return {
        "segmenter": dict(segmenter.state_dict()),
        "segmenter_name": built.get("name"),
        "segmenter_options": built.get("options", {}),
        "channels": text_features.shape[1],
        "class_names": list(names),
        "unseen": list(unseen),
        "text_features": text_features.detach().cpu(),
        "gamma": float(gamma),
        "logit_scale": float(logit_scale),
        "similarity": similarity,
        "resize": list(resize or ()),
        "size_divisor": size_divisor,
        "templates": templates,
        "clip": clip,
        "clip_activation": clip_activation,
        "clip_heads": None if clip_heads is None else list(clip_heads),
        "setting": setting,
    }


def save_student(content: dict[str, Any], path: str | Path) -> None:
    """Write one checkpoint file under a name of your own, whole or not at all."""
    path = Path(path)
    with write_whole(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file, or a run directory, whose newest undamaged checkpoint is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        path = newest_checkpoint(path / "checkpoints") or path / "checkpoints" / "last.pt"
    elif path.is_file() and not is_intact(path):
        raise ValueError(f"{path} is damaged: {_other_digest(path)}; take an older one beside it")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one file without comparing its digest; raises as ``load_checkpoint`` does."""
    if not path.is_file():
        raise FileNotFoundError(
            f"the checkpoint {path} does not exist; examples/train.py writes it to its --output"
        )
    try:
        content = read_torch(path)
    except ValueError as error:
        raise ValueError(
            f"{path} must be a checkpoint of cliptteacher, but it holds more than tensors and "
            "plain values or is damaged; take one that train.py wrote"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of the format {FORMAT}, got {found!r:.60}")
    wrong = [name for name, good in _ENTRIES.items() if not good(content.get(name, _MISSING))]
    wrong = wrong or _compare_entries(content, path)
    if wrong:
        raise ValueError(
            f"the entry {wrong[0]!r} of {path} is missing or of the wrong type; take a checkpoint "
            "that train.py or save_segmenter wrote"
        )
    return content


_MISSING = object()


def _is_whole(value: object, low: int = 0, high: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _is_side(value: object) -> bool:
    return _is_whole(value, low=1, high=2**15)  # pixels; a larger picture would fill any memory


def _is_list(value: object, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(good, value))


def _is_number(value: object) -> bool:
    return isinstance(value, float) and abs(value) < 1e38  # float32 holds no more; NaN is false


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


# What every checkpoint holds, whoever wrote it; checked once and here, for every reader.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "step": _is_whole,
    "segmenter": lambda v: isinstance(v, dict) and all(isinstance(t, Tensor) for t in v.values()),
    "segmenter_name": lambda v: v is None or isinstance(v, str),
    "segmenter_options": lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v),
    "channels": _is_whole,
    "class_names": lambda v: _is_list(
        v, lambda name: isinstance(name, str) and any(map(str.isalnum, name))
    ),
    "unseen": lambda v: _is_list(v, _is_whole),
    "text_features": _is_matrix,
    "gamma": _is_number,
    "logit_scale": _is_number,
    "similarity": lambda v: v in get_args(Similarity),
    "resize": lambda v: _is_list(v, _is_side) and len(v) in (0, 2),
    "size_divisor": _is_side,
    # Of newer ones only.
    "templates": lambda v: v is _MISSING or v in ("single", "ensemble"),
    "clip": lambda v: v in (_MISSING, None) or isinstance(v, str),
    "clip_activation": lambda v: v in (_MISSING, None) or isinstance(v, str),
    "clip_heads": lambda v: v in (_MISSING, None) or _is_list(v, partial(_is_whole, low=1)),
    "setting": lambda v: v is _MISSING or isinstance(v, str),
    "config": lambda v: v is _MISSING or isinstance(v, dict),
}


def _compare_entries(content: dict[str, Any], path: Path) -> list[str]:
    """Compare entries with each other, and tensors with the bytes of the file."""
    names, text = content["class_names"], content["text_features"]
    check_sizes({**content["segmenter"], "text_features": text}, path)
    tensors = {"segmenter": content["segmenter"].values(), "text_features": [text]}
    finite = {name: all(bool(t.isfinite().all()) for t in ts) for name, ts in tensors.items()}
    agree = {
        **finite,
        "class_names": len(names) == len(text) > 0,
        "channels": content["channels"] == text.shape[1],
        "unseen": all(index < len(names) for index in content["unseen"]),
    }
    return [name for name, good in agree.items() if not good]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest undamaged checkpoint of a folder; warns of each that it passes over.

    Returns:
        The path; None if the folder holds no checkpoint at all.

    Raises:
        ValueError: it holds some, and all of them are damaged.
    """
    folder = Path(folder)
    found = list_checkpoints(folder)
    if not found:
        last = folder / "last.pt"  # a folder in which someone kept this file alone
        return last if last.is_file() else None
    for path in reversed(found):
        if is_intact(path):
            return path
        warnings.warn(
            f"the checkpoint {path} is damaged ({_other_digest(path)}); the one before it is used",
            stacklevel=2,
        )
    raise ValueError(
        f"all {len(found)} checkpoints in {folder} are damaged; start again with another --output"
    )


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the numbered checkpoints of a folder, oldest first."""
    return sorted(p for p in Path(folder).glob("step_*.pt") if _NAME.fullmatch(p.name))


def is_intact(path: str | Path) -> bool:
    """Whether a file's bytes are those that were written; true where no digest is known."""
    path = Path(path)
    known = {d for d, name in _read_sums(path.parent) if path.name in (name, "last.pt")}
    return not known or file_digest(path) in known


def _other_digest(path: Path) -> str:
    return f"{path.stat().st_size} bytes whose SHA-256 is not the one in {SUMS}"


class _Hashed:
    """A file for writing that hashes what it is given, so that nothing is read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def _write_whole(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under another name, record its digest and rename it."""
    with write_whole(path) as file:
        hashed = _Hashed(file)
        torch.save(content, cast(BinaryIO, hashed))
        _record(path.parent, path.name, hashed.digest.hexdigest())


def _record(folder: Path, name: str, digest: str) -> None:
    """Add a digest to SHA256SUMS, before its file takes its name; drop those of deleted files.

    A file that is written anew keeps its older digest as well: until the rename it is the older.
    """
    present = {path.name for path in folder.iterdir()}
    kept = [(old, other) for old, other in _read_sums(folder) if other in present]
    lines = ("  ".join(pair) + "\n" for pair in dict.fromkeys([*kept, (digest, name)]))
    write_text("".join(lines), folder / SUMS)


def _read_sums(folder: Path) -> list[tuple[str, str]]:
    """Digests and names of SHA256SUMS; a line that is no such pair counts for nothing."""
    file = folder / SUMS
    text = file.read_text(errors="replace") if file.is_file() else ""
    pairs = (line.split(maxsplit=1) for line in text.splitlines())
    return [(pair[0], pair[1].lstrip("*")) for pair in pairs if len(pair) == 2]


def _point_last_to(path: Path) -> None:
    link = path.with_name(f"last.tmp{os.getpid()}")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    link.replace(path.with_name("last.pt"))
