"""Write the tables of all pages from the JSON files of the ablations, so that none is typed.

    python benchmarks/evidence.py            # rewrites the blocks
    python benchmarks/evidence.py --check    # exit status 1 where a block is not what the files say

A block names its files below benchmarks/results, in the order of the rows, and may choose rows and
leave out the comparison with the paper:

    <!-- evidence: ablation_table_3 ablation_bounds; rows: full no_glm; scores only -->
    the table
    <!-- end of evidence -->

Or it compares one row in several settings, a line for each file, by its scores or by its changes
against `full`:

    <!-- evidence: ablation_table_3 ablation_dice_1; changes of no_ce -->

Scores are means over the seeds with the sample standard deviation. A change against `full` is taken
seed by seed, for two rows of one seed share data order and first weights; where its mean is smaller
than its standard deviation, the row is called "within the spread".
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliptteacher.evaluation import SCORES
from cliptteacher.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(
    r"(?P<first><!-- evidence: (?P<files>[\w ]+?)(?:; rows: (?P<rows>[\w .]+?))?"
    r"(?P<short>; scores only)?(?:; (?P<what>changes|scores) of (?P<row>\w+))? -->\n)"
    r".*?(?P<last><!-- end of evidence -->)",
    re.DOTALL,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    check = parser.parse_args(argv).check
    stale: list[str] = []
    for page in pages():
        text = page.read_text()
        fresh = BLOCK.sub(filled, text)
        if fresh != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                write_text(fresh, page)
    print("stale:" if check else "rewritten:", ", ".join(stale) or "nothing")
    raise SystemExit(check and bool(stale))


def pages() -> list[Path]:
    """Every Markdown page of the project."""
    return sorted(
        page
        for folder in (".", "benchmarks", "examples", "cliptteacher/**")
        for page in (ROOT / folder).glob("*.md")
    )


def filled(block: re.Match[str]) -> str:
    """The block with the table that its first line asks for."""
    contents = [read(file) for file in block["files"].split()]
    names = block["rows"].split() if block["rows"] else None
    if block["row"]:
        lines = settings_table(contents, block["row"], changes=block["what"] == "changes")
    else:
        lines = table(contents, names, compare=block["short"] is None)
    return "\n".join([block["first"], *lines, "", block["last"]])


def table(
    contents: Sequence[dict[str, Any]], names: Sequence[str] | None = None, *, compare: bool = True
) -> list[str]:
    """Finished rows of ablations with one base; one that stands in two of them comes once."""
    found: dict[str, list[str]] = {}
    for content in contents:
        for row in content["rows"]:
            if row["hIoU"]["mean"] is not None:
                found.setdefault(row["row"], cells(row, content, compare))
    more = ["change of hIoU", "in the paper", "hIoU: sign"] if compare else []
    head = ["row", "seeds", *SCORES, *more]
    return as_markdown(head, [found[name] for name in names or found])


def settings_table(contents: Sequence[dict[str, Any]], name: str, *, changes: bool) -> list[str]:
    """One row of each file: its scores, or its changes against `full` with the paper's above."""
    lines: list[list[str]] = []
    if changes:
        base, row = (find(contents[0], each)["paper"] for each in ("full", name))
        lines.append(["the paper", "-", *(f"{row[it] - base[it]:+.1f}" for it in SCORES)])
    for content in contents:
        row = find(content, name)
        runs = finished(content, name)
        found = [
            row[score]["change_by_seed"] if changes else [run[score] for run in runs]
            for score in SCORES
        ]
        values = [number(numbers, signed=changes) for numbers in found]
        lines.append([setting(content["settings"]), str(len(found[-1])), *values])
    return as_markdown(["setting", "seeds", *SCORES], lines)


def setting(settings: dict[str, Any]) -> str:
    """Data, base, iterations if not the recipe's, and weights of terms if not the base's."""
    pairs = itertools.pairwise(settings["more"])
    weights = [f"`{flag} {value}`" for flag, value in pairs if flag.endswith("-weight")]
    data = {"folder": "photographs"}.get(settings["data"], settings["data"])
    length = [f"{settings['iterations']} iterations"] if settings["iterations"] else []
    return ", ".join([data, settings["base"], *length, *weights])


def cells(row: dict[str, Any], content: dict[str, Any], compare: bool) -> list[str]:
    """One row: title, seeds, scores and, if asked, the change against the base."""
    base = content["rows"][0]
    runs = finished(content, row["row"])
    scores = [number([run[name] for run in runs if run[name] is not None]) for name in SCORES]
    line = ["full" if row is base else row["title"], str(len(runs)), *scores]
    if compare:
        change = [] if row is base else row["hIoU"]["change_by_seed"]
        paper = None
        if row["paper"] and row is not base:
            paper = round(row["paper"]["hIoU"] - base["paper"]["hIoU"], 1)
        line += [number(change, signed=True), "-" if paper is None else f"{paper:+.1f}"]
        line.append(verdict(paper, change) or "-")
    return line


def number(values: Sequence[float], signed: bool = False) -> str:
    """Write mean and spread, "-" without a value."""
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if spread is None else f"{text} ± {spread:.1f}"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def verdict(paper: float | None, found: Sequence[float]) -> str:
    """Compare the sign of a change with that in the paper."""
    if not found:
        return ""
    mean, spread = mean_and_spread(found)
    if spread is not None and abs(mean) <= spread:
        return "within the spread"
    if paper is None:
        return f"{sign(mean)}, not in the paper"
    seeds = "" if spread is not None else ", one seed"
    return ("same sign" if sign(mean) == sign(paper) else "other sign") + seeds


def sign(change: float) -> str:
    return "+" if change > 0 else "-" if change < 0 else "0"


def as_markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *body))
    return [first, "|---" * len(head) + "|", *rest]


def read(file: str) -> dict[str, Any]:
    """The JSON file of an ablation."""
    return dict(json.loads((RESULTS / f"{file}.json").read_text()))


def find(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A row of it."""
    return next(row for row in content["rows"] if row["row"] == name)


def finished(content: dict[str, Any], name: str) -> list[dict[str, float]]:
    """The scores of the finished runs of a row."""
    return [run["scores"] for run in content["runs"] if run["row"] == name and run["scores"]]


def title_of(content: dict[str, Any]) -> str:
    """Table and data, as a heading."""
    table = content["table"]
    return f"{'Table ' if table.isdigit() else ''}{table} on {content['settings']['data']}"


def chart(content: dict[str, Any]) -> Any:
    """Bars of the means with their spreads, diamonds at the paper's scores: a figure."""
    from matplotlib.figure import Figure

    shown, rows = ("mIoU(S)", "mIoU(U)", "hIoU"), content["rows"]
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(shown):
        places = [k + 0.27 * (number - 1) for k in range(len(rows))]
        means = [row[name]["mean"] or 0.0 for row in rows]
        spreads = [row[name]["std"] or 0.0 for row in rows]
        axes.barh(places, means, 0.25, xerr=spreads, label=name, error_kw={"elinewidth": 0.8})
        paper = [row["paper"][name] if row["paper"] else math.nan for row in rows]
        axes.plot(paper, places, "kD", markersize=3, label="" if number else "paper")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("percent; mean and standard deviation over the seeds")
    axes.set_title(title_of(content), loc="left")
    figure.legend(loc="outside upper right", ncols=4, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
