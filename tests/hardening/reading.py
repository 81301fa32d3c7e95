"""Pictures, label maps, folders of data and archives, as they come from elsewhere."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from judge import Case, Draw, damaged
from PIL import Image

from cliptteacher.data.folder import FolderDataset, read_label
from cliptteacher.data.images import read_image
from cliptteacher.data.unpack import unpack

CHANNELS = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3,
            "LAB": 3, "HSV": 3, "I": 4, "F": 4, "I;16": 2, "PA": 2}  # fmt: skip
LOSSLESS = (".png", ".tif", ".bmp", ".ppm", ".tga")
TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1], 8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip


def pictures(draw: Draw, folder: Path) -> Case:
    """Any mode in any format, turned by EXIF or by rubbish in its place, damaged or not."""
    mode, width, height = draw.one(*CHANNELS), draw.whole(1, 6), draw.whole(1, 6)
    random = np.random.default_rng(draw.whole(0, 999))
    image = Image.frombytes(mode, (width, height), random.bytes(CHANNELS[mode] * width * height))
    if mode in ("I", "F"):  # any bytes are a number, but hardly one that was meant
        image = Image.fromarray(
            random.integers(0, 70000, (height, width)).astype("int32" if mode == "I" else "float32")
        )
    suffix = draw.one(*LOSSLESS, ".jpg", ".webp", ".gif", ".jp2")
    path, turn, options = folder / f"a{suffix}", draw.whole(0, 9), {}
    exif = Image.Exif()
    exif[274] = turn
    block = exif.tobytes()
    rubbish = draw.one(False, False, True)
    if suffix in (".png", ".jpg", ".webp", ".tif"):
        options["exif"] = damaged(draw, block, 6) if rubbish and suffix != ".tif" else block
    if suffix not in (".png", ".jpg", ".webp"):  # nothing to turn, or the loader of TIFF turns it
        turn = 1
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=Image.registered_extensions()[suffix], **options)
    except (OSError, ValueError, SystemError):  # Pillow has no such combination
        image, mode = Image.frombytes("RGB", image.size, random.bytes(3 * width * height)), "RGB"
        buffer = io.BytesIO()
        image.save(buffer, format=Image.registered_extensions()[suffix], **options)
    content = buffer.getvalue()
    broken = draw.one(False, False, True)
    path.write_bytes(damaged(draw, content) if broken else content)
    with Image.open(io.BytesIO(content)) as stored:
        stored.load()
        expected = as_stated(stored)
    right = expected is not None and suffix in LOSSLESS and not broken and not rubbish

    def act() -> None:
        found = read_image(path).permute(1, 2, 0).numpy()
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        if right and expected is not None:
            assert np.abs(found.astype(int) - TURNS.get(turn, TURNS[1])(expected)).max() <= 1

    return Case(act, path.name, "pass" if right else "either")


def as_stated(image: Image.Image) -> np.ndarray | None:
    """The colours that the table of `images.py` promises; None where it refuses."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image).astype(int)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        pixels = np.array(image.convert("RGBA")).astype(float)
        share = pixels[..., 3:] / 255
        return (pixels[..., :3] * share + 255 * (1 - share)).round().astype(int)
    if image.mode.startswith("I;16"):
        grey = (np.array(image).astype(float) * 255 / 65535).round().astype(int)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("1", "L", "P", "CMYK", "YCbCr"):
        return np.array(image.convert("RGB")).astype(int)
    return None


def png(values: np.ndarray, depth: int, colour: int) -> bytes:
    """Write a grey (0) or palette (3) PNG of 1 to 16 bits a pixel by hand."""
    height, width = values.shape
    rows = b""
    for row in values:
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    parts = chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def label_maps(draw: Draw, folder: Path) -> Case:
    """Index maps of every depth: the numbers as stored, or a refusal; nothing in between."""
    depth, colour = draw.one(1, 2, 4, 8, 16), draw.one(0, 3)
    depth = min(depth, 8) if colour == 3 else depth
    top = draw.one(2**depth - 1, 3, 20)
    random = np.random.default_rng(draw.whole(0, 999))
    shape = (draw.whole(1, 5), draw.whole(1, 9))
    values = random.integers(0, min(top, 2**depth - 1) + 1, shape)
    classes, ignored = draw.whole(1, 255), draw.one(255, 255, 0, 65535)
    valid = bool(((values < classes) | (values == ignored)).all())
    content, broken = png(values, depth, colour), draw.one(False, False, True)
    path = folder / "label.png"
    path.write_bytes(damaged(draw, content, 8) if broken else content)

    def act() -> None:
        found = read_label(path, classes, ignored).numpy()
        assert np.array_equal(found, np.where(values == ignored, 255, values)), "another label map"

    return Case(act, path.name, "either" if broken else "pass" if valid else "fail")


@cache
def picture_and_label() -> tuple[bytes, bytes]:
    """A picture of 4 x 4 and its labels 0, 1, 2, 255."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "png")
    return buffer.getvalue(), png(np.array([[0, 1, 2, 255]] * 4), 8, 0)


def data_folders(draw: Draw, folder: Path) -> Case:
    """A description with anything in it, lists in any encoding, names with accents."""
    stem = draw.one("a", "grün", "a b", "été.1")
    for name, content in zip(("images", "labels"), picture_and_label(), strict=True):
        (folder / name).mkdir()
        spelt = unicodedata.normalize(draw.one("NFC", "NFD"), stem)
        (folder / name / f"{spelt}.png").write_bytes(content)
        (folder / name / f"._{spelt}.png").write_bytes(b"of a Mac")
    description: dict[str, Any] = {"classes": ["sky", "tall grass", "cow"], "unseen": ["cow"]}
    description["ignore_index"] = 255
    right = draw.one(True, True, False)
    if not right:
        key = draw.one(*description, "other")
        if draw.one(True, False):
            description[key] = draw.junk()
            description[key] = None if isinstance(description[key], bytes) else description[key]
        else:
            description.pop(key, None)
    text = json.dumps(description)
    if not right and draw.one(True, False):
        text = damaged(draw, text.encode()).decode("utf-8", "replace")
    encoding = draw.one("utf-8", "utf-8-sig", "utf-16", "latin-1")
    (folder / "dataset.json").write_bytes(text.encode(encoding, "replace"))
    lines = draw.one("{}\n", "{}", "\n  {}  \n\n", "{}\r\n", "{}.png\n", "missing\n", "")
    listed = draw.one("utf-8", "utf-8-sig", "utf-16", "latin-1")
    (folder / "train.txt").write_bytes(lines.format(stem).encode(listed))
    clean = right and "{}" in lines and ".png" not in lines
    clean = clean and (listed != "latin-1" or stem.isascii())

    def act() -> None:
        image, label = FolderDataset(folder, "train")[0]
        assert (
            image.flatten().tolist()
            == np.arange(48).reshape(4, 4, 3).transpose(2, 0, 1).flatten().tolist()
        )
        assert set(label[0].tolist()) <= {0, 1, 2, 255} and label[0].tolist()[:2] == [0, 1]

    return Case(act, folder.name, "pass" if clean else "either")


def archives(draw: Draw, folder: Path) -> Case:
    """Archives whose names point anywhere, with links and devices, damaged or not."""
    place = folder / "place"
    place.mkdir()
    names = (
        "in/a",
        "in/b/c",
        "../x",
        "/tmp/hardening-x",
        "in/../../x",
        "in/a",
        "C:\\x",
        "in/\x01",
        "é/a",
        "in",
    )
    chosen = [draw.one(*names) for _ in range(draw.whole(1, 4))]
    path = folder / draw.one("a.tar", "a.tar.gz", "a.zip", "a.tar.xz")
    links = 0
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name in dict.fromkeys(chosen):
                packed.writestr(name, name)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:] if path.suffix != '.tar' else ''}") as stream:
            for name in chosen:
                entry = tarfile.TarInfo(name)
                entry.size = len(name.encode())
                if draw.one(False, False, True):
                    links += 1
                    entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc", 0
                stream.addfile(entry, io.BytesIO(name.encode()))
    broken = draw.one(False, True)
    if broken:
        path.write_bytes(damaged(draw, path.read_bytes()))
    clean = not broken and not links and set(chosen) == {"in/a", "in/b/c"}

    def act() -> None:
        try:
            unpack(path, "in", place / "target")
            found = {
                p.relative_to(place / "target").as_posix() for p in place.rglob("*") if p.is_file()
            }
            assert found and not any(p.is_symlink() for p in place.rglob("*"))
            assert broken or found <= {"a", "b/c", "\x01"}
        except BaseException:
            assert list(place.iterdir()) == [], "half an archive is left"
            raise
        finally:
            assert not Path("/tmp/hardening-x").exists() and not (folder / "x").exists()

    return Case(act, path.name, "pass" if clean else "either")


READING = (pictures, label_maps, data_folders, archives)
