"""Generated bad input of every kind, a few cases each; `run.py` tries as many as you like."""

from pathlib import Path

import pytest
from calls import CALLS
from judge import Case, Violation, judge
from reading import READING
from run import try_kind
from weights import WEIGHTS

SHORT = 40


@pytest.mark.parametrize("kind", [*READING, *WEIGHTS, *CALLS], ids=lambda kind: kind.__name__)
def test_no_case_is_unclear_or_silently_wrong(kind: object, tmp_path: Path) -> None:
    counts = try_kind(kind, SHORT, tmp_path)  # type: ignore[arg-type]
    assert counts["violations"] == 0 and sum(counts.values()) >= SHORT / 2


def test_the_judge_knows_a_sentence_from_an_accident() -> None:
    def accident() -> None:
        [][1]

    def passed_on() -> None:
        int("x")

    def silent() -> None:
        raise SystemExit(2)

    def wrong() -> None:
        raise AssertionError("no")

    for act in (accident, passed_on, silent):
        with pytest.raises(Violation):
            judge(Case(act))
    with pytest.raises(Violation, match="taken though it is wrong"):
        judge(Case(lambda: None, must="fail"))
    with pytest.raises(Violation, match="wrong result"):
        judge(Case(wrong, must="pass"))
