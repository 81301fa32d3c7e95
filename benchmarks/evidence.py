"""Write the tables of the pages from the JSON files of the ablations, so that none is typed.

    python benchmarks/evidence.py            # rewrites the blocks
    python benchmarks/evidence.py --check    # exit status 1 if a block differs from the files

A block stands in README.md or in a page of benchmarks/ and names files of benchmarks/results. It
lists their rows, all of them or those named, with the paper's change or with scores only:

    <!-- evidence: ablation_table_3 ablation_bounds; rows: full no_glm; scores only -->
    the table
    <!-- end of evidence -->

Three other kinds: one row in several settings, a line for each file, by its scores or by its
changes against `full`; and hIoU of several experiments, each a column, beside the paper's:

    <!-- evidence: ablation_table_3 ablation_dice_1; changes of no_ce -->
    <!-- evidence: ablation_table_3 ablation_windows | ablation_photographs; beside the paper -->
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cliptteacher.evaluation import SCORES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<first><!-- evidence: (?P<files>[\w |]+?)(?:; rows: (?P<rows>[\w .]+?))?"
    r"(?:; (?P<kind>scores only|beside the paper|(?:changes|scores) of (?P<row>\w+)))? -->\n)"
    r".*?(?P<last><!-- end of evidence -->)",
    re.DOTALL,
)
Content = dict[str, Any]  # a JSON file of an ablation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [page for page in PAGES if BLOCK.sub(filled, page.read_text()) != page.read_text()]
    for page in stale if not check else ():
        page.write_text(BLOCK.sub(filled, page.read_text()))
    names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
    print("stale:" if check else "rewritten:", names or "nothing")
    raise SystemExit(check and bool(stale))


def filled(block: re.Match[str]) -> str:
    """The block with the table that its first line asks for."""
    groups = [[read(file) for file in part.split()] for part in block["files"].split("|")]
    rows = block["rows"].split() if block["rows"] else None
    kind = block["kind"] or ""
    if block["row"]:
        lines = settings_table(groups[0], block["row"], changes=kind.startswith("changes"))
    elif kind == "beside the paper":
        lines = beside_the_paper(groups, rows)
    else:
        lines = rows_table(groups[0], rows, compare=not kind)
    return "\n".join([block["first"], *lines, "", block["last"]])


def read(file: str) -> Content:
    return dict(json.loads((RESULTS / f"{file}.json").read_text()))


def rows_table(
    contents: Sequence[Content], names: Sequence[str] | None, *, compare: bool
) -> list[str]:
    """Finished rows of ablations with one base: scores and, if asked, the change of hIoU."""
    more = ["change of hIoU", "in the paper"] if compare else []
    body = []
    for title, row, content in found_rows(contents, names).values():
        runs = finished(content, row["row"])
        line = [title, str(len(runs)), *(number([run[name] for run in runs]) for name in SCORES)]
        if compare:
            line.append(number(change_of(row, content), signed=True))
            line.append(number(paper_change(row, content), signed=True))
        body.append(line)
    return as_markdown(["row", "seeds", *SCORES, *more], body)


def settings_table(contents: Sequence[Content], name: str, *, changes: bool) -> list[str]:
    """One row of each file: its scores, or its changes against `full` with the paper's above."""
    body: list[list[str]] = []
    for content in contents:
        row = next(row for row in content["rows"] if row["row"] == name)
        runs = finished(content, name)
        values = [
            row[score]["change_by_seed"] if changes else [run[score] for run in runs]
            for score in SCORES
        ]
        if changes and not body:
            paper = [number(paper_change(row, content, score), signed=True) for score in SCORES]
            body.append(["the paper", "-", *paper])
        cells = [number(numbers, signed=changes) for numbers in values]
        body.append([setting(content["settings"]), str(len(values[-1])), *cells])
    return as_markdown(["setting", "seeds", *SCORES], body)


def beside_the_paper(groups: Sequence[Sequence[Content]], names: Sequence[str] | None) -> list[str]:
    """HIoU of `full` and how each row changes it: in the paper, then in each group of files."""
    columns = [found_rows(group, None) for group in groups]
    first = groups[0][0]["rows"][0]
    full = [number([first["paper"]["hIoU"]])]
    full += [number([run["hIoU"] for run in finished(group[0], first["row"])]) for group in groups]
    body = [["full", *full]]
    for name in names or {name: 0 for column in columns for name in column if name != "full"}:
        found = [column[name] for column in columns if name in column]
        paper = max((paper_change(row, content) for _, row, content in found), key=len)
        ours = [change_of(*column[name][1:]) if name in column else [] for column in columns]
        body.append([found[0][0], *(number(each, signed=True) for each in (paper, *ours))])
    head = ["hIoU", "the paper", *(setting(group[0]["settings"]) for group in groups)]
    return as_markdown(head, body)


def found_rows(
    contents: Sequence[Content], names: Sequence[str] | None
) -> dict[str, tuple[str, Content, Content]]:
    """Title, row and file of each row with a score; one that stands in two files comes once."""
    found: dict[str, tuple[str, Content, Content]] = {}
    for content in contents:
        for row in content["rows"]:
            title = "full" if row is content["rows"][0] else row["title"]
            if row["hIoU"]["mean"] is not None:
                found.setdefault(row["row"], (title, row, content))
    return {name: found[name] for name in names or found}


def finished(content: Content, name: str) -> list[dict[str, float]]:
    """The scores of the finished runs of a row, if all of them are defined."""
    runs = [run["scores"] for run in content["runs"] if run["row"] == name and run["scores"]]
    return [scores for scores in runs if None not in scores.values()]


def change_of(row: Content, content: Content) -> list[float]:
    """Changes of hIoU against `full`, seed by seed; none of `full` itself."""
    return [] if row is content["rows"][0] else list(row["hIoU"]["change_by_seed"])


def paper_change(row: Content, content: Content, score: str = "hIoU") -> list[float]:
    """The same in the paper: one change, or none."""
    base = content["rows"][0]
    return [row["paper"][score] - base["paper"][score]] if row["paper"] and row is not base else []


def number(values: Sequence[float], signed: bool = False) -> str:
    """Mean and sample standard deviation; "-" without a value."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):{'+' if signed else ''}.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def setting(settings: dict[str, Any]) -> str:
    """Data, base, iterations if not the recipe's, and weights of terms if not the base's."""
    pairs = itertools.pairwise(settings["more"])
    weights = [f"`{flag} {value}`" for flag, value in pairs if flag.endswith("-weight")]
    data = {"folder": "photographs"}.get(settings["data"], settings["data"])
    length = [f"{settings['iterations']} iterations"] if settings["iterations"] else []
    return ", ".join([data, settings["base"], *length, *weights])


def as_markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *body))
    return [first, "|---" * len(head) + "|", *rest]


if __name__ == "__main__":
    main()
