"""Checkpoints: written whole or not at all, read without running code.

A checkpoint is a dictionary of tensors and plain values, so ``torch.load(weights_only=True)``
reads it. It goes to a temporary file, is flushed to the disk and renamed; a crash leaves the
older files as they were. ``last.pt`` is a hard link to the newest.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

FORMAT = "cliptteacher-checkpoint-1"
_NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(content: dict[str, Any], folder: str | Path, keep: int = 2) -> Path:
    """Write ``step_XXXXXXXX.pt``, point ``last.pt`` to it and delete old ones.

    Args:
        content: tensors and plain values; must hold ``step``.
        folder: directory of the checkpoints; made if missing.
        keep: newest checkpoints that stay.

    Returns:
        The path of the new file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{content['step']:08d}.pt"
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _point_last_to(path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file, or a run directory, whose ``checkpoints/last.pt`` is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoints" / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"the checkpoint {path} does not exist; examples/train.py writes it to its --output"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to run the code inside the file
        raise ValueError(
            f"{path} must be a checkpoint of cliptteacher, but it holds more than tensors and "
            f"plain values or is damaged ({type(error).__name__}); take one that train.py wrote"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of cliptteacher; it has another format")
    return content


def list_checkpoints(folder: str | Path) -> list[Path]:
    """List the numbered checkpoints of a folder, oldest first."""
    return sorted(p for p in Path(folder).glob("step_*.pt") if _NAME.fullmatch(p.name))


def _point_last_to(path: Path) -> None:
    link = path.with_name(f"last.tmp{os.getpid()}")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    link.replace(path.with_name("last.pt"))
