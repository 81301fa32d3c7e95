"""Pictures: right colours in the right places, legends with the right words, whole files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cliptteacher.palette import class_palette, word_palette
from cliptteacher.visualize import (
    cluster_map,
    heat_map,
    overlay,
    prediction_panel,
    write_png,
)

NAMES = ["grass", "sky", "cow"]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every string that is drawn, in order."""
    drawn: list[str] = []
    original = ImageDraw.ImageDraw.text

    def record(
        self: ImageDraw.ImageDraw, xy: object, text: str, *args: object, **kw: object
    ) -> None:
        drawn.append(text)
        original(self, xy, text, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def grey(height: int, width: int, value: int = 100) -> Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def test_palette_is_distinct_stable_and_nested() -> None:
    palette = class_palette(171)
    assert palette.shape == (171, 3) and palette.dtype == np.uint8
    assert len({tuple(colour) for colour in palette.tolist()}) == 171
    assert np.array_equal(palette, class_palette(171))
    assert np.array_equal(palette[:20], class_palette(20))
    few = class_palette(20).astype(int)
    distances = np.abs(few[:, None] - few[None]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert distances.min() > 60
    assert class_palette(0).shape == (0, 3) and class_palette(256).shape == (256, 3)


@pytest.mark.parametrize("number", [-1, 257])
def test_palette_range(number: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_classes` must lie in 0\.\.256, got {number}"):
        class_palette(number)


def test_overlay_blends_colours_and_leaves_ignored_pixels() -> None:
    labels = torch.full((300, 400), 255, dtype=torch.uint8)
    labels[:150] = 2
    palette = np.array([[0, 0, 0], [0, 0, 0], [200, 50, 0]], dtype=np.uint8)
    picture = array(
        overlay(grey(300, 400), labels, NAMES, palette=palette, alpha=0.25, annotate=False)
    )
    assert (picture[12:162, 12:412] == [125, 88, 75]).all()  # 0.75 * 100 + 0.25 * colour
    assert (picture[162:312, 12:412] == 100).all()
    assert (picture[:12] == 255).all() and (picture[:, :12] == 255).all()  # the margin


def test_overlay_fades_the_colours_of_the_image() -> None:
    red = torch.zeros(3, 300, 300, dtype=torch.uint8)
    red[0] = 200
    labels = torch.ones(300, 300, dtype=torch.int64)
    opaque = array(overlay(red, labels, NAMES, alpha=1.0, annotate=False))[12:312, 12:312]
    assert (opaque == word_palette(NAMES)[1]).all()
    bare = array(overlay(red, labels, NAMES, alpha=0.0, annotate=False))[12:312, 12:312]
    assert (bare == [200, 0, 0]).all()


def test_overlay_legend_lists_what_is_there_largest_first(texts: list[str]) -> None:
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:60] = 2
    labels[60, :3] = 255
    overlay(grey(100, 100), labels, NAMES, unseen=[2], annotate=False)
    assert texts == ["cow 60.0%", "unseen", "grass 40.0%"]


def test_overlay_legend_of_tiny_areas(texts: list[str]) -> None:
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[0, 0] = 1
    overlay(grey(100, 100), labels, NAMES, annotate=False)
    assert texts == ["grass 100.0%", "sky <0.1%"]


def test_legend_breaks_into_lines_inside_the_picture() -> None:
    names = [f"a rather long class name {k}" for k in range(40)]
    labels = (torch.arange(80 * 80) % 40).view(80, 80)
    picture = array(overlay(grey(80, 80), labels, names))
    assert picture.shape[0] > 40 * 12  # one line each: the picture grew
    assert (picture[:, -2:] == 255).all() and (picture[-8:] == 255).all()


def test_small_images_are_enlarged_and_large_ones_kept() -> None:
    small = overlay(grey(128, 128), torch.zeros(128, 128), NAMES)
    assert small.width == 256 + 24
    large = overlay(grey(700, 900), torch.zeros(700, 900), NAMES)
    assert large.width == 900 + 24


def test_float_images_equal_bytes() -> None:
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    labels = torch.randint(3, (40, 50))
    first, second = overlay(image, labels, NAMES), overlay(image / 255, labels, NAMES)
    assert np.array_equal(array(first), array(second))


def test_panel_has_four_columns_titles_and_one_legend(texts: list[str]) -> None:
    labels = torch.full((256, 256), 255)
    labels[:, :128] = 0
    predictions = torch.zeros(256, 256, dtype=torch.int64)
    predictions[:64] = 2
    picture = prediction_panel([grey(256, 256)], [labels], [predictions], NAMES, unseen=[2])
    assert texts[:4] == ["image", "label", "prediction", "unseen classes"]
    assert texts[4:] == ["grass", "cow", "unseen", "no label"]
    assert picture.width == 24 + 4 * 256 + 3 * 8


def test_panel_last_column_shows_unseen_only() -> None:
    labels, predictions = torch.zeros(2, 256, 256).long(), torch.zeros(2, 256, 256).long()
    labels[:, :64] = 2  # labelled unseen, predicted as grass: a miss, in the colour of grass
    predictions[:, 200:] = 2
    picture = array(
        prediction_panel(torch.stack([grey(256, 256)] * 2), labels, predictions, NAMES, [2])
    )
    last = picture[36 : 36 + 256, 12 + 3 * 264 :][:, :256]
    grass, cow = word_palette(NAMES)[[0, 2]].astype(int)
    assert np.abs(last[:64] - (0.15 * 100 + 0.85 * grass)).max() <= 1
    assert np.abs(last[200:] - (0.15 * 100 + 0.85 * cow)).max() <= 1
    assert np.abs(last[64:200] - (0.3 * 100 + 0.7 * 255)).max() <= 1  # dimmed


def test_panel_takes_images_of_several_sizes() -> None:
    sizes = [(100, 200), (300, 150), (900, 1200)]
    images = [grey(*size) for size in sizes]
    maps = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    picture = prediction_panel(images, maps, maps, NAMES)
    assert picture.width == 24 + 4 * 512 + 3 * 8  # the large one is shrunk to 512


def test_heat_map_runs_from_violet_to_yellow() -> None:
    weights = torch.tensor([[0.0, 0.0, 1e-4, 1e-4]]).repeat(4, 1)  # attention weights are small
    picture = array(heat_map(grey(256, 256), weights, alpha=1.0))
    assert picture.shape == (256, 256, 3)
    assert (picture[:, :60] == [8, 6, 40]).all()
    assert (picture[:, -60:] == [252, 250, 180]).all()
    constant = array(heat_map(grey(256, 256), torch.ones(4, 4), alpha=1.0))
    assert (constant == [8, 6, 40]).all()


def test_cluster_map_colours_groups_and_greys_the_rest() -> None:
    groups = torch.tensor([[5, 5], [-1, 9]])
    picture = array(cluster_map(grey(256, 256), groups, alpha=1.0))
    palette = class_palette(2)
    assert (picture[:128] == palette[0]).all()
    assert (picture[128:, 128:] == palette[1]).all()
    assert (picture[128:, :128] == round(0.6 * 100 + 0.4 * 70)).all()
    empty = array(cluster_map(grey(256, 256), torch.full((2, 2), -1)))
    assert (empty == 88).all()


def test_write_png_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "picture.png"
    write_png(Image.new("RGB", (4, 4), (1, 2, 3)), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.getpixel((0, 0)) == (1, 2, 3)
    old = path.read_bytes()

    def fail(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half a picture")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_wrong_arguments() -> None:
    image, labels = grey(8, 8), torch.zeros(8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"as large as the image, got \(8, 9\) for \(8, 8\)"):
        overlay(image, torch.zeros(8, 9), NAMES)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2 or be 255, got \[3\]"):
        overlay(image, labels + 3, NAMES)
    with pytest.raises(ValueError, match=r"must have shape \(3, H, W\), got \(8, 8\)"):
        overlay(labels, labels, NAMES)
    with pytest.raises(ValueError, match="equally many and at least one, got 1, 1 and 2"):
        prediction_panel([image], [labels], [labels, labels], NAMES)
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        prediction_panel([], [], [], NAMES)
    with pytest.raises(ValueError, match=r"finite \(h, w\) map"):
        heat_map(image, torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match=r"`groups` must have shape \(h, w\), got \(4,\)"):
        cluster_map(image, torch.zeros(4))
