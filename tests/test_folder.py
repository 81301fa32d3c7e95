"""The folder format: pairs, palettes, orientation, and a sentence for everything that is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cliptteacher.data import FolderDataset
from cliptteacher.data.folder import read_label
from cliptteacher.data.images import read_image

CLASSES = ["grass", "sky", "cow"]
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
INDICES = np.array([[0, 1, 2, 255, 0, 1]] * 4, dtype=np.uint8)


def write_description(root: Path, **changes: object) -> None:
    content = {"classes": CLASSES, "unseen": ["cow"], "ignore_index": 255, **changes}
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        Image.fromarray(PIXELS).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(INDICES).save(tmp_path / "labels" / f"{name}.png")
    write_description(tmp_path)
    (tmp_path / "train.txt").write_text("b\n\n a \n")
    (tmp_path / "val.txt").write_text("a\n")
    return tmp_path


def test_reads_a_split(root: Path) -> None:
    dataset = FolderDataset(root, "train")
    assert len(dataset) == 2 and dataset.image_name(0) == "b"
    assert dataset.class_names == ("grass", "sky", "cow")
    assert dataset.unseen == (2,) and dataset.ignore_index == 255
    image, label = dataset[1]
    assert image.dtype == label.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), PIXELS)
    assert np.array_equal(label.numpy(), INDICES)
    assert len(FolderDataset(str(root), "val")) == 1


def test_reads_jpeg_in_any_spelling_and_grey_as_rgb(root: Path) -> None:
    (root / "images" / "a.png").unlink()
    Image.fromarray(PIXELS[..., 0]).save(root / "images" / "a.JPG")
    image, _ = FolderDataset(root, "val")[0]
    assert image.shape == (3, 4, 6)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_palette_labels_are_indices_not_colours(root: Path, bits: int) -> None:
    indices = np.where(INDICES == 255, 2, INDICES).astype(np.uint8)
    label = Image.new("P", (6, 4))
    label.putdata(indices.flatten().tolist())
    label.putpalette([128, 0, 0, 0, 128, 0, 0, 0, 128])
    label.save(root / "labels" / "a.png", bits=bits)
    with Image.open(root / "labels" / "a.png") as file:
        assert file.mode == "P"
    assert np.array_equal(FolderDataset(root, "val")[0][1].numpy(), indices)


def test_sixteen_bit_labels(root: Path) -> None:
    wide = INDICES.astype(np.uint16)
    wide[wide == 255] = 65535
    Image.fromarray(wide).save(root / "labels" / "a.png")
    write_description(root, ignore_index=65535)
    assert np.array_equal(FolderDataset(root, "val")[0][1].numpy(), INDICES)


def test_another_ignore_index_becomes_255(root: Path) -> None:
    other = np.where(INDICES == 255, 77, INDICES).astype(np.uint8)
    Image.fromarray(other).save(root / "labels" / "a.png")
    write_description(root, ignore_index=77)
    assert np.array_equal(FolderDataset(root, "val")[0][1].numpy(), INDICES)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy()
    assert np.array_equal(upright, np.rot90(PIXELS, k=-1))


def test_nothing_is_kept(root: Path) -> None:
    dataset = FolderDataset(root, "val")
    assert dataset[0][0] is not dataset[0][0]
    (root / "images" / "a.png").unlink()
    with pytest.raises(FileNotFoundError):
        dataset[0]


def test_missing_split_names_the_existing_ones(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"split 'test'.* splits found: train, val"):
        FolderDataset(root, "test")


def test_missing_description(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset\.json must describe the data set"):
        FolderDataset(tmp_path, "train")


@pytest.mark.parametrize(("folder", "suffix"), [("images", ".jpg or .jpeg"), ("labels", ".png")])
def test_missing_half_of_a_pair(root: Path, folder: str, suffix: str) -> None:
    (root / folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder}/b \({suffix}.* 1 of 2 files"):
        FolderDataset(root, "train")


def test_missing_folder(root: Path) -> None:
    (root / "images").rename(root / "pictures")
    with pytest.raises(FileNotFoundError, match="images must be a folder"):
        FolderDataset(root, "train")


def test_empty_split(root: Path) -> None:
    (root / "train.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"train\.txt must list at least one image"):
        FolderDataset(root, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen": ["horse"]}, r"must name classes of `classes`, got \['horse'\]"),
        ({"unseen": [2]}, r"`unseen` in .* must be a list of class names, got \[2\]"),
        ({"classes": None}, r"`classes` in .* must be a list of class names, got None"),
        ({"classes": ["cow", "cow"]}, "class names must be unique"),
        ({"unseen": CLASSES}, "at least one class must be seen"),
        ({"ignore_index": 1}, "an integer that is no class .* got 1"),
        ({"ignore_index": "255"}, "an integer that is no class .* got '255'"),
    ],
)
def test_wrong_description(root: Path, changes: dict[str, object], message: str) -> None:
    write_description(root, **changes)
    with pytest.raises(ValueError, match=message):
        FolderDataset(root, "train")


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_description_that_is_no_json_object(root: Path, text: str) -> None:
    (root / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"must hold JSON|must be a list of class names"):
        FolderDataset(root, "train")


def test_label_of_another_size(root: Path) -> None:
    Image.fromarray(INDICES[:3]).save(root / "labels" / "a.png")
    dataset = FolderDataset(root, "val")
    with pytest.raises(ValueError, match=r"a\.png must be as large .* got 3 x 6 for .* 4 x 6"):
        dataset[0]


def test_label_out_of_range(tmp_path: Path) -> None:
    Image.fromarray(INDICES + np.uint8(3)).save(tmp_path / "l.png")  # 3, 4, 5 and 2
    with pytest.raises(ValueError, match=r"l\.png must hold class indices 0\.\.2 .* got 3, 4, 5;"):
        read_label(tmp_path / "l.png", num_classes=3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_label_with_colours(tmp_path: Path, mode: str) -> None:
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / "l.png")
    with pytest.raises(ValueError, match=rf"colours instead of indices \(mode {mode}\)"):
        read_label(tmp_path / "l.png", num_classes=3)
