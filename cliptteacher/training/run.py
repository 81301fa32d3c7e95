"""The run directory: what was asked for, on what machine, and what came of it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision


def default_output(recipe: str) -> Path:
    """Name a fresh run directory: ``runs/<recipe>-<date>``."""
    return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def write_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def describe_environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Collect versions, machine, command and commit of this run."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
    }


def _commit() -> str | None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, appended as it happens.

    Args:
        path: the file. Lines from ``step`` on are dropped first, so that a resumed run does not
            tell the same iterations twice.
        step: the iteration that the run starts with.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        path = Path(path)
        lines = path.read_text().splitlines() if path.exists() and step else []
        kept = [line for line in lines if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line that was cut short by a crash


def progress_line(
    step: int, iterations: int, losses: Mapping[str, float], seconds: float, done: int, lr: float
) -> str:
    """Format one progress line.

    Args:
        step: iterations done in all.
        iterations: length of the run.
        losses: mean losses since the last line.
        seconds: time since this process started training.
        done: iterations done in that time.
        lr: learning rate of the backbone.
    """
    rate = done / max(seconds, 1e-9)
    terms = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    left = (iterations - step) / max(rate, 1e-9)
    return (
        f"{step:>6}/{iterations}  {terms}  lr {lr:.1e}  {rate:.2f} it/s  "
        f"{peak_memory() / 2**30:.1f} GiB  {format_time(left)} left"
    )


def format_time(seconds: float) -> str:
    """Format a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory() -> int:
    """Largest memory so far in bytes: of the CUDA allocator, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
