"""What the programs share: numbers with a range, and errors as one sentence.

add("--gamma", type=number(float))                   a finite number
add("--images", type=number(int, 1), default=6)      at least 1
with one_sentence_errors("predict.py"):              no traceback for a refused input
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from . import IGNORE_INDEX
from .files import read_text

MAX_WORDS = IGNORE_INDEX  # an index map has one byte a pixel, and 255 means "ignore"

Number = TypeVar("Number", int, float)


def number(
    kind: type[Number], low: float = -math.inf, high: float = math.inf
) -> Callable[[str], Number]:
    """Return an argparse type: a finite number in [low, high]; anything else names that range.

    >>> number(int, 1)("6")
    6
    """
    noun = "a whole number" if kind is int else "a number"
    ends = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
    range_ = " ".join((noun, " and ".join(ends))).rstrip()

    def parse(text: str) -> Number:
        with suppress(ValueError, OverflowError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {range_}, got {text!r}")

    return parse


def add_clip_flags(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add ``--clip`` and what its files may not say, with the names of `train.py`.

    Args:
        parser: of the program.
        purpose: what the CLIP is for.
    """
    add = parser.add_argument
    add("--clip", help=f"name or path of the CLIP, {purpose}")
    silent = "where neither its files nor the checkpoint say it"
    add("--clip-activation", choices=("quick_gelu", "gelu"), help=silent)
    add("--clip-heads", type=number(int, 1), nargs="+", metavar="N", help=f"{silent}: vision, text")


def clip_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `load_clip` that `add_clip_flags` has parsed, without the source."""
    return {"activation": args.clip_activation, "heads": tuple(args.clip_heads or ()) or None}


@contextmanager
def one_sentence_errors(program: str) -> Iterator[None]:
    """End a program with one sentence and exit code 1 where its input is refused.

    Characters that the terminal cannot encode are replaced instead of ending the program.

    Args:
        program: its name, which the sentence begins with.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"{program}: error: {error}") from None
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        free = shutil.disk_usage("/dev/shm").free / 2**20
        raise SystemExit(
            f"{program}: error: the processes that read data share /dev/shm, of which {free:.0f} "
            "MiB are free; make it larger (docker run --shm-size=8g), or use --workers 0"
        ) from None


def read_words(text: str) -> tuple[str, ...]:
    """Read words between commas, or the lines of a text file.

    Args:
        text: ``cat, tall grass, sky``; a word that holds a comma stands in double quotes. Or the
            name of a ``.txt`` file with one word a line.

    Raises:
        ValueError: there is no word, one occurs twice, or there are more than 255, which is what
            index maps of one byte a pixel can hold.
    """
    if text.lower().endswith(".txt"):
        found = read_text(text).splitlines()
    else:
        try:
            found = next(csv.reader([text], skipinitialspace=True), [])
        except csv.Error:
            raise ValueError(f"the words must stand in one line, got {text!r:.80}") from None
    words = tuple(" ".join(word.split()) for word in found if word.strip())
    repeated = sorted({word for word in words if words.count(word) > 1})
    if not 1 <= len(words) <= MAX_WORDS or repeated:
        got = f"{', '.join(repeated)} twice" if repeated else str(len(words))
        raise ValueError(f"the words must be 1 to {MAX_WORDS} different words, got {got}")
    return words
