"""CI on GitHub runs what `.ci` holds, and the package declares every file that it needs."""

import os
import re
from pathlib import Path

import cliptteacher

ROOT = Path(__file__).resolve().parents[1]


def test_the_workflow_runs_programs_that_exist() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    programs = re.findall(r"- run: (\S+)$", workflow, re.MULTILINE)
    assert programs == [".ci/run", ".ci/package"]
    assert all(os.access(ROOT / program, os.X_OK) for program in programs)
    assert "actions/workflows/ci.yml/badge.svg" in (ROOT / "README.md").read_text()


def test_every_file_of_the_package_is_declared() -> None:
    """Without the repository there is nothing but what pyproject.toml puts into the wheel."""
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = Path(cliptteacher.__file__).parent
    declared = {
        path
        for name, patterns in tool["package-data"].items()
        for pattern in patterns
        for path in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    other = {
        p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".md")
    }
    assert other == declared


def test_the_smoke_run_is_a_program() -> None:
    compile((ROOT / ".ci" / "smoke.py").read_text(), "smoke.py", "exec")
