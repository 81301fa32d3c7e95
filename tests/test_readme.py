"""The README is true: its commands parse, its names exist, its links lead somewhere."""

import re
import shlex
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cliptteacher as ct
from cliptteacher.data import FolderDataset, check_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def shell_commands() -> list[str]:
    text = "\n".join(body for language, body in BLOCKS if language == "bash")
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def program_calls() -> list[list[str]]:
    calls = [shlex.split(line) for line in shell_commands()]
    return [call for call in calls if any(word.startswith("examples/") for word in call)]


def flags_of(program: str) -> set[str]:
    """Read the flags from the help of a program, in this process: a start costs seconds."""
    with redirect_stdout(StringIO()) as text, pytest.raises(SystemExit) as ended:
        import_module(Path(program).stem).main(["--help"])
    assert not ended.value.code
    return set(re.findall(r"--[a-z][a-z0-9-]*", text.getvalue()))


def test_every_program_call_uses_flags_that_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    calls = program_calls()
    assert len(calls) >= 6
    known: dict[str, set[str]] = {}
    for call in calls:
        start = next(i for i, word in enumerate(call) if word.startswith("examples/"))
        program = call[start]
        known.setdefault(program, flags_of(program))
        given = {word for word in call[start:] if word.startswith("--")}
        assert given <= known[program], f"{program}: {given - known[program]}"


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_equation_map_names_real_functions():
    table = README.split("## From equation to function")[1].split("## File tree")[0]
    names = [name for row in table.splitlines()[4:] for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) > 15
    for name in names:
        module, *path = name.split(".")
        found = import_module(f"cliptteacher.{module}")
        for part in path:
            found = getattr(found, part)


def test_file_tree_is_complete():
    tree = README.split("## File tree")[1].split("```")[1]
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    files = {p.name for p in (ROOT / "cliptteacher").glob("*.py")} - {"__init__.py"}
    rooms = {f"{p.parent.name}/" for p in (ROOT / "cliptteacher").glob("*/__init__.py")}
    programs = {p.name for p in (ROOT / "examples").glob("*.py")}
    assert listed == files | rooms | programs


def test_python_example_runs():
    code = next(body for language, body in BLOCKS if language == "python")
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    labels = torch.randint(3, (2, 64, 64), dtype=torch.uint8)
    labels[:, :, 32:] = 255
    scope = {"images": images, "labels": labels, "image": images[0]}
    exec(code, scope)
    assert scope["label_map"].shape == (64, 64)
    assert torch.isfinite(scope["losses"]["total"])


def test_own_data_example_makes_a_good_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, code = (body for language, body in BLOCKS if language == "python")
    drawn = np.zeros((8, 12, 3), np.uint8)
    drawn[:, :3], drawn[:, 3:6], drawn[:, 6:9] = (0, 0, 255), (0, 255, 0), (160, 80, 0)
    for folder in ("images", "drawn"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in ("a", "b", "c"):
            suffix = "jpg" if folder == "images" else "png"
            Image.fromarray(drawn).save(tmp_path / "photos" / folder / f"{name}.{suffix}")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    report = check_folder(tmp_path / "photos")
    assert (report.problems, report.notes) == ([], [])
    assert report.counts == {"train": 2, "val": 1}
    _, label = FolderDataset(tmp_path / "photos", "val")[0]
    assert label[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [255] * 3


@pytest.mark.parametrize("key", ["pAcc", "mIoU(S)", "mIoU(U)", "hIoU"])
def test_promised_scores_stand_in_the_recorded_results(key: str):
    assert key in README.split("## Results")[1]
    assert key in (ROOT / "benchmarks" / "first_command.md").read_text()


def test_no_unfilled_figure():
    assert not re.findall(r"@[A-Z_]+@", README)


def test_public_names_resolve():
    for name in ct.__all__:
        assert getattr(ct, name) is not None
