"""The three benchmarks in miniature, in their official formats and archives, and a server."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matlab_files as mat
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliptteacher.data.benchmark import Benchmark
from cliptteacher.data.coco_stuff import COCO_STUFF
from cliptteacher.data.pascal_context import LABELMAP_IDS, PASCAL_CONTEXT
from cliptteacher.data.voc import VOC

SIZE = (40, 48)  # height, width
VOC_TRAIN, VOC_VAL = ("2007_000032", "2007_000039", "2008_000008"), ("2007_000033", "2008_000009")
SBD_TRAIN = ("2008_000008", "2008_000009", "2008_000015", "2009_000001")  # one of train, one of val
SBD_VAL = ("2007_000033", "2010_000002")
VOC_ADDED = ("2008_000015", "2009_000001", "2010_000002")
COCO = {"train": ("000000000009", "000000000025", "000000000030"), "val": ("000000000139",)}
CONTEXT = {"train": ("2008_000002", "2010_000009"), "val": ("2008_000003",)}


def stripes(values: NDArray[np.generic], seed: int) -> NDArray[np.generic]:
    """A label map of upright stripes, four of the values each."""
    chosen = np.random.default_rng(seed).choice(values, 4, replace=False)
    return np.tile(np.repeat(chosen, SIZE[1] // 4), (SIZE[0], 1))


def write_photo(path: Path, labels: NDArray[np.generic]) -> None:
    """A photograph in which every value of the label map has a colour of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(0).integers(0, 256, (512, 3))
    Image.fromarray(colours[labels.astype(int)].astype(np.uint8)).save(path, quality=90)


def voc_palette() -> list[int]:
    """The colours of VOC: the bits of the index, spread over red, green and blue."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=int)
    for bit in range(3):
        for channel in range(3):
            colours[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.ravel().tolist()


def write_palette(path: Path, labels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, "L").convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(voc_palette())
    image.save(path)


def lines(path: Path, names: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def voc_labels(name: str) -> NDArray[np.uint8]:
    """Background, a border and three classes, or four classes."""
    labels = stripes(np.arange(1, 21), int(name[-3:])).astype(np.uint8)
    labels[:4], labels[4:6] = 0, 255
    return labels


def write_voc(root: Path) -> None:
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    for name in {*VOC_TRAIN, *VOC_VAL, *VOC_ADDED}:
        labels = voc_labels(name)
        write_photo(voc / "JPEGImages" / f"{name}.jpg", labels)
        if name not in VOC_ADDED:
            write_palette(voc / "SegmentationClass" / f"{name}.png", labels)
    write_photo(voc / "JPEGImages" / "2012_000001.jpg", labels)  # of no split
    for name in {*SBD_TRAIN, *SBD_VAL}:
        labels = voc_labels(name)
        labels[labels == 255] = 0
        if name not in VOC_ADDED:
            labels[:] = 1  # not to be used: VOC has its own label, or evaluates on it
        mat.write_sbd(sbd / "cls" / f"{name}.mat", labels)
    lines(voc / "ImageSets" / "Segmentation" / "train.txt", VOC_TRAIN)
    lines(voc / "ImageSets" / "Segmentation" / "val.txt", VOC_VAL)
    lines(sbd / "train.txt", SBD_TRAIN)
    lines(sbd / "val.txt", SBD_VAL)


def coco_labels(name: str) -> NDArray[np.uint8]:
    labels = stripes(np.arange(182), int(name)).astype(np.uint8)
    labels[:4], labels[4:6] = 255, 11  # unlabelled, and a value without a class
    return labels


def write_coco(root: Path) -> None:
    for split, names in COCO.items():
        folder = root / "stuffthingmaps" / f"{split}2017"
        folder.mkdir(parents=True)
        for name in names:
            labels = coco_labels(name)
            Image.fromarray(labels).save(folder / f"{name}.png")
            write_photo(root / f"{split}2017" / f"{name}.jpg", labels)


def context_labels(name: str) -> NDArray[np.uint16]:
    labels = stripes(np.array(list(LABELMAP_IDS.values())), int(name[-3:])).astype(np.uint16)
    labels[:4], labels[4:6] = 1, 459  # two of the 400 ids that are no class
    return labels


def write_context(root: Path) -> None:
    (root / "trainval").mkdir(parents=True)
    images = [{"image_id": 2009000099, "phase": "test"}]
    for split, names in CONTEXT.items():
        for name in names:
            labels = context_labels(name)
            write_photo(root / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"{name}.jpg", labels)
            mat.write(root / "trainval" / f"{name}.mat", mat.array("LabelMap", labels))
            images.append({"image_id": int(name.replace("_", "")), "phase": split})
    outlines = [{"image_id": 2008000002, "segmentation": [[1.5, 2.5]]}]
    content = {"images": images, "annos_segmentation": outlines, "categories": []}
    (root / "trainval_merged.json").write_text(json.dumps(content))


def pack(source: Path, archive: Path, inside: str, folder: Path) -> None:
    """Pack `folder` of the tree `source` as `inside`, in the format that the suffix says."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(path, Path(inside, path.relative_to(folder)).as_posix()) for path in files]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path, name in names:
                packed.write(path, name)
        return
    with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
        packed.add(folder, inside, recursive=False)
        for path, name in names:
            packed.add(path, name)


WRITERS = {"voc": write_voc, "coco-stuff": write_coco, "context": write_context}
KINDS = {"voc": VOC, "coco-stuff": COCO_STUFF, "context": PASCAL_CONTEXT}
COUNTS = {
    "voc": {"train": 6, "val": 2},
    "coco-stuff": {"train": 3, "val": 1},
    "context": {"train": 2, "val": 1},
}


def publish(kind: str, source: Path, folder: Path) -> Benchmark:
    """Write a tree and its archives; returns the benchmark with the sizes of the miniature.

    The archives keep their official names and the folders within; addresses and checksums are
    those of the miniature.
    """
    WRITERS[kind](source)
    folder.mkdir(parents=True, exist_ok=True)
    archives = []
    for archive in KINDS[kind].archives:
        file = folder / archive.file
        if archive.inside is None:
            file.write_bytes((source / archive.yields).read_bytes())
        else:
            pack(source, file, archive.inside, source / archive.yields)
        md5 = hashlib.md5(file.read_bytes()).hexdigest() if archive.md5 else None
        urls = (f"http://127.0.0.1:9/{archive.file}",)  # nobody answers on this port
        archives.append(replace(archive, urls=urls, md5=md5, megabytes=0, unpacked=1))
    return replace(KINDS[kind], archives=tuple(archives), counts=COUNTS[kind], label_megabytes=1)


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; can break off, forget ranges, and tells what it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = True
        self.break_after: list[int] = []  # bytes after which the next answers end
        self.asked: list[tuple[str, str | None]] = []  # file and range

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers["Range"]
        self.server.asked.append((name, wanted))
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.break_after.pop(0) if self.server.break_after else None
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tar_with(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for info, content in members:
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
