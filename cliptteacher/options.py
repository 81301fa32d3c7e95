"""Check the values of options: one rule for code, JSON files and the command line.

    check_value("gamma", 1, float)                       1.0
    check_value("ce", "al", Literal["all", "none"])      ValueError: `ce` must be one of all, none

The fields of every configuration go through it, wherever their values come from.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

_LARGEST = {float: 3.4e38, int: 2**63 - 1}  # float32 and int64 hold no more


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value in the type of its option.

    Args:
        name: of the option, for the sentence.
        value: anything; a whole number serves as a real one, a list as a tuple.
        hint: bool, int, float, str, a Literal, a tuple of one of these, or one of all that or None.

    Raises:
        ValueError: the value has another type, is no choice, or no number that float32 or int64
            can hold.
    """
    kind = without_none(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(value, str) and value in choices:
            return value
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {_shown(value)}")
    if get_origin(kind) is tuple:
        args = get_args(kind)
        count = None if args[-1] is Ellipsis else len(args)
        value = value.tolist() if hasattr(value, "tolist") else value  # of an array or a tensor
        if isinstance(value, (list, tuple, range)) and count in (None, len(value)):
            return tuple(check_value(name, item, args[0]) for item in value)
        items = args[0].__name__ if count is None else f"{count} {args[0].__name__}"
        raise ValueError(f"`{name}` must be a list of {items}, got {_shown(value)}")
    allowed = {int: Integral, float: Real}.get(kind, kind)  # those of numpy, too
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"`{name}` must be {kind.__name__}, got {_shown(value)}")
    if kind in _LARGEST and not abs(value) <= _LARGEST[kind]:  # NaN compares as false
        raise ValueError(f"`{name}` must be a finite number, got {_shown(value)}")
    return kind(value)


def check_fields(config: Any) -> None:
    """Check every field of a frozen dataclass by its annotation; lists become tuples.

    Raises:
        ValueError: see `check_value`.
    """
    for name, hint in field_types(type(config)).items():
        object.__setattr__(config, name, check_value(name, getattr(config, name), hint))


def field_types(cls: Any) -> dict[str, Any]:
    """Map the fields of a dataclass to their types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def holds(condition: Tensor, need: str) -> bool:
    """Whether a condition on the numbers of a tensor holds.

    On CUDA nobody waits for the answer, which is true: the device itself stops if it is not.

    Args:
        condition: scalar, bool.
        need: what must hold; the device prints it.
    """
    try:  # Apple's devices have no such check
        torch._assert_async(condition.cpu() if condition.device.type == "mps" else condition, need)
    except RuntimeError:
        return False
    return True


def without_none(hint: Any) -> Any:
    """Return the type of a value that may be None."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
