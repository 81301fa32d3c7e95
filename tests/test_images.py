"""Pictures of every kind: the right pixels, or one sentence that names the file."""

import json
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cliptteacher.command_line import read_words
from cliptteacher.data import FolderDataset, check_folder
from cliptteacher.data.folder import read_label
from cliptteacher.data.images import list_images, read_image, to_batch, to_image

RAMP = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def pixels(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


# --- modes --------------------------------------------------------------------------------------


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    """Half of 65535 is half of 255, not white."""
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(pixels(tmp_path / name), np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_modes_that_pillow_converts(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(COLOURS).convert(mode)
    suffix = {"CMYK": ".tif", "YCbCr": ".tif"}.get(mode, ".png")
    picture.save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as stored:
        assert stored.mode == mode
        expected = np.array(stored.convert("RGB"))
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """Hidden colours stay hidden."""
    picture = Image.new(mode, (3, 1), (9, 9, 9, 0) if mode == "RGBA" else (9, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    picture.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255] * 3, [0] * 3, [255] * 3]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.gif", transparency=0)
    assert pixels(tmp_path / "a.gif")[0].tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("mode", ["F", "LAB", "I"])
def test_a_mode_without_a_range_is_refused_by_name(tmp_path: Path, mode: str) -> None:
    values = np.full((2, 2), 200, np.int32) if mode == "I" else np.zeros((2, 2), np.float32)
    picture = Image.new("LAB", (2, 2)) if mode == "LAB" else Image.fromarray(values)
    picture.save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif must be .*the range of its mode {mode} is not"):
        read_image(tmp_path / "a.tif")


# --- EXIF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".grey.tif"])
def test_every_orientation(tmp_path: Path, tag: int, suffix: str) -> None:
    """As the viewer of the standard turns it; by hand, on a picture without symmetry."""
    exif = Image.Exif()
    exif[274] = tag
    stored = COLOURS[..., 0] if "grey" in suffix else COLOURS
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif, lossless=True)
    flip, turn = np.fliplr, np.rot90
    expected = {
        1: stored, 2: flip(stored), 3: turn(stored, 2), 4: np.flipud(stored),
        5: stored.swapaxes(0, 1), 6: turn(stored, -1),
        7: turn(stored, 2).swapaxes(0, 1), 8: turn(stored, 1),
    }[tag]  # fmt: skip
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), expected)


def exif_block(orientation: int, *entries: bytes) -> bytes:
    """A little-endian TIFF header, the orientation, further entries, and eight bytes for them."""
    rows = [struct.pack("<HHIHH", 274, 3, 1, orientation, 0), *entries]
    offset = 8 + 2 + 12 * len(rows) + 4
    directory = struct.pack("<H", len(rows)) + b"".join(rows) + struct.pack("<I", 0)
    rational = struct.pack("<ii", -1, 0)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + rational
    return block.replace(b"@@@@", struct.pack("<I", offset))


def test_a_rational_of_minus_one_over_zero(tmp_path: Path) -> None:
    """What a phone wrote, and what rewriting EXIF stumbles over."""
    bad = struct.pack("<HHI", 37380, 10, 1) + b"@@@@"
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=exif_block(6, bad), quality=100)
    assert read_image(tmp_path / "a.jpg").shape == (3, 13, 4)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk!"])
def test_damaged_exif_is_no_exif(tmp_path: Path, block: bytes) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=block)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 13)


# --- files --------------------------------------------------------------------------------------


def test_a_bomb_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"large\.png must be .* at most 40 pixels, got 52; make"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png must be a readable image, but "):
        read_image(tmp_path / "a.png")


def test_every_truncation_is_a_sentence(tmp_path: Path) -> None:
    Image.fromarray(np.tile(COLOURS, (9, 5, 1))).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for length in range(0, len(whole) - 20, 7):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.png must be a readable image, but "):
            read_image(tmp_path / "cut.png")


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.webp", "c.jfif", "._b.jpg", ".hidden.png", "d.heicx", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.png").mkdir()
    readable, others = list_images(tmp_path)
    assert [path.name for path in readable] == ["a.webp", "b.JPG", "c.jfif"]
    assert [path.name for path in others] == ["d.heicx", "notes.txt"]


def test_everything_that_may_be_an_image(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOURS)
    picture.save(tmp_path / "a.png")
    tensor = torch.from_numpy(COLOURS).permute(2, 0, 1)
    for kind in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, COLOURS, tensor):
        assert torch.equal(to_image(kind), tensor)
    unit = to_image(COLOURS.astype(np.float64) / 255)
    assert unit.dtype == torch.float32 and torch.allclose(unit * 255, tensor.float())


@pytest.mark.parametrize("value", [2.0, -3.0, float("nan"), float("inf"), 255.0])
def test_float_images_out_of_range(value: float) -> None:
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"a float `image` must lie in \[0, 1\], got"):
        to_batch(image)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"must have shape \(H, W, 3\), got \(3, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), r"must have shape \(H, W, 3\), got \(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint16), r"must be uint8, or float .*got uint16"),
        (np.zeros((8, 8, 4)), r"must be uint8, or float"),
    ],
)
def test_arrays_that_are_no_images(wrong: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_image(wrong)


def test_other_objects_are_no_images() -> None:
    with pytest.raises(TypeError, match="must be a path, a PIL image, .* got dict"):
        to_image({})


# --- labels and lists ---------------------------------------------------------------------------


def write_grey_png(path: Path, values: np.ndarray, depth: int) -> None:
    """A grey PNG of 1, 2, 4 or 8 bits a pixel, by hand: Pillow writes 8 only."""
    import zlib

    rows = b""
    for row in values:
        bits = "".join(format(int(v), f"0{depth}b") for v in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_indices_of_every_depth_are_read_as_stored(
    tmp_path: Path, depth: int, palette: bool
) -> None:
    count = min(2**depth, 200)
    values = np.resize(np.arange(count, dtype=np.uint8), (7, 31))
    if palette:
        picture = Image.fromarray(values, "P")
        picture.putpalette([3, 1, 4] * count)
        picture.save(tmp_path / "a.png", bits=depth)
    else:
        write_grey_png(tmp_path / "a.png", values, depth)
    assert np.array_equal(read_label(tmp_path / "a.png", num_classes=count).numpy(), values)


def test_a_label_that_is_no_png(tmp_path: Path) -> None:
    """JPEG changes indices, whatever the file is called."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png", format="JPEG")
    with pytest.raises(ValueError, match=r"a\.png must be a PNG, got JPEG"):
        read_label(tmp_path / "a.png", 3)


@pytest.mark.parametrize("name", [" ", "&nbsp;", "-", "Sky", "s_k_y"])
def test_class_names_that_make_no_prompt_of_their_own(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, ["a"])
    classes = ["sky", name, "s-k-y"]
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": classes, "unseen": []}))
    message = r"dataset\.json: (a class name must hold|class names must)"
    with pytest.raises(ValueError, match=message):
        FolderDataset(tmp_path, "train")


def test_names_with_an_ending_are_explained(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a"])
    (tmp_path / "train.txt").write_text("a.png")
    with pytest.raises(ValueError, match=r"list names without ending, got a\.png"):
        FolderDataset(tmp_path, "train")


def test_indices_of_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 2, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_label(tmp_path / "a.png", 3, ignore_index=65535).tolist() == [[0, 2, 255]]
    with pytest.raises(ValueError, match=r"a\.png must hold class indices 0\.\.2 .* got 65535"):
        read_label(tmp_path / "a.png", 3)


def write_folder(root: Path, names: list[str], encoding: str = "utf-8") -> None:
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for name in names:
        Image.fromarray(COLOURS).save(root / "images" / f"{name}.png")
        Image.fromarray(np.zeros((4, 13), np.uint8)).save(root / "labels" / f"{name}.png")
    for split in ("train", "val"):
        (root / f"{split}.txt").write_bytes("\r\n".join(names).encode(encoding))
    (root / "dataset.json").write_bytes(
        '{"classes": ["sky", "cow"], "unseen": []}'.encode(encoding)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_every_usual_encoding(tmp_path: Path, encoding: str) -> None:
    write_folder(tmp_path, ["aé", "b"], encoding)
    dataset = FolderDataset(tmp_path, "train")
    assert [dataset.image_name(i) for i in range(2)] == ["aé", "b"]


def test_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, ["b"])
    (tmp_path / "train.txt").write_bytes("aé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt must be text in UTF-8, but .* save it as"):
        FolderDataset(tmp_path, "train")
    assert any("train.txt must be text" in line for line in check_folder(tmp_path).problems)


def test_names_are_compared_composed(tmp_path: Path) -> None:
    """MacOS writes e and an accent where others write one letter; ._ files are not data."""
    write_folder(tmp_path, [unicodedata.normalize("NFD", "café")])
    (tmp_path / "train.txt").write_text(unicodedata.normalize("NFC", "café"))
    (tmp_path / "images" / "._b.png").write_bytes(b"resource fork")
    assert len(FolderDataset(tmp_path, "train")) == 1
    report = check_folder(tmp_path)
    assert not any("missing" in line for line in report.problems)
    assert not any("no split" in line or "cannot be" in line for line in report.notes)


def test_what_a_check_cannot_read_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a"])
    (tmp_path / "images" / "b.heicx").write_bytes(b"")
    assert "images: 1 that cannot be read: b.heicx" in check_folder(tmp_path).notes


def test_deep_nesting_is_a_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a"])
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"dataset\.json must hold JSON"):
        FolderDataset(tmp_path, "train")


def test_words_with_commas_and_from_files(tmp_path: Path) -> None:
    assert read_words(" cat, tall  grass,,sky ") == ("cat", "tall grass", "sky")
    assert read_words('"table, dining", cat') == ("table, dining", "cat")
    (tmp_path / "words.txt").write_bytes("\ufeffcat\r\ntable, dining\n\nsky\n".encode())
    assert read_words(str(tmp_path / "words.txt")) == ("cat", "table, dining", "sky")
    for wrong in (" , ", "cat, dog, cat", ", ".join(map(str, range(256)))):
        with pytest.raises(ValueError, match="must be 1 to 255 different words, got"):
            read_words(wrong)
