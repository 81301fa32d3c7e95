"""Downloads over a loopback server, and archives that are hostile or broken."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import benchmark_trees as trees
import numpy as np
import pytest

from cliptteacher.data.download import download
from cliptteacher.data.unpack import unpack

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[trees.Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with trees.serve(tmp_path / "served") as running:
        yield running


# download


def test_an_interrupted_transfer_goes_on(server: trees.Server, tmp_path: Path) -> None:
    server.break_after = [100_000, 50_000]
    told: list[tuple[str, int, int]] = []
    path = download(
        [f"{server.address}/a.bin"], tmp_path / "a.bin", md5=md5(CONTENT).hexdigest(), wait=0,
        progress=lambda *what: told.append(what),
    )  # fmt: skip
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-"]
    assert told[-1] == ("a.bin", 300_000, 300_000)
    assert not list(tmp_path.glob("*.part"))
    assert download([f"{server.address}/a.bin"], path) == path and len(server.asked) == 3


def test_a_later_call_goes_on(server: trees.Server, tmp_path: Path) -> None:
    server.break_after = [200_000]
    with pytest.raises(ConnectionError, match=r"a\.bin must be downloaded.*closed after 200000 of"):
        download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=1)
    assert not (tmp_path / "a.bin").exists()
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=1)
    assert server.asked[1] == ("a.bin", "bytes=200000-")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(server: trees.Server, tmp_path: Path) -> None:
    server.ranges, server.break_after = False, [200_000]
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_partial_file_that_is_whole_or_too_long(
    server: trees.Server, tmp_path: Path, extra: bytes
) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + extra)
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == (2 if extra else 1)


def test_the_next_address_is_tried(server: trees.Server, tmp_path: Path) -> None:
    urls = [f"{server.address}/{name}" for name in ("gone.bin", "a.bin")]
    download(urls, tmp_path / "a.bin", wait=60)  # a file that is not there is not waited for
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=r"404.*run again to go on, name a mirror, or save"):
        download(urls[:1], tmp_path / "b.bin", wait=60)


@pytest.mark.parametrize("megabytes", [1, 0])
def test_a_page_in_place_of_the_file_is_passed_over(
    server: trees.Server, tmp_path: Path, megabytes: int
) -> None:
    """A mirror may answer every address with a short page and the status of success."""
    (server.folder / "page.html").write_bytes(b"please log in")
    (server.folder / "whole.bin").write_bytes(bytes(1_200_000))
    urls = [f"{server.address}/{name}" for name in ("page.html", "whole.bin")]
    path = download(urls, tmp_path / "x.bin", megabytes=megabytes, wait=60)
    assert path.stat().st_size == (1_200_000 if megabytes else 13)
    assert len(server.asked) == (2 if megabytes else 1)
    with pytest.raises(ConnectionError, match=r"13 bytes are offered, about 1 MB are published"):
        download(urls[:1], tmp_path / "y.bin", megabytes=1, wait=60)
    assert not list(tmp_path.glob("y.bin*"))
    with pytest.raises(ConnectionError, match=r"300000 bytes .* about 1 MB"):
        download([f"{server.address}/a.bin"], tmp_path / "z.bin", megabytes=1, wait=60)


def test_what_fails_is_tried_again_later_each_time(
    server: trees.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.break_after = [1, 1, 1]
    download([f"{server.address}/a.bin"], tmp_path / "a.bin", attempts=4, wait=3)
    assert waits == [3, 6, 12]
    nobody = "http://127.0.0.1:9/b.bin"
    with pytest.raises(ConnectionError, match=r"b\.bin must be downloaded.*127\.0\.0\.1:9"):
        download([nobody, nobody], tmp_path / "b.bin", attempts=2, wait=1)
    assert waits[3:] == [1, 1]


def test_a_wrong_checksum_is_discarded(server: trees.Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have the MD5 0+, got .* was discarded"):
        download([f"{server.address}/a.bin"], tmp_path / "a.bin", md5="0" * 32)
    assert not list(tmp_path.glob("a.bin*"))


# unpack


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


ESCAPES = ("../evil", "data/../../evil", "/tmp/evil", "data/..", "data\\..\\..\\evil", "C:/evil")
LINKS = (
    (tarfile.SYMTYPE, "/etc/passwd"),
    (tarfile.SYMTYPE, "a.txt"),
    (tarfile.LNKTYPE, "data/a.txt"),
    (tarfile.FIFOTYPE, ""),
    (tarfile.CHRTYPE, ""),
)


def refuse(archive: Path, message: str) -> None:
    """Unpacking fails with the message, and leaves nothing behind anywhere."""
    before = sorted(archive.parent.rglob("*"))
    for inside in ("data", "."):
        with pytest.raises(ValueError, match=message):
            unpack(archive, inside, archive.parent / "out" / "data")
        created = [archive.parent / "out"]
        assert sorted(set(archive.parent.rglob("*")) - set(before)) == created
        created[0].rmdir()


@pytest.mark.parametrize("name", ESCAPES)
def test_paths_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    good = (entry("data/a.txt"), b"a")
    (tmp_path / "a.tar.gz").write_bytes(trees.tar_with(good, (entry(name), b"evil")))
    refuse(tmp_path / "a.tar.gz", "points out of it; nothing was unpacked")
    (tmp_path / "a.tar.gz").unlink()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("data/a.txt", "a")
        packed.writestr(name, "evil")
    refuse(tmp_path / "a.zip", "points out of it; nothing was unpacked")


@pytest.mark.parametrize(("kind", "link"), LINKS)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, link: str) -> None:
    good, bad = (entry("data/a.txt"), b"a"), (entry("data/link", kind, link), b"")
    (tmp_path / "a.tar.gz").write_bytes(trees.tar_with(good, bad))
    refuse(tmp_path / "a.tar.gz", "files and folders only, got 'data/link'")


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("data/link")
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("data/a.txt", "a")
        packed.writestr(info, "/etc/passwd")
    refuse(tmp_path / "a.zip", "files and folders only, got 'data/link'")


def test_a_link_cannot_carry_a_file_out(tmp_path: Path) -> None:
    """The known attack: a link to a folder outside, then a file below the link."""
    way_out = entry("data/link", tarfile.SYMTYPE, str(tmp_path))
    (tmp_path / "a.tar").write_bytes(
        trees.tar_with((way_out, b""), (entry("data/link/evil"), b"evil"))
    )
    refuse(tmp_path / "a.tar", "got 'data/link'")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_archives_are_unpacked_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "source"
    for name in ("a.txt", "sub/b.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(os.urandom(5000))
    archive = tmp_path / f"a{suffix}"
    trees.pack(source, archive, "top/data", source)
    left = tmp_path / ".out.unpacking" / "left"  # by a run that was killed
    left.parent.mkdir()
    left.touch()
    assert unpack(archive, "top/data", tmp_path / "out") == tmp_path / "out"
    found = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.txt")}
    assert found == {Path("a.txt"), Path("sub/b.txt")} and not left.parent.exists()
    for path in found:
        assert (tmp_path / "out" / path).read_bytes() == (source / path).read_bytes()
    with pytest.raises(ValueError, match="must hold the folder 'other', but it is not in there"):
        unpack(archive, "other", tmp_path / "out2")
    archive.write_bytes(archive.read_bytes()[:6000])
    with pytest.raises(ValueError, match="must be a whole tar or zip file"):
        unpack(archive, "top/data", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
