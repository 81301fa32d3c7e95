"""The pages are true: links lead somewhere, and commands name programs and flags that exist."""

import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "benchmarks/*.md", "cliptteacher/**/*.md", "examples/*.md")
    for page in ROOT.glob(pattern)
)
PROGRAM = re.compile(r"(examples|benchmarks|tests)/\w+\.py")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TRAIN = "examples/train.py"
HELP = {"benchmarks/oracle_groups.py": ["image", "--help"]}  # of other programs: --help alone
PASSES_ON = {"benchmarks/ablate.py": TRAIN}  # what stands after `--`

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command in a fenced block of shell code, from our program on."""
    for language, body in FENCE.findall(text):
        if language not in ("", "bash", "sh"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if PROGRAM.search(line) else []
            starts = [i for i, word in enumerate(words) if PROGRAM.fullmatch(word)]
            for start, end in itertools.pairwise([*starts, len(words)]):
                yield words[start:end]


@functools.cache
def flags_of(program: str) -> frozenset[str]:
    """Read the flags from the usage of a program, in this process: a start costs seconds."""
    path = ROOT / program
    with (
        mock.patch.object(sys, "argv", [program, *HELP.get(program, ["--help"])]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch("signal.signal"),
        contextlib.redirect_stdout(io.StringIO()) as text,
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code, program
    usage = text.getvalue().split("\n\n")[0]  # examples follow, which may name other flags
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", usage))


def unknown_flags(command: list[str]) -> set[str]:
    program, *words = command
    own = words.index("--") if "--" in words else len(words)
    unknown = flags_in(words[:own]) - flags_of(program)
    if own < len(words):
        unknown |= flags_in(words[own + 1 :]) - flags_of(PASSES_ON[program])
    return unknown


def flags_in(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("../../actions/"):  # of the repository's own site
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            missing.append(link)
    assert missing == []


@every_page
def test_commands_name_programs_and_flags_that_exist(page: Path) -> None:
    for command in commands_of(page.read_text()):
        assert (ROOT / command[0]).exists(), command[0]
        assert unknown_flags(command) == set(), " ".join(command)


def test_pages_have_commands_and_all_programs_are_found() -> None:
    commands = [command for page in PAGES for command in commands_of(page.read_text())]
    programs = {command[0] for command in commands}
    assert len(commands) > 30
    assert {TRAIN, "examples/evaluate.py", "examples/predict.py"} <= programs


def test_a_wrong_flag_a_wrong_program_and_several_lines_are_seen() -> None:
    text = """
```bash
OMP_NUM_THREADS=1 python examples/train.py --seed 0 \\
    --segmenter-weight imagenet   # --a-comment
torchrun --standalone --nproc_per_node=2 examples/train.py --no-photometric --gamma=1
python examples/nothing.py --x
pip install --upgrade torch
```
```python
text = "python examples/other.py --y"
```
"""
    first, second, third = commands_of(text)
    assert unknown_flags(first) == {"--segmenter-weight"}
    assert second[1:] == ["--no-photometric", "--gamma=1"] and unknown_flags(second) == set()
    assert third == ["examples/nothing.py", "--x"]


@every_page
def test_published_commands_fix_their_length(page: Path) -> None:
    """Iterations, not minutes: with minutes the machine decides what comes out."""
    commands = [command for command in commands_of(page.read_text()) if "--minutes" in command]
    assert commands == []
