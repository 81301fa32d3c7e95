"""The ground room of files: whole or not at all, read with bounds."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cliptteacher.files import (
    file_digest,
    read_json,
    write_json,
    write_text,
    write_whole,
)

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# --- writing ------------------------------------------------------------------------------------


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT * 5)  # more than one block
    assert file_digest(tmp_path / "a") == hashlib.sha256(CONTENT * 5).hexdigest()
    assert file_digest(tmp_path / "a", "md5") == hashlib.md5(CONTENT * 5).hexdigest()


def test_text_and_json_are_written_in_utf8(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json({"crop": 64, "name": "Straße"}, path)
    assert path.read_bytes() == b'{\n  "crop": 64,\n  "name": "Stra\xc3\x9fe"\n}\n'
    write_text("Fenster\n", str(path))
    assert path.read_bytes() == b"Fenster\n"
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json({"crop": torch.zeros(1)}, path)
    assert path.read_bytes() == b"Fenster\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    assert list(path.parent.iterdir()) == [path]


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"older")
    with pytest.raises(KeyError), write_whole(path) as file:
        file.write(b"half")
        raise KeyError("from inside")
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="other.txt"), write_whole(path):
        (tmp_path / "other.txt").read_text()  # an error about another file keeps its words
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    write_text("a", tmp_path / "a")
    assert calls == ["fsync", "replace", "fsync"]
    write_text("a", tmp_path / "a", flush=False)
    assert calls[3:] == ["replace"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with write_whole(tmp_path / "a") as first:
        first.write(b"first, ")
        with write_whole(tmp_path / "a") as second:  # as another thread would
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
        first.write(b"and the last to end")
    assert (tmp_path / "a").read_bytes() == b"first, and the last to end"
    assert len(list(tmp_path.iterdir())) == 1


def test_names_up_to_the_limit_of_the_system(tmp_path: Path) -> None:
    write_text("a", tmp_path / ("ä" * 127))
    assert [path.name for path in tmp_path.iterdir()] == ["ä" * 127]


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    thread = threading.Thread(
        target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True
    )
    thread.start()
    write_text("through", tmp_path / "pipe")
    thread.join(10)
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def targets(folder: Path) -> dict[str, tuple[Path, type[OSError], str]]:
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    return {
        "a folder": (folder / "folder", IsADirectoryError, "it is a folder, give the name of a"),
        "below a file": (folder / "file" / "a", OSError, "one of its folders is a file"),
        "far below a file": (folder / "file" / "a" / "b", OSError, "one of its folders is a file"),
        "too long": (folder / ("a" * 300), OSError, "choose a shorter name"),
        "nowhere": (Path("/proc/a/b"), OSError, "cannot be written"),
        "here": (Path(), IsADirectoryError, "it is a folder"),
    }


KINDS = ("a folder", "below a file", "far below a file", "too long", "nowhere", "here")


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    path, error, advice = targets(tmp_path)[kind]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        write_text("a", path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be written (") and advice in message
    assert caught.value.errno and "\n" not in message and "[Errno" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_reasons_become_sentences(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = {
        errno.EACCES: "choose a folder in which you may write",
        errno.EROFS: "choose a folder in which you may write",
        errno.ENOSPC: r"\d+ MiB are free, make room and run again",
        errno.EIO: "check the disk and the folder",
    }[code]

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"a\.txt cannot be written \(.*\); {advice}") as caught:
        write_text("a", tmp_path / "a.txt")
    assert caught.value.errno == code and type(caught.value) is type(OSError(code, ""))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_torch_save(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own; torch hides the reason."""
    program = """
import resource, sys, torch
from cliptteacher.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    with write_whole(sys.argv[1]) as file:
        torch.save({"w": torch.zeros(10**6)}, file)
except OSError as error:
    print(error.errno, error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"{errno.EFBIG} {tmp_path / 'a.pt'} cannot be written")
    assert list(tmp_path.iterdir()) == []


# --- JSON from elsewhere ------------------------------------------------------------------------


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1]}).encode())
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    (tmp_path / "a.json").write_bytes(json.dumps({"a": [1]}).encode("utf-16"))
    assert read_json(tmp_path / "a.json") == {"a": [1]}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": \xff}', b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{\0}"],
)
def test_damaged_json_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json must hold JSON, but reading it stopped with"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        read_json(tmp_path / "b.json")


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2_000_001)
    with pytest.raises(ValueError, match=r"a\.json must be a JSON file of at most 2 MB"):
        read_json(tmp_path / "a.json", megabytes=2)
