"""Confusion matrix and scores by hand, by a loop, and against torchmetrics."""

import doctest
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliptteacher import metrics
from cliptteacher.metrics import SegmentationMetrics, class_iou, confusion_matrix, harmonic_iou

SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


def random_maps(seed: int, A: int, shape: tuple[int, ...] = (2, 9, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(0, A, shape, generator=generator)
    label = torch.randint(0, A, shape, generator=generator)
    label = torch.where(torch.rand(shape, generator=generator) < 0.3, pred, label)
    return pred, label.masked_fill(torch.rand(shape, generator=generator) < 0.2, 255)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_matrix_equals_the_loop(seed: int, A: int) -> None:
    pred, label = random_maps(seed, A)
    expected = torch.zeros(A, A, dtype=torch.int64)
    for p, t in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    matrix = confusion_matrix(pred, label, A)
    assert matrix.dtype == torch.int64
    assert torch.equal(matrix, expected)


def test_matrix_takes_small_integers_and_spurious_predictions_where_ignored() -> None:
    pred = torch.tensor([[170, 3, 255]], dtype=torch.uint8)
    label = torch.tensor([[170, 170, 255]], dtype=torch.uint8)
    matrix = confusion_matrix(pred, label, 171)
    assert matrix.shape == (171, 171)
    assert matrix[170, 170] == matrix[170, 3] == 1
    assert matrix.sum() == 2


def test_another_ignore_index_reaches_the_matrix() -> None:
    result = SegmentationMetrics(3, ignore_index=0)
    result.update(torch.tensor([1, 2, 1]), torch.tensor([1, 1, 0]))
    assert result.matrix.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_matrix_of_ignored_pixels_is_zero() -> None:
    everything = torch.full((4, 4), 7)
    assert confusion_matrix(everything, everything, 3, ignore_index=7).sum() == 0


def test_scores_by_hand() -> None:
    # class 0: 2 of 3 pixels; class 1: never there; class 2 (unseen): 1 of 3; 3 (unseen): 1 of 2
    pred = torch.tensor([[0, 0, 2, 3], [2, 2, 3, 1]])
    label = torch.tensor([[0, 0, 0, 3], [2, 3, 255, 255]])
    result = SegmentationMetrics(4, unseen=[3, 2])
    result.update(pred, label)
    scores = result.compute()
    torch.testing.assert_close(
        scores["IoU"],
        torch.tensor([2 / 3, math.nan, 1 / 3, 1 / 2]).double(),
        equal_nan=True,
        rtol=0,
        atol=1e-7,
    )
    assert scores["pAcc"] == 4 / 6
    assert scores["mIoU(S)"] == pytest.approx(2 / 3, abs=1e-15)
    assert scores["mIoU(U)"] == pytest.approx(5 / 12, abs=1e-15)
    assert scores["hIoU"] == pytest.approx(2 * (2 / 3) * (5 / 12) / (2 / 3 + 5 / 12), abs=1e-15)


def test_class_predicted_but_never_labelled_counts_as_zero() -> None:
    matrix = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert class_iou(matrix)[:2].tolist() == [0.5, 0.0]
    assert class_iou(matrix)[2].isnan()


def test_harmonic_mean() -> None:
    assert harmonic_iou(0.5, 0.5) == 0.5
    assert harmonic_iou(0.0, 0.7) == harmonic_iou(0.7, 0.0) == harmonic_iou(0.0, 0.0) == 0.0
    assert math.isnan(harmonic_iou(0.5, math.nan))
    assert harmonic_iou(41.0, 50.7) == pytest.approx(45.3, abs=0.05)  # Table 3 of the paper


def test_without_unseen_classes_the_unseen_scores_are_nan() -> None:
    result = SegmentationMetrics(2)
    result.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    scores = result.compute()
    assert scores["mIoU(S)"] == 0.25
    assert math.isnan(scores["mIoU(U)"])
    assert math.isnan(scores["hIoU"])


def test_without_a_pixel_every_score_is_nan() -> None:
    scores = SegmentationMetrics(3, unseen=[2]).compute()
    assert all(math.isnan(scores[name]) for name in SCORES)  # type: ignore[literal-required]
    assert scores["IoU"].isnan().all()


def test_perfect_prediction_scores_one() -> None:
    label = torch.arange(6).repeat(3)
    result = SegmentationMetrics(6, unseen=[4, 5])
    result.update(label, label)
    scores = result.compute()
    assert [scores["pAcc"], scores["mIoU(S)"], scores["mIoU(U)"], scores["hIoU"]] == [1.0] * 4


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_shards_add_up(seed: int, shards: int) -> None:
    pred, label = random_maps(seed, 5, (6, 5, 5))
    whole, total = SegmentationMetrics(5), torch.zeros(5, 5, dtype=torch.int64)
    whole.update(pred, label)
    for part in range(shards):
        shard = SegmentationMetrics(5)
        for image in range(part, 6, shards):
            shard.update(pred[image], label[image])
        total += shard.matrix
    assert torch.equal(total, whole.matrix)


def test_a_class_may_hold_more_pixels_than_32_bits_can_count() -> None:
    result = SegmentationMetrics(2)
    assert result.matrix.dtype == torch.int64
    result.matrix[0, 0] = 2**31 - 1
    result.update(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert result.matrix.tolist() == [[2**31 + 2, 0], [0, 0]]


def test_reset_forgets() -> None:
    result = SegmentationMetrics(3, unseen=[0])
    result.update(*random_maps(0, 3))
    assert result.matrix.sum() > 0
    result.reset()
    assert result.matrix.sum() == 0


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_torchmetrics(seed: int) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    pred, label = random_maps(seed, 7)
    matrix = classification.MulticlassConfusionMatrix(7, ignore_index=255)(pred, label)
    jaccard = classification.MulticlassJaccardIndex(7, average="none", ignore_index=255)
    result = SegmentationMetrics(7, unseen=[5, 6])
    result.update(pred, label)
    assert torch.equal(result.matrix, matrix)
    torch.testing.assert_close(
        result.compute()["IoU"].float(), jaccard(pred, label), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("unseen", [[], [5, 6], [2], [0, 2, 4]])
def test_absent_classes_and_the_unseen_set_follow_torchmetrics_matrix(unseen: list[int]) -> None:
    """Class 2 is nowhere, class 4 only predicted; the means are taken by hand from its matrix."""
    classification = pytest.importorskip("torchmetrics.classification")
    pred, label = random_maps(9, 7, (4, 11, 6))
    pred[pred == 2], label[label == 2], label[label == 4] = 1, 1, 255
    matrix = classification.MulticlassConfusionMatrix(7, ignore_index=255)(pred, label).tolist()
    result = SegmentationMetrics(7, unseen=unseen)
    result.update(pred, label)
    assert result.matrix.tolist() == matrix
    iou = {}
    for c in range(7):
        union = sum(matrix[c]) + sum(row[c] for row in matrix) - matrix[c][c]
        if union:
            iou[c] = matrix[c][c] / union
    assert set(iou) == {0, 1, 3, 4, 5, 6} and iou[4] == 0
    here = [[iou[c] for c in iou if (c in unseen) == side] for side in (False, True)]
    seen, absent = (sum(values) / len(values) if values else math.nan for values in here)
    scores = result.compute()
    assert scores["mIoU(S)"] == pytest.approx(seen, rel=1e-12)
    assert scores["mIoU(U)"] == pytest.approx(absent, rel=1e-12, nan_ok=True)
    harmonic = 2 / (1 / seen + 1 / absent) if absent else 0.0
    assert scores["hIoU"] == pytest.approx(harmonic, rel=1e-12, nan_ok=True)
    right, counted = sum(matrix[c][c] for c in range(7)), sum(map(sum, matrix))
    assert scores["pAcc"] == pytest.approx(right / counted, rel=1e-12)


def reduce_shard(rank: int, world: int, rendezvous: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    pred, label = random_maps(3, 5, (4, 6, 6))
    shard = SegmentationMetrics(5, unseen=[4])
    shard.update(pred[rank::world], label[rank::world])
    shard.reduce()
    torch.save(shard.matrix, f"{results}/{rank}.pt")
    for again in (shard.reduce, lambda: shard.update(pred, label)):
        with pytest.raises(RuntimeError, match="must not change .* got a call after `reduce`"):
            again()
    dist.destroy_process_group()


def test_reduce_sums_over_two_processes(tmp_path: Path) -> None:
    rendezvous = (tmp_path / "rendezvous").as_uri()
    mp.spawn(reduce_shard, args=(2, rendezvous, str(tmp_path)), nprocs=2)
    whole = confusion_matrix(*random_maps(3, 5, (4, 6, 6)), 5)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), whole)


def test_reduce_without_processes_changes_nothing() -> None:
    result = SegmentationMetrics(4)
    result.update(*random_maps(0, 4))
    before = result.matrix.clone()
    result.reduce()
    result.reduce()
    assert torch.equal(result.matrix, before)


@pytest.mark.parametrize(
    ("pred", "label", "error", "message"),
    [
        ([0, 3], [0, 1], ValueError, "`pred` must lie in 0 .. 2 .* got values from 0 to 3"),
        ([0, -1], [0, 1], ValueError, "`pred` must lie in 0 .. 2 .* got values from -1 to 0"),
        ([0, 1], [0, 254], ValueError, "`label` must lie in 0 .. 2 .* got values from 0 to 254"),
        ([0, 1, 2], [0, 1], ValueError, r"must have one shape, got \(3,\) and \(2,\)"),
        ([0.0, 1.0], [0, 1], TypeError, "`pred` must hold integer classes, got torch.float32"),
        ([0, 1], [False, True], TypeError, "`label` must hold integer classes, got torch.bool"),
    ],
)
def test_matrix_errors(
    pred: list[float], label: list[float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        confusion_matrix(torch.tensor(pred), torch.tensor(label), 3)


@pytest.mark.parametrize("unseen", [[3], [-1], [1, 1]])
def test_wrong_unseen_indices_are_an_error(unseen: list[int]) -> None:
    with pytest.raises(ValueError, match="`unseen` must hold distinct class indices from 0 to 2"):
        SegmentationMetrics(3, unseen=unseen)


def test_no_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        SegmentationMetrics(0)


def test_doctests() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted > 0
    assert result.failed == 0
