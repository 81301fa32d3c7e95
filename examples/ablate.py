r"""Run the rows of the paper's Tables 3-5, and of questions it leaves open, over several seeds.

    python examples/ablate.py --table 3 --data miniworld --seeds 3 --jobs 2 --output runs/table3
    python examples/ablate.py --table readings --data folder --root DIR --clip runs/clip/clip.pt \
        --rows seeding_window,lambda_0.9 --output runs/readings -- --precision bf16
    python examples/ablate.py --table 3 --seeds 3 --output runs/table3 --only-report

Every (row, seed) is a process of train.py with one thread; what stands after `--` goes to all of
them. A finished run is skipped, an interrupted one resumed, a failed one reported at the end
without stopping the others. The rows are data: cliptteacher/training/ablations.py.

Writes table.md (mean and standard deviation, the paper beside it), table.json (every run with its
command) and chart.png; the runs themselves are in --runs, which several tables may share.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_report import write_report
from ablation_runs import PROGRAMS, Run, as_flags, as_json
from cliptteacher.training.distributed import Process
from train import read_configuration

from cliptteacher.training.ablations import (
    BASES,
    CLIP_DENSE,
    TABLES,
    AblationRow,
    calibrated,
    select_rows,
)
from cliptteacher.training.config import config_as_dict
from cliptteacher.training.progress import format_time
from cliptteacher.training.run import describe_environment

POLL = 0.5  # seconds between two looks at the processes


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        rows = select_rows(args.table, args.rows.split(",") if args.rows else None)
    except ValueError as error:
        raise SystemExit(f"ablate.py: {error}") from error
    runs = plan_runs(args, rows)
    environment = describe_environment(Process(0, 0, 1, torch.device("cpu")))
    if not args.only_report:
        work_off(list(runs.values()), args.jobs, args.every, environment["commit"])
    settings = {**vars(args), "environment": environment, "rows": [row.name for row in rows]}
    print(write_report(args.table, rows, table_of(runs, rows, args), settings, args.output))
    failed = [run for run in set_of(runs) if run.problem]
    for run in failed:
        print(f"\nfailed: {run.name}\n{run.problem}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=tuple(TABLES), required=True)
    add("--data", choices=("miniworld", "folder"), default="miniworld")
    add("--root", help="folder of the data set")
    add("--clip", help="name or path of the teacher; default: that of the recipe")
    add("--base", choices=tuple(BASES), default="recipe", help="literal: the PLM as in the paper")
    add("--rows", help="names, with commas between them; full is always run")
    add("--seeds", type=int, default=3, help="how many")
    add("--seed-start", type=int, default=0, help="the first one")
    add("--iterations", type=int, help="default: those of the recipe")
    add("--output", type=Path, required=True, help="folder of the report")
    add("--runs", type=Path, help="folder of the runs; default: OUTPUT/runs")
    add("--jobs", type=int, default=1, help="processes at a time, one thread each")
    add("--calibrate", action="store_true", help="also score every row at its own gamma of val")
    add("--every", type=float, default=60, help="seconds between two progress lines")
    add("--only-report", action="store_true", help="run nothing, report what is finished")
    own, rest = argv, list[str]()
    if "--" in argv:
        own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(own)
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {args.seeds} and {args.jobs}")
    if args.calibrate and args.data != "miniworld":
        parser.error("--calibrate needs a split of its own beside the tested one: miniworld has it")
    args.runs, args.more = args.runs or args.output / "runs", rest
    return args


def plan_runs(args: argparse.Namespace, rows: Sequence[AblationRow]) -> dict[tuple[str, int], Run]:
    """Make a run of every row and seed; rows that resolve to one configuration share one."""
    runs: dict[tuple[str, int], Run] = {}
    for seed in range(
        args.seed_start, args.seed_start + args.seeds
    ):  # a whole table, then the next
        trained: list[Run] = []
        for row in rows:
            if row.name == CLIP_DENSE:
                run = dense_run(args, row, args.seed_start)  # no seed changes it
            elif row.checkpoints_of:
                run = evaluation_run(args, row, runs[row.checkpoints_of, seed])
            else:
                run = training_run(args, row, seed)
                run = next((r for r in trained if r.expected == run.expected), run)
                trained.append(run)
            runs[row.name, seed] = run
            if args.calibrate and run.trains:
                again = calibrated(run.row)
                runs[again.name, seed] = evaluation_run(args, again, run)
                runs[calibrated(row).name, seed] = runs[again.name, seed]
    dense = [run for (name, _), run in runs.items() if name == CLIP_DENSE]
    runs.update({key: dense[0] for key in runs if key[0] == CLIP_DENSE})
    return runs


def train_flags(args: argparse.Namespace, row: AblationRow, seed: int) -> list[str]:
    """Flags of `train.py`; of two values of one flag the later one wins."""
    chosen = {"root": args.root, "clip": args.clip}
    flags = ["--data", args.data, *as_flags({k: v for k, v in chosen.items() if v is not None})]
    flags += as_flags(BASES[args.base]) + args.more
    flags += as_flags({"iterations": args.iterations} if args.iterations else {})
    return [*flags, *as_flags(row.overrides), *as_flags({"seed": seed})]


def resolve(flags: list[str]) -> dict[str, Any]:
    """What `train.py` makes of flags, as it stands in config.json."""
    _, config, method = read_configuration(flags)
    return dict(as_json(config_as_dict(config, method)))


def training_run(args: argparse.Namespace, row: AblationRow, seed: int) -> Run:
    folder = args.runs / row.name / f"seed{seed}"
    flags = train_flags(args, row, seed)
    command = [str(PROGRAMS / "train.py"), *flags, "--output", str(folder), "--resume"]
    return Run(row, seed, folder, command, resolve(flags))


def evaluation_run(args: argparse.Namespace, row: AblationRow, source: Run) -> Run:
    """Evaluate the students of another row at the gamma of this one, or at their best on val."""
    folder = args.runs / row.name / f"seed{source.seed}"
    split = row.split or source.expected["test_split"]
    chosen = {"gamma": row.gamma} if row.calibrate_on is None else {"calibrate": row.calibrate_on}
    given = {"split": split, **chosen, "checkpoint": source.folder}
    command = evaluate_command(folder, {**given, "mode": source.expected["eval_mode"]})
    settings = {"split": split, "checkpoint": str(source.folder), "calibrated_on": row.calibrate_on}
    settings |= {"gamma": row.gamma} if row.calibrate_on is None else {}
    return Run(row, source.seed, folder, command, settings, source)


def dense_run(args: argparse.Namespace, row: AblationRow, seed: int) -> Run:
    """Score the teacher's dense tokens, at the size that students are evaluated at."""
    config = resolve(train_flags(args, row, seed))
    settings = {name: config[name] for name in ("clip", "data", "root")}
    settings |= {"split": config["test_split"], "resize": config["eval_resize"]}
    folder = args.runs / row.name / f"seed{seed}"
    given = {name: value for name, value in settings.items() if value is not None}
    command = evaluate_command(folder, {**given, "templates": config["templates"]})
    return Run(row, seed, folder, [*command, "--clip-dense"], settings)


def evaluate_command(folder: Path, fields: dict[str, Any]) -> list[str]:
    output = {"json": folder / "scores.json", "batch_size": 8}
    return [str(PROGRAMS / "evaluate.py"), *as_flags({**fields, **output})]


def set_of(runs: dict[tuple[str, int], Run]) -> list[Run]:
    """The runs in their order, each once."""
    return list({id(run): run for run in runs.values()}.values())


def table_of(
    runs: dict[tuple[str, int], Run], rows: Sequence[AblationRow], args: argparse.Namespace
) -> dict[str, list[Run]]:
    """The runs of each row, one a seed; the row without a student has one."""
    seeds = range(args.seed_start, args.seed_start + args.seeds)
    shown = [*rows, *(calibrated(row) for row in rows if (calibrated(row).name, seeds[0]) in runs)]
    return {
        row.name: [runs[row.name, seed] for seed in seeds][: 1 if row.name == CLIP_DENSE else None]
        for row in shown
    }


def work_off(runs: Sequence[Run], jobs: int, every: float, commit: str | None) -> None:
    """Run what is not finished, ``jobs`` processes at a time."""
    runs = list({id(run): run for run in runs}.values())
    for run in runs:
        run.problem = run.difference()
    waiting = [run for run in runs if run.problem is None and run.scores() is None]
    print(f"{len(runs)} runs, {len(waiting)} to do, {jobs} at a time", flush=True)
    running: list[Run] = []
    clock = Clock(runs, waiting)
    printed = 0.0
    try:
        while waiting or running:
            drop_hopeless(waiting)
            start_some(waiting, running, jobs)
            time.sleep(POLL)
            ended = [run for run in running if run.poll(commit)]
            running = [run for run in running if run not in ended]
            if ended or time.monotonic() - printed > every:
                print(clock.line(running), flush=True)
                printed = time.monotonic()
    finally:
        for run in running:
            run.stop(commit)


def drop_hopeless(waiting: list[Run]) -> None:
    """Give up runs whose students have failed."""
    for run in [run for run in waiting if run.needs is not None and run.needs.problem]:
        run.problem = f"it needs the students of {run.needs.name}, which failed"
        waiting.remove(run)


def start_some(waiting: list[Run], running: list[Run], jobs: int) -> None:
    """Start runs that need nothing unfinished, in order."""
    for run in list(waiting):
        if len(running) == jobs:
            return
        if run.needs is None or run.needs.scores() is not None:
            waiting.remove(run)
            run.start()
            if run.process is not None:
                running.append(run)


class Clock:
    """Estimates from the iterations done since the start how long the others will take."""

    def __init__(self, runs: Sequence[Run], waiting: Sequence[Run]) -> None:
        self.runs, self.to_do = list(runs), list(waiting)
        self.began, self.first = time.monotonic(), self._done()

    def _done(self) -> int:
        return sum(run.steps()[0] for run in self.to_do)

    def line(self, running: Sequence[Run]) -> str:
        """Say what is done, what runs, and the time left."""
        finished = sum(run.scores() is not None for run in self.runs)
        failed = sum(run.problem is not None for run in self.runs)
        steps = [(run.name, *run.steps()) for run in running]
        busy = ", ".join(f"{name} {done}/{total}" for name, done, total in steps) or "nothing"
        left = sum(run.steps()[1] for run in self.to_do if run.problem is None) - self._done()
        rate = (self._done() - self.first) / (time.monotonic() - self.began)
        hope = format_time(left / rate) if rate > 0 else "?"
        word = f", {failed} failed" if failed else ""
        return f"{finished} of {len(self.runs)} runs done{word}; running {busy}; {hope} left"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: children end too
    main()
