"""Fetch archives over HTTP: resumable, retried, verified where a checksum is published.

Sketch: for each address in turn, ask for what the partial file still lacks (HTTP range), refuse
what is far from the known size, append; when the server's length is reached, compare the MD5 and
rename. A file under its final name is always complete. Cost: the transfer, and one more reading of
the file if there is a checksum.
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

Progress = Callable[[str, int, int], None]  # what, done, total

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


class _AnotherFile(OSError):
    """What the server offers is not what was asked for."""


def download(
    urls: Sequence[str],
    target: Path,
    *,
    md5: str | None = None,
    megabytes: int = 0,
    attempts: int = 5,
    wait: float = 2.0,
    progress: Progress | None = None,
) -> Path:
    """Return a complete local copy of a file.

    Args:
        urls: addresses of the same file; the next one is tried when one fails.
        target: where to save it; ``<target>.part`` holds what has come so far.
        md5: published checksum (against broken transfers; it proves no origin).
        megabytes: about how large the file is, 0 if that is not known; an address that offers
            less than half or more than twice as much (a page that asks to log in) is passed over.
        attempts: how often each address is tried.
        wait: seconds before the second attempt, twice as long before each further one.
        progress: called with the file name, bytes done and bytes in total.

    Raises:
        ConnectionError: if no address gave the whole file; calling again goes on from there.
        ValueError: if what came does not have the published checksum.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    failures: list[str] = []
    for url in urls:
        for attempt in range(attempts):
            if attempt:
                time.sleep(wait * 2 ** (attempt - 1))
            try:
                _append(url, partial, megabytes, progress)
            except (OSError, HTTPException) as error:
                failures.append(f"{url}: {error}")
                if _is_final(error):
                    break
                continue
            _verify(partial, md5, url)
            return partial.replace(target)
    raise ConnectionError(
        f"{target.name} must be downloaded, but it did not come ({'; '.join(failures[-3:])}); "
        f"run again to go on, name a mirror, or save the file as {target} yourself"
    )


def _is_final(error: Exception) -> bool:
    """Tell whether asking again will not help."""
    gone = isinstance(error, urllib.error.HTTPError) and error.code in (403, 404, 410)
    return gone or isinstance(error, _AnotherFile)


def _append(url: str, partial: Path, megabytes: int, progress: Progress | None) -> None:
    """Download what a partial file still lacks."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        size = error.headers.get("Content-Range", "").rpartition("/")[2]
        if error.code == 416 and size == str(have):  # nothing is left to send
            return
        if error.code == 416:  # more than there is: the partial file is of another version
            partial.unlink()
        raise
    with response:
        if response.status != 206:  # a server may ignore the range
            have = 0
        if "Content-Length" not in response.headers:
            raise OSError("the server does not tell the size of the file")
        total = have + int(response.headers["Content-Length"])
        if megabytes and not megabytes / 2 <= total / 1e6 <= 2 * megabytes:
            raise _AnotherFile(f"{total} bytes are offered, about {megabytes} MB are published")
        with partial.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(partial.name.removesuffix(".part"), have, total)
        if have != total:
            raise OSError(f"the connection closed after {have} of {total} bytes")


def _verify(partial: Path, md5: str | None, url: str) -> None:
    if md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with partial.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != md5:
        partial.unlink()
        raise ValueError(
            f"{url} must have the MD5 {md5}, got {digest.hexdigest()}; "
            "the file was discarded, run again or name another mirror"
        )
