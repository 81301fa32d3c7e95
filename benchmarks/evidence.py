"""Write the tables of both READMEs from the JSON files of the ablations, so that none is typed.

    python benchmarks/evidence.py            # rewrites the blocks
    python benchmarks/evidence.py --check    # exit status 1 where a block is not what the files say

A block names its files below benchmarks/results, in the order of the rows, and may choose rows and
leave out the comparison with the paper:

    <!-- evidence: ablation_table_3 ablation_bounds; rows: full no_glm; scores only -->
    the table
    <!-- end of evidence -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from ablation_report import number, verdict  # noqa: E402

from cliptteacher.evaluation import SCORES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(
    r"(?P<first><!-- evidence: (?P<files>[\w ]+?)(?:; rows: (?P<rows>[\w .]+?))?"
    r"(?P<short>; scores only)? -->\n).*?(?P<last><!-- end of evidence -->)",
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
    names = block["rows"].split() if block["rows"] else None
    lines = table(block["files"].split(), names, compare=block["short"] is None)
    return "\n".join([block["first"], *lines, "", block["last"]])


def table(files: Sequence[str], names: Sequence[str] | None, *, compare: bool) -> list[str]:
    """Finished rows of several ablations with one base; one that stands in two comes once."""
    found: dict[str, list[str]] = {}
    for file in files:
        content = json.loads((RESULTS / f"{file}.json").read_text())
        for row in content["rows"]:
            if row["hIoU"]["mean"] is not None:
                found.setdefault(row["row"], cells(row, content, compare))
    more = ["change of hIoU", "in the paper", "hIoU: sign"] if compare else []
    head = f"| {' | '.join(['row', 'seeds', *SCORES, *more])} |"
    body = [f"| {' | '.join(found[name])} |" for name in names or found]
    return [head, "|---" * (head.count("|") - 1) + "|", *body]


def cells(row: dict[str, Any], content: dict[str, Any], compare: bool) -> list[str]:
    """One row: title, seeds, scores and, if asked, the change against the base."""
    base = content["rows"][0]
    runs = [run for run in content["runs"] if run["row"] == row["row"] and run["scores"]]
    scores = [number([run["scores"][name] for run in runs]) for name in SCORES]
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


if __name__ == "__main__":
    main()
