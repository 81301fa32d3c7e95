"""Files: hash them, write them whole, read JSON with bounds, download with resume and a lock.

The ground room, which every other room may import. It knows no tensor; those are in `tensors.py`.

    write   temporary file beside the target -> fsync -> rename -> fsync of the folder
    fetch   good copy? -> lock -> append to NAME.part (HTTP range) -> compare hash -> rename

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
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TextIO

OnProgress = Callable[[str, int, int], None]  # what, done, total (0: unknown)
StrPath = str | os.PathLike[str]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60
_NUMBERS = itertools.count()  # two threads may write the same file
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def file_digest(path: StrPath, algorithm: str = "sha256") -> str:
    """Hash the content of a file.

    Args:
        path: the file.
        algorithm: a name of `hashlib`; MD5 serves against broken transfers and proves no origin.

    Returns:
        Hexadecimal digits.
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


def download(
    urls: str | Sequence[str],
    path: StrPath,
    *,
    digest: str | None = None,
    algorithm: str = "sha256",
    megabytes: int = 0,
    attempts: int = 1,
    wait: float = 2.0,
    progress: OnProgress | None = None,
) -> Path:
    """Return a complete local copy of a published file; download what is missing of it.

    An interrupted transfer goes on where it stopped, in this call or a later one. Processes of
    one machine that want the same file wait for the first of them. Cost: the transfer, and one
    reading of the file per call if there is a digest.

    Args:
        urls: addresses of the same file; the next one is tried when one fails.
        path: where to save it; ``<path>.part`` holds what has come so far.
        digest: hexadecimal digits of the published hash, all of them or the first few. A copy
            with another hash is downloaded again. Without it, a file that exists is taken.
        algorithm: of the digest.
        megabytes: about how large the file is, 0 if that is not known; an address that offers
            less than half or more than twice as much (a page that asks to log in) is passed over.
        attempts: how often each address is tried.
        wait: seconds before the second attempt, twice as long before each further one.
        progress: called with the file name, bytes done and bytes in total; by default one line
            is logged per tenth of the file.

    Raises:
        FileNotFoundError: no address gave the whole file; calling again goes on from there.
        ValueError: what came does not have the published hash.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if _is_good(path, digest, algorithm):  # needs no lock, so a read-only cache will do
        return path
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if not _is_good(path, digest, algorithm):  # another process may have been faster
                partial = path.with_name(f"{path.name}.part")
                addresses = [urls] if isinstance(urls, str) else urls
                url = _try_all(addresses, path, partial, megabytes, attempts, wait, progress)
                _verify(partial, digest, algorithm, url)
                partial.replace(path)
    return path


def _is_good(path: Path, digest: str | None, algorithm: str) -> bool:
    if not path.is_file():
        return False
    if digest is None or file_digest(path, algorithm).startswith(digest):
        return True
    logger.warning("%s does not have the published hash and is downloaded again", path)
    return False


def _try_all(
    urls: Sequence[str],
    path: Path,
    partial: Path,
    megabytes: int,
    attempts: int,
    wait: float,
    progress: OnProgress | None,
) -> str:
    """Complete the partial file; returns the address that gave the last byte."""
    failures: list[str] = []
    for url in urls:
        for attempt in range(attempts):
            if attempt:
                time.sleep(wait * 2 ** (attempt - 1))
            try:
                _append(url, partial, megabytes, progress or _log_tenths())
                return url
            except (OSError, HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (*FULL_DISK, *_FORBIDDEN):
                    raise _explain(error, partial) from error  # ours, not the server's
                failures.append(f"{url}: {error}")
                if _is_final(error):
                    break
    state = "damaged" if path.is_file() else "missing"
    raise FileNotFoundError(
        f"{path} is {state} and could not be downloaded ({'; '.join(failures[-3:])}); run again "
        f"to go on, or get {urls[-1]} and put it there"
    )


class _AnotherFileError(OSError):
    """What the server offers is not what was asked for."""


def _is_final(error: Exception) -> bool:
    """Whether asking again is useless."""
    gone = isinstance(error, urllib.error.HTTPError) and error.code in (403, 404, 410)
    return gone or isinstance(error, _AnotherFileError)


def _append(url: str, partial: Path, megabytes: int, progress: OnProgress) -> None:
    """Download what a partial file still lacks."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        size = error.headers.get("Content-Range", "").rpartition("/")[2]
        if size in ("", "*", str(have)):  # nothing is left to send; the hash decides
            return
        partial.unlink()  # more than there is: the partial file is of another version
        raise
    with response:
        if response.status != 206:  # a server may ignore the range
            have = 0
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise OSError("the server does not give the size of the file")
        total = have + int(length)
        if megabytes and not megabytes / 2 <= total / 1e6 <= 2 * megabytes:
            raise _AnotherFileError(f"{total} bytes are offered, about {megabytes} MB expected")
        with partial.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress(partial.name.removesuffix(".part"), have, total)
            file.flush()
            os.fsync(file.fileno())
        if have != total:
            raise OSError(f"the connection closed after {have} of {total} bytes")


def _log_tenths() -> OnProgress:
    logged = [0]

    def log(name: str, done: int, total: int) -> None:
        tenth = done * 10 // total
        if tenth != logged[0]:
            logged[0] = tenth
            logger.info("downloaded %d%% of %s (%.0f MB)", tenth * 10, name, total / 1e6)

    return log


def _verify(partial: Path, digest: str | None, algorithm: str, url: str) -> None:
    if digest is None:
        return
    found = file_digest(partial, algorithm)
    if not found.startswith(digest):
        partial.unlink()
        raise ValueError(
            f"the {algorithm.upper()} of {url} must start with {digest}, got "
            f"{found[: len(digest)]}; the file was discarded, run again or use another address"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between the processes of one machine, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            except OSError:  # a network file system without locks
                logger.debug("no lock on %s", path)
            # The one who held it before may have removed the file: then ours locks nothing.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


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
        raise _explain(cause, path) from error


def _explain(error: OSError, path: Path) -> OSError:
    """Say in one sentence which file cannot be written, why, and what to do."""
    code = error.errno or 0
    if code in FULL_DISK:
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(folder).free / 2**20
        advice = f"{free:.0f} MiB are free, make room and run again"
    elif code in _FORBIDDEN:
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
