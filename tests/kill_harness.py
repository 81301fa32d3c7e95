"""Kill a training run over and over, and compare what it becomes with a run left in peace.

    python tests/kill_harness.py --kills 30 --seed 0 --output runs/kills

Two runs of `examples/train.py` on miniworld with equal options. One is sent SIGKILL at random
moments and started again with --resume each time; every second kill waits until a checkpoint is
being written. Both must end with the same bits in every tensor of the last checkpoint and the same
losses in metrics.jsonl. The last line printed is one JSON object; the exit status is 1 if anything
differs.

Attempts are forked from this process, which has imported PyTorch but computed nothing, so that
none of them has to import it again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
INTERVAL = 3  # iterations from checkpoint to checkpoint
PATIENCE = 3600.0  # seconds that an attempt may take on a busy machine
OPTIONS = f"""--data miniworld --clip miniworld --segmenter segformer_nano --batch-size 2 --crop 64
    --resize 64 64 --warmup 2 --kmeans-iterations 2 --bank-size 3
    --clip-gradient 1 --checkpoint-interval {INTERVAL} --log-interval 1 --eval-interval 0
    --test-split val --device cpu --resume"""


@dataclass
class Toll:
    """What the kills did."""

    kills: int = 0
    while_writing: int = 0  # a temporary file was left behind
    while_starting: int = 0  # before the first iteration of the attempt
    restarts: int = 0
    iterations_lost: int = 0  # done, but not in the newest checkpoint
    most_lost_at_once: int = 0


class Attempt:
    """A forked process that trains in ``output`` until it is done or killed."""

    def __init__(self, output: Path, options: list[str]) -> None:
        self.output, self.folder = output, output / "checkpoints"
        self.born = newest_step(self.folder)
        self.old_log = log_identity(output)
        self.child = os.fork()
        if not self.child:
            run_forked(output, options)

    def steps(self) -> int:
        """Iterations done so far, those before the attempt included."""
        if log_identity(self.output) == self.old_log:  # it has not begun its own log yet
            return self.born
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait(self, due: Callable[[], bool]) -> bool:
        """Wait until ``due()``; False if the attempt ended before."""
        limit = time.monotonic() + PATIENCE
        while not due():
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done and status:
                raise RuntimeError(f"an attempt failed, status {status}; see {self.output}.log")
            if done:
                return False
            if time.monotonic() > limit:
                self.kill()
                raise TimeoutError(f"an attempt did not end within {PATIENCE} seconds")
            time.sleep(0.0005)
        return True

    def sleep(self, seconds: float) -> bool:
        """Let time pass; False if the attempt ended before."""
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end)

    def kill(self) -> None:
        """SIGKILL: nothing in the process learns of it."""
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)


def run_forked(output: Path, options: list[str]) -> None:
    """Train in this process and leave it."""
    code = 1
    try:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        importlib.import_module("train").main([*options, "--output", str(output)])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def newest_step(folder: Path) -> int:
    return max((int(path.stem[5:]) for path in folder.glob("step_*.pt")), default=0)


def log_identity(output: Path) -> int | None:
    file = output / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else None


def kill_once(attempt: Attempt, chance: random.Random, writing: bool) -> bool:
    """Kill an attempt at a random moment; False if it ended before."""
    if chance.random() < 0.15:
        alive = attempt.sleep(chance.uniform(0, 3))  # it is still starting, or has just begun
    else:
        goal = attempt.born + chance.randint(1, 2 * INTERVAL)
        alive = attempt.wait(lambda: attempt.steps() >= goal) and (
            attempt.wait(lambda: any(attempt.folder.glob("*.tmp*")))
            and attempt.sleep(chance.uniform(0, 0.01))
            if writing
            else attempt.sleep(chance.uniform(0, 0.2))
        )
    if alive:
        attempt.kill()
    return alive


def run_with_kills(output: Path, options: list[str], kills: int, seed: int) -> Toll:
    """Train to the end, killed ``kills`` times on the way."""
    toll, chance = Toll(), random.Random(seed)
    while True:
        attempt = Attempt(output, options)
        if toll.kills == kills:
            attempt.wait(lambda: False)
            return toll
        if not kill_once(attempt, chance, writing=toll.kills % 2 == 1):
            raise RuntimeError(f"the run ended after {toll.kills} kills; raise --iterations")
        toll.kills += 1
        toll.restarts += 1
        lost = attempt.steps() - newest_step(attempt.folder)
        toll.while_writing += any(attempt.folder.glob("*.tmp*"))
        toll.while_starting += attempt.steps() == attempt.born
        toll.iterations_lost += lost
        toll.most_lost_at_once = max(toll.most_lost_at_once, lost)


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Paths at which two nested containers of tensors and values are not the same, bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict) and list(first) == list(second):
        return [d for key in first for d in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)) and type(first) is type(second):
        if len(first) != len(second):
            return [path]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [path]
    return [] if type(first) is type(second) and first == second else [path]


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, times and paths left out."""
    load = importlib.import_module("cliptteacher.checkpoint").load_checkpoint
    states = [load(run) for run in (one, other)]
    for state in states:
        state["config"].pop("output")
    told = []
    for run in (one, other):
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        clocks = ("images_per_second", "data_wait", "peak_memory_gib", "seconds_left")
        told.append([{k: v for k, v in row.items() if k not in clocks} for row in rows])
    return differences(states[0], states[1], "checkpoint") + differences(*told, "metrics")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, help="default: enough for the kills")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/kills"))
    args = parser.parse_args(argv)
    # An attempt may live for three seconds before it is killed, on a fast machine too.
    iterations = args.iterations or 20 * INTERVAL * (args.kills + 1)
    options = f"{OPTIONS} --iterations {iterations} --seed {args.seed} --workers {args.workers}"
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]
    importlib.import_module("train")
    args.output.mkdir(parents=True, exist_ok=False)
    began = time.monotonic()
    toll = run_with_kills(args.output / "killed", options.split(), args.kills, args.seed)
    killed = time.monotonic() - began
    Attempt(args.output / "peaceful", options.split()).wait(lambda: False)
    differing = compare(args.output / "peaceful", args.output / "killed")
    result = {
        "iterations": iterations,
        "checkpoint_interval": INTERVAL,
        **asdict(toll),
        "identical": not differing,
        "differing": differing[:10],
        "seconds_killed": round(killed, 1),
        "seconds_peaceful": round(time.monotonic() - began - killed, 1),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if main()["identical"] else 1)
