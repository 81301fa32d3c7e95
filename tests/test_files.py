"""The ground room of files: whole or not at all, and downloads over a server of our own."""

import errno
import hashlib
import io
import json
import logging
import os
import stat
import subprocess
import sys
import threading
import urllib.request
import urllib.response
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path

import benchmark_trees as trees
import numpy as np
import pytest
import torch

from cliptteacher import files
from cliptteacher.files import (
    download,
    file_digest,
    read_json,
    write_json,
    write_text,
    write_whole,
)

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[trees.Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with trees.serve(tmp_path / "served") as running:
        yield running


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


# --- downloads ------------------------------------------------------------------------------------


def test_an_interrupted_transfer_goes_on(server: trees.Server, tmp_path: Path) -> None:
    server.break_after = [100_000, 50_000]
    told: list[tuple[str, int, int]] = []
    path = download(
        [f"{server.address}/a.bin"], tmp_path / "a.bin",
        digest=hashlib.md5(CONTENT).hexdigest(), algorithm="md5",
        attempts=5, wait=0,
        progress=lambda *what: told.append(what),
    )  # fmt: skip
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert told[-1] == ("a.bin", 300_000, 300_000)
    assert not list(tmp_path.glob("*.part"))
    assert download([f"{server.address}/a.bin"], path) == path and len(server.asked) == 3


def test_a_later_call_goes_on(server: trees.Server, tmp_path: Path) -> None:
    server.break_after = [200_000]
    with pytest.raises(FileNotFoundError, match=r"closed after 200000 of.*run again to go on"):
        download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=1)
    assert not (tmp_path / "a.bin").exists()
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=1)
    assert server.asked[1] == ("a.bin", "bytes=200000-")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(server: trees.Server, tmp_path: Path) -> None:
    server.ranges, server.break_after = False, [200_000]
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=5, wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_partial_file_that_is_whole_or_too_long(
    server: trees.Server, tmp_path: Path, extra: bytes
) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + extra)
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=5, wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == (2 if extra else 1)


def test_the_next_address_is_tried(server: trees.Server, tmp_path: Path) -> None:
    urls = [f"{server.address}/{name}" for name in ("gone.bin", "a.bin")]
    download(
        urls, tmp_path / "a.bin", attempts=5, wait=60
    )  # a file that is not there is not waited for
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    with pytest.raises(FileNotFoundError, match=r"b\.bin is missing .*404.*run again to go on"):
        download(urls[:1], tmp_path / "b.bin", attempts=5, wait=60)


@pytest.mark.parametrize("megabytes", [1, 0])
def test_a_page_in_place_of_the_file_is_passed_over(
    server: trees.Server, tmp_path: Path, megabytes: int
) -> None:
    """A mirror may answer every address with a short page and the status of success."""
    (server.folder / "page.html").write_bytes(b"please log in")
    (server.folder / "whole.bin").write_bytes(bytes(1_200_000))
    urls = [f"{server.address}/{name}" for name in ("page.html", "whole.bin")]
    path = download(urls, tmp_path / "x.bin", megabytes=megabytes, attempts=5, wait=60)
    assert path.stat().st_size == (1_200_000 if megabytes else 13)
    assert len(server.asked) == (2 if megabytes else 1)
    with pytest.raises(FileNotFoundError, match=r"13 bytes are offered, about 1 MB expected"):
        download(urls[:1], tmp_path / "y.bin", megabytes=1, attempts=5, wait=60)
    assert not list(tmp_path.glob("y.bin*"))
    with pytest.raises(FileNotFoundError, match=r"300000 bytes .* about 1 MB"):
        download([f"{server.address}/a.bin"], tmp_path / "z.bin", megabytes=1, attempts=5, wait=60)


def test_what_fails_is_tried_again_later_each_time(
    server: trees.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.break_after = [1, 1, 1]
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=4, wait=3)
    assert waits == [3, 6, 12]
    nobody = "http://127.0.0.1:9/b.bin"
    with pytest.raises(
        FileNotFoundError, match=r"b\.bin is missing and could not be downloaded.*127\.0\.0\.1:9"
    ):
        download([nobody, nobody], tmp_path / "b.bin", attempts=2, wait=1)
    assert waits[3:] == [1, 1]


def test_a_wrong_checksum_is_discarded(server: trees.Server, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the MD5 of .*a\.bin must start with 0+, got .* discarded"
    ):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", digest="0" * 32, algorithm="md5")
    assert not list(tmp_path.glob("a.bin*"))


def test_a_complete_partial_file_is_used(server: trees.Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    path = download(f"{server.address}/a.bin", tmp_path / "a.bin", digest=SHA256)
    assert path.read_bytes() == CONTENT and not (tmp_path / "a.bin.part").exists()


def test_a_good_copy_is_taken_and_a_damaged_one_replaced(
    server: trees.Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cliptteacher")
    url, path = f"{server.address}/a.bin", tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert download(url, path, digest=SHA256[:8]) == path
    assert len(server.asked) == 1 and "downloaded 100% of a.bin" in caplog.text
    path.write_bytes(b"damaged")
    assert download(url, path, digest=SHA256).read_bytes() == CONTENT
    assert "does not have the published hash and is downloaded again" in caplog.text
    path.write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=r"a\.bin is damaged and could not be downloaded"):
        download("http://127.0.0.1:9/a.bin", path, digest=SHA256)
    assert path.read_bytes() == b"damaged"  # what was there is the user's


def test_threads_and_processes_wait_for_each_other(server: trees.Server, tmp_path: Path) -> None:
    url, path = f"{server.address}/a.bin", tmp_path / "a.bin"
    program = f"from cliptteacher.files import download; download({url!r}, {str(path)!r})"
    root = Path(files.__file__).parent.parent
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=root) for _ in range(2)]
    threads = [
        threading.Thread(target=download, args=(url, path), kwargs={"digest": SHA256})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert path.read_bytes() == CONTENT and len(server.asked) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "served"]


def test_a_download_that_cannot_be_written(server: trees.Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file/a\.bin cannot be written .* folders is a file"):
        download(f"{server.address}/a.bin", tmp_path / "file" / "a.bin")
    assert server.asked == []


def test_a_server_without_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in ("", "many"):
        headers = HTTPMessage()
        headers["Content-Length"] = length
        answer = urllib.response.addinfourl(io.BytesIO(CONTENT), headers, "http://x/a", 200)
        monkeypatch.setattr(urllib.request, "urlopen", lambda *_, answer=answer, **__: answer)
        with pytest.raises(FileNotFoundError, match="does not give the size of the file"):
            download("http://x/a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
