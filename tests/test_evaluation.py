"""Evaluation: scores by hand, shards that add up, tables and JSON."""

import json
import math
from pathlib import Path
from typing import Any

import benchmark_trees as trees
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

from cliptteacher import evaluation
from cliptteacher.data import open_dataset, prepare_benchmark
from cliptteacher.evaluation import (
    PANEL_IMAGES,
    evaluate,
    format_line,
    format_scores,
    scores_as_percent,
    sweep_gamma,
)
from cliptteacher.inference import Predictor
from cliptteacher.metrics import SegmentationMetrics
from cliptteacher.visualize import prediction_panel

NAMES = ("grass", "sky", "cow", "boat")


class Scenes:
    """Seven images of mixed sizes whose red channel is (noisily) the label."""

    class_names = NAMES
    unseen = (2,)
    ignore_index = 255
    sizes = ((6, 8), (6, 8), (6, 8), (5, 9), (5, 9), (6, 8), (4, 4))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        size = self.sizes[index]
        label = torch.randint(3, size, generator=generator, dtype=torch.uint8)
        noisy = torch.rand(size, generator=generator) < 0.3
        red = torch.where(noisy, torch.randint(3, size, generator=generator).byte(), label)
        label[0, 0] = 255
        return red.expand(3, -1, -1).contiguous(), label

    def image_name(self, index: int) -> str:
        return f"scene-{index}"


def red_channel(images: Tensor) -> Tensor:
    """Predict the label that the red channel spells out."""
    assert images.dtype == torch.uint8 and images.ndim == 4
    return images[:, 0].long()


def same(first: dict[str, object], second: dict[str, object]) -> bool:
    names = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
    iou = torch.equal(
        torch.as_tensor(first["IoU"]).nan_to_num(-1), torch.as_tensor(second["IoU"]).nan_to_num(-1)
    )
    return iou and all(first[name] == second[name] for name in names)


def plain_scores() -> dict[str, float]:
    """Count over all pixels of all images at once, in sets."""
    data = Scenes()
    truth = torch.cat([data[i][1].flatten() for i in range(7)])
    guess = torch.cat([data[i][0][0].flatten() for i in range(7)])[truth != 255]
    truth = truth[truth != 255]
    iou = []
    for k in range(3):
        inter = int(((truth == k) & (guess == k)).sum())
        iou.append(inter / int(((truth == k) | (guess == k)).sum()))
    seen, unseen = (iou[0] + iou[1]) / 2, iou[2]
    accuracy = int((truth == guess).sum()) / len(truth)
    harmonic = 2 * seen * unseen / (seen + unseen)
    return {"pAcc": accuracy, "mIoU(S)": seen, "mIoU(U)": unseen, "hIoU": harmonic}


def test_scores_equal_a_count_over_all_pixels() -> None:
    result = evaluate(red_channel, Scenes())
    expected = plain_scores()
    assert {name: result[name] for name in expected} == pytest.approx(expected)  # type: ignore[literal-required]
    assert math.isnan(float(result["IoU"][3]))


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (5, 0), (1, 2)])
def test_batches_and_workers_change_nothing(batch_size: int, workers: int) -> None:
    result = evaluate(red_channel, Scenes(), batch_size=batch_size, workers=workers)
    assert same(dict(result), dict(evaluate(red_channel, Scenes())))


def test_only_neighbours_of_equal_size_share_a_batch() -> None:
    shapes: list[tuple[int, ...]] = []

    def predictor(images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return red_channel(images)

    evaluate(predictor, Scenes(), batch_size=2)
    expected = [(2, 3, 6, 8), (1, 3, 6, 8), (2, 3, 5, 9), (1, 3, 6, 8), (1, 3, 4, 4)]
    assert shapes == expected


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_shards_partition_the_images_and_add_up(world_size: int) -> None:
    seen: list[int] = []
    metrics = SegmentationMetrics(4, unseen=[2])

    def on_sample(index: int, image: Tensor, label: Tensor, prediction: Tensor) -> None:
        raw, truth = Scenes()[index]
        assert torch.equal(image, raw) and torch.equal(label, truth)
        seen.append(index)
        metrics.update(prediction, label)

    for rank in range(world_size):
        evaluate(
            red_channel,
            Scenes(),
            rank=rank,
            world_size=world_size,
            batch_size=2,
            on_sample=on_sample,
        )
    assert sorted(seen) == list(range(7))
    assert same(dict(metrics.compute()), dict(evaluate(red_channel, Scenes())))


def test_the_unseen_classes_can_be_others_than_those_of_the_data_set() -> None:
    own, other = evaluate(red_channel, Scenes()), evaluate(red_channel, Scenes(), unseen=[0, 1])
    assert torch.equal(own["IoU"][:3], other["IoU"][:3])
    assert other["mIoU(S)"] == own["mIoU(U)"] and other["mIoU(U)"] == own["mIoU(S)"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_numbers_of_training_are_left_alone(workers: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(red_channel, Scenes(), workers=workers)
    assert torch.equal(torch.rand(3), expected)


def test_progress_counts_the_images_of_the_rank() -> None:
    calls: list[tuple[int, int]] = []
    evaluate(
        red_channel,
        Scenes(),
        batch_size=2,
        rank=0,
        world_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 4), (3, 4), (4, 4)]  # images 0 2 | 4 | 6


def sliding(num_classes: int = 4, **settings: Any) -> Predictor:
    """A tiny student (a patch of two pixels, four channels) under random text features."""
    generator = torch.Generator().manual_seed(0)
    student = torch.nn.Conv2d(3, 4, 2, stride=2)
    with torch.no_grad():
        student.weight.copy_(torch.randn(student.weight.shape, generator=generator))
        student.bias.copy_(-student.weight.sum((1, 2, 3)) / 2)  # type: ignore[union-attr]
    text = torch.randn(num_classes, 4, generator=generator)
    return Predictor(student, text, unseen=[2], gamma=0.1, **settings)


class Colours(Scenes):
    """The same sizes in three different channels, so that every pixel is predicted otherwise."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _, label = super().__getitem__(index)
        generator = torch.Generator().manual_seed(100 + index)
        size = (3, *self.sizes[index])
        return torch.randint(256, size, generator=generator, dtype=torch.uint8), label


SPLITS = ("train", "val")
WAYS = {"whole": {}, "slide": {"mode": "slide", "window": 6, "stride": 5, "resize": (12, 8)}}


def data_sets(root: Path) -> dict[str, Any]:
    """Seven images of mixed sizes, and both splits of the miniature of VOC."""
    return {"mixed": Colours(), **{name: open_dataset("voc", root, name) for name in SPLITS}}


def scores_of_everything(root: Path, **sharing: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{name} {way}": dict(evaluate(sliding(len(data.class_names), **settings), data, **sharing))
        for name, data in data_sets(root).items()
        for way, settings in WAYS.items()
    }


def _rank_process(rank: int, folder: str) -> None:
    """Be one of three processes, then one of two, if there is a place."""
    for world_size in (3, 2):
        if rank >= world_size:
            return
        meet = f"file://{folder}/meet{world_size}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
        seen: list[int] = []
        results = scores_of_everything(
            Path(folder),
            rank=rank,
            world_size=world_size,
            on_sample=lambda index, *_, seen=seen: seen.append(index),
        )
        torch.save({"seen": seen, **results}, f"{folder}/{rank}of{world_size}.pt")
        dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path: Path) -> None:
    """Whole images and sliding windows; shares differ in size, and one of three has no image."""
    prepare_benchmark(trees.publish("voc", tmp_path, tmp_path / "archives"), tmp_path)
    expected = scores_of_everything(tmp_path)
    for name, data in data_sets(tmp_path).items():
        assert not same(expected[f"{name} whole"], expected[f"{name} slide"])
        assert 0 < expected[f"{name} slide"]["pAcc"] < 1
        assert len(data) == {"mixed": 7, "train": 6, "val": 2}[name]
    mp.spawn(_rank_process, args=(str(tmp_path),), nprocs=3)  # type: ignore[no-untyped-call]
    for world_size in (3, 2):
        files = [tmp_path / f"{rank}of{world_size}.pt" for rank in range(world_size)]
        loaded = [torch.load(file, weights_only=True) for file in files]
        seen = [index for result in loaded for index in result["seen"]]
        assert sorted(seen) == sorted([*range(7), *range(6), *range(2)] * len(WAYS))
        for result in loaded:
            for name, scores in expected.items():
                assert same(result[name], scores)


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_predicted_at_the_original_size(way: str) -> None:
    """Through the predictor that evaluation is given, by hand: logits, argmax, count."""
    predictor, data = sliding(**WAYS[way]), Colours()
    shapes: list[tuple[int, ...]] = []
    metrics = SegmentationMetrics(4, unseen=[2])
    for index in range(7):
        image, label = data[index]
        prediction = predictor.logits(image).argmax(0)
        shapes.append(tuple(prediction.shape))
        metrics.update(prediction, label)
    assert tuple(shapes) == Scenes.sizes
    assert same(dict(metrics.compute()), dict(evaluate(predictor, data)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"`rank` must lie in 0\.\.world_size-1, got 2 of 2"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(red_channel, Scenes(), **settings)  # type: ignore[arg-type]


def test_empty_dataset() -> None:
    class Empty(Scenes):
        sizes = ()

    with pytest.raises(ValueError, match="at least one image, got 0"):
        evaluate(red_channel, Empty())


RESULT = {
    "pAcc": 0.7484,
    "mIoU(S)": 0.41,
    "mIoU(U)": float("nan"),
    "hIoU": 0.0,
    "IoU": torch.tensor([0.5, 0.912, float("nan"), 0.0]),
}


def test_table_by_hand() -> None:
    assert format_scores(RESULT, NAMES, unseen=[2, 3]) == "\n".join(
        [
            "  class  group     IoU",
            "  sky    seen     91.2",
            "  grass  seen     50.0",
            "  boat   unseen    0.0",
            "  cow    unseen      -",
            "",
            "     pAcc  mIoU(S)  mIoU(U)     hIoU",
            "     74.8     41.0        -      0.0",
        ]
    )


def test_line_by_hand() -> None:
    line = format_line(scores_as_percent(RESULT, NAMES))
    assert line == "pAcc 74.8  mIoU(S) 41.0  mIoU(U) -  hIoU 0.0"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_panel_shows_the_first_images_of_rank_0(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def draw(images: Any, labels: Any, predictions: Any, *names: Any) -> Image.Image:
        drawn.append((images, labels, predictions))
        assert names == (NAMES, (2,))
        return prediction_panel(images, labels, predictions, *names)

    monkeypatch.setattr(evaluation, "prediction_panel", draw)
    metrics = SegmentationMetrics(4, unseen=[2])
    monkeypatch.setattr(SegmentationMetrics, "reduce", lambda self: None)
    path = tmp_path / "panels" / "val.png"
    found = evaluate(red_channel, Scenes(), rank=rank, world_size=2, batch_size=4, panel=path)
    assert path.exists() == (rank == 0) == (len(drawn) == 1)
    indices = range(rank, 7, 2)
    for index in indices:
        image, label = Scenes()[index]
        metrics.update(image[0].long(), label)
    assert same(dict(found), dict(metrics.compute()))  # drawing changes no score
    if rank == 0:
        for position, index in enumerate(list(indices)[:PANEL_IMAGES]):
            image, label = Scenes()[index]
            for column, expected in zip(drawn[0], (image, label, image[0]), strict=True):
                assert torch.equal(column[position], expected.to(column[position].dtype))


def test_a_panel_has_at_most_so_many_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(images: Any, *_: Any) -> Image.Image:
        drawn.append(len(images))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(evaluation, "prediction_panel", draw)
    evaluate(red_channel, Scenes(), batch_size=3, panel=tmp_path / "panel.png")
    assert drawn == [PANEL_IMAGES] and len(Scenes()) > PANEL_IMAGES


def test_percent_survives_json() -> None:
    percent = scores_as_percent(RESULT, NAMES)
    again = json.loads(json.dumps(percent, allow_nan=False))
    assert again == percent
    assert again["pAcc"] == pytest.approx(74.84) and again["mIoU(U)"] is None
    assert list(again["IoU"]) == list(NAMES)
    assert again["IoU"]["sky"] == pytest.approx(91.2) and again["IoU"]["cow"] is None


def test_names_must_match_the_scores() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        scores_as_percent(RESULT, NAMES[:3])


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_sweep_equals_an_evaluation_at_every_gamma(mode: str) -> None:
    torch.manual_seed(0)
    student, text = torch.nn.Conv2d(3, 5, 2, stride=2, bias=False), torch.randn(4, 5)
    settings: dict[str, Any] = {"unseen": [2], "mode": mode, "window": 4, "stride": 3}
    settings["logit_scale"] = 100.0
    gammas = (-3.0, -0.1, 0.0, 0.1, 9.0)
    swept = sweep_gamma(
        Predictor(student, text, gamma=7.0, **settings), Scenes(), gammas, batch_size=2
    )
    for gamma, found in zip(gammas, swept, strict=True):
        assert same(found, evaluate(Predictor(student, text, gamma=gamma, **settings), Scenes()))
    assert len({float(found["mIoU(U)"]) for found in swept}) > 2


def test_a_sweep_of_one_image_has_no_batch() -> None:
    torch.manual_seed(0)
    predictor = Predictor(torch.nn.Conv2d(3, 5, 2, stride=2), torch.randn(4, 5), unseen=[0, 3])
    image = torch.rand(3, 6, 8)
    labels = predictor.sweep(image, (0.0, 1.5))
    assert labels.shape == (2, 6, 8) and torch.equal(labels[1], predictor(image))
