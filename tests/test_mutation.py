"""The table of the mutation campaign stays applicable, and the campaign notices what it must."""

import ast
from pathlib import Path

import mutation
import pytest
from mutation import CampaignError, Mutant, describe, fingerprint, load_mutants, mutate

MUTANTS = load_mutants()
ROOMS = {
    *("kmeans.py", "fusion.py", "glm.py", "vla.py", "plm.py", "losses.py", "metrics.py"),
    *(
        "framework.py",
        "inference.py",
        "logits.py",
        "distributed.py",
        "clip/model.py",
        "clip/tokenizer.py",
        "clip/prompts.py",
    ),
    *(
        "clip/convert.py",
        "clip/archive.py",
        "files.py",
        "tensors.py",
        "clip/weights.py",
        "clip/settings.py",
    ),
    *("data/splits.py", "training/optimizer.py"),
}


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_applies_and_is_a_program(file: str) -> None:
    for mutant in MUTANTS:
        if mutant.file == file:
            ast.parse(mutate(mutant))  # the old text occurs once, and the change is no typing error
            assert mutant.tests
            for test in mutant.tests:
                assert (mutation.ROOT / "tests" / f"test_{test}.py").exists(), mutant.title


def test_the_table_is_large_and_covers_every_room() -> None:
    counts = {room: sum(mutant.file == room for mutant in MUTANTS) for room in ROOMS}
    assert len(MUTANTS) >= 350
    assert min(counts.values()) >= 5


def test_few_mutants_may_survive() -> None:
    excused = [mutant for mutant in MUTANTS if mutant.survives]
    assert len(excused) <= 3
    assert all(len(mutant.survives.split()) > 8 for mutant in excused)


CHANGE = Mutant("fusion.py", "test", "state == 0.5", "state != 0.5", ("fusion",))


@pytest.mark.parametrize(
    ("old", "new", "times"),
    [
        ("no such text", "x", 0),
        ("import torch", "x", 1000),
        ("state == 0.5", "state == 0.5", 1),
    ],
)
def test_a_change_that_does_not_apply_is_an_error(
    tmp_path: Path, old: str, new: str, times: int
) -> None:
    (tmp_path / "cliptteacher").mkdir()
    text = "state == 0.5\n" + "import torch\n" * 1000
    (tmp_path / "cliptteacher" / "fusion.py").write_text(text)
    assert "state != 0.5" in mutate(CHANGE, tmp_path)
    wrong = Mutant("fusion.py", "test", old, new, ("fusion",))
    with pytest.raises(CampaignError, match=f"occurs {times} times; repair tests/mutants.py"):
        mutate(wrong, tmp_path)


def test_the_copy_is_changed_and_the_tree_is_not() -> None:
    original = (mutation.ROOT / "cliptteacher" / "fusion.py").read_bytes()
    with mutation.copy_of_tree(CHANGE) as root:
        assert b"state != 0.5" in (root / "cliptteacher" / "fusion.py").read_bytes()
        assert (root / "tests" / "test_fusion.py").exists()
        assert not list(root.rglob("__pycache__"))
    assert not root.exists()
    assert (mutation.ROOT / "cliptteacher" / "fusion.py").read_bytes() == original


def test_a_result_belongs_to_one_change() -> None:
    other = Mutant("fusion.py", "test", "state == 0.5", "state > 0.5", ("fusion",))
    assert fingerprint(CHANGE) == fingerprint(CHANGE) != fingerprint(other)


def test_the_report_counts_and_lists() -> None:
    survivor = Mutant("glm.py", "a|b", "x", "y", ("glm",), survives="equivalent")
    records = {
        CHANGE.title: {"first_failure": "tests/test_fusion.py::test_a[1]", "seconds": 2.0},
        survivor.title: {"first_failure": "", "seconds": 1.0},
    }
    report = describe([CHANGE, survivor], records)
    assert report.startswith("2 mutants, 1 killed, 1 survive; 3 seconds in all.")
    assert "| `fusion.py` | 1 | 1 |" in report and "| `glm.py` | 1 | 0 |" in report
    assert "| glm.py: a\\|b | equivalent |" in report
    assert "| fusion.py: test | `test_fusion.py::test_a` | 2.0 |" in report


@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One mutant that a test notices and one that changes nothing; then nothing is left to do."""
    select = "test_by_hand"
    good = Mutant("fusion.py", "a", "state == 0.5", "state != 0.5", ("fusion",), select)
    same = Mutant("fusion.py", "b", "state == 0.5", "state == (0.5)", ("fusion",), select)
    for pending in (2, 0):
        records = mutation.run_campaign([good, same], tmp_path, jobs=1, limit=200)
        assert f"2 mutants, {pending} to run" in capsys.readouterr().out
        assert (
            records[good.title]["first_failure"]
            == "tests/test_fusion.py::test_by_hand[the batch at once]"
        )
        assert records[same.title]["first_failure"] == ""
    assert (tmp_path / "mutation.json").exists()
