"""CLIP's dense tokens in the place of a student: `DenseTokens` and `evaluate.py --clip-only`."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_programs import NAMES, UNSEEN, tiny_clip, write_dataset

from cliptteacher.clip import DenseTokens, class_text_features, load_clip, save_clip
from cliptteacher.data import FolderDataset
from cliptteacher.metrics import SegmentationMetrics

ROOT = Path(__file__).resolve().parents[1]


def test_images_of_whole_patches_are_encoded_as_they_are() -> None:
    clip = tiny_clip()
    images = torch.rand(2, 3, 24, 40)
    assert torch.equal(DenseTokens(clip)(images), clip.encode_image(images).dense)


@pytest.mark.parametrize(
    ("sides", "grid"),
    [((19, 44), (2, 6)), ((20, 43), (3, 5)), ((3, 8), (1, 1)), ((11, 12), (1, 2))],
)
def test_other_sizes_go_to_the_nearest_whole_patch(
    sides: tuple[int, int], grid: tuple[int, int]
) -> None:
    dense = DenseTokens(tiny_clip())(torch.rand(1, 3, *sides))
    assert dense.shape == (1, 32, *grid)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    return tmp_path


@pytest.mark.parametrize("gamma", [0.0, 0.05])
def test_scores_are_those_of_the_obvious_computation(space: Path, gamma: float) -> None:
    options = f"--clip-only --clip {space / 'clip.pt'} --root {space / 'data'} --device cpu"
    more = f"--gamma {gamma} --json {space / 'scores.json'}"
    importlib.import_module("evaluate").main([*options.split(), *more.split()])
    found = json.loads((space / "scores.json").read_text())
    clip = load_clip(str(space / "clip.pt"))
    text = class_text_features(clip, NAMES)
    metrics = SegmentationMetrics(4, unseen=[NAMES.index(UNSEEN)])
    for image, label in FolderDataset(space / "data", "val"):
        dense = clip.encode_image(image[None].float() / 255).dense
        logits = torch.einsum("bchw,ac->bahw", F.normalize(dense, dim=1), text)
        logits[:, NAMES.index(UNSEEN)] += gamma
        large = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        metrics.update(large.argmax(1), label[None])
    expected = metrics.compute()
    for name in ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU"):
        assert found["scores"][name] == pytest.approx(100 * expected[name], abs=1e-3)
    assert found["checkpoint"] is None and found["clip"] == str(space / "clip.pt")


def test_a_clip_must_be_named_and_one_thing_be_scored(
    space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = importlib.import_module("evaluate")
    with pytest.raises(SystemExit, match="--clip-only needs a CLIP, got none; name one"):
        evaluate.main(["--clip-only", "--root", str(space / "data")])
    with pytest.raises(SystemExit):
        evaluate.main(["--clip-only", "--checkpoint", "x"])
    assert "not allowed with" in capsys.readouterr().err
