"""Recorded results: no figure of an ablation is typed, and every file is linked from a page."""

import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cliptteacher.evaluation import SCORES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("ablation_*.json"))


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("evidence")


def test_tables_of_the_pages_are_what_the_files_say(evidence: ModuleType) -> None:
    blocks = 0
    for page in evidence.PAGES:
        text = page.read_text()
        found = len(evidence.BLOCK.findall(text))
        assert found == text.count("<!-- evidence:") == text.count("<!-- end of evidence"), page
        assert evidence.BLOCK.sub(evidence.filled, text) == text, page
        blocks += found
    assert blocks > 5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_means_are_those_of_the_runs(file: Path) -> None:
    content = json.loads(file.read_text())
    for row in content["rows"]:
        runs = [run for run in content["runs"] if run["row"] == row["row"] and run["scores"]]
        found = [run["scores"]["hIoU"] for run in runs]
        if not found:
            assert row["hIoU"]["mean"] is None
            continue
        assert row["hIoU"]["mean"] == pytest.approx(statistics.fmean(found), abs=1e-9)
        if len(found) > 1:
            assert row["hIoU"]["std"] == pytest.approx(statistics.stdev(found), abs=1e-9)
        assert len({run["seed"] for run in runs}) == len(runs)
        for run in runs:
            seen, unseen = run["scores"]["mIoU(S)"], run["scores"]["mIoU(U)"]
            assert run["scores"]["hIoU"] == pytest.approx(2 * seen * unseen / (seen + unseen))
            assert run["command"].startswith("python examples/") and run["commit"]


def recorded(
    paper: dict[str, float | None], found: dict[str, list[float]], **settings: object
) -> dict[str, object]:
    """A file of an ablation; every score of a run is the same number."""
    rows, runs = [], []
    for name, values in found.items():
        change = [ours - base for ours, base in zip(values, found["full"], strict=False)]
        scores = {score: {"mean": 50.0, "change_by_seed": change} for score in SCORES}
        told = None if paper[name] is None else dict.fromkeys(SCORES, paper[name])
        rows.append({"row": name, "title": name.upper(), "paper": told, **scores})
        runs += [{"row": name, "scores": dict.fromkeys(SCORES, value)} for value in values]
        runs.append({"row": name, "scores": None})  # not finished
    settings = {"data": "miniworld", "base": "recipe", "iterations": 4, "more": [], **settings}
    return {"rows": rows, "runs": runs, "settings": settings}


@pytest.fixture
def fill(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Fill one block from files that are given by name; returns the lines of its table."""

    def filled(first: str, **files: dict[str, object]) -> list[str]:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        monkeypatch.setattr(evidence, "RESULTS", tmp_path)
        page = f"<!-- evidence: {first} -->\nold\n<!-- end of evidence -->"
        lines = evidence.BLOCK.sub(evidence.filled, page).splitlines()
        assert lines[0] == page.splitlines()[0] and lines[-1] == page.splitlines()[-1]
        assert lines[1] == lines[-2] == ""
        return lines[2:-2]

    return filled


PAPER = {"full": 40.0, "a": 38.5, "b": None}
ONE = recorded(PAPER, {"full": [50.0, 52.0], "a": [46.0, 47.0], "b": [53.0]})
TWO = recorded(
    PAPER,
    {"full": [30.0], "a": [33.0]},
    data="folder",
    base="literal",
    iterations=None,
    more=["--precision", "bf16", "--focal-weight", "20", "--dice-weight", "1"],
)


def test_a_block_chooses_rows_and_columns(fill: Callable[..., list[str]]) -> None:
    assert fill("one; rows: b full; scores only", one=ONE) == [
        "| row | seeds | pAcc | mIoU(S) | mIoU(U) | hIoU |",
        "|---|---|---|---|---|---|",
        "| B | 1 | 53.0 | 53.0 | 53.0 | 53.0 |",
        f"| full | 2 {'| 51.0 ± 1.4 ' * 4}|",
    ]
    compared = fill("one one", one=ONE)
    assert compared[0].endswith("| hIoU | change of hIoU | in the paper |")
    assert compared[2].endswith("| - | - |")
    assert compared[3].endswith("| -4.5 ± 0.7 | -1.5 |")
    assert compared[4].endswith("| +3.0 | - |") and len(compared) == 5


def test_a_block_compares_one_row_in_several_settings(fill: Callable[..., list[str]]) -> None:
    setting = "photographs, literal, `--focal-weight 20`, `--dice-weight 1`"
    assert fill("one two; changes of a", one=ONE, two=TWO) == [
        "| setting | seeds | pAcc | mIoU(S) | mIoU(U) | hIoU |",
        "|---|---|---|---|---|---|",
        f"| the paper | - {'| -1.5 ' * 4}|",
        f"| miniworld, recipe, 4 iterations | 2 {'| -4.5 ± 0.7 ' * 4}|",
        f"| {setting} | 1 {'| +3.0 ' * 4}|",
    ]
    assert fill("one; scores of a", one=ONE)[2:] == [
        f"| miniworld, recipe, 4 iterations | 2 {'| 46.5 ± 0.7 ' * 4}|"
    ]


def test_a_block_sets_experiments_beside_the_paper(fill: Callable[..., list[str]]) -> None:
    setting = "photographs, literal, `--focal-weight 20`, `--dice-weight 1`"
    assert fill("one one | two; beside the paper", one=ONE, two=TWO) == [
        f"| hIoU | the paper | miniworld, recipe, 4 iterations | {setting} |",
        "|---|---|---|---|",
        "| full | 40.0 | 51.0 ± 1.4 | 30.0 |",
        "| A | -1.5 | -4.5 ± 0.7 | +3.0 |",
        "| B | - | +3.0 | - |",
    ]
    chosen = fill("one | two; rows: b; beside the paper", one=ONE, two=TWO)
    assert [line.split(" | ")[0] for line in chosen[2:]] == ["| full", "| B"]


def test_a_stale_page_is_noticed_then_rewritten(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ONE))
    page = tmp_path / "page.md"
    page.write_text("A\n<!-- evidence: one; scores of a -->\nold\n<!-- end of evidence -->\nB\n")
    for name, value in (("RESULTS", tmp_path), ("PAGES", [page]), ("ROOT", tmp_path)):
        monkeypatch.setattr(evidence, name, value)

    def status(*flags: str) -> bool:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *flags])
        with pytest.raises(SystemExit) as ended:
            evidence.main()
        return bool(ended.value.code)

    assert status("--check") and "old" in page.read_text()
    assert not status() and "46.5 ± 0.7" in page.read_text()
    assert page.read_text().startswith("A\n") and page.read_text().endswith("-->\nB\n")
    assert not status("--check")


def test_every_result_and_figure_is_linked_from_a_page() -> None:
    pages = [ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md")]
    linked = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)", page.read_text())
    }
    files = [*RESULTS.glob("*.json"), *(ROOT / "benchmarks" / "figures").iterdir()]
    assert len(files) > 20 and [file.name for file in files if file not in linked] == []
