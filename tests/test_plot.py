"""The program that draws curves: what it reads, its arithmetic, and that the picture shows it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
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


def test_two_runs_make_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / name / "seed0", h) for name, h in (("a", 5.0), ("b", 9.0))]
    output = tmp_path / "new" / "curves.png"
    plot.main([*map(str, folders), "--output", str(output), "--smooth", "0.5", "--log"])
    assert capsys.readouterr().out == f"2 runs, 4 panels in {output}\n"
    assert Image.open(output).width > 600


def test_what_is_read(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "s", 5.0, skipped=0.0) for name in ("a", "b")]
    runs = plot.read_runs(folders)
    assert [run.name for run in runs] == ["a/s", "b/s"]
    assert plot.read_runs(folders[:1])[0].name == "s"
    # nothing that is zero or absent everywhere; nothing of the line that was cut
    assert plot.find_keys(runs) == ["total", "ce", "lr", "hIoU"]
    assert len(plot.points(runs[0], "total")) == 10
    assert plot.points(runs[0], "hIoU", "test") == [(100, 35.0)]


def test_panels_hold_the_curves_of_all_runs(tmp_path: Path) -> None:
    runs = plot.read_runs([write_run(tmp_path / name, h) for name, h in (("a", 5.0), ("b", 9.0))])
    total, rate, score = plot.draw(runs, ["total", "lr", "hIoU"], 0.5, True).axes[:3]
    assert (total.get_yscale(), rate.get_yscale(), score.get_yscale()) == ("log", *2 * ["linear"])
    names = [text.get_text() for text in total.figure.legends[0].get_texts()]
    assert names == ["a", "b"] and total.get_xlabel() == "iterations"
    curves = [line for line in total.lines if len(line.get_xdata())]
    assert [line.get_color() for line in curves] == ["C0", "C0", "C1", "C1"]
    assert [line.get_alpha() for line in curves] == [0.3, None] * 2  # as it is, then smoothed
    assert list(curves[0].get_ydata()) == [value for _, value in plot.points(runs[0], "total")]
    assert list(curves[1].get_ydata()) != list(curves[0].get_ydata())
    assert [len(line.get_xdata()) for line in rate.lines] == [10, 10]
    assert score.get_title() == "hIoU: dots val, diamonds test"
    found = [(line.get_color(), line.get_marker(), *line.get_ydata()) for line in score.lines]
    assert found == [("C0", "o", 25), ("C0", "D", 35), ("C1", "o", 29), ("C1", "D", 39)]


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    flat = [(step, 3.0) for step in range(9)]
    assert [value for _, value in plot.smoothed(flat, 0.9)] == pytest.approx([3.0] * 9)
    assert plot.exponential_mean([1.0, 4.0], 0.5) == [1.0, pytest.approx(3.0)]
    line = [(step, float(step)) for step in range(101)]
    assert plot.smoothed(line, 0.8)[50] == pytest.approx((50, 50.0), abs=1e-3)


def test_errors_name_the_run_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib, .*pip install 'cliptteacher\[plot\]'"):
        plot.main([run])
