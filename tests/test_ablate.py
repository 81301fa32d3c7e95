"""Ablations: rows as in the paper, runs that are resumed or skipped, a true report."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from small_runs import EXAMPLES, make_space

from cliptteacher.training.paper_recipes import PAPER_ROWS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from ablation_rows import CLIP_DENSE, LITERAL, TABLES, calibrated, select_rows

SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")

# Programs that write what train.py and evaluate.py would. The score is 30 + seed, 40 + seed of
# `no_ce`; FAIL fails, CUT leaves a last line that a crash cut short.
TRAIN = """
import json, os, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--output"])
print("command", sys.argv, os.environ["OMP_NUM_THREADS"], flush=True)
if "{fail}" in str(folder):
    raise OSError("disk full")
score = (40 if flags.get("--ce") == "none" else 30) + int(flags["--seed"])
scores = {"pAcc": 50.0, "mIoU(S)": 60.0, "mIoU(U)": 20.0, "hIoU": score, "IoU": {}}
rows = [{"step": 2, "split": "val", "hIoU": 1.0}, {"step": 4, "total": 1.0}]
text = "".join(json.dumps(row) + "\\n" for row in [*rows, {"step": 4, "split": "test", **scores}])
(folder / "metrics.jsonl").write_text(text if "{cut}" not in str(folder) else text[:-9])
"""
EVALUATE = """
import json, pathlib, sys
given = {name[2:]: value for name, value in zip(sys.argv[1::2], sys.argv[2::2])}
chosen = float(given.get("gamma", 0.25))
about = {"split": given.get("split"), "checkpoint": given.get("checkpoint"), "gamma": chosen}
scores = {"pAcc": 1.0, "mIoU(S)": 2.0, "mIoU(U)": 3.0, "hIoU": 10.0 + chosen, "IoU": {}}
path = pathlib.Path(given["json"])
path.write_text(json.dumps({**about, "calibrated_on": given.get("calibrate"), "scores": scores}))
"""


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("ablate")
    monkeypatch.setattr(module, "POLL", 0.02)
    return module


@pytest.fixture
def programs(ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace both programs; returns a function that does so with rows that fail."""

    def write(fail: str = "nothing", cut: str = "nothing") -> None:
        (tmp_path / "examples").mkdir(exist_ok=True)
        text = TRAIN.replace("{fail}", fail).replace("{cut}", cut)
        (tmp_path / "examples" / "train.py").write_text(text)
        (tmp_path / "examples" / "evaluate.py").write_text(EVALUATE)

    write()
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    return write


def planned(ablate: ModuleType, *argv: str) -> dict[str, dict[int, Any]]:
    args = ablate.read_arguments([*argv, "--output", "out"])
    rows = select_rows(args.table, None)
    return ablate.plan(args, rows + (calibrated(rows) if args.calibrate else ()))


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "table.json").read_text())


@pytest.mark.parametrize("table", ["3", "4", "5"])
def test_rows_of_the_paper_change_what_its_recipes_change(table: str) -> None:
    base = PAPER_ROWS["ablation_full"].overrides
    rows = {row.name: row for row in TABLES[table]}
    papers = {row.paper: row for row in TABLES[table] if row.paper is not None}
    for name, row in papers.items():
        recipe = PAPER_ROWS[f"ablation_{name}"]
        changed = {key: value for key, value in recipe.overrides.items() if base.get(key) != value}
        trained = rows[row.checkpoints_of or row.name]
        assert {**trained.overrides, **({"gamma": row.gamma} if row.gamma else {})} == changed
        assert row.paper_scores == recipe.scores
    known = {name[9:] for name, row in PAPER_ROWS.items() if row.table == int(table)}
    assert papers.keys() | {"full"} == {name for name in known if name} | {"full"}


def test_rows_are_chosen_by_table_and_name() -> None:
    for rows in TABLES.values():
        names = [row.name for row in rows]
        assert len(names) == len(set(names)) and names[0] == "full"
    chosen = select_rows("3", ["no_glm_gamma_5"])
    assert [row.name for row in chosen] == ["full", "no_glm", "no_glm_gamma_5"]
    chosen = select_rows(None, ["windows_2", "no_ce"])
    assert [row.name for row in chosen] == ["full", "no_ce", "windows_2"]
    with pytest.raises(ValueError, match="table 4 has no row 'glm'; the rows are full, glm_mean"):
        select_rows("4", ["glm"])
    with pytest.raises(ValueError, match="give --table, or rows of any table with --rows"):
        select_rows(None)


@pytest.mark.parametrize("base", ["recipe", "literal"])
def test_every_row_resolves_to_what_it_says(ablate: ModuleType, base: str) -> None:
    for table in TABLES:
        runs = planned(ablate, "--table", table, "--base", base, "--seeds", "1")
        for row in TABLES[table]:
            expected = {**(LITERAL if base == "literal" else {}), **row.overrides}
            for name, value in expected.items() if runs[row.name][0].trains else ():
                assert runs[row.name][0].expected[name] == json.loads(json.dumps(value)), row.name


def test_rows_of_one_configuration_share_a_run(ablate: ModuleType) -> None:
    gentle = planned(ablate, "--table", "readings", "--seeds", "2", "--calibrate")
    assert gentle["scope_image"][1] is gentle["full"][1] is not gentle["full"][0]
    assert gentle["scope_image@val"][1] is gentle["full@val"][1]
    assert gentle["scope_batch"][1] is not gentle["full"][1]
    literal = planned(ablate, "--table", "readings", "--base", "literal", "--seeds", "1")
    assert literal["scope_batch"][0] is literal["full"][0] is not literal["scope_image"][0]
    bounds = planned(ablate, "--table", "bounds", "--seeds", "2")
    assert list(bounds[CLIP_DENSE]) == [0] and list(bounds["full"]) == [0, 1]


def test_the_row_wins_over_what_is_passed_on(ablate: ModuleType) -> None:
    more = ["--iterations", "9", "--", "--ce", "seen", "--batch-size", "3"]
    args = ablate.read_arguments(["--table", "3", "--output", "out", *more])
    runs = ablate.plan(args, TABLES["3"])
    full = runs["full"][0].expected
    assert [full[key] for key in ("ce", "batch_size", "iterations")] == ["seen", 3, 9]
    assert runs["no_ce"][0].expected["ce"] == "none"


def test_an_evaluation_has_the_checkpoint_gamma_and_split_of_its_row(ablate: ModuleType) -> None:
    runs = planned(ablate, "--table", "3", "--calibrate")
    five, own = runs["no_glm_gamma_5"][2], runs["no_glm@val"][2]
    for run in (five, own):
        words = " ".join(run.command)
        assert run.source is runs["no_glm"][2] and words.startswith("examples/evaluate.py")
        assert f"--checkpoint {run.source.folder}" in words and "--split test" in words
    assert "--gamma 5.0" in " ".join(five.command) and "--calibrate" not in five.command
    assert "--calibrate val" in " ".join(own.command) and "--gamma" not in own.command
    dense = planned(ablate, "--table", "bounds")[CLIP_DENSE][0]
    assert "--clip miniworld" in " ".join(dense.command) and "--resize" not in dense.command


def test_mistakes_of_the_command(
    ablate: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="ablate.py: error: table 4 has no row 'no_ce'"):
        ablate.main(["--table", "4", "--output", "out", "--rows", "no_ce"])
    for wrong, message in (
        ("-- --no-such-flag 1", "unknown option '--no-such-flag'"),
        ("--seeds 0", "must be a whole number at least 1, got '0'"),
        ("--data folder --root x --calibrate", "--calibrate needs a split of its own"),
    ):
        with pytest.raises(SystemExit):
            ablate.main(["--table", "4", "--output", "out", *wrong.split()])
        assert message in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"run `pip install 'cliptteacher\[plot\]'`"):
        ablate.main(["--table", "4", "--output", "out"])


def test_scores_are_compared_seed_by_seed(
    ablate: ModuleType, programs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"""--table 3 --rows no_ce --seeds 2 --iterations 4 --jobs 2 --calibrate
        --output {tmp_path / "out"}""".split()
    ablate.main(argv)
    printed = capsys.readouterr().out
    assert "4 runs, 4 to do, 2 at a time" in printed and "no_ce seed 1 done, " in printed
    found = content(tmp_path / "out")
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["full", "no_ce", "full@val", "no_ce@val"]
    assert rows["full"]["hIoU"] == {
        "mean": 30.5,
        "std": pytest.approx(0.5**0.5),
        "change_by_seed": [],
    }
    assert rows["no_ce"]["hIoU"]["change_by_seed"] == [10.0, 10.0]
    assert rows["no_ce@val"]["hIoU"]["change_by_seed"] == [0.0, 0.0]
    assert rows["no_ce"]["paper"]["hIoU"] == 38.4 and found["settings"]["seeds"] == 2
    run = next(run for run in found["runs"] if run["row"] == "no_ce@val")
    assert run["gamma"] == 0.25 and run["split"] == "test" and run["minutes"] is not None
    assert run["command"].startswith("python examples/evaluate.py ") and run["commit"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| without any cross entropy | 2 | 50.0 ± 0.0 | 60.0 ± 0.0 | 20.0 ± 0.0 | 40.5 ± 0.7 "
        in text
    )
    assert "| +10.0 ± 0.0 | -7.0 |" in text
    assert Image.open(tmp_path / "out" / "chart.png").width > 500
    log = (tmp_path / "out" / "runs" / "full" / "seed1" / "log.txt").read_text()
    assert "'--resume'] 1" in log  # one thread

    ablate.main(argv)  # everything is finished
    assert "4 runs, 0 to do" in capsys.readouterr().out
    assert content(tmp_path / "out")["runs"] == found["runs"]


def test_a_failed_run_stops_no_other(
    ablate: ModuleType, programs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"""--table 3 --rows no_ce,no_glm_gamma_5 --seeds 1 --iterations 4
        --output {tmp_path / "out"}""".split()
    programs(fail="no_glm", cut="full")
    with pytest.raises(SystemExit):
        ablate.main(argv)
    problems = {run["row"]: run["problem"] for run in content(tmp_path / "out")["runs"]}
    assert problems["no_ce"] is None and problems["full"].startswith("exit status 0\ncommand")
    assert problems["no_glm"].startswith("exit status 1\n") and "disk full" in problems["no_glm"]
    assert problems["no_glm_gamma_5"] == "it needs the student of no_glm seed 0, which failed"
    assert "failed: no_glm seed 0\nexit status 1" in capsys.readouterr().err
    programs()
    ablate.main(argv)
    assert "3 runs, 2 to do" in capsys.readouterr().out
    means = {row["row"]: row["hIoU"]["mean"] for row in content(tmp_path / "out")["rows"]}
    assert means == {"full": 30, "no_ce": 40, "no_glm": 30, "no_glm_gamma_5": 15}


def test_another_run_in_the_folder_is_left_alone(
    ablate: ModuleType, programs: Any, tmp_path: Path
) -> None:
    argv = f"--table 4 --rows full --seeds 1 --iterations 4 --output {tmp_path / 'out'}".split()
    ablate.main(argv)
    folder = tmp_path / "out" / "runs" / "full" / "seed0"
    args = ablate.read_arguments(argv)
    config = {**ablate.plan(args, select_rows("4", ["full"]))["full"][0].expected, "workers": 7}
    (folder / "config.json").write_text(json.dumps(config))
    ablate.main(argv)  # the number of workers changes no score
    before = (folder / "log.txt").read_text()
    (folder / "config.json").write_text(json.dumps({**config, "scales": [5]}))
    with pytest.raises(SystemExit):
        ablate.main(argv)
    assert (folder / "log.txt").read_text() == before
    problem = content(tmp_path / "out")["runs"][0]["problem"]
    assert "holds a run with scales=[5], this one has [3, 7]; choose another --output" in problem


def test_an_interrupt_ends_the_processes(
    ablate: ModuleType, programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples" / "train.py").write_text("import time; time.sleep(60)")
    runs = planned(ablate, "--table", "4", "--seeds", "1", "--runs", str(tmp_path / "runs"))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ablate.execute([runs["full"][0]], 1, {"commit": "abc"})
    assert runs["full"][0].process.returncode == -15
    record = json.loads((runs["full"][0].folder / "run.json").read_text())
    assert record["commit"] == "abc" and record["minutes"] < 0.5


def test_only_report_runs_nothing(ablate: ModuleType, tmp_path: Path) -> None:
    ablate.main(["--table", "4", "--output", str(tmp_path), "--seeds", "1", "--only-report"])
    assert "- full seed 0: not finished" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "runs").exists()


def test_the_real_programs_write_what_is_read(
    ablate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py and evaluate.py in this process: a row of each kind."""
    make_space(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def start(run: Any) -> None:
        run.folder.mkdir(parents=True)
        (run.folder / "log.txt").touch()
        importlib.import_module(Path(run.command[0]).stem).main(run.command[1:])
        run.process = SimpleNamespace(poll=lambda: 0, wait=lambda: 0)

    monkeypatch.setattr(ablate.Run, "start", start)
    argv = f"""--rows gamma_1,{CLIP_DENSE} --data folder --root {tmp_path / "data"} --seeds 1
        --clip {tmp_path / "clip.pt"} --iterations 2 --output {tmp_path / "out"} --
        --segmenter segformer_nano --batch-size 2 --crop 32 --resize 64 64 --eval-resize 64 64
        --warmup 1 --kmeans-iterations 2 --device cpu"""
    ablate.main(argv.split())
    runs = content(tmp_path / "out")["runs"]
    assert [run["row"] for run in runs] == ["full", CLIP_DENSE, "gamma_1"]
    assert all(run["scores"] and not run["problem"] and run["commit"] for run in runs)
    assert [run["gamma"] for run in runs] == [0.0, 0.0, 1.0]
