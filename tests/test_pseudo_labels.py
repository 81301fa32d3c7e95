"""The measures of pseudo labels, against loops, scikit-learn and cases that one can count."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from test_programs import NAMES, UNSEEN, tiny_clip, write_dataset

from cliptteacher.clip import save_clip
from cliptteacher.data.transforms import cut_to_patches
from cliptteacher.framework import CLIPTeacherConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pseudo_labels")


def random_maps(seed: int, groups: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-1, groups, (12, 16), generator=g),
        torch.randint(-1, classes, (12, 16), generator=g),
    )


@pytest.mark.parametrize("seed", range(4))
def test_measures_against_loops_and_scikit_learn(quality: ModuleType, seed: int) -> None:
    groups, hidden = random_maps(seed)
    row = quality.compare(groups, hidden, torch.ones_like(groups, dtype=torch.bool))
    pixels = [
        (int(g), int(a))
        for g, a in zip(groups.flatten(), hidden.flatten(), strict=True)
        if g >= 0 and a >= 0
    ]
    right = in_mixed = 0
    for group in {g for g, _ in pixels}:
        counts = [sum((g, a) == (group, k) for g, a in pixels) for k in range(3)]
        right += max(counts)
        in_mixed += sum(counts) if sum(counts) - max(counts) > 0.05 * sum(counts) else 0
    cuts = []
    for k in range(3):
        own = [g for g, a in pixels if a == k]
        shares = [own.count(g) / len(own) for g in set(own)]
        cuts.append(math.exp(-sum(share * math.log(share) for share in shares)))
    assert row["purity"] == pytest.approx(right / len(pixels))
    assert row["mixed"] == pytest.approx(in_mixed / len(pixels))
    assert row["pieces"] == pytest.approx(sum(cuts) / 3)
    assert row["ARI"] == pytest.approx(adjusted_rand_score(*zip(*pixels, strict=True)))
    assert row["hidden"] == (hidden >= 0).sum() and row["found"] == len(pixels)


def test_strict_purity_counts_the_unlabelled_as_a_class(quality: ModuleType) -> None:
    groups = torch.tensor([[0, 0, 0, 1, 1]])
    hidden = torch.tensor([[4, -1, -1, 2, 2]])
    row = quality.compare(groups, hidden, torch.ones_like(groups, dtype=torch.bool))
    assert row["purity"] == 1 and row["strict"] == pytest.approx(4 / 5)


def test_a_perfect_partition_and_a_single_group(quality: ModuleType) -> None:
    hidden = torch.zeros(8, 8, dtype=torch.long)
    hidden[:, 4:] = 3
    free = torch.ones(8, 8, dtype=torch.bool)
    perfect = quality.compare(7 - hidden, hidden, free)
    wanted = {"purity": 1, "strict": 1, "mixed": 0, "pieces": 1, "ARI": 1, "boundary": 1}
    assert {name: perfect[name] for name in wanted} == pytest.approx(wanted)
    whole = quality.compare(torch.zeros_like(hidden), hidden, free)
    wanted = {"purity": 0.5, "mixed": 1, "pieces": 1, "ARI": 0, "boundary": 0}
    assert {name: whole[name] for name in wanted} == pytest.approx(wanted)


def test_a_boundary_may_lie_two_pixels_of_128_beside_the_true_one(quality: ModuleType) -> None:
    hidden = torch.zeros(128, 128, dtype=torch.long)
    hidden[:, 64:] = 1
    free = torch.ones(128, 128, dtype=torch.bool)
    for shift, found in ((0, 1), (2, 1), (-2, 1), (3, 0), (-3, 0)):
        groups = torch.zeros_like(hidden)
        groups[:, 64 + shift :] = 1
        assert quality.compare(groups, hidden, free)["boundary"] == found


def test_boundaries_to_annotated_pixels_do_not_count(quality: ModuleType) -> None:
    hidden = torch.tensor([[0, 0, -1, -1]])
    free = torch.tensor([[True, True, False, False]])
    assert "boundary" not in quality.compare(hidden, hidden, free)


def test_nothing_hidden_is_no_image_of_any_measure(quality: ModuleType) -> None:
    nothing = torch.full((4, 4), -1)
    row = quality.compare(nothing, nothing, torch.zeros(4, 4, dtype=torch.bool))
    assert row == {"hidden": 0, "found": 0}
    result = quality.summarise([row])
    assert result["purity"] is None and result["covered"] is None
    assert quality.cells(result) == ["-"] * len(quality.COLUMNS)


def test_measures_are_averaged_over_the_images_that_have_them(quality: ModuleType) -> None:
    rows = [
        {"purity": 0.5, "hidden": 10.0, "found": 10.0},
        {"purity": 1.0, "hidden": 30.0, "found": 0.0},
        {"hidden": 0.0, "found": 0.0},
    ]
    result = quality.summarise(rows)
    assert result["purity"] == 0.75 and result["covered"] == 0.25


def test_rivals_are_the_groups_of_a_class_in_all_images_together(quality: ModuleType) -> None:
    groups = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]], [[-1, -1, 0, 0]]])
    hidden = torch.tensor([[[5, 5, 5, 5]], [[7, 7, 7, 7]], [[5, 5, 5, 5]]])
    # class 5: two groups in the first image, one in the third, two pixels each; class 7: one
    assert quality.rivals(groups, hidden)["rivals"] == pytest.approx((3 + 1) / 2)
    assert quality.rivals(groups, torch.full_like(hidden, -1)) == {}


def test_readings_differ_from_the_base_in_one_field(quality: ModuleType) -> None:
    found = quality.groupings(CLIPTeacherConfig(), 16)
    assert next(iter(found)) == "base" and list(found)[-1] == "one group an image"
    assert "lambda 0.9" in found and "lambda 0.8" not in found  # 0.8 is the base
    assert "seeding window" in found and "tokens final" in found


def test_cutting_keeps_the_middle_and_moves_both_alike() -> None:
    image = torch.arange(3 * 19 * 30).reshape(3, 19, 30).to(torch.uint8)
    label = image[0].clone()
    cut, cut_label = cut_to_patches(image, label, 8)
    assert torch.equal(cut, image[:, 1:17, 3:27]) and torch.equal(cut_label, label[1:17, 3:27])
    small, small_label = cut_to_patches(image[:, :5, :9], label[:5, :9], 8)
    assert small.shape == (3, 8, 8) and (small_label[5:] == 255).all()
    resized, resized_label = cut_to_patches(image, label, 4, (15, 10))
    assert resized.shape == (3, 8, 12) and resized_label.shape == (8, 12)


def test_the_program_from_end_to_end(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", NAMES, UNSEEN)
    torch.manual_seed(0)
    save_clip(tiny_clip(), tmp_path / "clip.pt")
    options = f"--data folder --root {tmp_path / 'data'} --clip {tmp_path / 'clip.pt'}"
    quality.main([*options.split(), "--output", str(tmp_path / "out"), "--batch-size", "3"])
    content = json.loads((tmp_path / "out" / "pseudo_labels.json").read_text())
    results = content["results"]
    assert content["settings"]["images"] == 4  # the train split
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert results["one group an image"]["pieces"] == 1
    assert results["base"]["rivals"] >= results["base"]["pieces"] >= 1
    assert results["one group a token"]["purity"] >= results["base"]["purity"]
    assert results["no fusion"]["groups"] == results["base"]["clusters"]
    assert results["base"]["groups"] <= results["base"]["clusters"]
    table = (tmp_path / "out" / "pseudo_labels.md").read_text()
    assert table.count("\n| ") == len(results) + 1
