"""InfoNCE, focal and dice by hand, by slow loops with one-hot masks, and by gradcheck."""

import doctest
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliptteacher import losses
from cliptteacher.losses import count_pairs, dice_loss, info_nce, nel, sigmoid_focal_loss


def random_rows(seed: int, B: int = 4, M: int = 11, C: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, target, bank = (
        torch.randn(rows, C, generator=generator, dtype=torch.float64) for rows in (B, B, M)
    )
    return predicted, target, bank


def random_masks(
    seed: int, B: int = 3, S: int = 4, H: int = 5, W: int = 6, ignored: float = 0.4
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, S, H, W, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, S, (B, H, W), generator=generator)
    labels[0].clamp_(max=1)  # an image without most of the classes
    return logits, labels.masked_fill(torch.rand(B, H, W, generator=generator) < ignored, 255)


def loop_info_nce(
    predicted: Tensor, target: Tensor, negatives: list[list[Tensor]], temperature: float
) -> float:
    def similarity(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    total = 0.0
    for p, t, others in zip(predicted, target, negatives, strict=True):
        positive = math.exp(similarity(p, t) / temperature)
        rest = sum(math.exp(similarity(p, other) / temperature) for other in others)
        total -= math.log(positive / (positive + rest))
    return total / len(predicted)


def one_hot_pairs(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """List (logits, binary target, present) of every (image, class) pair."""
    return [
        (logits[b, s], (labels[b] == s).to(logits.dtype), bool((labels[b] == s).any()))
        for b in range(logits.shape[0])
        for s in range(logits.shape[1])
    ]


def loop_focal(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    pairs = one_hot_pairs(logits, labels)
    total = torch.zeros((), dtype=logits.dtype)
    for x, t, _ in pairs:
        p = x.sigmoid()
        p_t = p * t + (1 - p) * (1 - t)
        alpha_t = alpha * t + (1 - alpha) * (1 - t)
        total = total + (-alpha_t * (1 - p_t) ** gamma * p_t.log()).mean()
    return total / max(sum(present for *_, present in pairs), 1)


def loop_dice(logits: Tensor, labels: Tensor) -> Tensor:
    present = [(x.sigmoid(), t) for x, t, here in one_hot_pairs(logits, labels) if here]
    total = torch.zeros((), dtype=logits.dtype)
    for p, t in present:
        total = total + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return total / max(len(present), 1)


# InfoNCE, Eq. (3)


def test_info_nce_by_hand() -> None:
    # Own token at angle 0, one negative at a right angle, the temperature 0.5.
    predicted, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    loss = info_nce(predicted, target, torch.tensor([[0.0, 2.0]]), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.05, 2.0))
def test_info_nce_equals_the_loop(seed: int, M: int, temperature: float) -> None:
    predicted, target, bank = random_rows(seed, M=M)
    expected = loop_info_nce(predicted, target, [list(bank)] * 4, temperature)
    assert info_nce(predicted, target, bank, temperature).item() == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_own_row_is_no_negative(seed: int, offset: int) -> None:
    predicted, target, bank = random_rows(seed)
    bank[offset : offset + 4] = target
    rows = offset + torch.arange(4)
    others = [[row for m, row in enumerate(bank) if m != offset + i] for i in range(4)]
    loss = info_nce(predicted, target, bank, target_rows=rows)
    assert loss.item() == pytest.approx(loop_info_nce(predicted, target, others, 0.07))


def test_ranks_average_to_the_global_batch() -> None:
    predicted, target, old = random_rows(0, B=6)
    bank = torch.cat([target, old])
    whole = info_nce(predicted, target, bank, target_rows=torch.arange(6))
    halves = [
        info_nce(predicted[o : o + 3], target[o : o + 3], bank, target_rows=o + torch.arange(3))
        for o in (0, 3)
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


def test_unfilled_rows_of_the_bank_do_not_count() -> None:
    predicted, target, bank = random_rows(1)
    valid = torch.tensor([True, False, True, True, False, True, True, True, False, True, False])
    rows = torch.tensor([0, 2, 3, 5])
    bank[rows] = target
    spoiled = bank.masked_fill(~valid.unsqueeze(1), 0.0)
    position = valid.cumsum(0) - 1
    expected = info_nce(predicted, target, bank[valid], target_rows=position[rows])
    loss = info_nce(predicted, target, spoiled, target_rows=rows, bank_valid=valid)
    torch.testing.assert_close(loss, expected)


def test_no_negative_left_gives_zero_and_finite_gradients() -> None:
    predicted, target, bank = random_rows(2)
    predicted.requires_grad_()
    loss = info_nce(predicted, target, bank, bank_valid=torch.zeros(11, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None
    assert predicted.grad.abs().max() < 1e-12
    assert info_nce(predicted, target, bank[:0]).item() == 0.0


def test_info_nce_gradcheck() -> None:
    predicted, target, bank = random_rows(5, B=3, M=5, C=4)
    bank[1:4] = target
    valid = torch.tensor([True, True, True, True, False])

    def loss(rows: Tensor) -> Tensor:
        return info_nce(rows, target, bank, 0.3, target_rows=1 + torch.arange(3), bank_valid=valid)

    assert torch.autograd.gradcheck(loss, predicted.requires_grad_())


def test_info_nce_is_float32_under_autocast() -> None:
    predicted, target, bank = (rows.float() for rows in random_rows(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = info_nce(predicted, target, bank)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, info_nce(predicted, target, bank))
    half = info_nce(predicted.bfloat16(), target.bfloat16(), bank.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.ones(3, 6)}, r"must have one shape \(B, C\), got \(4, 6\) and \(3, 6\)"),
        ({"predicted": torch.ones(4)}, r"must have one shape \(B, C\), got \(4,\)"),
        ({"bank": torch.ones(11, 5)}, r"`bank` must have shape \(M, C\) with C = 6, got \(11, 5\)"),
        ({"bank": torch.ones(2, 3, 6)}, r"`bank` must have shape .* got \(2, 3, 6\)"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"target_rows": torch.arange(3)}, r"`target_rows` must have shape .* got \(3,\)"),
        ({"bank_valid": torch.ones(4) > 0}, r"`bank_valid` must have shape .* got \(4,\)"),
    ],
)
def test_info_nce_errors(changes: dict[str, Tensor | float], message: str) -> None:
    predicted, target, bank = random_rows(0)
    arguments = {"predicted": predicted, "target": target, "bank": bank} | changes
    with pytest.raises(ValueError, match=message):
        info_nce(**arguments)  # type: ignore[arg-type]


def test_row_outside_the_bank_is_an_error() -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        info_nce(*random_rows(0), target_rows=torch.tensor([0, 1, 2, 11]))


# Focal, dice and NEL, Eq. (12)


def test_focal_by_hand() -> None:
    # One image, classes 0 and 1, pixels labelled 1 and 255, all logits log(3): p = 3/4.
    logits = torch.full((1, 2, 1, 2), math.log(3.0), dtype=torch.float64)
    negative = 0.75 * 0.75**2 * math.log(4)
    positive = 0.25 * 0.25**2 * math.log(4 / 3)
    loss = sigmoid_focal_loss(logits, torch.tensor([[[1, 255]]]))
    assert loss.item() == pytest.approx((3 * negative + positive) / 2, rel=1e-12)


def test_dice_by_hand() -> None:
    # Present: class 0 (2 pixels) and class 2 (1 pixel); p = 1/2 everywhere on 4 pixels.
    labels = torch.tensor([[[0, 0], [2, 255]]])
    expected = ((1 - (2 * 1 + 1) / (2 + 2 + 1)) + (1 - (2 * 0.5 + 1) / (2 + 1 + 1))) / 2
    loss = dice_loss(torch.zeros(1, 3, 2, 2, dtype=torch.float64), labels)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 4))
def test_focal_and_dice_equal_the_loops(
    seed: int, ignored: float, alpha: float, gamma: float
) -> None:
    logits, labels = random_masks(seed, ignored=ignored)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma),
        loop_focal(logits, labels, alpha, gamma),
    )
    torch.testing.assert_close(dice_loss(logits, labels), loop_dice(logits, labels))


def test_gradients_equal_those_of_the_loops() -> None:
    logits, labels = random_masks(0)
    logits.requires_grad_()
    for fast, slow in ((sigmoid_focal_loss, loop_focal), (dice_loss, loop_dice)):
        (actual,) = torch.autograd.grad(fast(logits, labels), logits)
        (expected,) = torch.autograd.grad(slow(logits, labels), logits)
        torch.testing.assert_close(actual, expected)


def test_focal_agrees_with_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    logits, labels = random_masks(1, ignored=0.0)
    targets = F.one_hot(labels, 4).movedim(3, 1).double()
    summed = ops.sigmoid_focal_loss(logits, targets, reduction="sum") / 30
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, labels), summed / count_pairs(labels, 4).double()
    )


def test_focal_without_focus_is_half_the_cross_entropy() -> None:
    logits, labels = random_masks(2, ignored=0.0)
    targets = F.one_hot(labels, 4).movedim(3, 1).double()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    loss = sigmoid_focal_loss(logits, labels, alpha=0.5, gamma=0.0, pair_count=1.0)
    torch.testing.assert_close(loss, entropy / 60)


@pytest.mark.parametrize("scale", [50.0, 1e3, 1e30])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_stay_finite(scale: float, gamma: float) -> None:
    logits = scale * torch.tensor([[[[1.0, -1.0, 1.0, -1.0]], [[1.0, 1.0, -1.0, -1.0]]]])
    logits.requires_grad_()
    terms = nel(logits, torch.tensor([[[0, 0, 1, 255]]]), gamma=gamma)
    (terms.focal + terms.dice).backward()
    assert logits.grad is not None
    assert torch.isfinite(torch.stack([terms.focal.detach(), terms.dice.detach()])).all()
    assert torch.isfinite(logits.grad).all()


def test_perfect_logits_cost_nothing() -> None:
    labels = torch.tensor([[[0, 1], [2, 255]]])
    targets = torch.stack([(labels == s).double() for s in range(3)], dim=1)
    terms = nel(100 * (2 * targets - 1), labels)
    assert terms.focal.item() == pytest.approx(0, abs=1e-12)
    assert terms.dice.item() == pytest.approx(0, abs=1e-12)


def test_nel_weighs_focal_and_dice() -> None:
    logits, labels = random_masks(3)
    options: dict[str, float] = {"alpha": 0.4, "gamma": 1.5}
    terms = nel(logits, labels, focal_weight=20.0, dice_weight=3.0, **options)
    torch.testing.assert_close(terms.focal, 20 * sigmoid_focal_loss(logits, labels, **options))
    torch.testing.assert_close(terms.dice, 3 * dice_loss(logits, labels))
    default = nel(logits, labels)
    torch.testing.assert_close(default.focal, 100 * sigmoid_focal_loss(logits, labels))
    torch.testing.assert_close(default.dice, dice_loss(logits, labels))


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, dice_loss])
def test_gradcheck(loss: Callable[..., Tensor]) -> None:
    logits, labels = random_masks(4, B=2, S=3, H=2, W=3)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_masks(8)
    logits.requires_grad_()
    whole = nel(logits, labels)
    (expected,) = torch.autograd.grad(whole.focal + whole.dice, logits)
    monkeypatch.setattr(losses, "_CHUNK", 50)  # 7 of the 30 pixels at a time
    parts = nel(logits, labels)
    torch.testing.assert_close(parts, whole)
    (gradient,) = torch.autograd.grad(parts.focal + parts.dice, logits)
    torch.testing.assert_close(gradient, expected)


def test_focal_and_dice_keep_no_copy_of_the_logits() -> None:
    logits = torch.randn(1, 8, 64, 64, requires_grad=True)
    labels, kept = torch.randint(8, (1, 64, 64)), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * (tensor.untyped_storage().data_ptr() != logits.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nel(logits, labels)
    assert kept < 3 * logits.numel()  # tensors of one number per pixel, an eighth of the logits


def test_count_pairs() -> None:
    labels = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 0]]])
    count = count_pairs(labels, 3)
    assert count.item() == 4
    assert count.dtype == torch.float32
    assert count_pairs(labels[1:2], 3).item() == 0
    assert count_pairs(labels.to(torch.uint8), 3).item() == 4


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, dice_loss])
def test_pair_count_replaces_the_own_count_and_is_at_least_one(loss: Callable[..., Tensor]) -> None:
    logits, labels = random_masks(5)
    total = loss(logits, labels) * count_pairs(labels, 4).double()
    torch.testing.assert_close(loss(logits, labels, pair_count=8.0), total / 8)
    torch.testing.assert_close(loss(logits, labels, pair_count=torch.tensor(8.0)), total / 8)
    torch.testing.assert_close(loss(logits, labels, pair_count=0.25), total)
    torch.testing.assert_close(loss(logits, labels, pair_count=torch.tensor(0.25)), total)


def test_two_ranks_with_the_mean_pair_count_equal_the_double_batch() -> None:
    logits, labels = random_masks(6, B=4)
    pairs = count_pairs(labels, 4) / 2
    whole = nel(logits, labels)
    first, second = (nel(logits[h], labels[h], pair_count=pairs) for h in (slice(2), slice(2, 4)))
    torch.testing.assert_close((first.focal + second.focal) / 2, whole.focal)
    torch.testing.assert_close((first.dice + second.dice) / 2, whole.dice)


def test_only_ignored_pixels() -> None:
    logits, labels = random_masks(7)
    terms = nel(logits.requires_grad_(), torch.full_like(labels, 255))
    (gradient,) = torch.autograd.grad(terms.focal + terms.dice, logits)
    expected = 100 * 0.75 * (logits.sigmoid() ** 2 * F.softplus(logits)).sum() / 30
    torch.testing.assert_close(terms.focal, expected)
    assert terms.dice.item() == 0.0
    assert torch.isfinite(gradient).all()


def test_what_an_ignored_pixel_weighs_by_hand() -> None:
    """A negative of every class: one pixel of four in the focal term, in the area of the dice."""
    logits = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    terms = nel(logits, torch.tensor([[[0, 255], [0, 1]]]))  # two present pairs, p = 1/2
    (focal,) = torch.autograd.grad(terms.focal, logits, retain_graph=True)
    (dice,) = torch.autograd.grad(terms.dice, logits)
    negative = 0.75 * (2 * 0.5 * 0.25 * math.log(2) + 0.5**2 * 0.5)  # d/dx of p^2 softplus(x)
    expected = torch.full((2,), 100 * negative / 4 / 2, dtype=torch.float64)
    torch.testing.assert_close(focal[0, :, 0, 1], expected)
    # d/dp of -(2 overlap + 1) / (p + t + 1), times p (1 - p), over two pairs
    expected = torch.tensor([3 / 5**2, 2 / 4**2], dtype=torch.float64) * 0.25 / 2
    torch.testing.assert_close(dice[0, :, 0, 1], expected)


def test_other_ignore_index_and_small_label_types() -> None:
    logits, labels = random_masks(8)
    moved = labels.masked_fill(labels == 255, -1)
    for loss in (sigmoid_focal_loss, dice_loss):
        assert torch.equal(loss(logits, moved, ignore_index=-1), loss(logits, labels))
        assert torch.equal(loss(logits, labels.to(torch.uint8)), loss(logits, labels))


def test_masks_are_float32_under_autocast() -> None:
    logits, labels = random_masks(9)
    plain = nel(logits.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nel(logits.float(), labels)
    assert torch.equal(mixed.focal, plain.focal)
    assert torch.equal(mixed.dice, plain.dice)
    assert nel(logits.bfloat16(), labels).focal.dtype == torch.float32


def test_class_outside_the_logits_is_an_error() -> None:
    logits, labels = random_masks(0)
    labels[0, 0, 0] = 4
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        nel(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.ones(4, 5, 6), torch.ones(5, 6).long(), ValueError, r"`logits` .* got \(4, 5, 6\)"),
        (
            torch.ones(2, 4, 5, 6),
            torch.ones(2, 6, 5).long(),
            ValueError,
            r"\(2, 5, 6\), got \(2, 6",
        ),
        (torch.ones(2, 4, 5, 6), torch.ones(2, 5, 6), TypeError, "`labels` .* got torch.float32"),
        (torch.ones(2, 4, 5, 6), torch.ones(2, 5, 6) > 0, TypeError, "`labels` .* torch.bool"),
        (torch.ones(2, 4, 5, 6).int(), torch.ones(2, 5, 6).int(), TypeError, "`logits` .*int32"),
    ],
)
def test_mask_errors(logits: Tensor, labels: Tensor, error: type[Exception], message: str) -> None:
    for loss in (sigmoid_focal_loss, dice_loss, nel):
        with pytest.raises(error, match=message):
            loss(logits, labels)


def test_count_pairs_errors() -> None:
    with pytest.raises(ValueError, match=r"`labels` must have shape \(B, H, W\), got \(5, 6\)"):
        count_pairs(torch.ones(5, 6).long(), 4)
    with pytest.raises(TypeError, match="`labels` must be integer class indices"):
        count_pairs(torch.ones(2, 5, 6), 4)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    predicted, target, bank = random_rows(0)
    rows, valid = torch.arange(4), torch.arange(11) < 9
    contrast = torch.compile(info_nce, fullgraph=True, backend=backend)
    torch.testing.assert_close(
        contrast(predicted, target, bank, target_rows=rows, bank_valid=valid),
        info_nce(predicted, target, bank, target_rows=rows, bank_valid=valid),
    )
    logits, labels = random_masks(0)
    logits.requires_grad_()
    for function in (torch.compile(nel, fullgraph=True, backend=backend), nel):
        terms = function(logits, labels)
        (gradient,) = torch.autograd.grad(terms.focal + terms.dice, logits)
        torch.testing.assert_close(terms.focal, 100 * loop_focal(logits, labels))
        torch.testing.assert_close(terms.dice, loop_dice(logits, labels))
        total = 100 * loop_focal(logits, labels) + loop_dice(logits, labels)
        torch.testing.assert_close(gradient, torch.autograd.grad(total, logits)[0])


def test_doctests() -> None:
    result = doctest.testmod(losses)
    assert result.attempted > 0
    assert result.failed == 0
