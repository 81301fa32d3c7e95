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
from torch import Tensor

from .distributed import mean_over_processes


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
        path: the file. Lines after ``step`` are dropped first, so that a resumed run does not
            tell the same iterations twice.
        step: iterations already done when the run starts.
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


class Progress:
    """Sums losses on the device and waits for it only when a line is due.

    Args:
        iterations: length of the run.
        start: iteration that this process starts with.
        log: None on all but the main process.
    """

    def __init__(self, iterations: int, start: int, log: MetricsLog | None) -> None:
        self.iterations, self.start, self.log = iterations, start, log
        self._began = time.monotonic()
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @property
    def seconds(self) -> float:
        """Time since the loop began."""
        return time.monotonic() - self._began

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step."""
        self._sums = {name: self._sums.get(name, 0) + value for name, value in losses.items()}
        self._count += 1

    def report(self, done: int, lr: float) -> str | None:
        """Log the mean losses since the last line, over all processes; all must call it.

        Returns:
            The line to print on the main process, None on the others.
        """
        sums = mean_over_processes(torch.stack(tuple(self._sums.values())))
        means = dict(zip(self._sums, (sums / self._count).tolist(), strict=True))
        self._sums, self._count = {}, 0
        if self.log is None:
            return None
        steps = done - self.start
        speed = steps / self.seconds
        self.log.write({"step": done, **means, "lr": lr, "iterations_per_second": speed})
        return progress_line(done, self.iterations, means, self.seconds, steps, lr)


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
