"""Recorded results: no figure of an ablation is typed, and what a page links to exists."""

import importlib
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").glob("ablation_*.json"))


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("evidence")


def test_tables_of_the_pages_are_what_the_files_say(evidence: ModuleType) -> None:
    texts = [page.read_text() for page in evidence.PAGES]
    assert sum(text.count("<!-- evidence:") for text in texts) > 0
    for text in texts:
        assert len(evidence.BLOCK.findall(text)) == text.count("<!-- evidence:")
        assert evidence.BLOCK.sub(evidence.filled, text) == text


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


def test_a_block_chooses_rows_and_columns(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(value: float) -> dict[str, float]:
        return dict.fromkeys(evidence.SCORES, value)

    def row(name: str, paper: float | None, change: list[float]) -> dict[str, object]:
        told = None if paper is None else scores(paper)
        return {
            "row": name,
            "title": name.upper(),
            "paper": told,
            "hIoU": {"mean": 50.0, "change_by_seed": change},
        }

    content = {
        "rows": [row("full", 40.0, [0.0, 0.0]), row("a", 38.0, [-4.0, -5.0]), row("b", None, [3])],
        "runs": [
            *({"row": "full", "scores": scores(v)} for v in (50.0, 52.0)),
            *({"row": "a", "scores": scores(v)} for v in (46.0, 47.0)),
            {"row": "b", "scores": scores(53.0)},
            {"row": "b", "scores": None},
        ],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    page = "<!-- evidence: one; rows: b full; scores only -->\nold\n<!-- end of evidence -->"
    lines = evidence.BLOCK.sub(evidence.filled, page).splitlines()
    assert lines[2] == "| row | seeds | pAcc | mIoU(S) | mIoU(U) | hIoU |"
    assert lines[4] == "| B | 1 | 53.0 | 53.0 | 53.0 | 53.0 |"
    assert lines[5].startswith("| full | 2 | 51.0 ± 1.4") and "old" not in lines
    compared = evidence.rows_table([content, content], None, compare=True)
    assert compared[3].endswith("| -4.5 ± 0.7 | -2.0 | same sign |") and len(compared) == 5
    assert compared[4].endswith("| +3.0 | - | +, not in the paper |")


def test_a_block_compares_one_row_in_several_settings(
    evidence: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, paper: float, change: list[float]) -> dict[str, object]:
        scores = {score: {"change_by_seed": change} for score in evidence.SCORES}
        return {"row": name, "paper": dict.fromkeys(evidence.SCORES, paper), **scores}

    settings = {"data": "miniworld", "base": "recipe", "iterations": 4, "more": []}
    rows = [row("full", 40.0, [0.0, 0.0]), row("a", 38.5, [-4.0, -5.0])]
    runs = [{"row": "a", "scores": dict.fromkeys(evidence.SCORES, v)} for v in (34.0, 36.0)]
    content = {"rows": rows, "settings": settings, "runs": [*runs, {"row": "a", "scores": None}]}
    (tmp_path / "one.json").write_text(json.dumps(content))
    more = ["--precision", "bf16", "--focal-weight", "20", "--dice-weight", "1"]
    settings = {"data": "folder", "base": "literal", "iterations": None, "more": more}
    rows = [row("full", 40.0, [0.0]), row("a", 38.5, [3.0])]
    content = {"rows": rows, "settings": settings, "runs": []}
    (tmp_path / "two.json").write_text(json.dumps(content))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    page = "<!-- evidence: one two; changes of a -->\nold\n<!-- end of evidence -->"
    lines = evidence.BLOCK.sub(evidence.filled, page).splitlines()
    assert lines[2] == "| setting | seeds | pAcc | mIoU(S) | mIoU(U) | hIoU |"
    assert lines[4] == "| the paper | - | -1.5 | -1.5 | -1.5 | -1.5 |"
    assert lines[5].startswith("| miniworld, recipe, 4 iterations | 2 | -4.5 ± 0.7 | -4.5 ± 0.7 |")
    assert lines[6] == (
        "| photographs, literal, `--focal-weight 20`, `--dice-weight 1` "
        "| 1 | +3.0 | +3.0 | +3.0 | +3.0 |"
    )
    assert len(lines) == 9 and "old" not in lines
    scores = page.replace("changes of a", "scores of a").replace("one two", "one")
    lines = evidence.BLOCK.sub(evidence.filled, scores).splitlines()
    assert lines[4] == f"| miniworld, recipe, 4 iterations | 2 {'| 35.0 ± 1.4 ' * 4}|"


def test_links_of_the_results_lead_somewhere() -> None:
    page = ROOT / "benchmarks" / "README.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    assert [link for link in local if not (page.parent / link).exists()] == []
    for file in [*FILES, *(ROOT / "benchmarks" / "figures").glob("*_*")]:
        assert f"{file.parent.name}/{file.name}" in local
