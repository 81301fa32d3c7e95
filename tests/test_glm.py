"""The Global Learning Module against explicit loops, alone and in two processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cliptteacher.distributed import gather_rows
from cliptteacher.glm import (
    CLSBank,
    GlobalLearningModule,
    attention_weights,
    pool_features,
    split_windows,
)

TAU = 0.07


def random_step(seed: int, B: int = 3, C: int = 6, h: int = 4, w: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, C, h, w, generator=generator)
    return features, 3 * torch.randn(B, C, generator=generator)


def loop_pool(features: Tensor, cls: Tensor, pooling: str, query: str = "raw") -> Tensor:
    """Eq. (1)-(2) one image, one position at a time, in float64."""
    rows = []
    for image, token in zip(features.double(), cls.double(), strict=True):
        C, h, w = image.shape
        positions = [image[:, y, x] for y in range(h) for x in range(w)]
        if pooling == "mean":
            rows.append(torch.stack(positions).sum(0) / len(positions))
        elif pooling == "max":
            rows.append(
                torch.stack([torch.stack([p[c] for p in positions]).max() for c in range(C)])
            )
        else:
            s = token / token.norm() if query == "unit" else token
            exponents = [((s * p).sum() / math.sqrt(C)).exp() for p in positions]
            total = sum(exponents)
            rows.append(sum(e / total * p for e, p in zip(exponents, positions, strict=True)))
    return torch.stack(rows)


def loop_info_nce(pooled: Tensor, cls: Tensor, negatives: list[list[Tensor]]) -> Tensor:
    """Eq. (3) with its missing -log; ``negatives[i]`` are the other tokens of image i."""
    terms = []
    for predicted, own, others in zip(pooled, cls.double(), negatives, strict=True):
        p = predicted / predicted.norm()
        positive = ((own / own.norm()) @ p / TAU).exp()
        rest = sum((((s / s.norm()).double() @ p) / TAU).exp() for s in others)
        terms.append(-(positive / (positive + rest)).log())
    return torch.stack(terms).mean()


def held(bank: CLSBank) -> Tensor:
    """The tokens that count, the newest first."""
    return bank.tokens[bank.valid()]


def others(history: list[Tensor], size: int) -> list[list[Tensor]]:
    """For each image of the newest batch: every token of the last ``size`` batches but its own."""
    window = history[-size:]
    return [
        [
            row.double()
            for age, batch in enumerate(reversed(window))
            for j, row in enumerate(batch)
            if not (age == 0 and j == i)
        ]
        for i in range(len(history[-1]))
    ]


@pytest.mark.parametrize("query", ["raw", "unit"])
@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
def test_pooling_equals_a_loop_over_positions(pooling: str, query: str) -> None:
    features, cls = random_step(0)
    pooled = pool_features(features, cls, pooling, query)
    assert pooled.shape == (3, 6) and pooled.dtype == torch.float32
    expected = loop_pool(features, cls, pooling, query)
    # Exponents near 10 in float32.
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)


POOLINGS = ("attention", "mean", "max")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_of_the_pooling(pooling: str) -> None:
    features, cls = (part.double() for part in random_step(1, h=2, w=3))
    assert torch.autograd.gradcheck(
        lambda x: pool_features(x, cls, pooling), features.requires_grad_()
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_gradcheck_of_the_module_through_its_bank(pooling: str, iterations: int) -> None:
    """The whole of Eq. (1)-(3) in float64, at the first step and when the bank has rows."""
    history = [random_step(20 + i, h=2, w=3)[1].double() for i in range(iterations)]
    features = random_step(30, h=2, w=3)[0].double().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        module = GlobalLearningModule(pooling, bank_size=2)
        for cls in history[:-1]:
            module.bank.insert(cls)
        return module(x, history[-1])

    assert loss(features).dtype == torch.float64
    expected = loop_info_nce(
        loop_pool(features, history[-1], pooling), history[-1], others(history, 2)
    )
    torch.testing.assert_close(loss(features), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(loss, features)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_in_float32_equal_those_of_the_loop(pooling: str) -> None:
    features, cls = random_step(1)
    ours = features.clone().requires_grad_()
    loop = features.clone().double().requires_grad_()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    (pool_features(ours, cls, pooling) * weight).sum().backward()
    (loop_pool(loop, cls, pooling) * weight).sum().backward()
    torch.testing.assert_close(ours.grad.double(), loop.grad, rtol=1e-5, atol=1e-6)


def test_windows_come_image_by_image_and_row_by_row() -> None:
    maps = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(8))
    windows = split_windows(maps, 2)
    assert windows.shape == (8, 3, 3, 2)
    for number, window in enumerate(windows):
        b, row, column = number // 4, number // 2 % 2, number % 2
        assert torch.equal(window, maps[b, :, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2])
    assert torch.equal(split_windows(maps, 1), maps)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bank_over_26_iterations_equals_the_loop_in_float64(pooling: str) -> None:
    """Negatives at iterations 1, 2, 24 and 25, to the last digits, gradients too."""
    module, history = GlobalLearningModule(pooling), []
    for iteration in range(1, 27):
        features, cls = (part.double() for part in random_step(200 + iteration, B=2, h=2, w=2))
        history.append(cls)
        ours, loop = features.clone().requires_grad_(), features.clone().requires_grad_()
        loss = module(ours, cls)
        assert len(held(module.bank)) == 2 * min(iteration, 24)
        if iteration not in (1, 2, 24, 25, 26):
            continue
        rows = others(history, 24)
        assert [len(row) for row in rows] == [2 * min(iteration, 24) - 1] * 2
        expected = loop_info_nce(loop_pool(loop, cls, pooling), cls, rows)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad(loss, ours)
        torch.testing.assert_close(
            found, *torch.autograd.grad(expected, loop), rtol=1e-10, atol=1e-12
        )


def test_attention_weights_sum_to_one_and_prefer_similar_positions() -> None:
    features, cls = random_step(3)
    features[0, :, 2, 1] = 20 * cls[0] / cls[0].norm()
    weights = attention_weights(features, cls)
    assert weights.shape == (3, 4, 5) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(3))
    assert weights[0].argmax() == 2 * 5 + 1


def test_the_length_of_cls_counts_unless_the_query_is_unit() -> None:
    features, cls = random_step(4)
    weights = attention_weights(features, cls, "unit")
    torch.testing.assert_close(attention_weights(features, 50 * cls, "unit"), weights)
    assert not torch.allclose(attention_weights(3 * features, cls, "unit"), weights, atol=1e-3)
    raw = attention_weights(features, cls)
    assert not torch.allclose(attention_weights(features, 2 * cls), raw, atol=1e-3)


def test_the_loss_of_a_unit_query_ignores_the_length_of_cls() -> None:
    features, cls = random_step(5)
    first, second = (GlobalLearningModule(query="unit") for _ in range(2))
    torch.testing.assert_close(first(features, cls), second(features, 9 * cls))


def test_negatives_are_the_last_24_iterations_but_the_own_token() -> None:
    module = GlobalLearningModule(bank_size=24)
    history: list[Tensor] = []
    for iteration in range(1, 27):
        features, cls = random_step(100 + iteration)
        history.append(cls)
        loss = module(features, cls).double()
        assert len(held(module.bank)) == 3 * min(iteration, 24)
        if iteration in (1, 2, 24, 25, 26):
            pooled = loop_pool(features, cls, "attention")
            torch.testing.assert_close(
                loss, loop_info_nce(pooled, cls, others(history, 24)), rtol=1e-5, atol=1e-6
            )
            if iteration >= 25:  # one batch more would be seen
                longer = loop_info_nce(pooled, cls, others(history, 25))
                assert abs(float(longer - loss)) > 1e-4


def test_the_bank_holds_the_newest_first() -> None:
    bank = CLSBank(3)
    for value in (1.0, 2.0, 3.0, 4.0):
        bank.insert(torch.full((2, 3), value))
        assert bank.tokens.shape == (6, 3)
    assert held(bank)[:, 0].tolist() == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0]


def test_a_larger_batch_enlarges_the_bank_and_a_smaller_one_displaces_its_own_rows() -> None:
    bank, history = CLSBank(3), torch.zeros(0, 2)
    for number, B in enumerate((2, 1, 4, 2, 3, 4, 4)):
        batch = torch.full((B, 2), float(number))
        bank.insert(batch)
        history = torch.cat((batch, history))
        rows = 6 if number < 2 else 12
        assert bank.tokens.shape == (rows, 2)
        history = history[:rows]
        assert torch.equal(held(bank), history)


def test_varying_batch_sizes_equal_the_loop() -> None:
    """The negatives are all rows of the bank but the token of the image itself."""
    module, history = GlobalLearningModule("mean", bank_size=3), torch.zeros(0, 6)
    for seed, B in enumerate((2, 5, 1, 3, 2)):
        features, cls = random_step(seed, B=B)
        history = torch.cat((cls, history))[: 6 if seed == 0 else 15]
        negatives = [[row for j, row in enumerate(history.double()) if j != i] for i in range(B)]
        expected = loop_info_nce(loop_pool(features, cls, "mean"), cls, negatives)
        torch.testing.assert_close(module(features, cls).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_an_iteration_fill_the_bank_like_the_whole(size: int) -> None:
    """Gradient accumulation: the bank spans iterations, not calls."""
    whole, parts = GlobalLearningModule(bank_size=size), GlobalLearningModule(bank_size=size)
    for iteration in range(5):
        features, cls = random_step(iteration, B=4)
        whole(features, cls)
        for part in (slice(0, 2), slice(2, 4)):
            parts(features[part], cls[part], parts=2)
        assert whole.bank.tokens.shape == parts.bank.tokens.shape == (4 * size, 6)
        # The order is another: the newest part comes first.
        blocks = held(parts.bank).reshape(-1, 2, 2, 6).flip(1).reshape(-1, 6)
        assert torch.equal(blocks, held(whole.bank))


@pytest.mark.parametrize("size", [1, 3])
def test_the_last_part_of_an_iteration_has_all_its_negatives(size: int) -> None:
    module = GlobalLearningModule(bank_size=size)
    for iteration in range(5):
        features, cls = random_step(iteration, B=4)
        module(features[:2], cls[:2], parts=2)
        loss = module(features[2:], cls[2:], parts=2)
    rows = held(module.bank).double()
    assert len(rows) == 4 * size
    negatives = [[row for j, row in enumerate(rows) if j != i] for i in range(2)]
    expected = loop_info_nce(loop_pool(features[2:], cls[2:], "attention"), cls[2:], negatives)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1])
def test_size_0_and_1_keep_the_current_batch_alone(size: int) -> None:
    module = GlobalLearningModule(bank_size=size)
    module(*random_step(0))
    features, cls = random_step(1)
    loss = module(features, cls).double()
    assert torch.equal(held(module.bank), cls)
    expected = loop_info_nce(loop_pool(features, cls, "attention"), cls, others([cls], 1))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_single_image_without_history_has_no_negative_and_no_loss() -> None:
    features, cls = random_step(0, B=1)
    features.requires_grad_()
    loss = GlobalLearningModule()(features, cls)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert features.grad.abs().max() < 1e-6


def test_half_precision_features_keep_a_full_precision_softmax() -> None:
    features, cls = random_step(8, C=16)
    weights = attention_weights(features.bfloat16(), cls.bfloat16())
    assert weights.dtype == torch.float32
    # Twenty numbers that were rounded once each; sums of bfloat16 numbers are off by 1e-3.
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_half_precision_maps_are_pooled_in_full_precision(pooling: str) -> None:
    features, cls = random_step(8, C=16, h=16, w=16)
    half = features.bfloat16()
    pooled = pool_features(half, cls.bfloat16(), pooling)
    assert pooled.dtype == torch.float32
    # The inputs are rounded already; a mean in bfloat16 would be off by 1e-3 of its terms.
    torch.testing.assert_close(pooled.double(), loop_pool(half, cls, pooling), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 5), (5, 6), (5, 5)])
def test_windows_must_divide_both_sides(size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"2 x 2 windows must divide maps of {size[0]} x {size[1]}"
    ):
        split_windows(torch.zeros(1, 2, *size), 2)


@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_the_temperature_reaches_the_loss(temperature: float) -> None:
    features, cls = random_step(9)
    pooled = torch.nn.functional.normalize(loop_pool(features, cls, "attention"), dim=1)
    unit = torch.nn.functional.normalize(cls.double(), dim=1)
    expected = torch.nn.functional.cross_entropy(pooled @ unit.T / temperature, torch.arange(3))
    loss = GlobalLearningModule(temperature=temperature)(features, cls)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_bank_alone_keeps_no_graph() -> None:
    bank = CLSBank(2)
    bank.insert(torch.randn(2, 3, requires_grad=True) * 2)
    assert not held(bank).requires_grad and held(bank).dtype == torch.float32


def test_the_bank_keeps_no_graph() -> None:
    module = GlobalLearningModule()
    features, cls = random_step(0)
    module(features, cls.requires_grad_())
    assert not held(module.bank).requires_grad


def test_the_state_is_the_bank_in_a_fixed_shape() -> None:
    module = GlobalLearningModule(bank_size=4)
    assert not list(module.parameters())
    for step in range(6):
        module(*random_step(step))
        state = module.state_dict()
        assert set(state) == {"bank.tokens", "bank.filled"}
        assert state["bank.tokens"].shape == (12, 6)
        assert state["bank.filled"].item() == min(3 * (step + 1), 12)


def test_state_round_trip_through_a_file(tmp_path: Path) -> None:
    module = GlobalLearningModule(bank_size=4)
    for seed in range(6):
        module(*random_step(seed))
    torch.save(module.state_dict(), tmp_path / "bank.pt")
    copy = GlobalLearningModule(bank_size=4)
    copy(*random_step(50))  # what it held before is dropped
    copy.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert torch.equal(held(copy.bank), held(module.bank))
    for seed in range(60, 66):
        assert torch.equal(copy(*random_step(seed)), module(*random_step(seed)))
        assert torch.equal(copy.bank.tokens, module.bank.tokens)


def test_an_empty_bank_makes_the_round_trip() -> None:
    module, copy = GlobalLearningModule(), GlobalLearningModule()
    copy(*random_step(0))
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(*random_step(1)), module(*random_step(1)))


@pytest.mark.parametrize(("size", "B"), [(1, 3), (2, 3), (6, 3), (4, 1), (4, 5)])
def test_a_loaded_bank_takes_the_size_and_the_batch_of_the_run_that_goes_on(
    size: int, B: int
) -> None:
    """Saved with 4 iterations of 3 images: the newest of them stay, as many as now fit."""
    old, bank = CLSBank(4), CLSBank(size)
    stored = torch.arange(24.0).reshape(12, 2)
    for first in (9, 6, 3, 0):
        old.insert(stored[first : first + 3])
    bank.load_state_dict(old.state_dict())
    assert torch.equal(held(bank), stored)
    new = -torch.ones(B, 2)
    bank.insert(new)
    assert bank.tokens.shape == (size * B, 2)
    assert torch.equal(held(bank), torch.cat((new, stored))[: size * B])


def test_equal_batches_are_written_in_place() -> None:
    """From the second iteration on the buffers are the same tensors, of the same shape."""
    bank = CLSBank(3)
    bank.insert(torch.randn(2, 5))
    tokens, filled = bank.tokens, bank.filled
    for _ in range(4):
        bank.insert(torch.randn(2, 5))
    assert bank.tokens is tokens and bank.filled is filled


def test_two_forward_passes_before_one_backward_pass() -> None:
    """Autograd must have saved no tensor that the second insertion overwrites."""
    module, twin = GlobalLearningModule(bank_size=2), GlobalLearningModule(bank_size=2)
    for seed in range(2):  # a full bank, written in place from here on
        module(*random_step(seed))
        twin(*random_step(seed))
    steps = [random_step(seed) for seed in (2, 3)]
    leaves = [features.clone().requires_grad_() for features, _ in steps]
    sum(module(leaf, cls) for leaf, (_, cls) in zip(leaves, steps, strict=True)).backward()
    for leaf, (features, cls) in zip(leaves, steps, strict=True):
        alone = features.clone().requires_grad_()
        twin(alone, cls).backward()
        assert torch.equal(leaf.grad, alone.grad)


def test_half_precision_tokens_are_held_in_full_precision() -> None:
    bank, cls = CLSBank(2), torch.randn(2, 3).bfloat16()
    bank.insert(cls)
    assert bank.tokens.dtype == torch.float32 and torch.equal(held(bank), cls.float())


def test_a_bank_in_float64_keeps_its_digits_through_a_state_dict() -> None:
    bank, fresh = CLSBank(2), CLSBank(2)
    bank.insert(torch.randn(2, 3, dtype=torch.float64))
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(held(fresh), held(bank))


def test_a_state_without_its_count_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"filled"'):
        CLSBank(2).load_state_dict({"tokens": torch.zeros(6, 4)})


def test_bfloat16_features_stay_close() -> None:
    features, cls = random_step(7, C=32)
    exact = GlobalLearningModule()(features, cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = GlobalLearningModule()(features.bfloat16(), cls.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)


def test_alone_nothing_is_gathered() -> None:
    cls = torch.randn(2, 4, requires_grad=True)
    gathered, first = gather_rows(cls)
    assert torch.equal(gathered, cls) and first == 0 and not gathered.requires_grad


def global_step(iteration: int) -> tuple[Tensor, Tensor]:
    return random_step(300 + iteration, B=4)


def train_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = GlobalLearningModule(bank_size=2)
    losses, gradients = [], []
    for iteration in range(4):
        features, cls = (part[2 * rank : 2 * rank + 2] for part in global_step(iteration))
        features = features.clone().requires_grad_()
        loss = module(features, cls)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(features.grad)
    result = {"losses": losses, "gradients": gradients, "bank": held(module.bank)}
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path) -> None:
    mp.spawn(train_on_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert torch.equal(ranks[0]["bank"], ranks[1]["bank"])
    single, history = GlobalLearningModule(bank_size=2), []
    for iteration in range(4):
        features, cls = global_step(iteration)
        history.append(cls)
        features = features.requires_grad_()
        loss = single(features, cls)
        loss.backward()
        mean = (ranks[0]["losses"][iteration] + ranks[1]["losses"][iteration]) / 2
        torch.testing.assert_close(mean, loss.detach())
        both = torch.cat([rank["gradients"][iteration] for rank in ranks]) / 2
        torch.testing.assert_close(both, features.grad)
        rows = others(history, 2)  # rank r owns images 2r and 2r + 1 of the global batch
        for r in range(2):
            own = slice(2 * r, 2 * r + 2)
            pooled = loop_pool(features.detach()[own], cls[own], "attention")
            expected = loop_info_nce(pooled, cls[own], rows[own])
            torch.testing.assert_close(
                ranks[r]["losses"][iteration].double(), expected, rtol=1e-5, atol=1e-6
            )
    assert torch.equal(held(single.bank), ranks[0]["bank"])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"must agree, got \(2, 4, 3, 3\) and \(2, 5\)"):
        pool_features(torch.zeros(2, 4, 3, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"must agree, got \(2, 4, 3\)"):
        pool_features(torch.zeros(2, 4, 3), torch.zeros(2, 4))


def test_unknown_pooling() -> None:
    with pytest.raises(ValueError, match='"mean" or "max", got \'median\''):
        pool_features(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2), "median")


def test_negative_bank_size() -> None:
    with pytest.raises(ValueError, match="at least 0, got -1"):
        GlobalLearningModule(bank_size=-1)


def test_an_unknown_query_is_refused() -> None:
    with pytest.raises(ValueError, match='`query` must be "raw" or "unit", got \'units\''):
        attention_weights(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2), "units")
