"""What may go wrong on the way: damaged files, full disks, dead workers, losses that are NaN."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_runs import NoisyStudent, final, make_space, options, program, rows
from torch import Tensor

from cliptteacher import checkpoint as checkpoint_file
from cliptteacher.checkpoint import (
    is_intact,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    student_content,
)
from cliptteacher.data import FolderDataset
from cliptteacher.training.finite import FiniteCheck
from cliptteacher.training.interruption import ignore_signals

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_space(tmp_path_factory.mktemp("faults"))


def content(step: int) -> dict[str, Any]:
    student = student_content(torch.nn.Identity(), names=["cat"], text_features=torch.ones(1, 2))
    return {**student, "step": step, "w": torch.full((100,), float(step))}


@pytest.fixture
def keep_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "KEEP", 3)


def save_three(run: Path) -> list[Path]:
    for step in (1, 2, 3):
        save_checkpoint(content(step), run / "checkpoints")
    return list_checkpoints(run / "checkpoints")


# --- damaged files ------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, flip_one_bit])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, keep_three: None, damage: Callable[[Path], None]
) -> None:
    files = save_three(tmp_path)
    damage(files[2])
    with pytest.warns(UserWarning, match=r"step_00000003.pt is damaged .*the one before it is"):
        loaded = load_checkpoint(tmp_path)
    assert loaded["step"] == 2 and torch.equal(loaded["w"], torch.full((100,), 2.0))
    for name in ("step_00000003.pt", "last.pt"):  # a hard link: damaged with it
        with pytest.raises(ValueError, match=rf"{name} is damaged: \d+ bytes whose SHA-256"):
            load_checkpoint(tmp_path / "checkpoints" / name)
    damage(files[1])
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert load_checkpoint(tmp_path)["step"] == 1
    assert len(warned) == 2
    damage(files[0])
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="all 3 checkpoints in .* are damaged; start again"),
    ):
        load_checkpoint(tmp_path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Also where torch.load would not see it, such as between the records of the archive."""
    path = save_checkpoint(content(1), tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert not is_intact(path), position
    path.write_bytes(whole)
    assert is_intact(path)


def test_the_sums_are_those_of_sha256sum(tmp_path: Path, keep_three: None) -> None:
    save_three(tmp_path)
    folder = tmp_path / "checkpoints"
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == 3
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    for step in (4, 5):
        save_checkpoint(content(step), folder)
    names = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert names[-2:] == ["step_00000004.pt", "step_00000005.pt"] and len(names) <= 5


def test_checkpoints_without_sums_are_taken_as_they_are(tmp_path: Path) -> None:
    save_three(tmp_path)
    (tmp_path / "checkpoints" / "SHA256SUMS").unlink()
    assert load_checkpoint(tmp_path)["step"] == 3
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "run"))
    whole, told = final(tmp_path / "run"), rows(tmp_path / "run")
    flip_one_bit(tmp_path / "run" / "checkpoints" / "step_00000006.pt")
    with pytest.warns(UserWarning, match="step_00000006.pt is damaged"):
        train.main(options(space, tmp_path / "run", "--resume"))
    assert "resumed from step 4" in capsys.readouterr().out
    assert torch.equal(final(tmp_path / "run")["segmenter"]["head.weight"],
                       whole["segmenter"]["head.weight"])  # fmt: skip
    assert rows(tmp_path / "run") == told


def test_a_run_whose_checkpoints_are_all_damaged(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "run", "--iterations", "2"))
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        cut(path)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(SystemExit, match="error: all 1 checkpoints in .* are damaged"),
    ):
        train.main(options(space, tmp_path / "run", "--resume"))


# --- dying between any two system calls ---------------------------------------------------------

CALLS = ((os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink"), (torch, "save"))


def save_and_die(folder: Path, calls: int) -> bool:
    """Save a checkpoint in a forked process that is gone before its n-th call; did it survive?"""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        left = [calls]

        def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for owner, name in CALLS:
            setattr(owner, name, mortal(getattr(owner, name)))
        save_checkpoint(content(3), folder)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("again", [False, True])
def test_whenever_it_dies_the_newest_checkpoint_is_whole(tmp_path: Path, again: bool) -> None:
    """``again``: a step is written anew, over a file of the same name."""
    survived, calls = False, 0
    while not survived:
        folder = tmp_path / str(calls)
        for step in (1, 2, 3) if again else (1, 2):
            save_checkpoint(content(step), folder)
        survived = save_and_die(folder, calls)
        newest = newest_checkpoint(folder)  # no warning: nothing is damaged
        assert newest is not None and is_intact(newest) and is_intact(folder / "last.pt")
        step = load_checkpoint(newest)["step"]
        assert step in ((3,) if again or survived else (2, 3))
        save_checkpoint(content(4), folder)  # and the next one cleans up
        assert not list(folder.glob("*.tmp*"))
        assert [int(path.stem[5:]) for path in list_checkpoints(folder)][-1] == 4
        calls += 1
    assert calls > 6


# --- full disks ---------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    save_three(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()}
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            save_checkpoint({"step": 4, "w": torch.zeros(10**6)}, tmp_path / "checkpoints")
        except OSError as error:
            clear = "the older ones are intact: make room" in str(error) and error.errno
            os._exit(17 if clear == errno.EFBIG else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir()} == before


def test_a_run_on_a_full_disk_ends_with_one_sentence(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    real, saved = torch.save, []

    def until_full(value: Any, file: Any) -> None:
        saved.append(value["step"])
        if len(saved) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(value, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", until_full)
        with pytest.raises(
            SystemExit,
            match=r"error: no room for the checkpoint .*step_00000004.pt .*No space left.*"
            r"the older ones are intact: make room and start again with --resume",
        ):
            train.main(options(space, tmp_path / "run"))
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000002.pt"]
    train.main(options(space, tmp_path / "run", "--resume"))
    train.main(options(space, tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_other_errors_of_writing_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(checkpoint_file.torch, "save", fail)
    with pytest.raises(PermissionError, match="not yours"):
        save_checkpoint(content(1), tmp_path)


# --- dead workers -------------------------------------------------------------------------------


def test_a_killed_data_worker_names_its_sample(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)

    class Deadly(FolderDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    monkeypatch.setattr(train, "open_dataset", lambda _, root, split: Deadly(root, split))
    with pytest.raises(
        SystemExit,
        match=r"error: a data worker died while samples \d+ \(image scene2\) were being made; "
        r"lack of memory, or of room in /dev/shm, is the usual reason: try fewer --workers",
    ):
        train.main(options(space, tmp_path / "run", "--workers", "1"))


def test_a_failing_sample_names_itself_through_a_worker(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)

    class Broken(FolderDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            raise OSError("cannot read")

    monkeypatch.setattr(train, "open_dataset", lambda _, root, split: Broken(root, split))
    with pytest.raises(RuntimeError, match=r"sample 0 \(index \d, image 'scene\d'\) could not be"):
        train.main(options(space, tmp_path / "run", "--workers", "1"))


# --- losses and gradients that are not finite ---------------------------------------------------


class Diverging(NoisyStudent):
    """A student whose features are NaN in chosen training steps."""

    steps: tuple[int, ...] = ()

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.passes = -1

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        factor = torch.nan if self.training and self.passes in self.steps else 1.0
        return super().forward(images * factor)


def diverging(monkeypatch: pytest.MonkeyPatch, *steps: int) -> ModuleType:
    """train.py with that student."""
    train = program(monkeypatch)
    monkeypatch.setattr(Diverging, "steps", steps)
    monkeypatch.setattr(
        train, "build_segmenter", lambda _, channels, *__, **___: Diverging(channels)
    )
    return train


@pytest.mark.parametrize("interval", [1, 4])
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """Noticed with the next line of the log, at the latest before a checkpoint is written."""
    train = diverging(monkeypatch, 2, 3)
    with pytest.raises(SystemExit) as stop:
        train.main(options(space, tmp_path / "run", "--log-interval", str(interval)))
    message = str(stop.value.code)
    assert (
        "error: iteration 2 was not finite: global, ce, focal, dice, generate on process 0"
        in message
    )
    assert "samples 8 to 11 (images scene" in message and message.count("scene") == 4
    assert f"The last checkpoint in {tmp_path / 'run'} is good" in message
    content = final(tmp_path / "run")
    assert content["step"] == 2
    assert all(value.isfinite().all() for value in content["segmenter"].values())
    monkeypatch.setattr(Diverging, "steps", ())
    train.main(options(space, tmp_path / "run", "--resume"))
    assert final(tmp_path / "run")["step"] == 6


def losses_of(**values: float) -> dict[str, Tensor]:
    terms = {name: torch.tensor(value) for name, value in values.items()}
    return {**terms, "total": torch.stack(tuple(terms.values())).sum()}


def test_the_first_step_is_the_one_that_is_named() -> None:
    """As on a device: steps go on until the note is read."""
    check = FiniteCheck(CPU)
    for step, ce in enumerate((1.0, torch.inf, 2.0, torch.nan)):
        check.add(losses_of(ce=ce, dice=1.0))
        check.end_step(step, torch.tensor(1.0))
    assert check.check() == (1, {0: ["ce"]})


def test_a_part_of_a_step_counts_for_the_step() -> None:
    check = FiniteCheck(CPU)
    for ce in (torch.nan, 1.0):
        check.add(losses_of(ce=ce))
    check.end_step(5, torch.tensor(torch.nan))
    check.add(losses_of(ce=1.0))
    check.end_step(6, torch.tensor(1.0))
    assert check.check() == (5, {0: ["ce"]})


def test_a_gradient_alone_may_be_bad() -> None:
    check = FiniteCheck(CPU)
    check.add(losses_of(ce=1.0))
    check.end_step(7, torch.tensor(torch.inf))
    assert check.check() == (7, {0: ["gradient"]})


def test_a_total_alone_may_be_bad() -> None:
    check = FiniteCheck(CPU)
    check.add(
        {"ce": torch.tensor(3e38), "dice": torch.tensor(3e38), "total": torch.tensor(torch.inf)}
    )
    check.end_step(0, torch.tensor(torch.nan))
    assert check.check() == (0, {0: ["total"]})


def test_gradients_that_overflow_in_half_precision_are_the_scalers_business() -> None:
    check = FiniteCheck(CPU, scaled=True)
    check.add(losses_of(ce=1.0))
    check.end_step(0, torch.tensor(torch.inf))
    assert check.check() is None


class Slow(torch.utils.data.Dataset[Tensor]):
    """Samples that take their time."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.05)
        return torch.tensor(index)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux")
def test_data_workers_obey_their_parent_alone() -> None:
    """A stranger's SIGTERM and SIGUSR1 are not heard; the parent's SIGTERM ends them at once."""
    loader = torch.utils.data.DataLoader(
        Slow(), num_workers=1, worker_init_fn=ignore_signals, persistent_workers=True
    )
    batches = iter(loader)
    assert next(batches).item() == 0
    (worker,) = loader._iterator._workers
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [batch.item() for batch in batches] == [1, 2, 3, 4, 5]
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=20)
    assert not worker.is_alive()
