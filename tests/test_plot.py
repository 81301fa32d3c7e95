"""The program that draws curves: what it reads, its arithmetic, and that the picture shows it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
curves = importlib.import_module("curves")
plot = importlib.import_module("plot")


def write_run(folder: Path, height: float, **more: Any) -> Path:
    """Losses that fall from height to height / 10, an evaluation on the way and one at the end."""
    rows: list[dict[str, Any]] = [
        {"step": step, "ce": height, "total": height * (1 - step / 112), "lr": 1e-3, **more}
        for step in range(10, 101, 10)
    ]
    rows.insert(5, {"step": 50, "split": "val", "hIoU": 20.0 + height, "mIoU(U)": None})
    rows.append({"step": 100, "split": "test", "hIoU": 30.0 + height, "IoU": {"sky": 1.0}})
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 110, "tot')  # cut by a crash
    return folder


def has_colour(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(picture) == np.array(colour)).all(axis=2).any())


def test_two_runs_make_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "seed0", h) for name, h in (("a", 5.0), ("b", 9.0))]
    output = tmp_path / "new" / "curves.png"
    plot.main([*map(str, folders), "--output", str(output), "--smooth", "0.5", "--log"])
    assert capsys.readouterr().out == f"2 runs, 4 panels in {output}\n"
    picture = Image.open(output)
    assert picture.mode == "RGB" and picture.width == 2 * (2 * 330 + 32)
    assert has_colour(picture, curves.COLOURS[0]) and has_colour(picture, curves.COLOURS[1])
    assert not has_colour(picture, curves.COLOURS[2])


def test_what_is_read(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "s", 5.0, skipped=0.0) for name in ("a", "b")]
    runs = plot.read_runs(folders)
    assert [run.name for run in runs] == ["a/s", "b/s"]
    assert plot.read_runs(folders[:1])[0].name == "s"
    # nothing that is zero or absent everywhere; nothing of the line that was cut
    assert plot.find_keys(runs) == ["total", "ce", "lr", "hIoU"]
    assert len(plot.points(runs[0], "total")) == 10
    panel = plot.make_panel("hIoU", runs, 0.5, False)
    assert panel.title == "hIoU in percent: dots val, diamonds test"
    assert [(c.points, c.colour, c.style) for c in panel.curves][:2] == [
        ([(50, 25.0)], 0, "dots"),
        ([(100, 35.0)], 0, "diamonds"),
    ]
    pale, line = plot.make_panel("total", runs[:1], 0.5, True).curves
    assert (pale.style, line.style) == ("pale", "line") and len(pale.points) == len(line.points)


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    flat = [(step, 3.0) for step in range(9)]
    assert [value for _, value in plot.smoothed(flat, 0.9)] == pytest.approx([3.0] * 9)
    assert plot.exponential_mean([1.0, 4.0], 0.5) == [1.0, pytest.approx(3.0)]
    line = [(step, float(step)) for step in range(101)]
    assert plot.smoothed(line, 0.8)[50] == pytest.approx((50, 50.0), abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1800, False, [0, 500, 1000, 1500]),
        (0.0, 0.002, False, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (61.2, 63.9, False, [62, 63]),
        (3, 40, True, [5, 10, 20]),
        (0.9e-5, 2, True, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1]),
    ],
)
def test_ticks(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert curves.ticks(curves.Scale(low, high, 0, 1, log)) == pytest.approx(expected)


def test_scales() -> None:
    assert [curves.Scale(0, 4, 10, 50)(v) for v in (0, 1, 4)] == [10, 20, 50]
    assert curves.Scale(1, 100, 0, 8, True)(10) == pytest.approx(4)
    assert curves.fit([2.0, 4.0], 0, 1, 0.5)[:2] == (1.0, 5.0)
    assert curves.fit([5.0], 0, 1, 0.06)[:2] == (4.5, 5.5)  # one value stands in the middle
    assert curves.fit([], 0, 1, 0.06).low < curves.fit([], 0, 1, 0.06).high
    labels = {0.002: "0.002", 1e-5: "1e-5", 1500: "1500", 20_000: "20k", 0: "0"}
    assert [curves.show(value) for value in labels] == list(labels.values())


def test_a_curve_lies_where_its_values_are() -> None:
    """A straight line from (0, 0) to (100, 1): blue on the diagonal, none in the other corners."""
    panel = curves.Panel("line", [curves.Curve([(0, 0.0), (100, 1.0)], 0, "line")])
    picture = np.asarray(curves.draw_figure([panel], ["run"]), dtype=int)
    blue = np.abs(picture - np.array(curves.COLOURS[0])).sum(axis=2) < 40
    area = blue[2 * (16 + 18 + curves.TOP) : 2 * (16 + 18 + 230 - curves.BOTTOM)]
    rows, columns = np.nonzero(area)
    assert np.corrcoef(rows, columns)[0, 1] < -0.999
    assert columns.min() == pytest.approx(2 * (16 + curves.LEFT), abs=4)
    assert columns.max() == pytest.approx(2 * (16 + 330 - curves.RIGHT), abs=4)


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "run", 5.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty holds no metrics\.jsonl; give a run of train"):
        plot.main([str(tmp_path / "empty")])
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match=r"metrics\.jsonl has no line yet"):
        plot.main([str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="no run has 'loss'; choose among total, ce, lr, hIoU"):
        plot.main([run, "--keys", "loss"])
    with pytest.raises(SystemExit):
        plot.main([run, "--smooth", "1"])
    assert "--smooth must lie in [0, 1), got 1" in capsys.readouterr().err
