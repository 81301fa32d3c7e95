"""One run of an ablation: its command, where it stands, and its result.

A run is a process of `train.py` (or, for rows that train nothing, of `evaluate.py`) with a folder
of its own. Everything about it is read from that folder, so a later process goes on where an
earlier one stopped: `config.json` says what was asked, `metrics.jsonl` or `scores.json` what came
of it, `attempts.jsonl` which commands took how long, `log.txt` what they printed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cliptteacher.evaluation import SCORES
from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.training.ablations import AblationRow
from cliptteacher.training.config import TrainConfig, config_as_dict

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two programs out of one folder
    fcntl = None  # type: ignore[assignment]

PROGRAMS = Path(__file__).resolve().parent
TAIL = 12  # lines of the log of a failed run
# What may differ between a finished run and the one asked for: it changes no result.
_BOOKKEEPING = {
    *("output", "resume", "dry_run", "workers", "log_interval", "tensorboard"),
    *("checkpoint_interval", "keep_checkpoints", "eval_interval"),
}


@dataclass(eq=False)
class Run:
    """One (row, seed): a command and the folder it writes to."""

    row: AblationRow
    seed: int
    folder: Path
    command: list[str]
    expected: dict[str, Any]  # config.json of a training run, else the settings in scores.json
    needs: Run | None = None  # the run whose students are evaluated
    problem: str | None = None  # why there is no result
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    _open: list[IO[Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Row and seed, for people."""
        return f"{self.row.name} seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether this run trains a student."""
        return "iterations" in self.expected

    def scores(self) -> dict[str, Any] | None:
        """Return the final scores in percent, None if the run is not finished or is another."""
        if self.difference() is not None or (self.needs and self.needs.scores() is None):
            return None
        if self.trains:
            rows = read_lines(self.folder / "metrics.jsonl")
            found = [row for row in rows if row.get("step") == self.expected["iterations"]]
            return next((row for row in reversed(found) if "hIoU" in row), None)
        return read_object(self.folder / "scores.json").get("scores")

    def gamma(self) -> float | None:
        """The bonus of the unseen classes at which the scores were taken."""
        if self.trains:
            return float(self.expected["gamma"])
        return read_object(self.folder / "scores.json").get("gamma")

    def difference(self) -> str | None:
        """Say in which field the folder's run is another than the one asked for."""
        found = read_object(self.folder / ("config.json" if self.trains else "scores.json"))
        if not found:
            return None
        defaults = as_json(config_as_dict(TrainConfig(), CLIPTeacherConfig()))
        for name, value in self.expected.items():
            there = found.get(name, defaults.get(name))
            if name not in _BOOKKEEPING and there != value:
                return (
                    f"{self.folder} holds a run with {name}={there!r}, this one has {value!r}; "
                    "choose another --output or delete that folder"
                )
        return None

    def steps(self) -> tuple[int, int]:
        """Iterations done and in all; an evaluation counts as one."""
        if not self.trains:
            return int(self.scores() is not None), 1
        rows = read_lines(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0, int(self.expected["iterations"])

    def start(self) -> None:
        """Start the process, unless another program is at this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "lock").open("w")
        if not acquire(lock):
            lock.close()
            self.problem = f"another program is running it in {self.folder}"
            return
        log = (self.folder / "log.txt").open("ab")
        self._open = [lock, log]
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **single, "PYTHONUNBUFFERED": "1"},
            pass_fds=(lock.fileno(),) if fcntl else (),  # held as long as the process lives
        )

    def poll(self, commit: str | None) -> bool:
        """Look whether the process has ended; if so, note how it went."""
        if self.process is None or self.process.poll() is None:
            return False
        code = self._record(commit)
        if code != 0:
            lines = (self.folder / "log.txt").read_text(errors="replace").splitlines()[-TAIL:]
            self.problem = "\n".join([f"exit status {code}", *lines])
        elif self.scores() is None:
            self.problem = f"it ended without final scores; see {self.folder / 'log.txt'}"
        return True

    def _record(self, commit: str | None) -> int:
        """Write an ended attempt down, and give the folder free."""
        assert self.process is not None
        code, self.process = self.process.returncode, None
        for file in self._open:
            file.close()
        attempt = {
            "command": self.readable_command(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": commit,
            "seconds": round(time.monotonic() - self.began, 3),
            "exit": code,
        }
        with (self.folder / "attempts.jsonl").open("a") as file:
            file.write(json.dumps(attempt) + "\n")
        return int(code)

    def readable_command(self) -> str:
        """The command as one types it in the folder of the project."""
        program = Path(self.command[0])
        inside = PROGRAMS in program.parents
        first = f"{PROGRAMS.name}/{program.name}" if inside else self.command[0]
        return shlex.join(["python", first, *self.command[1:]])

    def stop(self, commit: str | None) -> None:
        """End the process; train.py saves a checkpoint first, so that the run can be resumed."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self._record(commit)

    def summary(self) -> dict[str, Any]:
        """Collect what is known of this run, for the JSON file."""
        attempts = read_lines(self.folder / "attempts.jsonl")
        # A run that was started by hand, in the folder where it is looked for, has no attempts.
        last = attempts[-1] if attempts else read_object(self.folder / "environment.json")
        scores = self.scores()
        return {
            "row": self.row.name,
            "seed": self.seed,
            "scores": scores and {name: scores[name] for name in (*SCORES, "IoU")},
            "gamma": self.gamma(),
            "split": self.expected.get("test_split", self.expected.get("split")),
            "command": self.readable_command(),
            "minutes": round(sum(a["seconds"] for a in attempts) / 60, 2) if attempts else None,
            "commit": last.get("commit"),
            "date": last.get("date"),
            "folder": str(self.folder),
            "problem": self.problem,
        }


def as_flags(fields: Mapping[str, Any]) -> list[str]:
    """Write fields of the configuration as flags of `train.py`.

    >>> as_flags({"scales": (3, 7), "closed_set": False, "potential_slots": None})
    ['--scales', '3', '7', '--no-closed-set', '--potential-slots', 'none']
    """
    words: list[str] = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (tuple, list)):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return words


def as_json(content: Any) -> Any:
    """Return what is left of a value after it was written as JSON and read again."""
    return json.loads(json.dumps(content))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a last line that was cut short is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def acquire(file: IO[str]) -> bool:
    """Lock a file for this process and those that it starts; False if another one has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
