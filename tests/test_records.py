"""The run directory and what a run says about itself: progress, metrics, environment, events."""

import importlib.util
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptteacher.distributed import Process
from cliptteacher.training import progress as progress_module
from cliptteacher.training import records as records_module
from cliptteacher.training.progress import Progress, format_time, peak_memory, progress_line
from cliptteacher.training.records import (
    MetricsLog,
    check_tensorboard,
    default_output,
    describe_environment,
    record_start,
)

CPU = torch.device("cpu")
ALONE = Process(0, 0, 1, CPU)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- metrics ----------------------------------------------------------------------------------


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "total": float("nan"), "ce": float("inf"), "lr": 0.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "total": null, "ce": null, "lr": 0.5}\n'


def test_metrics_are_on_disk_as_they_happen(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 10, "total": 1.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 10, "total": 1.5}]
    log.close()


def test_a_resumed_run_tells_no_iteration_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "total": s / 10}) for s in (10, 20, 20, 30)]
    path.write_text("\n".join([*lines, '{"step": 40, "tot']))  # the last one was cut by a crash
    log = MetricsLog(path, step=20)
    log.write({"step": 30, "total": 9.0})
    log.close()
    assert [(r["step"], r["total"]) for r in rows(path)] == [
        *((10, 1.0), (20, 2.0), (20, 2.0), (30, 9.0))
    ]


def test_a_run_from_the_start_starts_the_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"step"', '{"other": 1}', '{"step": null}', ""])
def test_a_foreign_line_is_dropped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 10}}\n{line}\n')
    MetricsLog(path, step=50).close()
    assert rows(path) == [{"step": 10}]


# --- the progress line --------------------------------------------------------------------------


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: self.now)


class SlowLoader:
    """Three batches, the k-th of which takes k seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __iter__(self) -> Any:
        for k in (1, 2, 3):
            self.clock.now += k
            yield k


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def losses(total: float) -> dict[str, Tensor]:
    return {"ce": torch.tensor(total / 2), "total": torch.tensor(total)}


def test_a_line_by_hand(clock: Clock, tmp_path: Path) -> None:
    """Three steps of 1 + 4, 2 + 4, 3 + 4 seconds; 5 and 70 seconds of pauses count nowhere."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    progress = Progress(103, 100, 8, CPU, log)
    lines = []
    for done, batch in enumerate(progress.time_batches(SlowLoader(clock)), 101):
        clock.now += 4
        progress.add(losses(float(batch)))
        if done == 101:
            with progress.paused():
                clock.now += 5
        if done in (102, 103):
            lines.append(progress.report(done, 1e-3 / done))
        if done == 102:
            with progress.paused():
                clock.now += 70
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["step"], first["ce"], first["total"]) == (102, 0.75, 1.5)
    assert first["images_per_second"] == pytest.approx(16 / 11)
    assert first["data_wait"] == pytest.approx(3 / 11)
    assert first["seconds_left"] == pytest.approx(5.5)  # one more iteration of 11 / 2 seconds
    assert (second["step"], second["total"], second["seconds_left"]) == (103, 3.0, 0.0)
    assert second["images_per_second"] == pytest.approx(8 / 7)
    assert second["data_wait"] == pytest.approx(3 / 7)
    assert second["lr"] == pytest.approx(1e-3 / 103)
    assert second["peak_memory_gib"] == pytest.approx(peak_memory() / 2**30, rel=0.1)
    memory = f"{second['peak_memory_gib']:.1f} GiB"
    assert lines[1] == (
        f"   103/103  ce 1.500  total 3.000  lr 9.7e-06  1.14 images/s  data 43 %  {memory}"
        "  0:00 left"
    )
    assert progress.seconds == 18 + 75


def test_the_time_left_forgets_a_slow_start(clock: Clock, tmp_path: Path) -> None:
    """A minute of compilation, then two seconds a step: the median of the lines is two seconds."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    progress = Progress(1000, 0, 4, CPU, log)
    for done in range(1, 5):
        clock.now += 60 if done == 1 else 2
        progress.add(losses(1.0))
        progress.report(done, 1.0)
    left = [row["seconds_left"] for row in rows(tmp_path / "metrics.jsonl")]
    assert left == [60 * 999, 31 * 998, 2 * 997, 2 * 996]


def test_parts_of_a_step_are_averaged(clock: Clock, tmp_path: Path) -> None:
    """Two steps of two parts: the mean of the four."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    progress = Progress(2, 0, 4, CPU, log)
    clock.now += 1
    for total in (1.0, 2.0, 3.0, 6.0):
        progress.add(losses(total))
    progress.report(2, 1.0)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["ce"], row["total"]) == (1.5, 3.0)


def test_other_processes_report_nothing(clock: Clock) -> None:
    progress = Progress(10, 0, 4, CPU)
    clock.now += 1
    progress.add(losses(1.0))
    assert progress.report(1, 1.0) is None


def test_waiting_is_measured_on_a_real_clock() -> None:
    def slow() -> Any:
        for _ in range(3):
            time.sleep(0.05)
            yield 0

    progress = Progress(3, 0, 1, CPU)
    for _ in progress.time_batches(slow()):
        time.sleep(0.01)
    assert 0.15 <= progress._waited < progress.seconds - 0.03


def test_the_loop_never_reads_the_losses_between_lines() -> None:
    """`add` on the meta device, which has no numbers to read."""
    progress = Progress(3, 0, 1, CPU)
    for _ in range(3):
        progress.add({"total": torch.zeros((), device="meta")})
    assert progress._sums["total"].is_meta


def test_the_progress_line() -> None:
    row = {
        "step": 200, "global": 1.5, "total": 12.3456, "lr": 6e-5, "images_per_second": 123.4,
        "data_wait": 0.016, "peak_memory_gib": 3.14, "seconds_left": 500.2,
    }  # fmt: skip
    assert progress_line(row, ("global", "total"), 1200) == (
        "   200/1200  global 1.500  total 12.346  lr 6.0e-05  123 images/s  data 2 %  3.1 GiB"
        "  8:20 left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (7325, "2:02:05"),
    ],
)
def test_format_time(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_output_and_memory() -> None:
    assert default_output("paper").parent == Path("runs")
    assert default_output("paper").name.startswith("paper-2")
    assert 2**20 < peak_memory() < 2**45


# --- the environment ----------------------------------------------------------------------------


def test_the_environment_is_ready_for_json() -> None:
    found = json.loads(json.dumps(describe_environment(ALONE)))
    assert found["processes"] == 1 and found["torch"] == torch.__version__
    (device,) = found["devices"]
    assert (device["rank"], device["device"]) == (0, "cpu")
    assert device["threads"] == torch.get_num_threads() and device["name"] and device["host"]
    assert found["commit"] is None or (len(found["commit"]) == 40 and found["dirty"] in (0, 1))


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean, then changed; a file that the repository around it does not know has no commit."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    own = tmp_path / "package" / "records.py"
    own.parent.mkdir()
    own.write_text("first")
    monkeypatch.setattr(records_module, "__file__", str(own))
    nothing = {"commit": None, "dirty": None}
    assert records_module._describe_commit() == nothing  # no repository
    git("init", "-q")
    assert records_module._describe_commit() == nothing  # not in it
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "notes.txt").write_text("not of the package")
    assert records_module._describe_commit() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    own.write_text("second")
    assert records_module._describe_commit() == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert records_module._describe_commit() == {"commit": None, "dirty": None}


def test_a_second_start_keeps_what_the_first_wrote(tmp_path: Path) -> None:
    record_start({"crop": 64, "size": (1, 2), "seed": 0}, {"torch": "1"}, tmp_path, 0)
    assert json.loads((tmp_path / "environment.json").read_text()) == {"torch": "1", "start": 0}
    record_start({"crop": 64, "size": (1, 2), "seed": 1}, {"torch": "2"}, tmp_path, 50)
    record_start({"crop": 96, "size": (1, 3), "seed": 1}, {"torch": "3"}, tmp_path, 80)
    assert json.loads((tmp_path / "environment.json").read_text()) == {
        "torch": "3",
        "start": 80,
        "config_changes": {"crop": [64, 96], "size": [[1, 2], [1, 3]]},
        "earlier": [
            {"torch": "1", "start": 0},
            {"torch": "2", "start": 50, "config_changes": {"seed": [0, 1]}},
        ],
    }
    assert json.loads((tmp_path / "config.json").read_text())["crop"] == 96


def test_a_damaged_record_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"torch": "1", ')
    record_start({"crop": 64}, {"torch": "2"}, tmp_path, 0)
    assert json.loads((tmp_path / "environment.json").read_text()) == {"torch": "2", "start": 0}


# --- TensorBoard --------------------------------------------------------------------------------


def test_without_tensorboard_the_flag_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else found(name, *rest),
    )
    for call in (check_tensorboard, lambda: MetricsLog(tmp_path / "m.jsonl", tensorboard=True)):
        with pytest.raises(RuntimeError, match="not installed; run `pip install tensorboard`"):
            call()
    MetricsLog(tmp_path / "m.jsonl").close()


def test_events_hold_the_figures_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.write({"step": 10, "total": 1.5, "lr": 0.25})
    log.write({"step": 10, "split": "val", "hIoU": None, "pAcc": 50.0, "IoU": {"sky": 75.0}})
    log.write({"step": 20, "total": 1.25, "lr": 0.125})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert told == {
        "train/total": [(10, 1.5), (20, 1.25)],
        "train/lr": [(10, 0.25), (20, 0.125)],
        "val/pAcc": [(10, 50.0)],
        "val/IoU/sky": [(10, 75.0)],
    }
