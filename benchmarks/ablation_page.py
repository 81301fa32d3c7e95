"""The report of an ablation as one page in HTML, beside its table.md: scores, classes, commands."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cliptteacher.evaluation import SCORES
from cliptteacher.files import write_text
from cliptteacher.pages import page, picture, table, text


def write_page(title: str, content: Mapping[str, Any], chart: Path, path: Path) -> None:
    """Write the page.

    Args:
        title: of the page.
        content: what table.json holds.
        chart: picture of the scores.
        path: the file to write.
    """
    rows, runs = content["rows"], content["runs"]
    settings = content["settings"]
    with Image.open(chart) as image:
        drawn = picture(image, "mean and standard deviation over the seeds")
    sections = [
        f'<p class="note">{text(settings["environment"]["command"])}</p>',
        table(("row", "seeds", *SCORES, "paper's hIoU"), [_scores(row, runs) for row in rows]),
        drawn,
        "<h2>IoU of every class, mean over the seeds</h2>",
        _classes(rows, runs),
        "<h2>Runs</h2>",
        table(
            ("row", "seed", "hIoU", "minutes", "command"),
            [
                (text(run["row"]), str(run["seed"]), _cell(run["scores"] and run["scores"]["hIoU"]),
                 _cell(run["minutes"]), text(run["problem"] or run["command"]))
                for run in runs
            ],
        ),
    ]  # fmt: skip
    write_text(page(title, "\n".join(sections)), path)


def _scores(row: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = sum(run["row"] == row["row"] and run["scores"] is not None for run in runs)
    cells = [
        _cell(row[name]["mean"])
        + ("" if row[name]["std"] is None else f" ± {row[name]['std']:.1f}")
        for name in SCORES
    ]
    return [text(row["title"]), str(seeds), *cells, _cell(row["paper"] and row["paper"]["hIoU"])]


def _classes(rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """One line a class, one column a row of the ablation."""
    finished = [run for run in runs if run["scores"]]
    found = {
        row["row"]: [run["scores"]["IoU"] for run in finished if run["row"] == row["row"]]
        for row in rows
    }
    names = dict.fromkeys(name for ious in found.values() for iou in ious for name in iou)
    return table(
        ("class", *(row["title"] for row in rows)),
        [[text(name), *(_mean(iou.get(name) for iou in ious) for ious in found.values())]
         for name in names],
    )  # fmt: skip


def _mean(values: Any) -> str:
    known = [value for value in values if value is not None]
    return _cell(statistics.fmean(known) if known else None)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
