"""Pages in one file: well formed, nothing from elsewhere, words escaped, figures in their place."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import small_runs
import torch
from PIL import Image

from cliptteacher.pages import gallery, line_chart, page, picture, table, text
from cliptteacher.palette import word_palette
from cliptteacher.report import Example, largest_confusions, report_run

VOID = {"meta", "img", "br", "input", "link"}


class Checker(HTMLParser):
    """Every element is closed, and every address is inside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def check(content: str) -> None:
    checker = Checker()
    checker.feed(content)
    assert checker.open == []
    assert all(address.startswith("data:") for address in checker.addresses)
    assert not re.findall(r"https?://(?!www\.w3\.org)", content)


def test_a_page_escapes_words() -> None:
    content = page("<cat> & dog", table(["a<b"], [[text('"x" <y>')]]))
    check(content)
    assert "&lt;cat&gt; &amp; dog" in content and "a&lt;b" in content and "&lt;y&gt;" in content


def test_a_picture_is_inside_the_page_and_fits() -> None:
    tag = picture(Image.new("RGB", (4000, 200)), "wide <picture>", side=100)
    check(tag)
    assert 'width="100" height="5"' in tag and "wide &lt;picture&gt;" in tag


def test_a_chart_is_svg_from_zero_to_the_largest_value() -> None:
    points = [(0, 1.0), (5, float("nan")), (10, 4.0)]
    chart = line_chart({"a": points, "b": [(0, 2.0)]}, "scores")
    root = ElementTree.fromstring(chart)
    space = "{http://www.w3.org/2000/svg}"
    (line,) = root.findall(f"{space}polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(places) == 2 and places[0][0] == 46 and places[1] == (320, 24)
    assert places[0][1] == pytest.approx(24 + 0.75 * 154)
    words = [element.text for element in root.findall(f"{space}text")]
    assert {"scores", "4", "0", "10", "a", "b"} <= set(words)
    assert line_chart({"a": []}, "nothing") == ""


def test_a_gallery_holds_maps_and_a_button_per_class() -> None:
    names = ["sky", "grass", "<cow>"]
    labels = Image.fromarray(np.array([[0, 2], [255, 2]], dtype=np.uint8))
    content = gallery("two", [("a & b", Image.new("RGB", (2, 2)), labels)], names,
                      word_palette(names))  # fmt: skip
    check(content)
    assert re.findall(r'data-class="(\d+)"', content) == ["0", "2"]
    assert "&lt;cow&gt;" in content and "a &amp; b" in content and "COLOURS" not in content
    assert json.dumps(word_palette(names).tolist()) in content


def test_confusions_are_counted_and_the_worst_image_shown() -> None:
    zeros = torch.zeros(2, 4, dtype=torch.int64)
    half = torch.tensor([[0, 0, 1, 1]] * 2)
    examples = [
        Example(zeros, zeros + 1, zeros + 1),  # right
        Example(zeros, zeros, half),  # half of class 0 is taken for 1
        Example(zeros, half, half.where(half == 1, 2)),  # class 0 is taken for 2
    ]
    first, second = largest_confusions(examples, 3)
    assert first == (0, 1, 4, pytest.approx(4 / 12), 1)
    assert second == (0, 2, 4, pytest.approx(4 / 12), 2)
    assert largest_confusions(examples[:1], 3) == []


def test_every_run_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = small_runs.make_space(tmp_path)
    train = small_runs.program(monkeypatch)
    train.main(small_runs.options(space, tmp_path / "run", "--eval-interval", "2"))
    content = (tmp_path / "run" / "report.html").read_text()
    check(content)
    assert len(content) < 3_000_000
    final = small_runs.rows(tmp_path / "run")[-1]
    for name in ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU"):
        assert f"{name}<b>{final[name]:.1f}</b>" in content
    assert content.count("<svg") >= 7 and content.count("taken for") >= 1
    assert content.count('<tr class="unseen">') == 1 and content.count('<tr class="seen">') == 3
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert text(environment["command"]) in content and "configuration" in content


def test_a_report_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="has no report.html: .*; the run is complete"):
        report_run(tmp_path, None, None, None)  # type: ignore[arg-type]
