"""Fetch OpenAI's published CLIP weights: resumable, verified, once per machine.

Sketch: if the file is in the cache and its SHA-256 is right, use it; otherwise take a lock (the
processes of one machine wait for each other), go on from a partial file with an HTTP range
request, verify the SHA-256, and rename. A file under its final name is always complete.
"""

import contextlib
import hashlib
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30


class PublishedWeights(NamedTuple):
    """Where a published file is, and what it must be."""

    url: str
    sha256: str


def _openai(file: str, sha256: str) -> PublishedWeights:
    return PublishedWeights(
        f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}", sha256
    )


OPENAI_WEIGHTS = {
    "ViT-B/16": _openai(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    ),
    "ViT-B/32": _openai(
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    ),
    "ViT-L/14": _openai(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    ),
    "ViT-L/14@336px": _openai(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    ),
}


def download_weights(
    published: PublishedWeights, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Return a verified local copy of published weights, downloading what is missing.

    Args:
        published: the address and the SHA-256 of the file.
        cache_dir: where copies are kept; by default ``$CLIPTTEACHER_CACHE``, or ``~/.cache/clip``,
            the cache of OpenAI's own package.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: if the file is not in the cache and cannot be downloaded.
        RuntimeError: if what was downloaded has the wrong SHA-256.
    """
    cache = Path(cache_dir or os.environ.get("CLIPTTEACHER_CACHE") or "~/.cache/clip").expanduser()
    target = cache / published.url.rsplit("/", 1)[1]
    if _is_verified(target, published):  # needs no lock, so a read-only cache will do
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock")):
        if not _is_verified(target, published):  # another process may have been faster
            _download(published, target)
    return target


def _is_verified(target: Path, published: PublishedWeights) -> bool:
    if not target.exists():
        return False
    if _sha256(target) != published.sha256:
        logger.warning("%s has the wrong SHA-256 and is downloaded again", target)
        return False
    return True


def _download(published: PublishedWeights, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    try:
        _append(published.url, partial)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"{target} is missing and downloading it stopped ({error}); call again to go on, or "
            f"fetch {published.url} on another machine and save it as {target}"
        ) from error
    found = _sha256(partial)
    if found != published.sha256:
        partial.unlink()
        raise RuntimeError(
            f"{published.url} must have the SHA-256 {published.sha256}, got {found}; "
            "the file was discarded, try again"
        )
    partial.replace(target)


def _append(url: str, partial: Path) -> None:
    """Download what a partial file still lacks."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the SHA-256 will tell
            return
        raise
    with response:
        have = have if response.status == 206 else 0  # a server may ignore the range
        if "Content-Length" not in response.headers:
            raise OSError("the server does not tell the size of the file")
        total = have + int(response.headers["Content-Length"])
        logger.info("downloading %s (%.0f of %.0f MB)", url, (total - have) / 1e6, total / 1e6)
        with partial.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                _log_progress(have, have + len(chunk), total)
                have += len(chunk)
        if have != total:
            raise OSError(f"the connection closed after {have} of {total} bytes")


def _log_progress(before: int, after: int, total: int) -> None:
    """Log one line per tenth of the file."""
    if before * 10 // total != after * 10 // total:
        logger.info("downloaded %d%%", after * 100 // total)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between the processes of one machine, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield
