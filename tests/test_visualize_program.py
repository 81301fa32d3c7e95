"""`examples/visualize.py`: the figures of a tiny run, and what their captions claim."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from test_programs import NAMES, UNSEEN, tiny_clip, training, write_dataset

from cliptteacher.clip import save_clip
from cliptteacher.data import FolderDataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def visualize(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("visualize")


def test_three_figures_of_a_run(
    program: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    program("train").main(training(tmp_path, tmp_path / "run", "--iterations", "2"))
    capsys.readouterr()
    visualize = program("visualize")
    argv = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "figures")]
    visualize.main([*argv, "--images", "2"])
    files = [str(tmp_path / "figures" / f"figure{k}.png") for k in (5, 6, 7)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == files and printed[3].startswith("attention over 2 images: as if spread")
    measured = json.loads((tmp_path / "figures" / "figure5.json").read_text())
    assert measured["images"] == 2 and 0 < measured["effective_share"] <= 1 <= measured["peak"]
    sizes = [Image.open(file).size for file in files]
    side = 208  # the recipe fits 64 pixels into 107, whole patches make 104, enlarged by two
    assert sizes[0][0] >= 3 * side and sizes[1][0] >= 8 * side and sizes[2][0] >= 4 * side
    assert all(height > 2 * side for _, height in sizes)
    write_dataset(tmp_path / "other", ("a", "b", "c", "d"), "d")
    with pytest.raises(SystemExit, match="must have the classes of training, grass, sky, brick"):
        visualize.main([*argv, "--root", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="does not exist"):
        visualize.main(["--checkpoint", str(tmp_path / "none"), *argv[2:]])


def test_the_caption_divides_attention_and_area(visualize: ModuleType) -> None:
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    labels[:, 2:] = 3
    labels[3, 3] = 255
    weights = torch.tensor([[1.0, 6.0], [1.0, 2.0]]) / 10
    sample = visualize.Sample("x", torch.zeros(3, 4, 4), labels, labels)
    caption = visualize.attention_caption(weights, sample, [3])
    assert caption == (
        "x: attention / area: seen 20% / 50%, unseen 75% / 44%, no label 5% / 6%; "
        "peak 2.4 x the mean"
    )


def test_attention_is_measured_against_the_plain_mean(
    visualize: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    dataset = FolderDataset(tmp_path / "data", "train")
    trained, clip = SimpleNamespace(settings={"resize": None}), SimpleNamespace(patch_size=8)
    even = torch.full((8, 8), 1 / 64)
    monkeypatch.setattr(visualize, "attention_of", lambda *_: even)
    found = visualize.measure_attention(dataset, trained, clip)
    assert found["effective_share"] == pytest.approx(1) and found["peak"] == pytest.approx(1)
    assert found["lift"] == pytest.approx({"seen": 1, "unseen": 1, "no label": 1})
    top = torch.zeros(8, 8)
    top[0] = 1 / 8  # the upper eight rows of pixels, two of which have no label
    monkeypatch.setattr(visualize, "attention_of", lambda *_: top)
    found = visualize.measure_attention(dataset, trained, clip)
    assert found["effective_share"] == pytest.approx(1 / 8) and found["peak"] == pytest.approx(8)
    assert found["lift"]["no label"] == pytest.approx((2 / 8) / (2 / 64))


def test_centres_alone_are_the_largest_of_the_largest_groups(visualize: ModuleType) -> None:
    groups = torch.tensor([[1, 1, 1, 1, 1, 0, 0, -1]])
    clusters = torch.tensor([[4, 4, 5, 5, 5, 2, 3, -1]])
    masks = visualize.centers_alone(clusters, groups)
    assert len(masks) == visualize.CENTERS
    assert masks[0].tolist() == [[-1, -1, 0, 0, 0, -1, -1, -1]]
    assert masks[1].tolist() == [[-1, -1, -1, -1, -1, 0, -1, -1]]
    assert all((mask == -1).all() for mask in masks[2:])


def test_samples_show_seen_and_unseen_classes_and_hide_the_latter(
    visualize: ModuleType, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    dataset = FolderDataset(tmp_path / "data", "train")
    samples = visualize.choose_samples(dataset, 4, 8, None)
    unseen = NAMES.index(UNSEEN)
    with_unseen = [bool((sample.labels == unseen).any()) for sample in samples]
    assert with_unseen == sorted(with_unseen, reverse=True) and with_unseen[0]
    for sample in samples:
        hidden = (sample.labels == unseen) | (sample.labels == 255)
        assert torch.equal(sample.seen == 255, hidden)
