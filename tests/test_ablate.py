"""Ablations: rows as in the paper, runs that go on where they stopped, a true report."""

import importlib
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cliptteacher.training.ablations import CLIP_DENSE, LITERAL, TABLES, AblationRow, select_rows
from PIL import Image
from test_programs import NAMES, UNSEEN, tiny_clip, write_dataset

from cliptteacher.clip import save_clip
from cliptteacher.training.paper_recipes import PAPER_ROWS

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
ALL_ROWS = [(table, row) for table, rows in TABLES.items() for row in rows]


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("ablate")
    monkeypatch.setattr(module, "POLL", 0.02)
    return module


def planned(ablate: ModuleType, output: Path, *argv: str) -> dict[tuple[str, int], Any]:
    args = ablate.parse_arguments([*argv, "--output", str(output)])
    return ablate.plan_runs(args, select_rows(args.table))


# the rows


@pytest.mark.parametrize("table", ["3", "4", "5"])
def test_rows_of_the_paper_change_what_its_recipes_change(table: str) -> None:
    base = PAPER_ROWS["ablation_full"].overrides
    for row in TABLES[table]:
        if row.paper is None:
            continue
        recipe = PAPER_ROWS[f"ablation_{row.paper}"]
        changed = {
            name: value for name, value in recipe.overrides.items() if base.get(name) != value
        }
        trained = row
        if row.checkpoints_of:
            trained = next(r for r in TABLES[table] if r.name == row.checkpoints_of)
        gamma = {} if row.gamma is None else {"gamma": row.gamma}
        assert {**trained.overrides, **gamma} == changed
        assert row.paper_scores == recipe.scores
    in_the_paper = {row.paper for row in TABLES[table]} - {None, "full"}
    tables = {PAPER_ROWS[f"ablation_{name}"].table for name in in_the_paper}
    count = sum(row.table == int(table) for name, row in PAPER_ROWS.items() if "ablation" in name)
    assert tables == {int(table)} and len(in_the_paper) == count - (table == "3")


def test_names_are_unique_and_the_base_comes_first() -> None:
    for rows in TABLES.values():
        names = [row.name for row in rows]
        assert len(names) == len(set(names)) and names[0] == "full"


def test_every_row_resolves_to_what_it_says(ablate: ModuleType, tmp_path: Path) -> None:
    for table in TABLES:
        for base in ("recipe", "literal"):
            runs = planned(ablate, tmp_path, "--table", table, "--base", base, "--seeds", "1")
            for row in TABLES[table]:
                run = runs[row.name, 0]
                expected = {**(LITERAL if base == "literal" else {}), **row.overrides}
                for name, value in expected.items():
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


def test_the_row_wins_over_what_is_passed_through(ablate: ModuleType, tmp_path: Path) -> None:
    more = ("--iterations", "9", "--", "--ce", "seen", "--batch-size", "3")
    args = ablate.parse_arguments(["--table", "3", "--output", str(tmp_path), *more])
    runs = ablate.plan_runs(args, TABLES["3"])
    found = {name: runs[name, 0].expected for name in ("full", "no_ce")}
    assert [found["full"][key] for key in ("ce", "batch_size", "iterations")] == ["seen", 3, 9]
    assert found["no_ce"]["ce"] == "none"


def test_a_choice_of_rows_brings_what_it_needs() -> None:
    assert [row.name for row in select_rows("3", ["no_glm_gamma_5"])] == [
        *("full", "no_glm", "no_glm_gamma_5"),
    ]
    with pytest.raises(ValueError, match="table 4 has the rows full, glm_mean, glm_max, got 'glm'"):
        select_rows("4", ["glm"])


def test_mistakes_of_the_command_are_told(ablate: ModuleType, tmp_path: Path) -> None:
    argv = ["--table", "4", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="table 4 has the rows"):
        ablate.main([*argv, "--rows", "no_ce"])
    with pytest.raises(SystemExit):
        ablate.main([*argv, "--", "--no-such-flag", "1"])
    with pytest.raises(SystemExit):
        ablate.main([*argv, "--seeds", "0"])


def test_calibration_follows_every_trained_row(ablate: ModuleType, tmp_path: Path) -> None:
    args = ablate.parse_arguments(["--table", "3", "--output", str(tmp_path), "--calibrate"])
    runs = ablate.plan_runs(args, TABLES["3"])
    trained = [row.name for row in TABLES["3"] if not row.checkpoints_of]
    assert {name for name, _ in runs if "@" in name} == {f"{name}@val" for name in trained}
    run = runs["no_glm@val", 2]
    assert run.needs is runs["no_glm", 2] and not run.trains
    assert run.readable_command().startswith("python examples/evaluate.py --split test")
    words = " ".join(run.command)
    assert "--split test" in words and "--calibrate val" in words and "--gamma " not in words
    assert f"--checkpoint {runs['no_glm', 2].folder}" in words
    table = ablate.table_of(runs, TABLES["3"], args)
    assert list(table)[: len(TABLES["3"])] == [row.name for row in TABLES["3"]]
    assert [run.seed for run in table["full@val"]] == [0, 1, 2]
    argv = ["--table", "3", "--output", str(tmp_path), "--data", "folder", "--calibrate"]
    with pytest.raises(SystemExit):
        ablate.parse_arguments([*argv, "--root", "x"])


def test_an_evaluation_is_of_its_checkpoint_gamma_and_split(
    ablate: ModuleType, tmp_path: Path
) -> None:
    source = fake(ablate, tmp_path, "full")
    ablate.work_off([source], 1, 60, None)
    args = ablate.parse_arguments(["--table", "3", "--output", str(tmp_path), "--runs", "r"])
    source.expected |= {"eval_mode": "whole"}
    (source.folder / "config.json").write_text(json.dumps(source.expected))
    args.runs = tmp_path
    row = AblationRow(name="five", title="five", checkpoints_of="full", gamma=5.0)
    run = ablate.evaluation_run(args, row, source)
    run.folder.mkdir(parents=True)
    content = {"scores": {"hIoU": 1.0}, "split": "val", "gamma": 5.0}
    content["checkpoint"] = str(source.folder)
    (run.folder / "scores.json").write_text(json.dumps(content))
    assert run.scores() == {"hIoU": 1.0} and run.gamma() == 5 and run.steps() == (1, 1)
    (run.folder / "scores.json").write_text(json.dumps({**content, "gamma": 4.0}))
    assert run.scores() is None and "gamma=4.0, this one has 5.0" in run.difference()
    (run.folder / "scores.json").write_text(json.dumps(content))
    (source.folder / "metrics.jsonl").unlink()
    assert run.scores() is None


# the runs: real processes that write what train.py would

WORKS = """
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
(folder / "config.json").write_text(json.dumps({expected!r}))
time.sleep({seconds})
losses = {{"step": 4, "total": 1.0}}
scores = {{"step": 4, "pAcc": 50.0, "mIoU(S)": 40.0, "mIoU(U)": 30.0, "hIoU": {score}, "IoU": {{}}}}
(folder / "metrics.jsonl").write_text(json.dumps(losses) + "\\n" + json.dumps(scores))
"""
EXPECTED = {"iterations": 4, "seed": 0, "test_split": "val", "gamma": 0.5, "scales": [3, 7]}


def fake(ablate: ModuleType, folder: Path, place: str, script: str = WORKS, **more: Any) -> Any:
    expected = {**EXPECTED, "seed": more.pop("seed", 0)}
    path = folder / place / f"seed{expected['seed']}"
    values = {"folder": str(path), "expected": expected, "seconds": 0.0, "score": 34.0, **more}
    row = AblationRow(name=place, title=place)
    command = ["-c", script.format(**values)]
    return ablate.Run(row, expected["seed"], path, command, expected)


def test_failed_runs_are_told_and_stop_no_other(ablate: ModuleType, tmp_path: Path) -> None:
    good, later = fake(ablate, tmp_path, "good"), fake(ablate, tmp_path, "later")
    bad = fake(ablate, tmp_path, "bad", script="print('one'); raise OSError('disk full')")
    silent = fake(ablate, tmp_path, "silent", script="pass")
    hopeless = fake(ablate, tmp_path, "hopeless")
    hopeless.needs = bad
    ablate.work_off([bad, silent, good, hopeless, later], jobs=2, every=60, commit="abc")
    assert good.problem is None and later.problem is None
    assert good.scores()["hIoU"] == later.scores()["hIoU"] == 34
    assert bad.problem.startswith("exit status 1\none\n") and "OSError: disk full" in bad.problem
    assert "ended without final scores" in silent.problem
    assert hopeless.problem == "it needs the students of bad seed 0, which failed"
    assert not hopeless.folder.exists()
    attempt = json.loads((bad.folder / "attempts.jsonl").read_text())
    assert attempt["exit"] == 1 and attempt["commit"] == "abc" and attempt["seconds"] > 0


def test_finished_runs_are_skipped_and_others_are_not_touched(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fake(ablate, tmp_path, "run")
    ablate.work_off([run], 1, 60, None)
    again, other = fake(ablate, tmp_path, "run"), fake(ablate, tmp_path, "run")
    other.expected = {**EXPECTED, "scales": [5]}
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    ablate.work_off([again], 1, 60, None)
    assert "1 runs, 0 to do" in capsys.readouterr().out
    ablate.work_off([other], 1, 60, None)
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert "holds a run with scales=[3, 7], this one has [5]" in other.problem
    assert other.scores() is None and again.scores()["hIoU"] == 34


def test_an_interrupted_run_is_not_finished(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run")
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(EXPECTED))
    lines = ({"step": 2, "hIoU": 9.0}, {"step": 3, "total": 1.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text + '{"step": 4, "hIo')
    assert run.scores() is None and run.difference() is None and run.steps() == (3, 4)


WAITS = """
import pathlib, time
root = pathlib.Path({folder!r}).parents[1]
(root / "started-{name}").touch()
for _ in range(6000):  # until another one runs beside it, or a minute
    if len(list(root.glob("started-*"))) > 1: break
    time.sleep(0.01)
else:
    raise SystemExit("alone")
"""


def test_no_more_processes_than_asked(
    ablate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [fake(ablate, tmp_path, f"run{n}", WAITS + WORKS, name=f"run{n}") for n in range(4)]
    ablate.work_off(runs, 2, 0, None)
    printed = capsys.readouterr().out
    assert max(line.count("seed 0") for line in printed.splitlines()) <= 2
    assert [run.problem for run in runs] == [None] * 4 and "4 of 4 runs done" in printed


def test_never_two_in_one_folder(ablate: ModuleType, tmp_path: Path) -> None:
    first = fake(ablate, tmp_path, "busy", WAITS + WORKS, name="busy")
    first.start()  # waits for another one
    second = fake(ablate, tmp_path, "busy")
    second.start()
    assert second.process is None and "another program is running it" in second.problem
    (tmp_path / "started-other").touch()
    while not first.poll(None):
        time.sleep(0.02)
    assert first.problem is None and first.scores() is not None


def test_an_interrupt_ends_the_processes(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run", seconds=60)
    run.poll = lambda commit: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ablate.work_off([run], 1, 60, None)
    assert run.process is None
    attempt = json.loads((run.folder / "attempts.jsonl").read_text())
    assert attempt["exit"] != 0 and attempt["seconds"] < 50


def test_a_run_started_by_hand_says_its_commit(ablate: ModuleType, tmp_path: Path) -> None:
    run = fake(ablate, tmp_path, "run")
    assert (run.summary()["commit"], run.summary()["date"]) == (None, None)
    run.folder.mkdir(parents=True, exist_ok=True)
    told = {"commit": "abc", "date": "2026-11-25"}
    (run.folder / "environment.json").write_text(json.dumps(told))
    assert {name: run.summary()[name] for name in told} == told
    assert run.summary()["minutes"] is None


# the report


def finished(ablate: ModuleType, folder: Path, row: AblationRow, seed: int, *scores: float) -> Any:
    run = ablate.Run(
        row, seed, folder / row.name / str(seed), ["train.py"], {**EXPECTED, "seed": seed}
    )
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.expected))
    values = {"step": 4, **dict(zip(SCORES, scores, strict=True)), "IoU": {"sand": 1.0}}
    (run.folder / "metrics.jsonl").write_text(json.dumps(values) + "\n")
    return run


@pytest.fixture
def reported(ablate: ModuleType, tmp_path: Path) -> tuple[str, dict[str, Any], Path]:
    """Table 3 of made-up scores: two rows finished, one half, the others not at all."""
    rows = {row.name: row for row in TABLES["3"]}
    runs = {
        "full": [
            finished(ablate, tmp_path, rows["full"], seed, 90, 70 + seed, 60, 64 + seed)
            for seed in range(3)
        ],
        "no_ce": [
            finished(ablate, tmp_path, rows["no_ce"], seed, 80, 60, 50, 54 + 2 * seed)
            for seed in range(2)
        ],
        "seen_ce": [finished(ablate, tmp_path, rows["seen_ce"], 0, 90, 72, None, 65)],
        "no_generate": [
            finished(ablate, tmp_path, rows["no_generate"], seed, 90, 70, 60, score)
            for seed, score in enumerate((61, 68))
        ],
    }
    chosen = [row for row in TABLES["3"] if row.name in runs]
    environment = {"command": "ablate", "date": "2026-11-24T", "commit": "abc", "torch": "2"}
    settings = {"data": "miniworld", "base": "recipe", "seed_start": 0, "seeds": 3, "more": []}
    write_report = importlib.import_module("ablation_report").write_report
    text = write_report("3", chosen, runs, {**settings, "environment": environment}, tmp_path)
    return text, json.loads((tmp_path / "table.json").read_text()), tmp_path


def test_the_table_holds_means_spreads_and_signs(reported: tuple[str, Any, Path]) -> None:
    text, _, folder = reported
    assert text == (folder / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ours, paper = "90.0 ± 0.0 | 71.0 ± 1.0 | 60.0 ± 0.0 | 65.0 ± 1.0", "74.8 | 41.0 | 50.7 | 45.4"
    assert f"| full | 3 | {ours} | {paper} |" in lines
    seen = "| cross entropy on seen pixels only | 1 | 90.0 | 72.0 | - | 65.0 | - | - | - | - |"
    assert seen in lines
    # seeds 0 and 1: 54 - 64 and 56 - 65, mean -9.5; the paper 38.4 - 45.4
    change = next(line for line in lines if "-7.0" in line)
    assert change.endswith("| -7.0 | -9.5 ± 0.7 | same sign |")
    assert any(line.endswith("| +1.0 | +, not in the paper |") for line in lines)
    assert any(line.endswith("| -0.2 | +0.0 ± 4.2 | within the spread |") for line in lines)


def test_a_second_table_holds_the_scores_at_the_own_gammas(
    ablate: ModuleType, tmp_path: Path
) -> None:
    report = importlib.import_module("ablation_report")
    rows = select_rows("3", ["no_glm"])
    runs = {}
    for row, score in zip(rows, (60.0, 20.0), strict=True):
        source = finished(ablate, tmp_path, row, 0, 90, 70, 60, score)
        own = ablate.calibrated(row)
        folder = tmp_path / own.name
        expected = {"split": "test", "calibrated_on": "val"}
        again = ablate.Run(own, 0, folder, ["evaluate.py"], expected, needs=source)
        folder.mkdir()
        scores = dict(zip(SCORES, (90, 70, 60, score + 5), strict=True))
        content = {**expected, "scores": {**scores, "IoU": {}}, "gamma": -score / 10}
        (folder / "scores.json").write_text(json.dumps(content))
        runs |= {row.name: [source], own.name: [again]}
    environment = {"command": "ablate", "date": "2026-11-24T", "commit": "abc", "torch": "2"}
    settings = {"data": "miniworld", "base": "recipe", "seed_start": 0, "seeds": 1, "more": []}
    settings |= {"environment": environment, "calibrate": True}
    text = report.write_report("3", rows, runs, settings, tmp_path)
    first, second = text.split("## Scores at the gamma that the validation split chooses")
    assert "| 60.0 |" in first and "| 65.0 |" in second
    assert "full: -6; without GLM, gamma of the base: -2." in second
    assert "| -40.0 | -, not in the paper |" in second
    written = json.loads((tmp_path / "table.json").read_text())
    assert [run["gamma"] for run in written["runs"]] == [0.5, -6.0, 0.5, -2.0]


def test_the_json_holds_every_run(reported: tuple[str, Any, Path]) -> None:
    _, content, _ = reported
    assert len(content["runs"]) == 3 + 2 + 1 + 2
    rows = {row["row"]: row for row in content["rows"]}
    assert rows["no_ce"]["hIoU"]["mean"] == 55 and rows["no_ce"]["paper"]["hIoU"] == 38.4
    assert rows["no_ce"]["hIoU"]["change_by_seed"] == [-10, -9]
    assert content["runs"][0]["scores"]["IoU"] == {"sand": 1.0}
    assert content["runs"][0]["command"] == "python train.py"
    assert content["settings"]["environment"]["commit"] == "abc"


def test_the_chart_shows_bars_as_long_as_their_scores(
    ablate: ModuleType, reported: tuple[str, Any, Path]
) -> None:
    chart = importlib.import_module("ablation_chart")
    colours = dict(chart.SERIES)
    image = Image.open(reported[2] / "chart.png")
    assert image.width == chart.WIDTH * chart.SCALE

    def longest(rows: list[Any], name: str) -> int:
        picture = chart.draw_chart("title", "note", rows)
        body = picture.crop((0, chart.HEAD * chart.SCALE, *picture.size))
        wanted = colours[name]
        pixels = body.load()
        return max(
            sum(pixels[x, y] == wanted for x in range(body.width)) for y in range(body.height)
        )

    def rows(score: float) -> list[Any]:
        bars = [chart.Bar(80.0, None, None), chart.Bar(score, None, None), chart.Bar(None, None, 7)]
        return [chart.ChartRow("row", 1, bars)]

    half, whole = longest(rows(40), "mIoU(U)"), longest(rows(80), "mIoU(U)")
    assert whole == pytest.approx(2 * half, abs=3) and longest(rows(80), "hIoU") == 0


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
    argv = f"""--table bounds --data folder --root {tmp_path / "data"} --clip {tmp_path / "clip.pt"}
        --seeds 1 --iterations 2 --output {tmp_path / "out"} --rows distill,{CLIP_DENSE} --jobs 3
        -- --segmenter segformer_nano --batch-size 2 --crop 64 --resize 64 64 --eval-resize 64 64
        --warmup 1 --kmeans-iterations 2 --device cpu""".split()
    ablate.main(argv)
    out = capsys.readouterr().out
    assert "3 runs, 3 to do" in out and "3 of 3 runs done" in out
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    assert all(run["scores"] and run["minutes"] and not run["problem"] for run in content["runs"])
    config = json.loads(
        (tmp_path / "out" / "runs" / "distill" / "seed0" / "config.json").read_text()
    )
    assert config["distill_weight"] == 1 and config["focal_weight"] == 0
    ablate.main(argv)
    assert "3 runs, 0 to do" in capsys.readouterr().out
    ablate.main([*argv[: argv.index("--")], "--only-report", *argv[argv.index("--") :]])
    again = json.loads((tmp_path / "out" / "table.json").read_text())
    assert again["runs"] == content["runs"]


def test_only_report_runs_nothing(ablate: ModuleType, tmp_path: Path) -> None:
    ablate.main(["--table", "4", "--output", str(tmp_path), "--seeds", "1", "--only-report"])
    text = (tmp_path / "table.md").read_text()
    assert "- full seed 0: not finished" in text and "| GLM: mean | 0 | - |" in text
    assert not (tmp_path / "runs").exists()
