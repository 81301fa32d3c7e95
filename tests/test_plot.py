"""The program that plots curves: what it reads, its arithmetic, and that the picture shows it."""

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
    colours = Image.open(output).convert("RGB").getcolors(1 << 20)
    found = {colour for _, colour in colours}
    assert {(31, 119, 180), (255, 127, 14)} <= found and (44, 160, 44) not in found


def test_figures_that_are_zero_or_absent_everywhere_are_left_out(tmp_path: Path) -> None:
    run = plot.read_run(write_run(tmp_path / "run", 5.0, skipped=0.0))
    assert list(run) == ["ce", "total", "lr", "hIoU"]
    assert [step for step, _ in run["total"][None]] == list(range(10, 101, 10))
    assert run["hIoU"] == {"val": [(50, 25.0)], "test": [(100, 35.0)]}


def test_every_curve_lies_where_its_values_are(tmp_path: Path) -> None:
    runs = {name: plot.read_run(write_run(tmp_path / name, 5.0)) for name in ("a", "b")}
    figure = plot.draw(runs, ["total", "hIoU"], 0.5, True)
    total, scores = figure.axes
    assert (total.get_yscale(), scores.get_yscale()) == ("log", "linear")
    assert scores.get_title() == "hIoU in percent"
    pale, line = total.get_lines()[:2]
    assert pale.get_ydata() == pytest.approx([5 * (1 - step / 112) for step in range(10, 101, 10)])
    assert line.get_ydata() == pytest.approx(plot.smoothed(pale.get_ydata(), 0.5))
    dots, diamonds = scores.get_lines()[:2]
    assert (dots.get_marker(), diamonds.get_marker()) == ("o", "D")
    assert list(diamonds.get_xydata()[0]) == [100, 35]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    assert plot.smoothed([3.0] * 9, 0.9) == pytest.approx([3.0] * 9)
    assert plot.exponential_mean([1.0, 4.0], 0.5) == [1.0, pytest.approx(3.0)]
    assert plot.smoothed(list(range(101)), 0.8)[50] == pytest.approx(50, abs=1e-3)


def test_errors_are_one_sentence(
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
    assert "must be a number at least 0 and at most 0.999, got '1'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"matplotlib; run `pip install 'cliptteacher\[plot\]'`"):
        plot.main([run, "--output", str(tmp_path / "no.png")])
    assert not (tmp_path / "no.png").exists()
