"""Draw the curves of one or many runs: losses, learning rate, scores.

    python examples/plot.py runs/a runs/b --output curves.png
    python examples/plot.py runs/a --keys total ce hIoU --log --smooth 0.9

A panel per figure of metrics.jsonl, a colour per run. With --smooth, losses are exponential means
taken from both ends, so that they do not lag, with the figures themselves pale behind them. Scores
of the split that is evaluated on the way are dots on a line, those of another split (the test at
the end) are diamonds. Needs matplotlib: pip install 'cliptteacher[plot]'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cliptteacher.evaluation import SCORES

FACTS = ("step", "lr", "images_per_second", "data_wait", "peak_memory_gib", "seconds_left")
TITLES = {"lr": "learning rate", "total": "total loss"}
Rows = list[dict[str, Any]]


class Run(NamedTuple):
    """The lines of a run's metrics.jsonl: those of training, and those of evaluation."""

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
        figure = draw(runs, keys, args.smooth, args.log)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150)
    print(f"{len(runs)} runs, {len(keys)} panels in {args.output}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="picture to write")
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
    """Read a line; {} for one that a crash cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def find_keys(runs: Sequence[Run]) -> list[str]:
    """Name the figures that are not zero in every run: the total loss, its terms, speed, scores."""
    losses: dict[str, None] = {"total": None}
    for run in runs:
        losses |= {key: None for row in run.training for key in row if key not in FACTS}
    every = [*losses, *FACTS[1:], *SCORES]
    return [key for key in every if any(value for run in runs for _, value in points(run, key))]


def points(run: Run, key: str, split: str | None = None) -> list[tuple[float, float]]:
    """The finite values of a figure, with their steps; of one split or of all lines."""
    rows = run.evaluation if split is not None or key in SCORES else run.training
    return [
        (row["step"], float(row[key]))
        for row in rows
        if split in (None, row.get("split"))
        and isinstance(row.get(key), (int, float))
        and math.isfinite(row[key])
    ]


def draw(runs: Sequence[Run], keys: Sequence[str], smooth: float, log: bool) -> Any:
    """Draw a panel for every key; returns matplotlib's figure."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plot.py needs matplotlib, which is not installed; run "
            "`pip install 'cliptteacher[plot]'`"
        ) from None
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4.4 * columns, 3 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, key in zip(panels, keys, strict=False):
        draw_panel(panel, key, runs, smooth)
        panel.set_xlabel("iterations")
        panel.grid(alpha=0.3)
        if log and key not in SCORES and key not in FACTS:
            panel.set_yscale("log")
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    lines = [figure.axes[0].plot([], [], f"C{k}")[0] for k in range(len(runs))]
    figure.legend(lines, [run.name for run in runs], loc="outside upper left", ncols=4)
    return figure


def draw_panel(panel: Any, key: str, runs: Sequence[Run], smooth: float) -> None:
    """Draw one figure of all runs."""
    title, markers = TITLES.get(key, key.replace("_", " ")), dict[str, str]()
    for number, run in enumerate(runs):
        colour = f"C{number}"
        if key in SCORES:
            for split in dict.fromkeys(row["split"] for row in run.evaluation):
                first = next(iter(markers), split)
                markers[split] = "o-" if split == first else "D"
                panel.plot(*columns_of(points(run, key, split)), markers[split], color=colour)
            continue
        values = points(run, key)
        if smooth > 0 and key != "lr":
            panel.plot(*columns_of(values), color=colour, alpha=0.3, linewidth=0.8)
            values = smoothed(values, smooth)
        panel.plot(*columns_of(values), color=colour)
    if len(markers) > 1:
        words = {"o-": "dots", "D": "diamonds"}
        title += ": " + ", ".join(f"{words[it]} {split}" for split, it in markers.items())
    panel.set_title(title)


def columns_of(values: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in values], [value for _, value in values]


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
