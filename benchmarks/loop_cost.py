r"""Measure what the training loop costs beside the training: scaling, overhead, waiting for data.

    python benchmarks/loop_cost.py                     # recipe miniworld, 8 crops a process

examples/train.py runs as it is, alone and as two processes of one thread each with the same number
of crops a process (weak scaling), by turns; only saving and the last evaluation are left out. The
clocks stand around what an iteration is for:

    forward     teacher, student, both modules, losses
    backward    with the exchange of gradients between processes
    optimiser   AdamW
    data        blocked in next(loader)
    overhead    the rest of an iteration: moving the batch, the guard against losses that are not
                finite, learning rate, sums of losses, lines of the log (one in 20 iterations)

Wall clock and processor time are both told: on a busy machine only the second means something, and
it knows nothing of waiting. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("forward", "backward", "optimiser", "data")
WARM_UP = 5  # iterations that are not measured
CALM = 0.7  # load average of the last minute below which the figures are taken for good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crops", type=int, default=8, help="of a process")
    parser.add_argument("--iterations", type=int, default=45, help="of a run, 5 of them to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()  # the rest goes to train.py
    if args.worker:
        measure(args.worker, [*options, "--iterations", str(args.iterations)])
        return
    load = os.getloadavg()[0]
    print(f"load average before: {load:.2f} ({'calm' if load < CALM else 'BUSY'} machine)")
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in args.processes}
    for _ in range(args.repeats):
        for count in args.processes:
            runs[count].append(launch(count, args, options))
            print(f"{count} processes: {show(runs[count][-1])}", flush=True)
    result = {count: summarise(found) for count, found in runs.items()}
    first, last = min(runs), max(runs)
    efficiency = {
        kind: result[first][f"{kind}_per_iteration"][0] / result[last][f"{kind}_per_iteration"][0]
        for kind in ("wall", "cpu")
    }
    print(f"weak scaling, {first} to {last} processes: efficiency {efficiency['wall']:.2f} by the")
    print(f"wall clock, {efficiency['cpu']:.2f} by processor time")
    print(json.dumps({"load": load, "efficiency": efficiency, "runs": result}))


def launch(count: int, args: argparse.Namespace, options: list[str]) -> dict[str, float]:
    """Run train.py with so many processes; returns the means over its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={count}", __file__, "--worker", folder]
        command += ["--iterations", str(args.iterations), "--batch-size", str(count * args.crops)]
        command += ["--output", f"{folder}/run", "--eval-interval", "0", "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    means = {name: statistics.fmean(rank[name] for rank in ranks) for name in ranks[0]}
    return {**means, "images_per_second": count * args.crops / means["wall_per_iteration"]}


class Clock:
    """Adds up wall and processor time by part, and marks the end of every iteration."""

    def __init__(self) -> None:
        self.spent = {name: [0.0, 0.0] for name in PARTS}
        self.marks: list[dict[str, list[float]]] = []

    def now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                end = self.now()
                self.spent[part][0] += end[0] - wall
                self.spent[part][1] += end[1] - cpu

        return timed

    def mark(self) -> None:
        """An iteration begins: remember all sums."""
        totals = {name: list(both) for name, both in self.spent.items()}
        self.marks.append({**totals, "all": list(self.now())})

    def shares(self) -> dict[str, float]:
        """Of the iterations between the warm-up and the last mark."""
        first, last = self.marks[WARM_UP], self.marks[-1]
        count = len(self.marks) - 1 - WARM_UP
        spent = {
            name: [end - begin for begin, end in zip(first[name], last[name], strict=True)]
            for name in first
        }
        row: dict[str, float] = {}
        for place, kind in enumerate(("wall", "cpu")):
            whole = spent["all"][place]
            row[f"{kind}_per_iteration"] = whole / count
            for name in PARTS:
                row[f"{kind}_{name}"] = spent[name][place] / whole
            rest = whole - sum(spent[name][place] for name in PARTS)
            row[f"{kind}_overhead"] = rest / whole
        return row


def measure(folder: Path, options: list[str]) -> None:
    """Run the program with clocks around its parts, as one of its processes."""
    sys.path.insert(0, str(ROOT / "examples"))
    import learning
    import torch
    import train

    clock = Clock()
    learning.forward = clock.around("forward", learning.forward)
    torch.Tensor.backward = clock.around("backward", torch.Tensor.backward)
    torch.amp.GradScaler.step = clock.around("optimiser", torch.amp.GradScaler.step)
    loader = torch.utils.data.dataloader._BaseDataLoaderIter
    loader.__next__ = clock.around("data", loader.__next__)
    set_rate = train.set_learning_rate

    def begin(*args: Any) -> None:  # the first thing that an iteration does
        clock.mark()
        set_rate(*args)

    train.set_learning_rate = begin
    train.save = train.score = lambda *_, **__: None
    train.main(options)
    rank = int(os.environ.get("RANK", 0))
    (folder / f"rank{rank}.json").write_text(json.dumps(clock.shares()))


def summarise(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Median, smallest and largest of every figure."""
    columns = {name: sorted(run[name] for run in runs) for name in runs[0]}
    return {
        name: [round(v, 5) for v in (statistics.median(values), values[0], values[-1])]
        for name, values in columns.items()
    }


def show(run: dict[str, float]) -> str:
    parts = "  ".join(f"{name} {100 * run[f'wall_{name}']:.1f} %" for name in (*PARTS, "overhead"))
    return (
        f"{run['images_per_second']:.1f} images/s  {run['wall_per_iteration']:.3f} s an iteration "
        f"({run['cpu_per_iteration']:.3f} s of processor)  {parts}  "
        f"(overhead by processor time {100 * run['cpu_overhead']:.2f} %)"
    )


if __name__ == "__main__":
    main()
