"""The reference is complete, and every link of it leads somewhere."""

import importlib
import re
from pathlib import Path

import pytest
from test_pages_html import check

import cliptteacher

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("api_page")
    program.main(["--output", str(tmp_path / "api.html")])
    content = (tmp_path / "api.html").read_text()
    check(re.sub(r'href="#[^"]*"', "", content))
    places = re.findall(r' id="([^"]+)"', content)
    links = set(re.findall(r'href="#([^"]+)"', content))
    assert len(places) == len(set(places)) > 300
    assert links <= set(places) and len(links) > 100
    for name, home in cliptteacher._HOME.items():
        value = getattr(importlib.import_module(f"cliptteacher.{home}"), name)
        assert f"{value.__module__}.{name}" in links
    assert "Eq. (9)" in content and "Raises:" in content
