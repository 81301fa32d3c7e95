"""OpenAI's published CLIP weights: where they are, and which hash they must have."""

import os
from pathlib import Path
from typing import NamedTuple

from ..download import download


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
        FileNotFoundError: the file is not in the cache and cannot be downloaded.
        ValueError: what was downloaded has the wrong SHA-256.
        OSError: the cache cannot be written.
    """
    target = cached_weights(published, cache_dir)
    return download(published.url, target, digest=published.sha256)


def cached_weights(
    published: PublishedWeights, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Return where the copy of published weights lies or would lie."""
    cache = Path(cache_dir or os.environ.get("CLIPTTEACHER_CACHE") or "~/.cache/clip").expanduser()
    return cache / published.url.rsplit("/", 1)[1]
