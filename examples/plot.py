"""Draw the curves of one or many runs: losses, learning rate, scores.

    python examples/plot.py runs/a runs/b --output curves.png
    python examples/plot.py runs/a --keys total ce hIoU --log --smooth 0.9

A panel per figure of metrics.jsonl, a colour per run. With --smooth, losses are exponential means
that run from both ends, so that they do not lag, with the figures themselves pale behind them.
Scores of the split that is evaluated on the way are dots on a line, those of another split (the
test at the end) are diamonds. Pillow alone draws.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curves import Curve, Panel, draw_figure

from cliptteacher.evaluation import SCORES

FACTS = ("step", "lr", "images_per_second", "data_wait", "peak_memory_gib", "seconds_left")
Rows = list[dict[str, Any]]


class Run(NamedTuple):
    """What a run wrote down: lines of training, and lines of evaluation."""

    name: str
    training: Rows
    evaluation: Rows


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        runs = read_runs(args.runs)
        known = find_keys(runs)
        keys = args.keys or [key for key in known if key not in FACTS[2:]]
        missing = [key for key in keys if key not in known]
        if missing:
            raise ValueError(f"no run has {missing[0]!r}; choose among {', '.join(known)}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    panels = [make_panel(key, runs, args.smooth, args.log) for key in keys]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_figure(panels, [run.name for run in runs]).save(args.output)
    print(f"{len(runs)} runs, {len(panels)} panels in {args.output}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write")
    parser.add_argument("--keys", nargs="+", help="figures of metrics.jsonl; default all but speed")
    parser.add_argument("--log", action="store_true", help="logarithmic axis of the losses")
    parser.add_argument(
        "--smooth", type=float, default=0.0, help="0: as it is (default); towards 1: smoother"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth must lie in [0, 1), got {args.smooth:g}")
    return args


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read metrics.jsonl of every run; a name is what its path does not share with the others."""
    paths = [folder.resolve() for folder in folders]
    parents = os.path.commonpath([path.parent for path in paths])
    runs = []
    for folder, path in zip(folders, paths, strict=True):
        file = path / "metrics.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no metrics.jsonl; give a run of train.py")
        rows = [row for row in map(read_row, file.read_text().splitlines()) if row]
        if not rows:
            raise ValueError(f"{file} has no line yet; the first comes after --log-interval steps")
        evaluation = [row for row in rows if "split" in row]
        training = [row for row in rows if "split" not in row]
        runs.append(Run(os.path.relpath(path, parents), training, evaluation))
    return runs


def read_row(line: str) -> dict[str, Any]:
    """Read a line; one that a crash cut short is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def find_keys(runs: Sequence[Run]) -> list[str]:
    """Name the figures that change in some run: the total loss, its terms, speed, scores."""
    losses: dict[str, None] = {"total": None}
    for run in runs:
        losses |= {key: None for row in run.training for key in row if key not in FACTS}
    every = [*losses, *FACTS[1:], *SCORES]
    return [key for key in every if any(value for run in runs for _, value in points(run, key))]


def points(run: Run, key: str, split: str | None = None) -> list[tuple[float, float]]:
    """The finite values of a figure, with their steps; of one split or of all lines."""
    rows = run.training if split is None and key not in SCORES else run.evaluation
    found = [row for row in rows if split is None or row["split"] == split]
    return [
        (row["step"], float(row[key]))
        for row in found
        if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    ]


def make_panel(key: str, runs: Sequence[Run], smooth: float, log: bool) -> Panel:
    """Collect the curves of one figure."""
    curves: list[Curve] = []
    told: dict[str, str] = {}  # split -> how it is drawn
    for colour, run in enumerate(runs):
        if key in SCORES:
            splits = list(dict.fromkeys(row["split"] for row in run.evaluation))
            for number, split in enumerate(splits):
                style = "dots" if number == 0 else "diamonds"
                told[split] = told.get(split, style)
                curves.append(Curve(points(run, key, split), colour, told[split]))
            continue
        values = points(run, key)
        if key != "lr" and smooth > 0:
            curves.append(Curve(values, colour, "pale"))
            values = smoothed(values, smooth)
        curves.append(Curve(values, colour, "line"))
    title = {"lr": "learning rate", "total": "total loss"}.get(key, key.replace("_", " "))
    unit = " in percent" if key in SCORES else ""
    if len(told) > 1:
        unit += ": " + ", ".join(f"{style} {split}" for split, style in told.items())
    is_loss = key not in SCORES and key not in FACTS
    return Panel(title + unit, [curve for curve in curves if curve.points], log and is_loss)


def smoothed(values: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """Mean of an exponential mean from the left and one from the right."""
    numbers = [value for _, value in values]
    left = exponential_mean(numbers, weight)
    right = exponential_mean(numbers[::-1], weight)[::-1]
    return [(step, (a + b) / 2) for (step, _), a, b in zip(values, left, right, strict=True)]


def exponential_mean(numbers: Sequence[float], weight: float) -> list[float]:
    """Means of the numbers so far, without the pull towards a start at zero."""
    found, mean, total = [], 0.0, 0.0
    for number in numbers:
        mean = weight * mean + (1 - weight) * number
        total = weight * total + (1 - weight)
        found.append(mean / total)
    return found


if __name__ == "__main__":
    main()
