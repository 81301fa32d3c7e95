"""Ablations: rows as in the paper, runs that go on where they stopped, a true report."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from test_programs import NAMES, UNSEEN, tiny_clip, write_dataset

from cliptteacher.clip import save_clip
from cliptteacher.training.paper_recipes import PAPER_ROWS

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("ablate")
    monkeypatch.setattr(module, "POLL", 0.02)
    return module


def planned(ablate: ModuleType, output: Path, *argv: str) -> dict[str, list[Any]]:
    args = ablate.parse_arguments(["--output", str(output), *argv])
    return ablate.plan_runs(args, ablate.select_rows(args.table))


# the rows


@pytest.mark.parametrize("table", ["3", "4", "5"])
def test_rows_of_the_paper_change_what_its_recipes_change(ablate: ModuleType, table: str) -> None:
    base, rows = PAPER_ROWS["ablation_full"].overrides, ablate.TABLES[table]
    for row in rows:
        if row.paper is None:
            continue
        recipe = PAPER_ROWS[f"ablation_{row.paper}"]
        changed = {
            name: value for name, value in recipe.overrides.items() if base.get(name) != value
        }
        trained = next(it for it in rows if it.name == (row.checkpoints_of or row.name))
        gamma = {} if row.gamma is None else {"gamma": row.gamma}
        assert {**trained.overrides, **gamma} == changed
        assert row.paper_scores == recipe.scores
    in_the_paper = {row.paper for row in rows} - {None, "full"}
    of_table = {
        name.removeprefix("ablation_")
        for name, row in PAPER_ROWS.items()
        if name.startswith("ablation_") and row.table == int(table)
    }
    assert in_the_paper == of_table - {"full"}


def test_names_are_unique_and_the_base_comes_first(ablate: ModuleType) -> None:
    for rows in ablate.TABLES.values():
        names = [row.name for row in rows]
        assert len(names) == len(set(names)) and names[0] == "full"


@pytest.mark.parametrize("base", ["recipe", "literal"])
def test_every_row_resolves_to_what_it_says(ablate: ModuleType, tmp_path: Path, base: str) -> None:
    for table, rows in ablate.TABLES.items():
        runs = planned(ablate, tmp_path, "--table", table, "--base", base, "--seeds", "1")
        for row in rows:
            (run,) = runs[row.name]
            for name, value in {**ablate.BASES[base], **row.overrides}.items():
                if run.trains:
                    assert run.expected[name] == json.loads(json.dumps(value)), row.name


def test_rows_of_one_configuration_share_a_run(ablate: ModuleType, tmp_path: Path) -> None:
    gentle = planned(ablate, tmp_path, "--table", "readings")
    assert gentle["scope_image"] == gentle["full"] and len(set(gentle["full"])) == 3
    assert not set(gentle["scope_batch"]) & set(gentle["full"])
    literal = planned(ablate, tmp_path, "--table", "readings", "--base", "literal")
    assert literal["scope_batch"] == literal["full"] != literal["scope_image"]


def test_the_row_wins_over_what_is_passed_through(ablate: ModuleType, tmp_path: Path) -> None:
    more = ("--iterations", "9", "--", "--ce", "seen", "--batch-size", "3", "--scales", "5", "9")
    runs = planned(ablate, tmp_path / "a folder", "--table", "3", "--seed-start", "4", *more)
    found = {name: runs[name][0].expected for name in ("full", "no_ce")}
    expected = ["seen", 3, 9, [5, 9], 4]
    names = ("ce", "batch_size", "iterations", "scales", "seed")
    assert [found["full"][name] for name in names] == expected
    assert found["no_ce"]["ce"] == "none"
    command = runs["full"][0].command
    assert command[-3:] == ["--output", str(tmp_path / "a folder/runs/full/seed4"), "--resume"]
    assert " ".join(command).count("--scales 5 9 ") == 1


def test_a_choice_of_rows_brings_what_it_needs(ablate: ModuleType) -> None:
    names = [row.name for row in ablate.select_rows("3", ["no_glm_gamma_5"])]
    assert names == ["full", "no_glm", "no_glm_gamma_5"]
    with pytest.raises(ValueError, match="table 4 has the rows full, glm_mean, glm_max, got 'glm'"):
        ablate.select_rows("4", ["glm"])


def test_mistakes_of_the_command_are_named(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--table", "4", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="table 4 has the rows"):
        ablate.main([*argv, "--rows", "no_ce"])
    with pytest.raises(SystemExit, match="`root` must name the folder"):
        ablate.main([*argv, "--data", "folder"])
    with pytest.raises(SystemExit):
        ablate.main([*argv, "--", "--crops", "1"])
    assert "unknown option '--crops'; did you mean '--crop'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablate.main([*argv, "--seeds", "0"])


def test_an_evaluation_is_of_its_checkpoint_gamma_and_split(
    ablate: ModuleType, tmp_path: Path
) -> None:
    runs = planned(ablate, tmp_path, "--table", "3", "--seeds", "2")
    run, source = runs["no_glm_gamma_5"][1], runs["no_glm"][1]
    assert run.source is source and not run.trains
    folder = source.folder
    assert f"--checkpoint {folder} --gamma 5.0 --split test" in " ".join(run.command)
    finish(source, hIoU=20.0)
    run.folder.mkdir(parents=True)
    content = {"scores": {"hIoU": 1.0}, "split": "test", "gamma": 5.0, "checkpoint": str(folder)}
    (run.folder / "scores.json").write_text(json.dumps(content))
    assert run.scores() == {"hIoU": 1.0}
    (run.folder / "scores.json").write_text(json.dumps({**content, "gamma": 4.0}))
    assert run.scores() is None and "gamma=4.0, this one has 5.0" in run.difference()
    (run.folder / "scores.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").unlink()  # the students are not finished
    assert run.scores() is None


# the runs: processes that write what train.py would

WORKS = """
import json, pathlib, time
folder = pathlib.Path({folder!r})
(folder / "config.json").write_text(json.dumps({expected!r}))
time.sleep({seconds})
scores = {{"pAcc": 50.0, "mIoU(S)": 40.0, "mIoU(U)": 30.0, "hIoU": 34.0, "IoU": {{}}}}
rows = [{{"step": 4, "total": 1.0}}, {{"step": 4, "split": "val", **scores}}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
EXPECTED = {"iterations": 4, "seed": 0, "test_split": "val", "gamma": 0.5, "scales": [3, 7]}


def fake(ablate: ModuleType, folder: Path, place: str, script: str = WORKS, **more: Any) -> Any:
    path = folder / place / "seed0"
    values = {"folder": str(path), "expected": EXPECTED, "seconds": 0.0, **more}
    row = ablate.AblationRow(name=place, title=place)
    return ablate.Run(row, 0, path, ["-c", script.format(**values)], EXPECTED)


def finish(run: Any, *, step: int | None = None, **scores: float) -> Any:
    """Write what a finished run leaves behind."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.expected))
    row = {"step": step or run.expected["iterations"], "split": run.expected["test_split"]}
    row |= {**dict.fromkeys(SCORES, None), "IoU": {"sand": 1.0}, **scores}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return run


def test_failed_runs_are_reported_and_stop_no_other(ablate: ModuleType, tmp_path: Path) -> None:
    good, later = fake(ablate, tmp_path, "good"), fake(ablate, tmp_path, "later")
    bad = fake(ablate, tmp_path, "bad", script="print('one'); raise OSError('disk full')")
    silent = fake(ablate, tmp_path, "silent", script="pass")
    ablate.run_all([bad, silent, good, later], jobs=2, commit="abc")
    assert good.problem is None and later.problem is None
    assert good.scores()["hIoU"] == later.scores()["hIoU"] == 34
    assert bad.problem.startswith("exit status 1\none\n") and "OSError: disk full" in bad.problem
    assert "ended without final scores" in silent.problem
    ended = json.loads((bad.folder / "ended.json").read_text())
    assert ended["exit"] == 1 and ended["commit"] == "abc" and ended["minutes"] >= 0
    of_bad = fake(ablate, tmp_path, "of_bad")
    of_bad.source = bad
    ablate.run_all([of_bad], jobs=1, commit="abc")
    assert of_bad.problem == "it needs the students of bad seed 0, which failed"
    assert not of_bad.folder.exists()


def test_finished_runs_are_skipped_and_others_are_not_touched(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake(ablate, tmp_path, "run")
    ablate.run_all([run], 1, None)
    again, other = fake(ablate, tmp_path, "run"), fake(ablate, tmp_path, "run")
    other.expected = {**EXPECTED, "scales": [5]}
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    ablate.run_all([again, other], 1, None)
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert "holds a run with scales=[3, 7], this one has [5]" in other.problem
    assert other.scores() is None and again.scores()["hIoU"] == 34


def test_an_interrupted_run_is_not_finished(ablate: ModuleType, tmp_path: Path) -> None:
    run = finish(fake(ablate, tmp_path, "run"), step=2, hIoU=9.0)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "val", "hIoU')
    assert run.scores() is None and run.difference() is None


def test_an_interrupt_ends_the_processes(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake(ablate, tmp_path, "run", seconds=60)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ablate.run_all([run], 1, None)
    ended = json.loads((run.folder / "ended.json").read_text())
    assert ended["exit"] != 0 and ended["minutes"] < 0.5


def test_a_run_started_by_hand_names_its_commit(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run")
    assert (run.summary()["commit"], run.summary()["date"]) == (None, None)
    run.folder.mkdir(parents=True)
    known = {"commit": "abc", "date": "2026-11-25"}
    (run.folder / "environment.json").write_text(json.dumps(known))
    assert {name: run.summary()[name] for name in known} == known


# the report


def test_the_report_holds_means_spreads_signs_and_every_run(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "no_ce,seen_ce,no_generate,no_nel"
    argv = ["--table", "3", "--rows", names, "--output", str(tmp_path), "--only-report"]
    args = ablate.parse_arguments(argv)
    runs = ablate.plan_runs(args, ablate.select_rows("3", names.split(",")))
    for seed, run in enumerate(runs["full"]):
        scores = {"pAcc": 90.0, "mIoU(S)": 70.0 + seed, "mIoU(U)": 60.0, "hIoU": 64.0 + seed}
        finish(run, **scores)
    for seed, run in enumerate(runs["no_ce"][:2]):
        finish(run, hIoU=54.0 + 2 * seed)
    finish(runs["seen_ce"][0], hIoU=65.0)
    for run, score in zip(runs["no_generate"], (61.0, 68.0), strict=False):
        finish(run, hIoU=score)
    ablate.main(argv)
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    full = "| full | 3 | 90.0 ± 0.0 | 71.0 ± 1.0 | 60.0 ± 0.0 | 65.0 ± 1.0 |"
    assert f"{full} - | - | - |" in lines and "| full | 74.8 | 41.0 | 50.7 | 45.4 |" in lines
    # seeds 0 and 1: 54 - 64 and 56 - 65, mean -9.5; the paper 38.4 - 45.4
    assert any(line.endswith("| -9.5 ± 0.7 | -7.0 | same sign |") for line in lines)
    assert any(line.endswith("| +1.0 | - | +, not in the paper |") for line in lines)
    assert any(line.endswith("| +0.0 ± 4.2 | -0.2 | within the spread |") for line in lines)
    assert "- no_nel seed 0: not finished" in lines and not runs["no_nel"][0].folder.exists()
    content = json.loads((tmp_path / "table.json").read_text())
    assert len(content["runs"]) == 5 * 3
    rows = {row["row"]: row for row in content["rows"]}
    assert rows["no_ce"]["hIoU"]["mean"] == 55 and rows["no_ce"]["paper"]["hIoU"] == 38.4
    assert rows["no_ce"]["hIoU"]["change_by_seed"] == [-10, -9]
    assert content["runs"][0]["scores"]["IoU"] == {"sand": 1.0}
    assert content["runs"][0]["command"].startswith("python examples/train.py --data miniworld ")
    assert Image.open(tmp_path / "chart.png").width > 600


def test_bars_are_as_long_as_their_scores(ablate: ModuleType, tmp_path: Path) -> None:
    evidence = importlib.import_module("evidence")
    content = evidence.read("ablation_table_3")
    figure = evidence.chart(content)
    (axes,) = figure.axes
    bars = [bar.get_width() for bar in axes.patches]
    means = [row[name]["mean"] for name in SCORES[1:] for row in content["rows"]]
    assert bars == pytest.approx(means)
    paper = [x for line in axes.lines if line.get_marker() == "D" for x in line.get_xdata()]
    assert paper[0] == 41.0 and len(paper) == len(bars)  # NaN, drawn nowhere, if not in the paper
    assert axes.get_yticklabels()[0].get_text() == "full"


# the whole


@pytest.mark.slow
def test_a_table_from_the_first_process_to_the_report(
    ablate: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = f"""--table main --data folder --root {tmp_path / "data"} --clip {tmp_path / "clip.pt"}
        --seeds 1 --iterations 2 --output {tmp_path / "out"} --rows {ablate.CLIP_ONLY} --jobs 2
        -- --segmenter segformer_nano --batch-size 2 --crop 64 --resize 64 64 --eval-resize 64 64
        --warmup 1 --kmeans-iterations 2 --device cpu""".split()
    ablate.main(argv)
    assert "2 runs, 2 to do" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert all(run["scores"] and not run["problem"] for run in content["runs"])
    assert [run["gamma"] for run in content["runs"]] == [0.0, 0.0]
    ablate.main(argv)
    assert "2 runs, 0 to do" in capsys.readouterr().out
    again = json.loads((tmp_path / "out" / "table.json").read_text())
    assert again["runs"] == content["runs"]
