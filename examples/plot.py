"""Plot the curves of one or many runs: losses, learning rate, scores.

    python examples/plot.py runs/a runs/b --output curves.png
    python examples/plot.py runs/a --keys total ce hIoU --log --smooth 0.9

A panel per figure of metrics.jsonl, a colour per run. With --smooth, losses are exponential means
from both ends, so that they do not lag, above the figures themselves in a pale colour. Scores on
the split of the evaluations during training are dots, those on another split are diamonds. Needs
matplotlib: `pip install 'cliptteacher[plot]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cliptteacher.command_line import number, one_sentence_errors
from cliptteacher.evaluation import SCORES
from cliptteacher.files import write_whole

SPEED = ("images_per_second", "data_wait", "peak_memory_gib", "seconds_left")
NOT_A_LOSS = {"step", "lr", *SPEED, *SCORES}
Curves = dict[str | None, list[tuple[int, float]]]  # split, None in training -> (step, value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    add("--output", type=Path, default=Path("curves.png"), help="picture to write")
    add("--keys", nargs="+", help="figures of metrics.jsonl; default: all but speed")
    add("--log", action="store_true", help="logarithmic axis of the losses")
    add("--smooth", type=number(float, 0, 0.999), default=0, help="0: none; towards 1: smoother")
    args = parser.parse_args(argv)
    with one_sentence_errors("plot.py"):
        runs = [read_run(folder) for folder in args.runs]
        found = dict.fromkeys(("total", *(key for run in runs for key in run), "lr", *SCORES))
        known = [key for key in found if [run for run in runs if key in run]]
        keys = args.keys or [key for key in known if key not in SPEED]
        for key in keys:
            if key not in known:
                raise ValueError(f"no run has {key!r}; choose among {', '.join(known)}")
        parents = os.path.commonpath([folder.resolve().parent for folder in args.runs])
        names = [os.path.relpath(folder.resolve(), parents) for folder in args.runs]
        figure = draw(dict(zip(names, runs, strict=True)), keys, args.smooth, args.log)
        with write_whole(args.output) as file:
            figure.savefig(file, format=args.output.suffix[1:] or "png", dpi=160)
    print(f"{len(runs)} runs, {len(keys)} panels in {args.output}")


def read_run(folder: Path) -> dict[str, Curves]:
    """Read the figures of metrics.jsonl that are finite, and not zero everywhere."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl; give a run of train.py")
    figures: dict[str, Curves] = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # cut short by a crash
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                curve = figures.setdefault(key, {}).setdefault(row.get("split"), [])
                curve.append((row["step"], value))
    if not figures:
        raise ValueError(f"{file} has no line yet; the first comes after --log-interval steps")
    return {k: c for k, c in figures.items() if [v for curve in c.values() for _, v in curve if v]}


def draw(runs: Mapping[str, dict[str, Curves]], keys: list[str], smooth: float, log: bool) -> Any:
    """Draw a matplotlib figure with a panel per key and a colour per run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib; run `pip install 'cliptteacher[plot]'`") from None
    columns = 2 if len(keys) == 4 else min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 5), 3 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    entries = {}
    for panel, key in zip(panels, keys, strict=False):
        for place, (name, run) in enumerate(runs.items()):
            colour = f"C{place % 10}"
            for order, (split, curve) in enumerate(run.get(key, {}).items()):
                steps, values = zip(*curve, strict=True)
                style = "D" if order else "-" if split is None and len(curve) > 1 else "-o"
                if smooth and split is None and key != "lr":
                    panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                    values = smoothed(values, smooth)
                entries[name] = panel.plot(steps, values, style, color=colour)[0]
        panel.set_title({"lr": "learning rate"}.get(key, key + " in percent" * (key in SCORES)))
        panel.set_yscale("log" if log and key not in NOT_A_LOSS else "linear")
        panel.set_xlabel("iterations")
        panel.grid(alpha=0.3)
    for panel in panels[len(keys) :]:
        panel.remove()
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)
    return figure


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Mean of an exponential mean from the left and one from the right."""
    left, right = exponential_mean(values, weight), exponential_mean(values[::-1], weight)[::-1]
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


def exponential_mean(values: Sequence[float], weight: float) -> list[float]:
    """Means of the values so far, without the bias towards a start at zero."""
    found, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        found.append(mean / total)
    return found


if __name__ == "__main__":
    main()
