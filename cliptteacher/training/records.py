"""The run directory: what was asked for, on what machines, and what came of it.

config.json        every field of the configuration
environment.json   versions, commit, command, device of every process; those of earlier starts
metrics.jsonl      one object a line: losses and rates, or scores of an evaluation
tensorboard/       the same figures as events, if asked for
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy
import PIL
import torch
import torch.distributed as dist
import torchvision

from ..distributed import Process
from ..files import make_folder, open_for_writing, read_json, write_json, write_text

# Settings from outside that change a run, its speed, or where it ran.
_VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"),
    *("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


def default_output(recipe: str) -> Path:
    """Make a fresh run directory, ``runs/<recipe>-<date>``, with a number if that is taken."""
    plain = make_folder("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = plain
    for number in itertools.count(2):
        with suppress(FileExistsError):  # of a run that was started in the same second
            folder.mkdir()
            break
        folder = plain.with_name(f"{plain.name}-{number}")
    return folder


def hold(folder: Path) -> IO[str]:
    """Hold a run directory until the file that is returned is closed, or the process ends.

    Raises:
        ValueError: another process holds it.
        OSError: the directory cannot be written.
    """
    file = open_for_writing(make_folder(folder) / ".lock")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"another run is writing to {folder}; wait for its end, or choose another --output"
        ) from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def describe_environment(process: Process) -> dict[str, Any]:
    """Collect command, commit, versions and the devices of all processes; all must call it."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "directory": os.getcwd(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_describe_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        "platform": platform.platform(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "processes": process.world_size,
        "devices": _describe_devices(process),
    }


def record_start(
    config: Mapping[str, Any], environment: Mapping[str, Any], folder: Path, start: int
) -> None:
    """Write config.json and environment.json; what an earlier start of this run wrote is kept.

    Args:
        config: every field, flat.
        environment: see ``describe_environment``.
        folder: the run directory.
        start: iterations already done.
    """
    before, known = _read_object(folder / "environment.json"), _read_object(folder / "config.json")
    entry = {**environment, "start": start}
    if before:
        keys = [key for key in {**known, **config} if known.get(key) != as_json(config.get(key))]
        entry["config_changes"] = {key: [known.get(key), config.get(key)] for key in keys}
        entry["earlier"] = [*before.pop("earlier", []), before]
    write_json(config, folder / "config.json")
    write_json(entry, folder / "environment.json")


def _is_undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, appended as it happens.

    Args:
        path: the file. Lines after ``step`` are dropped first, so that a resumed run does not
            hold the same iterations twice.
        step: iterations already done when the run starts.
        tensorboard: write the figures as TensorBoard events too, to ``tensorboard/`` beside.

    Raises:
        RuntimeError: ``tensorboard`` is asked for and not installed.
    """

    def __init__(self, path: str | Path, step: int = 0, *, tensorboard: bool = False) -> None:
        path = Path(path)
        self._events = _open_events(path.with_name("tensorboard"), step) if tensorboard else None
        lines = path.read_text().splitlines() if path.exists() and step else []
        write_text("".join(line + "\n" for line in lines if _step_of(line) <= step), path)
        self._file = open_for_writing(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and hand it to the operating system at once; NaN, no JSON, is null."""
        plain = {name: None if _is_undefined(value) else value for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in _scalars(row, str(row.get("split", "train"))):
                self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def check_tensorboard() -> None:
    """Say how to get TensorBoard where it is missing.

    Raises:
        RuntimeError: the package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise RuntimeError(
            "--tensorboard needs the package tensorboard, which is not installed; run "
            "`pip install tensorboard`, or leave the flag out: metrics.jsonl holds the same figures"
        )


def _open_events(folder: Path, step: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _scalars(row: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """List the figures of a row by name, those of nested objects after them: val/IoU/grass."""
    found: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and key != "step":
            found.append((f"{prefix}/{key}", value))
    return found


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line that was cut short by a crash


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none, or none that can be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value


def _describe_devices(process: Process) -> list[dict[str, Any]]:
    cuda = process.device.type == "cuda"
    own = {
        "rank": process.rank,
        "host": socket.gethostname(),
        "device": str(process.device),
        "name": torch.cuda.get_device_name(process.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * process.world_size
    dist.all_gather_object(everyone, own)
    return everyone


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _describe_commit() -> dict[str, Any]:
    """Name the commit of this package, and say whether its files differ from it.

    A package that lies in some other repository, such as in a virtual environment inside one, has
    no commit.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    changed = _git("status", "--porcelain", "--untracked-files=no", ":/")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    """What git prints about the folder of this file; None where it fails or is missing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
