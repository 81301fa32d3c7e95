"""Files: hash them, write them whole, read text and JSON from elsewhere with bounds.

The ground room, which every other room may import. It knows no tensor; those are in `tensors.py`.

    temporary file beside the target -> fsync -> rename -> fsync of the folder

A file under its final name is always complete, whatever was killed. Every `OSError` of writing
names the file and says what to do.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

OnProgress = Callable[[str, int, int], None]  # what, done, total (0: unknown)
StrPath = str | os.PathLike[str]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_NUMBERS = itertools.count()  # two threads may write the same file
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def file_digest(path: StrPath, algorithm: str = "sha256") -> str:
    """Hash the content of a file; returns hexadecimal digits.

    Args:
        path: the file.
        algorithm: a name of `hashlib`; MD5 serves against broken transfers and proves no origin.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def write_whole(path: StrPath, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a file that is written whole or not at all.

    The bytes go to a temporary file in the same folder, which takes the name of the target when
    the block ends without an error; otherwise it is removed and an older target stays as it was.
    A device or a pipe (``/dev/stdout``) cannot be replaced and is written directly.

    Args:
        path: the target; its folder is made if missing.
        flush: wait until the bytes are on the disk before the rename, so that a power failure
            leaves the old file or the new one. Off for many small files that can be made again.

    Raises:
        OSError: the file cannot be written; of the class that the system's error belongs to.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name[:50]}.tmp{os.getpid()}-{next(_NUMBERS)}"
    with explained(path, temporary):
        if path.exists() and not path.is_file():  # a folder is refused by the system
            with path.open("wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if flush:
                flush_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):  # it is gone after the rename, or was never made
                temporary.unlink()


def make_folder(path: StrPath) -> Path:
    """Make a folder and those above it, where they are missing; raises as `write_whole` does."""
    with explained(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def open_for_writing(path: StrPath) -> TextIO:
    """Open a text file to append lines; raises as `write_whole` does."""
    with explained(Path(path)):
        return Path(path).open("a", encoding="utf-8")


def check_writable(path: StrPath) -> None:
    """Raise now what writing a file would raise after long work; leaves everything as it was."""
    path = make_folder(Path(path).parent) / Path(path).name
    new = not path.exists()
    open_for_writing(path).close()
    if new:
        path.unlink()


def write_text(text: str, path: StrPath, *, flush: bool = True) -> None:
    """Write UTF-8 text whole or not at all; raises as `write_whole` does."""
    with write_whole(path, flush=flush) as file:
        file.write(text.encode("utf-8"))


def write_json(content: Any, path: StrPath) -> None:
    """Write a JSON file whole or not at all; raises as `write_whole` does.

    Raises:
        TypeError: JSON cannot hold the content; the file is as it was.
    """
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def read_text(path: StrPath) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark; a mark is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding.
    """
    content = Path(path).read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, but {error}; save it as UTF-8") from None


def read_json(path: StrPath, *, megabytes: int = 100) -> Any:
    """Read a JSON file that may come from elsewhere.

    Args:
        path: the file; encodings as in `read_text`.
        megabytes: a larger file is refused before it is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no UTF-8, no JSON, or nested deeper than Python can follow.
    """
    path = Path(path)
    if path.stat().st_size > megabytes * 10**6:
        raise ValueError(f"{path} must be a JSON file of at most {megabytes} MB; check its name")
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must hold JSON, but reading it stopped with: {error}; correct it or get it "
            "again"
        ) from error


def flush_folder(folder: Path) -> None:
    """Bring a rename to the disk; some systems cannot open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # a file system that cannot do this for a folder
        logger.debug("no fsync of %s", folder)
    finally:
        os.close(handle)


def _cause_of(error: BaseException | None, ours: Sequence[Path]) -> OSError | None:
    """Find the system's error about one of our files behind an exception, if that is the reason."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    if error is None or error.errno is None or not error.strerror:
        return None
    named = error.filename
    return error if named is None or (isinstance(named, str) and Path(named) in ours) else None


@contextlib.contextmanager
def explained(path: Path, *others: Path) -> Iterator[None]:
    """Raise the system's error about `path`, a folder above it or `others` as a sentence."""
    if "\0" in str(path):
        raise ValueError(f"the name of a file must not hold the character NUL, got {str(path)!r}")
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        cause = _cause_of(error, (path, *path.parents, *others))
        if cause is None:
            raise
        raise explain(cause, path) from error


def explain(error: OSError, path: Path) -> OSError:
    """Say in one sentence which file cannot be written, why, and what to do."""
    code = error.errno or 0
    if code in FULL_DISK:
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(folder).free / 2**20
        advice = f"{free:.0f} MiB are free, make room and run again"
    elif code in FORBIDDEN:
        advice = "choose a folder in which you may write"
    elif code == errno.EISDIR:
        advice = "it is a folder, give the name of a file"
    elif code in (errno.ENOTDIR, errno.EEXIST):
        advice = "one of its folders is a file, choose another folder"
    elif code == errno.ENAMETOOLONG:
        advice = "choose a shorter name"
    else:
        advice = "check the disk and the folder, then run again"
    explained = type(error)(f"{path} cannot be written ({error.strerror}); {advice}")
    explained.errno = code  # the sentence alone is printed, and callers can still ask why
    return explained
