"""k iterations = j, an end, a resumption, k - j: bit for bit, whatever ended the run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import kill_harness
import pytest
import torch
from small_runs import EXAMPLES, final, make_space, options, program, rows
from test_programs import assert_same

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_space(tmp_path_factory.mktemp("resume"))


def send_at(
    monkeypatch: pytest.MonkeyPatch, train: ModuleType, step: int, number: signal.Signals
) -> None:
    """Send this process a signal at the start of one iteration."""
    real = train.learning_rate_factor

    def watched(at: int, *args: Any) -> float:
        if at == step:
            os.kill(os.getpid(), number)
        return real(at, *args)

    monkeypatch.setattr(train, "learning_rate_factor", watched)


CASES = {
    "plain": (),
    "two workers": ("--workers", "2"),
    "everything": (*("--accumulate", "2", "--precision", "bf16", "--clip-gradient", "1"),),
    "fp16": ("--precision", "fp16"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Weights, optimiser, bank, adapter, statistics, scaler, random numbers and log."""
    train, more = program(monkeypatch), CASES[case]
    train.main(options(space, tmp_path / "whole", *more))
    number = SIGNALS[len(case) % 2]
    with monkeypatch.context() as patched:
        send_at(patched, train, 2, number)  # in the third iteration: no checkpoint is due there
        with pytest.raises(SystemExit) as stop:
            train.main(options(space, tmp_path / "parts", *more))
    assert stop.value.code == 75
    assert final(tmp_path / "parts")["step"] == 3
    train.main(options(space, tmp_path / "parts", *more, "--resume"))
    assert final(tmp_path / "parts")["step"] == 6
    assert_same(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_the_signals_do_afterwards_what_they_did_before(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    train = program(monkeypatch)
    send_at(monkeypatch, train, 0, signal.SIGUSR1)
    with pytest.raises(SystemExit):
        train.main(options(space, tmp_path / "run"))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    said = "stopped by a signal after step 1, exit code 75; the same command with --resume"
    assert said in capsys.readouterr().out


def test_an_evaluation_that_a_kill_prevented_is_made_up(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    more = ("--eval-interval", "2")
    train.main(options(space, tmp_path / "whole", *more))

    class KilledError(Exception):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(train, "score", killed)  # behind the checkpoint of step 2
        with pytest.raises(KilledError):
            train.main(options(space, tmp_path / "parts", *more))
    assert not any("split" in row for row in rows(tmp_path / "parts"))
    for _ in range(2):  # the second resumption has nothing left to train
        train.main(options(space, tmp_path / "parts", *more, "--resume"))
    told = [(row["step"], row["pAcc"]) for row in rows(tmp_path / "parts") if "split" in row]
    assert told[:3] == [(r["step"], r["pAcc"]) for r in rows(tmp_path / "whole") if "split" in r]


def test_what_a_resumed_run_may_change_takes_effect(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate that --resume asks for is the one that is recorded and used."""
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "run", "--iterations", "4", "--learning-rate", "1e-3"))
    train.main(options(space, tmp_path / "run", "--resume", "--learning-rate", "1e-5"))
    content = final(tmp_path / "run")
    assert content["config"]["learning_rate"] == 1e-5
    rates = [group["base_lr"] for group in content["training"]["optimizer"]["param_groups"]]
    assert set(rates) == {1e-5}
    used = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row and row["step"] > 4]
    assert len(used) == 2 and max(used) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        *("--segmenter fpn_small", "--crop 48", "--batch-size 2", "--seed 4", "--bank-size 5"),
        *("--ce seen", "--resize 32 32", "--tokens final"),
    ],
)
def test_what_would_be_another_run_is_refused(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "run", "--iterations", "2"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    message = rf"was begun with {change.split()[0]} = .* and cannot go on with"
    with pytest.raises(SystemExit, match=message):
        train.main(options(space, tmp_path / "run", *change.split(), "--resume"))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_another_order_of_classes_is_refused(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    shutil.copytree(space, tmp_path / "copy")
    train.main(options(tmp_path / "copy", tmp_path / "run", "--iterations", "2"))
    file = tmp_path / "copy" / "data" / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "classes": content["classes"][::-1]}))
    with pytest.raises(SystemExit, match="was begun with class_names = .* and cannot go on with"):
        train.main(
            options(space, tmp_path / "run", "--root", str(tmp_path / "copy/data"), "--resume")
        )


# --- killed at any moment -----------------------------------------------------------------------


@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    """The harness itself, shortly; the thirty kills are in benchmarks/."""
    command = [sys.executable, kill_harness.__file__, "--kills", "3", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "kills")],
        env=environment, capture_output=True, text=True, check=False, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] and result["kills"] == result["restarts"] == 3
    assert result["most_lost_at_once"] <= kill_harness.INTERVAL


def test_the_harness_sees_a_difference(tmp_path: Path) -> None:
    one = {"a": [torch.zeros(2), 3], "b": torch.ones(1)}
    other = {"a": [torch.zeros(2), 4], "b": torch.ones(1) + 1e-7}
    assert kill_harness.differences(one, one) == []
    assert kill_harness.differences(one, other) == ["/a/1", "/b"]
    assert kill_harness.differences(one, {"a": one["a"]}) == [""]
    assert kill_harness.differences([1], [1, 2], "x") == ["x"]
    assert kill_harness.differences(torch.zeros(1), torch.zeros(1).double(), "x") == ["x"]


# --- several processes --------------------------------------------------------------------------


def torchrun(folder: Path, *flags: str, run: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(EXAMPLES / "train.py")]
    return subprocess.Popen(
        [*command, *run], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def in_peace(space: Path) -> Path:
    """A run of two processes that nothing disturbs; each with two data workers."""
    output = space / "peace"
    flags = ("--standalone", "--nproc_per_node=2")
    finish(torchrun(space, *flags, run=options(space, output, *TWO)))
    return output


TWO = ("--accumulate", "2", "--workers", "2", "--iterations", "8")


def child_with_rank(parent: int, rank: int) -> int | None:
    """The id of a process that torchrun started, by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            variables = (folder / "environ").read_text().split("\0")
        except OSError:
            continue
        if f"PPid:\t{parent}\n" in status and f"RANK={rank}" in variables:
            return int(folder.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_torchrun_goes_on_by_itself_after_a_kill(
    space: Path, tmp_path: Path, in_peace: Path
) -> None:
    """No --output and no --resume: the second attempt finds the directory of the first."""
    flags = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    process = torchrun(tmp_path, *flags, run=options(space, None, *TWO))
    limit = time.monotonic() + 300
    while not list(tmp_path.glob("runs/folder-*/checkpoints/step_00000004.pt")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)
    victim = child_with_rank(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    printed = finish(process)
    assert "resumed from step" in printed, printed
    (output,) = (tmp_path / "runs").iterdir()
    assert_same(final(in_peace), final(output))
    assert rows(in_peace) == rows(output)


@pytest.mark.slow
def test_two_agents_with_one_rendezvous(space: Path, tmp_path: Path, in_peace: Path) -> None:
    """Two torchruns on the loopback, as on two nodes, train what one torchrun trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=two")
    meet = f"--rdzv-endpoint=127.0.0.1:{port}"
    run = options(space, tmp_path / "run", *TWO)
    agents = [torchrun(tmp_path, *flags, meet, "--local-addr=127.0.0.1", run=run) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert len(final(tmp_path / "run")["training"]["rng"]) == 2
    assert_same(final(in_peace), final(tmp_path / "run"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(space: Path, tmp_path: Path, in_peace: Path) -> None:
    """Both stop behind the same step, and the run goes on with one checkpoint for both."""
    output = tmp_path / "run"
    shutil.copytree(in_peace, output)
    long = options(space, output, *TWO, "--resume", "--iterations", "10000")
    process = torchrun(tmp_path, "--standalone", "--nproc_per_node=2", run=long)
    limit = time.monotonic() + 300
    while len(rows(output)) < 12:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)
    victim = child_with_rank(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGUSR1)
    printed, _ = process.communicate(timeout=300)
    assert "stopped by a signal after step" in printed
    assert "exitcode  : 75" in printed, printed
    step = int(printed.split("stopped by a signal after step ")[1].split(",")[0])
    assert final(output)["step"] == step >= 12
