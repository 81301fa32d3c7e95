"""Downloads, over a server of our own: interrupted, damaged, refused, and by many at once."""

import hashlib
import io
import logging
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

from cliptteacher import download as downloads
from cliptteacher.download import download

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[trees.Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with trees.serve(tmp_path / "served") as running:
        yield running


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
    program = f"from cliptteacher.download import download; download({url!r}, {str(path)!r})"
    root = Path(downloads.__file__).parent.parent
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
