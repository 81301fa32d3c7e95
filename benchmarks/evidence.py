"""Write the tables of the pages from the JSON files of the ablations, so that none is typed.

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
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cliptteacher.evaluation import SCORES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("**/*.md")))
BLOCK = re.compile(
    r"(?P<first><!-- evidence: (?P<files>[\w ]+?)(?:; rows: (?P<rows>[\w .]+?))?"
    r"(?P<short>; scores only)?(?:; (?P<what>changes|scores) of (?P<row>\w+))? -->\n)"
    r".*?(?P<last><!-- end of evidence -->)",
    re.DOTALL,
)


def main() -> None:
    check = "--check" in sys.argv
    stale: list[str] = []
    for page in PAGES:
        text = page.read_text()
        fresh = BLOCK.sub(filled, text)
        if fresh == text:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not check:
            page.write_text(fresh)
    print("stale:" if check else "rewritten:", ", ".join(stale) or "nothing")
    raise SystemExit(check and bool(stale))


def filled(block: re.Match[str]) -> str:
    """The block with the table that its first line asks for."""
    files = block["files"].split()
    names = block["rows"].split() if block["rows"] else None
    if block["row"]:
        lines = settings_table(files, block["row"], changes=block["what"] == "changes")
    else:
        lines = rows_table([read(file) for file in files], names, compare=block["short"] is None)
    return "\n".join([block["first"], *lines, "", block["last"]])


def rows_table(
    contents: Sequence[dict[str, Any]], names: Sequence[str] | None, *, compare: bool
) -> list[str]:
    """Finished rows of ablations with one base; a row that is in two of them comes once."""
    found: dict[str, list[str]] = {}
    for content in contents:
        for row in content["rows"]:
            if row["hIoU"]["mean"] is not None:
                found.setdefault(row["row"], cells(row, content, compare))
    more = ["change of hIoU", "in the paper", "hIoU: sign"] if compare else []
    head = ["row", "seeds", *SCORES, *more]
    return as_markdown(head, [found[name] for name in names or found])


def settings_table(files: Sequence[str], name: str, *, changes: bool) -> list[str]:
    """One row of each file: its scores, or its changes against `full` with the paper's above."""
    lines: list[list[str]] = []
    contents = [read(file) for file in files]
    if changes:
        base, row = (find(contents[0], each)["paper"] for each in ("full", name))
        told = [f"{row[score] - base[score]:+.1f}" for score in SCORES]
        lines.append(["the paper", "-", *told])
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
    weights = [f"`{weight}`" for weight in weights_of(settings)]
    data = {"folder": "photographs"}.get(settings["data"], settings["data"])
    length = [f"{settings['iterations']} iterations"] if settings["iterations"] else []
    return ", ".join([data, settings["base"], *length, *weights])


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


def cells(row: dict[str, Any], content: dict[str, Any], compare: bool) -> list[str]:
    """One row: title, seeds, scores and, if asked, the change against the base."""
    base = content["rows"][0]
    runs = finished(content, row["row"])
    scores = [number([run[name] for run in runs]) for name in SCORES]
    title = "full" if row is base else row["title"]
    line = [title, str(len(runs)), *scores]
    if compare:
        change = [] if row is base else row["hIoU"]["change_by_seed"]
        paper = None
        if row["paper"] and row is not base:
            paper = round(row["paper"]["hIoU"] - base["paper"]["hIoU"], 1)
        line += [number(change, signed=True), "-" if paper is None else f"{paper:+.1f}"]
        line.append(verdict(paper, change) or "-")
    return line


def number(values: Sequence[float], signed: bool = False) -> str:
    """Write mean and sample standard deviation, "-" without a value."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def verdict(paper: float | None, changes: Sequence[float]) -> str:
    """Compare the sign of a change, one value a seed, with that in the paper."""
    if not changes:
        return ""
    mean = statistics.fmean(changes)
    if len(changes) > 1 and abs(mean) <= statistics.stdev(changes):
        return "within the spread"
    sign = (mean > 0) - (mean < 0)
    if paper is None:
        return f"{'-0+'[sign + 1]}, not in the paper"
    same = sign == (paper > 0) - (paper < 0)
    return ("same sign" if same else "other sign") + ("" if len(changes) > 1 else ", one seed")


def weights_of(settings: Mapping[str, Any]) -> list[str]:
    """The weights of terms that were given to all rows, as flags."""
    pairs = itertools.pairwise(settings["more"])
    return [f"{flag} {value}" for flag, value in pairs if flag.endswith("-weight")]


if __name__ == "__main__":
    main()
