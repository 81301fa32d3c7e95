"""What may come of bad input: the right result, or one sentence that somebody wrote on purpose.

A kind makes cases; the judge runs one and says "right" or "refused", or raises `Violation`. An
error is a deliberate sentence if a `raise` statement of this project raised it, which is looked
up in the source: a message from the depths of torch, Pillow or Python that merely passes through
does not count.
"""

from __future__ import annotations

import ast
import io
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from hypothesis import note
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the other files here build on helpers of the tests
SECONDS = 20  # a case that takes longer has found something without a bound
CLEAR = (ValueError, TypeError, OSError, RuntimeError, SystemExit)
T = TypeVar("T")


class Case(NamedTuple):
    """One input, ready to be tried."""

    act: Callable[[], object]  # asserts that what comes of it is right
    mention: str = ""  # what a sentence must name: the file
    must: Literal["pass", "fail", "either"] = "either"


class Hidden(NamedTuple):
    """A number that hypothesis shows by a short word."""

    number: int

    def __repr__(self) -> str:
        return "choice"


class Draw:
    """Draw values from hypothesis, with short words for the usual ones."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def __call__(self, strategy: st.SearchStrategy[T]) -> T:
        return self.data.draw(strategy)

    def one(self, *choices: T) -> T:
        choice = choices[self.data.draw(st.integers(0, len(choices) - 1).map(Hidden)).number]
        note(f"Draw: {choice!r}"[:100])
        return choice

    def whole(self, low: int, high: int) -> int:
        return self(st.integers(low, high))

    def junk(self) -> Any:
        """A value that is hardly ever meant: of any type, of any size."""
        numbers = (0, 1, -1, 3, 255, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e300)
        others = (float("nan"), float("inf"), None, True, "", " ", "x", "\0", "0", "é", b"x")
        return self.one(*numbers, *others, [], [1], ["a", "a"], [None], {}, {"a": 1}, (), [[]])


Kind = Callable[[Draw, Path], Case]


class Violation(AssertionError):
    """A traceback, a silent wrong result, or valid input that is refused."""


def judge(case: Case) -> str:
    """Run a case; returns "right" or "refused"."""
    printed, began = io.StringIO(), time.monotonic()
    try:
        with warnings.catch_warnings(), redirect_stderr(printed), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            case.act()
    except AssertionError as error:
        raise Violation(f"wrong result: {error}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = what_is_unclear(error, case.mention, printed.getvalue())
        if problem:
            raise Violation(f"{problem}: {type(error).__name__}: {error}") from error
        if case.must == "pass":
            raise Violation(f"refused though it is right: {error}") from error
        found = "refused"
    else:
        if case.must == "fail":
            raise Violation("taken though it is wrong")
        found = "right"
    if time.monotonic() - began > SECONDS:
        raise Violation(f"took {time.monotonic() - began:.0f} seconds")
    return found


def what_is_unclear(error: BaseException, mention: str, printed: str) -> str:
    """Say why an error is no deliberate sentence about its case; "" if it is one."""
    message = str(error)
    if isinstance(error, SystemExit) and error.code == 2:  # argparse has printed the sentence
        return "" if "error: " in printed else "ended without a sentence"
    if not isinstance(error, CLEAR):
        return "an error of no expected type"
    if not is_raised_here(error.__traceback__):
        return "an error from the depths"
    if len(message) < 20 or "\n" in message.strip():
        return "no sentence"
    if mention and mention not in message:
        return f"{mention} is not named"
    return ""


def is_raised_here(traceback: TracebackType | None) -> bool:
    """Whether a `raise` statement of the package or of a program is where the error began."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = Path(traceback.tb_frame.f_code.co_filename)
    ours = any(file.is_relative_to(ROOT / room) for room in ("cliptteacher", "examples"))
    return ours and traceback.tb_lineno in raising_lines(file)


@cache
def raising_lines(file: Path) -> frozenset[int]:
    """The lines of a source file that belong to a raise statement."""
    raises = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
    return frozenset(n for r in raises for n in range(r.lineno, (r.end_lineno or r.lineno) + 1))


def damaged(draw: Draw, content: bytes, start: int = 0) -> bytes:
    """Cut bytes off, flip some, remove some, or repeat some, from a place on."""
    raw, end = bytearray(content), len(content) - 1
    for _ in range(draw.whole(1, 3)):
        at = draw.whole(min(start, end), end)
        match draw.one("flip", "flip", "cut", "remove", "repeat"):
            case "flip":
                raw[at % len(raw)] ^= 1 << draw.whole(0, 7)
            case "cut":
                del raw[max(1, at) :]
            case "remove" if len(raw) > 9:
                del raw[at : at + draw.whole(1, 8)]
            case _:
                raw[at:at] = raw[at : at + draw.whole(1, 8)]
    return bytes(raw)
