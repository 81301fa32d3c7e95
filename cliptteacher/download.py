"""Download published files: with resume, hashes, several addresses, and a lock.

good copy? -> lock -> append to NAME.part (HTTP range) -> compare hash -> rename
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from .files import FORBIDDEN, FULL_DISK, OnProgress, StrPath, explain, explained, file_digest

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


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
                if isinstance(error, OSError) and error.errno in (*FULL_DISK, *FORBIDDEN):
                    raise explain(error, partial) from error  # ours, not the server's
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
        return (yield)
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
