"""Archives that are hostile or broken."""

import os
import stat
import tarfile
import zipfile
from pathlib import Path

import benchmark_trees as trees
import pytest

from cliptteacher.data.unpack import unpack


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
