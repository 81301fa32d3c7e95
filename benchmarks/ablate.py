r"""Run the rows of the paper's Tables 3-5, and of questions it leaves open, over several seeds.

    python benchmarks/ablate.py --table 3 --seeds 3 --jobs 2 --output runs/table3
    python benchmarks/ablate.py --table readings --data folder --root DIR --clip runs/clip/clip.pt \
        --rows seeding_window,lambda_0.9 --output runs/readings -- --precision bf16
    python benchmarks/ablate.py --table 3 --seeds 3 --output runs/table3 --only-report

Every (row, seed) is a process of examples/train.py with one thread; what follows `--` goes to all
of them. A finished run is skipped, an interrupted one resumed, a failed one reported at the end
without stopping the others. The rows are data: benchmarks/ablation_rows.py.

Writes table.md (mean and standard deviation over the seeds, the change against `full` seed by
seed, the paper beside it), table.json (every run with its command), chart.png and report.html (all
of it on one page); the runs are in --runs, which several tables may share.
Needs matplotlib: `pip install 'cliptteacher[plot]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_page import write_page
from ablation_rows import BASES, CLIP_DENSE, TABLES, AblationRow, calibrated, select_rows
from evidence import rows_table, setting

from cliptteacher.command_line import number, one_sentence_errors
from cliptteacher.distributed import Process
from cliptteacher.evaluation import SCORES, format_line
from cliptteacher.files import read_json, write_json, write_text, write_whole
from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.training.config import (
    TrainConfig,
    config_as_dict,
    parse_arguments,
    resolve_config,
    show_flag,
)
from cliptteacher.training.recipes import default_recipe, get_recipe
from cliptteacher.training.records import describe_environment

ROOT = Path(__file__).resolve().parents[1]
CLASSES = (TrainConfig, CLIPTeacherConfig)
POLL = 0.5  # seconds between two looks at the processes
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# What may differ between a finished run and the one asked for: it changes no score.
BOOKKEEPING = {
    *("output", "resume", "dry_run", "workers", "log_interval", "tensorboard"),
    *("checkpoint_interval", "eval_interval"),
}


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(sys.argv[1:] if argv is None else argv)
    with one_sentence_errors("ablate.py"):
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the chart needs matplotlib; run `pip install 'cliptteacher[plot]'`")
        rows = select_rows(args.table, args.rows.split(",") if args.rows else None)
        rows += calibrated(rows) if args.calibrate else ()
        runs = plan(args, rows)
    environment = describe_environment(Process(0, 0, 1, torch.device("cpu")))
    unique = list({id(run): run for run in runs.values()}.values())
    if not args.only_report:
        for trains in (True, False):  # an evaluation needs the student of another run
            execute([run for run in unique if run.trains is trains], args.jobs, environment)
    settings = {**vars(args), "rows": [row.name for row in rows], "environment": environment}
    print(report(rows, runs, settings, args.output))
    failed = [run for run in unique if run.problem]
    for run in failed:
        print(f"\nfailed: {run.name}\n{run.problem}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=tuple(TABLES), help="default: none, --rows names rows of any table")
    add("--rows", help="names, with commas between them; full is always run")
    add("--data", choices=("miniworld", "folder"), default="miniworld")
    add("--root", help="folder of the data set")
    add("--clip", help="name or path of the teacher; default: that of the recipe")
    add("--base", choices=tuple(BASES), default="recipe", help="literal: the PLM as in the paper")
    add("--seeds", type=number(int, 1), default=3, help="how many")
    add("--seed-start", type=number(int, 0), default=0, help="the first one")
    add("--iterations", type=number(int, 1), help="default: those of the recipe")
    add("--output", type=Path, required=True, help="folder of the report")
    add("--runs", type=Path, help="folder of the runs; default: OUTPUT/runs")
    add("--jobs", type=number(int, 1), default=1, help="processes at a time, one thread each")
    add("--calibrate", action="store_true", help="also score every row at its own gamma of val")
    add("--only-report", action="store_true", help="run nothing, report what is finished")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    if args.calibrate and args.data != "miniworld":
        parser.error("--calibrate needs a split of its own beside the tested one: miniworld has it")
    args.runs, args.more = args.runs or args.output / "runs", argv[cut + 1 :]
    return args


@dataclass(eq=False)
class Run:
    """One (row, seed): a process of train.py or evaluate.py, and the folder that it writes to."""

    row: AblationRow
    seed: int
    folder: Path
    command: list[str]
    expected: dict[str, Any]  # config.json of a training run, else the settings in scores.json
    source: Run | None = None  # the run whose student is evaluated
    problem: str | None = None  # why there is no result
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    @property
    def name(self) -> str:
        """Row and seed."""
        return f"{self.row.name} seed {self.seed}"

    @property
    def trains(self) -> bool:
        """Whether this run trains a student."""
        return "iterations" in self.expected

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the folder; {} if there is none."""
        path = self.folder / name
        return dict(read_json(path)) if path.is_file() else {}

    def difference(self) -> str | None:
        """Name the field in which the run in the folder is another than the one asked for."""
        found = self.read("config.json" if self.trains else "scores.json")
        for name, value in self.expected.items() if found else ():
            if name not in BOOKKEEPING and found.get(name) != value:
                return (
                    f"{self.folder} holds a run with {name}={found.get(name)!r}, this one has "
                    f"{value!r}; choose another --output or delete that folder"
                )
        return None

    def scores(self) -> dict[str, Any] | None:
        """Return the final scores in percent; None if the run is not finished or another."""
        if self.difference() or (self.source and self.source.scores() is None):
            return None
        if not self.trains:
            return self.read("scores.json").get("scores")
        log = self.folder / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        try:
            last = json.loads(lines[-1]) if lines else {}
        except ValueError:  # cut short by a crash
            return None
        end = self.expected["iterations"], self.expected["test_split"]
        return last if (last.get("step"), last.get("split")) == end else None

    def start(self) -> None:
        """Start the process; what it prints is appended to log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / self.command[0]), *self.command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **SINGLE, "PYTHONPATH": path},
            )

    def end(self, environment: dict[str, Any]) -> None:
        """Wait for the process, record when and how long it ran, and find out how it ended."""
        assert self.process is not None
        code = self.process.wait()
        minutes = (time.monotonic() - self.began) / 60 + self.read("run.json").get("minutes", 0)
        record = {"commit": environment["commit"], "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json({**record, "minutes": round(minutes, 2)}, self.folder / "run.json")
        if self.scores() is None:
            log = (self.folder / "log.txt").read_text(errors="replace")
            self.problem = "\n".join([f"exit status {code}", *log.splitlines()[-12:]])

    def summary(self, row: str) -> dict[str, Any]:
        """Collect what is known of this run, for the JSON file."""
        scores = self.scores()
        record = self.read("run.json") or self.read("environment.json")  # or started by hand
        return {
            "row": row,
            "seed": self.seed,
            "scores": scores and {name: scores[name] for name in (*SCORES, "IoU")},
            "gamma": self.expected.get("gamma", self.read("scores.json").get("gamma")),
            "split": self.expected.get("test_split", self.expected.get("split")),
            "command": shlex.join(["python", *self.command]),
            **{name: record.get(name) for name in ("minutes", "commit", "date")},
            "folder": str(self.folder),
            "problem": self.problem or (None if scores else self.difference() or "not finished"),
        }


def plan(args: argparse.Namespace, rows: Sequence[AblationRow]) -> dict[tuple[str, int], Run]:
    """Make a run of every row and seed; those that ask for the same thing share one."""
    runs: dict[tuple[str, int], Run] = {}
    first = args.seed_start
    for seed in range(first, first + args.seeds):  # the whole table with one seed, then the next
        for row in rows:
            source = runs[row.checkpoints_of, seed] if row.checkpoints_of else None
            run = make_run(args, row, seed, source)
            runs[row.name, seed] = next(
                (r for r in runs.values() if r.expected == run.expected), run
            )
    return runs


def make_run(args: argparse.Namespace, row: AblationRow, seed: int, source: Run | None) -> Run:
    """Train a row, or evaluate the student of another run, or the teacher's dense tokens."""
    folder = args.runs / row.name / f"seed{seed}"
    flags, config = resolve(args, row, seed)
    if source is None and row.name != CLIP_DENSE:
        command = ["examples/train.py", *flags, "--output", str(folder), "--resume"]
        return Run(row, seed, folder, command, config)
    expected: dict[str, Any] = {"split": row.split or config["test_split"]}
    if source is None:
        expected |= {name: config[name] for name in ("clip", "data", "root")}
        expected["resize"] = config["eval_resize"]  # that of the students
        command = ["--clip-only", "--templates", config["templates"]]
    elif row.calibrate_on:
        expected |= {"checkpoint": str(source.folder), "calibrated_on": row.calibrate_on}
        command = ["--calibrate", row.calibrate_on]
    else:
        expected |= {"checkpoint": str(source.folder), "gamma": row.gamma}
        command = []
    for name, value in expected.items():
        if name == "calibrated_on":
            continue
        values = value if isinstance(value, list) else [value]
        command += [] if value is None else [f"--{name}", *map(str, values)]
    command += ["--batch-size", "8", "--json", str(folder / "scores.json")]
    return Run(row, seed, folder, ["examples/evaluate.py", *command], expected, source)


def resolve(args: argparse.Namespace, row: AblationRow, seed: int) -> tuple[list[str], Any]:
    """Flags of train.py for a row, and the config.json that it makes of them."""
    flags = ["--data", args.data]
    for name in ("root", "clip"):
        flags += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    flags += as_flags(BASES[args.base]) + args.more  # of two values of one flag the later one wins
    flags += as_flags({"iterations": args.iterations} if args.iterations else {})
    flags += as_flags({**row.overrides, "seed": seed})
    parser = argparse.ArgumentParser("ablate.py")
    parser.add_argument("--recipe")
    namespace, given = parse_arguments(parser, CLASSES, flags)
    recipe = get_recipe(namespace.recipe or default_recipe(given))
    config = config_as_dict(*resolve_config(CLASSES, (recipe, given)))
    return flags, json.loads(json.dumps(config))


def as_flags(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in show_flag(name, value).split()]


def execute(runs: Sequence[Run], jobs: int, environment: dict[str, Any]) -> None:
    """Run what is not finished, ``jobs`` processes at a time."""
    for run in runs:
        run.problem = run.difference()
        if run.source and run.source.problem:
            run.problem = f"it needs the student of {run.source.name}, which failed"
    waiting = [run for run in runs if run.problem is None and run.scores() is None]
    print(f"{len(runs)} runs, {len(waiting)} to do, {jobs} at a time", flush=True)
    running: list[Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL)
            for run in [r for r in running if r.process and r.process.poll() is not None]:
                running.remove(run)
                run.end(environment)
                how = "failed" if run.problem else format_line(run.scores() or {})
                left = len(waiting) + len(running)
                print(f"{run.name}: {how}; {left} runs left", flush=True)
    finally:  # train.py answers SIGTERM with a checkpoint, so that the run can be resumed
        for run in running:
            if run.process is not None:
                run.process.terminate()
        for run in running:
            run.end(environment)


def report(
    rows: Sequence[AblationRow],
    runs: dict[tuple[str, int], Run],
    settings: dict[str, Any],
    output: Path,
) -> str:
    """Write table.md, table.json, chart.png and report.html; returns the Markdown."""
    found = {
        row.name: {r.seed: r for (name, _), r in runs.items() if name == row.name} for row in rows
    }
    content = {
        "table": settings["table"],
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "rows": [summarise(row, found) for row in rows],
        "runs": [run.summary(name) for name, by_seed in found.items() for run in by_seed.values()],
    }
    environment = settings["environment"]
    title = f"{settings['table'] or 'rows'}, {setting(settings)}"
    lines = [
        f"# Table {title}\n",
        f"`{environment['command']}`; {environment['date'][:10]}, commit {environment['commit']}, "
        f"torch {environment['torch']}, one thread a run. Percent, mean ± standard deviation. The "
        "paper's rows: SegFormer-B0 on PASCAL Context, 20,000 iterations.\n",
        *rows_table([content], None, compare=True),
    ]
    missing = [run for run in content["runs"] if run["problem"]]
    lines += ["\n## Without a result\n"] if missing else []
    lines += [f"- {run['row']} seed {run['seed']}: {run['problem']}" for run in missing]
    text = "\n".join(lines) + "\n"
    write_text(text, output / "table.md")
    write_json(content, output / "table.json")
    draw(title, content["rows"], output / "chart.png")
    write_page(f"Table {title}", content, output / "chart.png", output / "report.html")
    return text


def summarise(row: AblationRow, runs: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """Mean, sample standard deviation and changes against ``full``, seed by seed."""
    base = "full@val" if row.calibrate_on else "full"
    own, full = (
        {seed: scores for seed, run in runs[name].items() if (scores := run.scores())}
        for name in (row.name, base)
    )
    compared = [seed for seed in own if seed in full and row.name != base and not row.split]
    paper = row.paper_scores
    result: dict[str, Any] = {
        **{"row": row.name, "title": row.title, "overrides": row.overrides},
        **{"checkpoints_of": row.checkpoints_of, "gamma": row.gamma},
        "paper": None if paper is None else dict(zip(SCORES, paper, strict=True)),
    }
    for name in SCORES:
        values = [scores[name] for scores in own.values() if scores[name] is not None]
        result[name] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "change_by_seed": [
                own[seed][name] - full[seed][name]
                for seed in compared
                if None not in (own[seed][name], full[seed][name])
            ],
        }
    return result


def draw(title: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars of the finished rows with standard deviations, the paper's scores as lines."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["hIoU"]["mean"] is not None]
    figure = Figure(figsize=(8, 1.4 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(("mIoU(S)", "mIoU(U)", "hIoU")):
        heights = [y + (place - 1) * 0.27 for y in range(len(rows))]
        means, spreads = ([row[name][key] or 0 for row in rows] for key in ("mean", "std"))
        axes.barh(heights, means, 0.25, xerr=spreads, label=name, error_kw={"elinewidth": 1})
        paper = [row["paper"][name] if row["paper"] else None for row in rows]
        axes.plot(paper, heights, "k|", markersize=9, label=None if place else "paper")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=4)
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like an interrupt: children end too
    main()
