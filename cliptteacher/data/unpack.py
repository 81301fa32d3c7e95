"""Unpack tar and zip archives that came from elsewhere: nothing leaves the folder, no links.

Files are written into a new folder beside the final one, which gets its name when everything is
there: a folder under its final name is complete, and no link can lie in the way of a file.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, TypeVar

from ..files import OnProgress, explained, make_folder

Block = TypeVar("Block")


class _Member(NamedTuple):
    """One entry of an archive."""

    name: str
    is_folder: bool
    is_file: bool
    content: IO[bytes] | None


def unpack(archive: Path, inside: str, target: Path, *, progress: OnProgress | None = None) -> Path:
    """Unpack one folder of an archive, whole or not at all.

    Args:
        archive: tar (plain, gz, bz2, xz) or zip file.
        inside: folder within the archive that is wanted; "." for all of it.
        target: what that folder becomes; it must not exist.
        progress: called with the name of the archive, files written, and 0 (the total is unknown).

    Raises:
        ValueError: if an entry points out of the archive, a wanted one is neither file nor folder
            (such as a link), the folder is not in the archive, or it is no such archive.
    """
    temporary = target.with_name(f".{target.name}.unpacking")
    if temporary.exists():
        shutil.rmtree(temporary)  # of a run that was interrupted
    make_folder(temporary)
    count = 0
    members = _members(archive)
    try:
        while member := _read(members, archive):
            parts = _parts_below(member.name, inside, archive)
            if parts is None or member.is_folder:
                continue
            if not member.is_file or member.content is None:
                raise ValueError(
                    f"{archive} must hold files and folders only, got {member.name!r}, a link or "
                    "a device; nothing was unpacked, fetch the archive from its official address"
                )
            blocks = iter(partial(member.content.read, 1 << 20), b"")
            _write(temporary.joinpath(*parts), blocks, archive, member.name)
            count += 1
            if progress is not None:
                progress(archive.name, count, 0)
        if not count:
            raise ValueError(f"{archive} must hold the folder {inside!r}, but it is not in there")
        with explained(target):
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _read(blocks: Iterator[Block], archive: Path) -> Block | None:
    """Take the next entry, or the next bytes of one; None at the end."""
    try:
        return next(blocks, None)
    except Exception as error:  # any byte of an archive may be wrong, and leads anywhere
        raise ValueError(
            f"{archive} must be a whole tar or zip file, got: {error}; delete it and run again"
        ) from error


def _write(path: Path, blocks: Iterator[bytes], archive: Path, name: str) -> None:
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                while block := _read(blocks, archive):
                    file.write(block)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ValueError(
            f"{archive} must not name a folder as a file, got {name!r}; nothing was unpacked, "
            "fetch the archive from its official address"
        ) from None


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the maker was no Unix
                is_file = kind in (0, stat.S_IFREG) and not info.is_dir()
                if is_file:
                    with packed.open(info) as content:
                        yield _Member(info.filename, False, True, content)
                else:
                    yield _Member(info.filename, info.is_dir(), False, None)
        return
    with tarfile.open(archive, "r|*") as stream:  # one pass, whatever the compression
        for entry in stream:
            data = stream.extractfile(entry) if entry.isreg() else None
            yield _Member(entry.name, entry.isdir(), entry.isreg(), data)


def _parts_below(name: str, inside: str, archive: Path) -> tuple[str, ...] | None:
    """Return the path of an entry below the wanted folder, None if it lies elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(
            f"{archive} must hold names below one folder, got {name!r}, which points out of it; "
            "nothing was unpacked, fetch the archive from its official address"
        )
    wanted = PurePosixPath(inside)
    if not path.is_relative_to(wanted):
        return None
    return path.relative_to(wanted).parts
