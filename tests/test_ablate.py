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
ENVIRONMENT = {"commit": "abc"}


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("ablate")
    monkeypatch.setattr(module, "POLL", 0.02)
    return module


def planned(ablate: ModuleType, output: Path, *argv: str) -> dict[tuple[str, int], Any]:
    args = ablate.read_arguments(["--output", str(output), *argv])
    rows = ablate.select_rows(args.table)
    return ablate.plan(args, rows + (ablate.calibrated(rows) if args.calibrate else ()))


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
            run = runs[row.name, 0]
            for name, value in {**ablate.BASES[base], **row.overrides}.items():
                if run.trains:
                    assert run.expected[name] == json.loads(json.dumps(value)), row.name


def test_rows_of_one_configuration_share_a_run(ablate: ModuleType, tmp_path: Path) -> None:
    gentle = planned(ablate, tmp_path, "--table", "readings")
    assert gentle["scope_image", 1] is gentle["full", 1]
    assert gentle["scope_batch", 1] is not gentle["full", 1]
    assert gentle["full", 0] is not gentle["full", 1]
    literal = planned(ablate, tmp_path, "--table", "readings", "--base", "literal")
    assert literal["scope_batch", 2] is literal["full", 2]
    assert literal["scope_image", 2] is not literal["full", 2]
    bounds = planned(ablate, tmp_path, "--table", "bounds")
    dense = [bounds[ablate.CLIP_DENSE, seed] for seed in range(3)]
    assert dense[0] is dense[1] is dense[2]  # no seed changes it


def test_the_row_wins_over_what_is_passed_through(ablate: ModuleType, tmp_path: Path) -> None:
    more = ("--iterations", "9", "--", "--ce", "seen", "--batch-size", "3", "--scales", "5", "9")
    folder = tmp_path / "a folder"
    runs = planned(
        ablate, folder, "--table", "3", "--clip", "my clip.pt", "--seed-start", "4", *more
    )
    full = runs["full", 4]
    names = ("ce", "batch_size", "iterations", "scales", "seed", "clip")
    assert [full.expected[name] for name in names] == ["seen", 3, 9, [5, 9], 4, "my clip.pt"]
    assert runs["no_ce", 4].expected["ce"] == "none"
    assert full.command[-3:] == ["--output", str(folder / "runs/full/seed4"), "--resume"]
    assert "my clip.pt" in full.command


def test_a_choice_of_rows_brings_what_it_needs(ablate: ModuleType) -> None:
    names = [row.name for row in ablate.select_rows("3", ["no_glm_gamma_5"])]
    assert names == ["full", "no_glm", "no_glm_gamma_5"]
    names = [row.name for row in ablate.select_rows(None, ["windows_4", "glm_max"])]
    assert names == ["full", "glm_max", "windows_4"]
    with pytest.raises(ValueError, match="no row 'glm'; the rows are full, glm_mean, glm_max"):
        ablate.select_rows("4", ["glm"])


def test_mistakes_of_the_command_are_named(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--table", "4", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="table 4 has no row 'no_ce'"):
        ablate.main([*argv, "--rows", "no_ce"])
    with pytest.raises(SystemExit, match="give --table, or rows of any table with --rows"):
        ablate.main(argv[2:])
    with pytest.raises(SystemExit, match="`root` must name the folder"):
        ablate.main([*argv, "--data", "folder"])
    for more, message in (
        (["--", "--crops", "1"], "unknown option '--crops'; did you mean '--crop'?"),
        (["--seeds", "0"], "--seeds: must be a whole number at least 1, got '0'"),
        (["--calibrate", "--data", "folder", "--root", "x"], "--calibrate needs a split"),
    ):
        with pytest.raises(SystemExit):
            ablate.main([*argv, *more])
        assert message in capsys.readouterr().err


def test_an_evaluation_is_of_its_checkpoint_gamma_and_split(
    ablate: ModuleType, tmp_path: Path
) -> None:
    runs = planned(ablate, tmp_path, "--table", "3", "--seeds", "2", "--calibrate")
    run, source = runs["no_glm_gamma_5", 1], runs["no_glm", 1]
    assert run.source is source and not run.trains
    folder = source.folder
    assert f"--split test --checkpoint {folder} --gamma 5.0" in " ".join(run.command)
    own = runs["no_glm@val", 1]
    assert own.source is source and "--gamma" not in own.command
    assert f"--calibrate val --split test --checkpoint {folder}" in " ".join(own.command)
    finish(source, hIoU=20.0)
    run.folder.mkdir(parents=True)
    content = {"scores": {"hIoU": 1.0}, "split": "test", "gamma": 5.0, "checkpoint": str(folder)}
    (run.folder / "scores.json").write_text(json.dumps(content))
    assert run.scores() == {"hIoU": 1.0}
    (run.folder / "scores.json").write_text(json.dumps({**content, "gamma": 4.0}))
    assert run.scores() is None and "gamma=4.0, this one has 5.0" in run.difference()
    (run.folder / "scores.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").unlink()  # the student is not finished
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


def fake(ablate: ModuleType, folder: Path, name: str, script: str = WORKS, **more: Any) -> Any:
    """A run of a program of its own, which stands beside its folder."""
    path = folder / name / "seed0"
    values = {"folder": str(path), "expected": EXPECTED, "seconds": 0.0, **more}
    program = folder / f"{name}.py"
    program.write_text(script.format(**values))
    return ablate.Run(ablate.AblationRow(name, name), 0, path, [str(program)], EXPECTED)


def finish(run: Any, *, step: int | None = None, split: str | None = None, **scores: float) -> None:
    """Write what a run leaves behind whose last evaluation this is."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(run.expected))
    end = {"step": run.expected["iterations"], "split": run.expected["test_split"]}
    given = {"step": step or end["step"], "split": split or end["split"]}
    row = {**given, **dict.fromkeys(SCORES), "IoU": {"sand": 1.0}, **scores}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_failed_runs_are_reported_and_stop_no_other(ablate: ModuleType, tmp_path: Path) -> None:
    good, later = fake(ablate, tmp_path, "good"), fake(ablate, tmp_path, "later")
    bad = fake(ablate, tmp_path, "bad", script="print('one'); raise OSError('disk full')")
    silent = fake(ablate, tmp_path, "silent", script="print('nothing to do')")
    ablate.execute([bad, silent, good, later], 2, ENVIRONMENT)
    assert good.problem is None and later.problem is None
    assert good.scores()["hIoU"] == later.scores()["hIoU"] == 34
    assert bad.problem.startswith("exit status 1\none\n") and "OSError: disk full" in bad.problem
    assert silent.problem == "exit status 0\nnothing to do"
    record = json.loads((good.folder / "run.json").read_text())
    assert record["commit"] == "abc" and record["minutes"] >= 0
    of_bad = fake(ablate, tmp_path, "of_bad")
    of_bad.source = bad
    ablate.execute([of_bad], 1, ENVIRONMENT)
    assert of_bad.problem == "it needs the student of bad seed 0, which failed"
    assert not of_bad.folder.exists()


def test_finished_runs_are_skipped_and_others_are_not_touched(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake(ablate, tmp_path, "run")
    ablate.execute([run], 1, ENVIRONMENT)
    line = "run seed 0: pAcc 50.0  mIoU(S) 40.0  mIoU(U) 30.0  hIoU 34.0; 0 runs left\n"
    assert capsys.readouterr().out.endswith(line)
    again, other = fake(ablate, tmp_path, "run"), fake(ablate, tmp_path, "run")
    other.expected = {**EXPECTED, "scales": [5]}
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    ablate.execute([again, other], 1, ENVIRONMENT)
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert "holds a run with scales=[3, 7], this one has [5]" in other.problem
    assert other.scores() is None and again.scores()["hIoU"] == 34


def test_an_interrupted_run_is_not_finished(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run")
    finish(run, hIoU=9.0)
    assert run.scores()["hIoU"] == 9
    finish(run, step=2, hIoU=9.0)
    assert run.scores() is None and run.difference() is None
    run.expected = {**EXPECTED, "test_split": "test"}
    finish(run, split="val", hIoU=9.0)  # ended between the two evaluations of the last iteration
    assert run.scores() is None
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "test", "hIoU')
    assert run.scores() is None


def test_an_interrupt_ends_the_processes(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake(ablate, tmp_path, "run", seconds=60)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ablate.execute([run], 1, ENVIRONMENT)
    assert run.process.returncode < 0 and run.problem.startswith("exit status -")
    assert json.loads((run.folder / "run.json").read_text())["minutes"] < 0.5


def test_a_run_started_by_hand_names_its_commit(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run")
    assert (run.summary("run")["commit"], run.summary("run")["date"]) == (None, None)
    run.folder.mkdir(parents=True)
    known = {"commit": "abc", "date": "2026-11-25"}
    (run.folder / "environment.json").write_text(json.dumps(known))
    assert {name: run.summary("run")[name] for name in known} == known


# the report


def test_the_report_holds_means_spreads_changes_and_every_run(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--table", "3", "--rows", "no_ce,seen_ce,no_generate,no_nel", "--only-report"]
    runs = planned(ablate, tmp_path, "--table", "3")
    for seed in range(3):
        scores = {"pAcc": 90.0, "mIoU(S)": 70.0 + seed, "mIoU(U)": 60.0, "hIoU": 64.0 + seed}
        finish(runs["full", seed], **scores)
        generate = {**scores, "hIoU": (61.0, 68.0, 66.0)[seed]}
        finish(runs["no_generate", seed], **generate)
    for seed in range(2):
        scores = {"pAcc": 80.0, "mIoU(S)": 60.0, "mIoU(U)": 50.0, "hIoU": 54.0 + 2 * seed}
        finish(runs["no_ce", seed], **scores)
    finish(runs["seen_ce", 0], **{**scores, "hIoU": 65.0})
    ablate.main([*argv, "--output", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    lines = text.splitlines()
    full = "| full | 3 | 90.0 ± 0.0 | 71.0 ± 1.0 | 60.0 ± 0.0 | 65.0 ± 1.0 | - | - |"
    assert lines[0] == "# Table 3, miniworld, recipe" and full in lines
    # seeds 0 and 1: 54 - 64 and 56 - 65, mean -9.5; the paper 38.4 - 45.4
    assert any(line.endswith("| 55.0 ± 1.4 | -9.5 ± 0.7 | -7.0 |") for line in lines)
    assert any(line.endswith("| 65.0 | +1.0 | - |") for line in lines)
    assert any(line.endswith("| +0.0 ± 3.0 | -0.2 |") for line in lines)
    assert "- no_nel seed 0: not finished" in lines and not runs["no_nel", 0].folder.exists()
    content = json.loads((tmp_path / "table.json").read_text())
    assert len(content["runs"]) == 5 * 3
    rows = {row["row"]: row for row in content["rows"]}
    assert rows["no_ce"]["hIoU"]["mean"] == 55 and rows["no_ce"]["paper"]["hIoU"] == 38.4
    assert rows["no_ce"]["hIoU"]["std"] == pytest.approx(2**0.5)
    assert rows["no_ce"]["hIoU"]["change_by_seed"] == [-10, -9]
    assert content["runs"][0]["scores"]["IoU"] == {"sand": 1.0}
    assert content["runs"][0]["command"].startswith("python examples/train.py --data miniworld ")
    assert Image.open(tmp_path / "chart.png").width > 600
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == 3 and "data:image/jpeg" in page and "https://" not in page


def test_rows_at_their_own_gammas_are_compared_with_full_at_its_own(
    ablate: ModuleType, tmp_path: Path
) -> None:
    argv = ["--table", "3", "--rows", "no_glm", "--seeds", "1", "--calibrate", "--only-report"]
    runs = planned(ablate, tmp_path, "--table", "3", "--seeds", "1", "--calibrate")
    for name, score, own in (("full", 60.0, 65.0), ("no_glm", 20.0, 45.0)):
        scores = {**dict.fromkeys(SCORES, 1.0), "hIoU": score}
        finish(runs[name, 0], **scores)
        run = runs[f"{name}@val", 0]
        run.folder.mkdir(parents=True)
        found = {**run.expected, "gamma": -2.0, "scores": {**scores, "hIoU": own, "IoU": {}}}
        (run.folder / "scores.json").write_text(json.dumps(found))
    ablate.main([*argv, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "table.json").read_text())
    changes = {row["row"]: row["hIoU"]["change_by_seed"] for row in content["rows"]}
    assert changes == {"full": [], "no_glm": [-40], "full@val": [], "no_glm@val": [-20]}
    assert [run["gamma"] for run in content["runs"]] == [0.5, 0.5, -2.0, -2.0]


# the whole


@pytest.mark.slow
def test_a_table_from_the_first_process_to_the_report(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    argv = f"""--rows {ablate.CLIP_DENSE} --data folder --root {tmp_path / "data"}
        --clip {tmp_path / "clip.pt"} --seeds 1 --iterations 2 --output {tmp_path / "out"}
        -- --segmenter segformer_nano --batch-size 2 --crop 64 --resize 64 64 --eval-resize 64 64
        --warmup 1 --kmeans-iterations 2 --device cpu""".split()
    ablate.main(argv)
    assert capsys.readouterr().out.count("1 runs, 1 to do, 1 at a time") == 2
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert all(run["scores"] and not run["problem"] for run in content["runs"])
    assert [run["row"] for run in content["runs"]] == ["full", ablate.CLIP_DENSE]
    ablate.main(argv)
    assert capsys.readouterr().out.count("1 runs, 0 to do") == 2
    again = json.loads((tmp_path / "out" / "table.json").read_text())
    assert again["runs"] == content["runs"]
