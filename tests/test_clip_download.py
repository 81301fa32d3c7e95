"""Downloads, from a server of our own: resumed, verified, once per machine."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from clip_files import assert_same, save_openai, small_clip

from cliptteacher.clip import load_clip
from cliptteacher.clip.download import OPENAI_WEIGHTS, PublishedWeights, download_weights

CONTENT = bytes(range(256)) * 5000


class Server(ThreadingHTTPServer):
    """Serves CONTENT; like some mirrors, without the size in its answer to a range."""

    content = CONTENT
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requests.append(asked)
        content, start = self.server.content, 0
        if asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(server: Server, content: bytes = CONTENT) -> PublishedWeights:
    url = f"http://127.0.0.1:{server.server_address[1]}/models/clip.pt"
    return PublishedWeights(url, hashlib.sha256(content).hexdigest())


def test_download_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cliptteacher")
    path = download_weights(published(server), tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / "clip.pt"
    assert path.read_bytes() == CONTENT
    assert download_weights(published(server), tmp_path / "new" / "cache") == path
    assert server.requests == [None]
    assert "downloaded 100%" in caplog.text
    assert not list(path.parent.glob("*.part"))


def test_cache_folder_from_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPTTEACHER_CACHE", str(tmp_path / "env"))
    assert download_weights(published(server)) == tmp_path / "env" / "clip.pt"
    monkeypatch.delenv("CLIPTTEACHER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download_weights(published(server)) == tmp_path / ".cache" / "clip" / "clip.pt"


def test_a_complete_partial_file_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "clip.pt.part").write_bytes(CONTENT)
    assert download_weights(published(server), tmp_path).read_bytes() == CONTENT


def test_wrong_hash_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the SHA256 of .* must start with .*discarded"):
        download_weights(published(server, b"other"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offline_message_names_address_and_place(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/models/clip.pt"  # the discard port: nothing listens
    with pytest.raises(FileNotFoundError) as caught:
        download_weights(PublishedWeights(address, "0" * 64), tmp_path)
    assert address in str(caught.value)
    assert f"{tmp_path / 'clip.pt'} is missing" in str(caught.value)


def test_processes_wait_for_each_other(server: Server, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=download_weights, args=(published(server), tmp_path))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "clip.pt").read_bytes() == CONTENT
    assert server.requests == [None]


def test_a_published_name_is_downloaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = small_clip()
    server.content = save_openai(clip, tmp_path).read_bytes()
    monkeypatch.setitem(OPENAI_WEIGHTS, "ViT-B/16", published(server, server.content))
    assert_same(load_clip("ViT-B/16", cache_dir=tmp_path / "cache"), clip)


def test_published_addresses() -> None:
    assert list(OPENAI_WEIGHTS) == ["ViT-B/16", "ViT-B/32", "ViT-L/14", "ViT-L/14@336px"]
    for name, (url, sha256) in OPENAI_WEIGHTS.items():
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        assert url == f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
        assert len(sha256) == 64
