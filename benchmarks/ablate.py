r"""Run the rows of the paper's Tables 3-5, and of questions it leaves open, over several seeds.

    python benchmarks/ablate.py --table 3 --seeds 3 --jobs 2 --output runs/table3
    python benchmarks/ablate.py --table readings --data folder --root DIR --clip runs/clip/clip.pt \
        --rows seeding_window,lambda_0.9 --output runs/readings -- --precision bf16
    python benchmarks/ablate.py --table 3 --seeds 3 --output runs/table3 --only-report

Every (row, seed) is a process of examples/train.py with one thread, or of examples/evaluate.py
where a row trains nothing; what stands after `--` goes to every training run. A finished run is
skipped, an interrupted one resumed, a failed one reported at the end without stopping the others.
The rows are data: benchmarks/ablation_rows.py. Do not run two programs on one folder of runs.

Writes table.md (mean and standard deviation over the seeds, change against `full` beside the
paper's), table.json (every run with its command and commit) and chart.png; the runs themselves are
in --runs, which several tables may share.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_rows import BASES, CLIP_ONLY, TABLES, AblationRow, select_rows
from evidence import as_markdown, chart, mean_and_spread, table, title_of

from cliptteacher.distributed import Process
from cliptteacher.evaluation import SCORES
from cliptteacher.files import write_json, write_text
from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.training import config as training_config
from cliptteacher.training.config import TrainConfig, config_as_dict, resolve_config
from cliptteacher.training.recipes import get_recipe
from cliptteacher.training.records import describe_environment

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLASSES = (TrainConfig, CLIPTeacherConfig)
POLL = 0.5  # seconds between two looks at the processes
TAIL = 12  # lines of the log of a failed run
# What may differ between a finished run and the one asked for: it changes no result.
BOOKKEEPING = {
    *("output", "resume", "dry_run", "workers", "log_interval", "tensorboard"),
    *("checkpoint_interval", "eval_interval"),
}


@dataclass(eq=False)
class Run:
    """One (row, seed): a command, and the folder it writes to."""

    row: AblationRow
    seed: int
    folder: Path
    command: list[str]
    expected: dict[str, Any]  # of config.json, or of scores.json where nothing is trained
    source: Run | None = None  # the run whose students are evaluated
    problem: str | None = None  # why it has no result
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    @property
    def trains(self) -> bool:
        return "iterations" in self.expected

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.seed}"

    def scores(self) -> dict[str, Any] | None:
        """The final scores in percent; None if the run is not finished, or is another one."""
        if self.difference() or (self.source and self.source.scores() is None):
            return None
        if not self.trains:
            return read_object(self.folder / "scores.json").get("scores")
        path = self.folder / "metrics.jsonl"
        for line in reversed(path.read_text().splitlines() if path.is_file() else []):
            if '"hIoU"' in line and line.endswith("}"):
                row = json.loads(line)
                ends = self.expected["iterations"], self.expected["test_split"]
                return row if (row["step"], row["split"]) == ends else None
        return None

    def difference(self) -> str | None:
        """Say in which field the run in this folder is another one than asked for."""
        found = read_object(self.folder / ("config.json" if self.trains else "scores.json"))
        for name, value in self.expected.items() if found else ():
            if name not in BOOKKEEPING and found.get(name) != value:
                return (
                    f"{self.folder} holds a run with {name}={found.get(name)!r}, this one has "
                    f"{value!r}; choose another --runs or delete that folder"
                )
        return None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.began = time.monotonic()
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **single},
            )

    def end(self, commit: str | None) -> None:
        """Note how an ended process went."""
        assert self.process is not None
        code = self.process.wait()
        spent = read_object(self.folder / "ended.json").get("minutes", 0.0)
        minutes = round(spent + (time.monotonic() - self.began) / 60, 2)
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        about = {"date": date, "commit": commit, "minutes": minutes, "exit": code}
        write_json(about, self.folder / "ended.json")
        log = (self.folder / "log.txt").read_text(errors="replace").splitlines()
        if code != 0:
            self.problem = "\n".join([f"exit status {code}", *log[-TAIL:]])
        elif self.scores() is None:
            self.problem = f"it ended without final scores; see {self.folder / 'log.txt'}"

    def summary(self) -> dict[str, Any]:
        """What is known of this run, for the JSON file."""
        about = {  # a run that was started by hand, in this folder, has the first file only
            **read_object(self.folder / "environment.json"),
            **read_object(self.folder / "ended.json"),
        }
        scores = self.scores()
        command = ["python", f"examples/{Path(self.command[0]).name}", *self.command[1:]]
        return {
            "row": self.row.name,
            "seed": self.seed,
            "split": self.expected.get("test_split", self.expected.get("split")),
            "gamma": self.expected.get("gamma", 0.0),
            "scores": scores and {name: scores[name] for name in (*SCORES, "IoU")},
            "command": shlex.join(command),
            **{name: about.get(name) for name in ("minutes", "commit", "date")},
            "folder": str(self.folder),
            "problem": self.problem or self.difference(),
        }


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        rows = select_rows(args.table, args.rows.split(",") if args.rows else None)
        runs = plan_runs(args, rows)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    environment = describe_environment(Process(0, 0, 1, torch.device("cpu")))
    every = list(dict.fromkeys(run for found in runs.values() for run in found))
    if not args.only_report:
        run_all([run for run in every if run.source is None], args.jobs, environment["commit"])
        run_all([run for run in every if run.source], args.jobs, environment["commit"])
    print(write_report(args, rows, runs, environment))
    if any(run.problem for run in every):
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
    add("--only-report", action="store_true", help="run nothing, report what is finished")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {args.seeds} and {args.jobs}")
    args.runs, args.more = args.runs or args.output / "runs", argv[cut + 1 :]
    flags = argparse.ArgumentParser(prog="examples/train.py")  # names a flag that it does not have
    args.given = training_config.parse_arguments(flags, CLASSES, args.more)[1]
    return args


def plan_runs(args: argparse.Namespace, rows: Sequence[AblationRow]) -> dict[str, list[Run]]:
    """Make the runs of every row; rows that resolve to one configuration share their runs."""
    runs: dict[str, list[Run]] = {row.name: [] for row in rows}
    for seed in range(args.seed_start, args.seed_start + args.seeds):
        trained: list[Run] = []
        for row in rows:
            if row.name == CLIP_ONLY:
                if not runs[row.name]:  # no seed changes it
                    runs[row.name].append(evaluation_run(args, row, seed, None))
                continue
            if row.checkpoints_of:
                run = evaluation_run(args, row, seed, runs[row.checkpoints_of][-1])
            else:
                run = training_run(args, row, seed)
                run = next((it for it in trained if it.expected == run.expected), run)
                trained.append(run)
            runs[row.name].append(run)
    return runs


def overrides_of(args: argparse.Namespace, row: AblationRow, seed: int) -> dict[str, Any]:
    """The fields in which a run differs from the recipe of its data set; the row's come last."""
    chosen = {"data": args.data, "root": args.root, "clip": args.clip}
    length = {"iterations": args.iterations} if args.iterations else {}
    named = {name: value for name, value in chosen.items() if value is not None}
    return {**named, **BASES[args.base], **args.given, **length, **row.overrides, "seed": seed}


def training_run(args: argparse.Namespace, row: AblationRow, seed: int) -> Run:
    folder, overrides = args.runs / row.name / f"seed{seed}", overrides_of(args, row, seed)
    flags = as_flags({**overrides, "output": folder, "resume": True})
    return Run(row, seed, folder, [str(EXAMPLES / "train.py"), *flags], resolved(args, overrides))


def resolved(args: argparse.Namespace, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What train.py makes of these fields, as it stands in config.json."""
    configs = resolve_config(CLASSES, (get_recipe(args.data), overrides))
    return dict(json.loads(json.dumps(config_as_dict(*configs))))


def evaluation_run(
    args: argparse.Namespace, row: AblationRow, seed: int, source: Run | None
) -> Run:
    """Evaluate the students of another row at the gamma of this one, or the teacher alone."""
    config = resolved(args, overrides_of(args, row, seed)) if source is None else source.expected
    if source is not None:
        expected = {"checkpoint": str(source.folder), "gamma": row.gamma}
    else:  # the teacher's dense tokens, at the size that students are evaluated at
        expected = {name: config[name] for name in ("clip", "data", "root")}
        expected["resize"] = config["eval_resize"]
    expected["split"] = config["test_split"]
    folder = args.runs / row.name / f"seed{seed}"
    alone = {"clip_only": True, "templates": config["templates"]} if source is None else {}
    known = {name: value for name, value in expected.items() if value is not None}
    flags = as_flags({**known, **alone, "batch_size": 8, "json": folder / "scores.json"})
    return Run(row, seed, folder, [str(EXAMPLES / "evaluate.py"), *flags], expected, source)


def as_flags(fields: Mapping[str, Any]) -> list[str]:
    """Write fields as a command line.

    >>> as_flags({"scales": (3, 7), "closed_set": False, "potential_slots": None})
    ['--scales', '3', '7', '--no-closed-set', '--potential-slots', 'none']
    """
    words: list[str] = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            words += [f"--{flag}", *("none" if it is None else str(it) for it in values)]
    return words


def run_all(runs: Sequence[Run], jobs: int, commit: str | None) -> None:
    """Run what is not finished, `jobs` processes at a time."""
    for run in runs:
        run.problem = run.difference()
        if run.source and run.source.problem:
            run.problem = f"it needs the students of {run.source.name}, which failed"
    waiting = [run for run in runs if run.problem is None and run.scores() is None]
    print(f"{len(runs)} runs, {len(waiting)} to do, {jobs} at a time", flush=True)
    running: list[Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                run.end(commit)
                word = "failed" if run.problem else "done"
                print(f"{run.name} {word}, {len(waiting) + len(running)} to go", flush=True)
    finally:  # train.py answers SIGTERM with a checkpoint, so that the run can be resumed
        for run in running:
            run.process.terminate()
        for run in running:
            run.end(commit)


def write_report(
    args: argparse.Namespace,
    rows: Sequence[AblationRow],
    runs: Mapping[str, Sequence[Run]],
    environment: dict[str, Any],
) -> str:
    """Write table.md, table.json and chart.png; returns the Markdown."""
    names = ("table", "data", "root", "clip", "base", "seeds", "seed_start", "iterations", "more")
    values = {name: collect(runs[name]) for name in runs}
    content = {
        "table": args.table,
        "settings": {**{name: getattr(args, name) for name in names}, "environment": environment},
        "rows": [row_as_json(row, values[row.name], values["full"]) for row in rows],
        "runs": [{**run.summary(), "row": name} for name in runs for run in runs[name]],
    }
    lines = [
        f"# {title_of(content)}\n",
        f"`{environment['command']}`; {environment['date'][:10]}, commit {environment['commit']}, "
        f"torch {environment['torch']}. Percent, mean ± standard deviation over the seeds. The "
        "paper's rows: SegFormer-B0 on PASCAL Context, 20,000 iterations.\n",
        *table([content]),
        "\n## The paper\n",
        *as_markdown(
            ["row", *SCORES],
            [[row.title, *map(str, row.paper_scores)] for row in rows if row.paper_scores],
        ),
    ]
    missing = [run for run in content["runs"] if run["scores"] is None]
    if missing:
        lines.append("\n## Runs without a result\n")
    for run in missing:
        reason = (run["problem"] or "not finished").replace("\n", "\n      ")
        lines.append(f"- {run['row']} seed {run['seed']}: {reason}")
    text = "\n".join(lines) + "\n"
    write_json(content, args.output / "table.json")
    write_text(text, args.output / "table.md")
    chart(content).savefig(args.output / "chart.png", dpi=150)
    return text


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def collect(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """The scores of the finished runs of one row: score -> seed -> percent."""
    finished = {run.seed: scores for run in runs if (scores := run.scores()) is not None}
    return {
        name: {seed: it[name] for seed, it in finished.items() if it[name] is not None}
        for name in SCORES
    }


def row_as_json(
    row: AblationRow, values: dict[str, dict[int, float]], base: dict[str, dict[int, float]]
) -> dict[str, Any]:
    """A row with mean, spread and, seed by seed, its change against the base."""
    result: dict[str, Any] = {
        **{name: getattr(row, name) for name in ("title", "overrides", "checkpoints_of", "gamma")},
        "paper": row.paper_scores and dict(zip(SCORES, row.paper_scores, strict=True)),
    }
    for name in SCORES:
        own, there = values[name], base[name]
        mean, spread = mean_and_spread(list(own.values())) if own else (None, None)
        change = [own[seed] - there[seed] for seed in sorted(own.keys() & there.keys())]
        result[name] = {"mean": mean, "std": spread, "change_by_seed": change}
    return {"row": row.name, **result}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: children end too
    main()
