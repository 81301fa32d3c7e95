"""One rule for every value of an option, wherever it comes from."""

from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch

from cliptteacher.options import check_fields, check_value

Choice = Literal["all", "none"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (np.int64(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (True, bool, True),
        ("x", str, "x"),
        ("all", Choice, "all"),
        (None, Optional[int], None),  # noqa: UP045
        (None, Choice | None, None),
        (4, int | None, 4),
        ([1, 2], tuple[int, int], (1, 2)),
        ((), tuple[int, ...], ()),
        (range(3), tuple[int, ...], (0, 1, 2)),
        (np.array([1, 2]), tuple[float, ...], (1.0, 2.0)),
        (torch.tensor([2, 0]), tuple[int, ...], (2, 0)),
    ],
)
def test_values_in_the_type_of_their_option(value: Any, hint: Any, expected: Any) -> None:
    found = check_value("x", value, hint)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("al", Choice, "`x` must be one of all, none, got 'al'"),
        (["all"], Choice, r"`x` must be one of all, none, got \['all'\]"),
        (None, int, "`x` must be int, got None"),
        (True, int, "`x` must be int, got True"),
        (True, float, "`x` must be float, got True"),
        (1, bool, "`x` must be bool, got 1"),
        (1.0, int, r"`x` must be int, got 1\.0"),
        ("1", float, "`x` must be float, got '1'"),
        (float("nan"), float, "`x` must be a finite number, got nan"),
        (-float("inf"), float, "`x` must be a finite number, got -inf"),
        (1e39, float, r"`x` must be a finite number, got 1e\+39"),
        (10**400, float, r"`x` must be a finite number, got 1000.*0\.\.\.$"),
        (2**63, int, "`x` must be a finite number"),
        ("12", tuple[int, ...], "`x` must be a list of int, got '12'"),
        (3, tuple[int, ...], "`x` must be a list of int, got 3"),
        ([1], tuple[int, int], r"`x` must be a list of 2 int, got \[1\]"),
        ([1, "b"], tuple[int, int], "`x` must be int, got 'b'"),
    ],
)
def test_other_values_are_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_value("x", value, hint)


def test_fields_of_a_frozen_dataclass() -> None:
    @dataclass(frozen=True)
    class Options:
        sides: tuple[int, ...] = (1,)
        rate: float = 0.5

        def __post_init__(self) -> None:
            check_fields(self)

    options = Options(sides=[3, 4], rate=1)  # type: ignore[arg-type]
    assert options.sides == (3, 4) and isinstance(options.rate, float)
    with pytest.raises(ValueError, match="`rate` must be float, got 'fast'"):
        Options(rate="fast")  # type: ignore[arg-type]
