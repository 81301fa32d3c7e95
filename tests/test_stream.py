"""The training stream: sample n is the same whoever makes it, and whenever."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from cliptteacher.data.stream import TrainingStream, mix_seed, rank_indices, seeded
from cliptteacher.data.transforms import training_transform


class Numbered:
    """Ten images, each filled with its own number."""

    class_names = ("a", "b")
    unseen = ()
    ignore_index = 255

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(24 * 32, dtype=torch.int64).view(24, 32) % 2
        return torch.full((3, 24, 32), 20 * index, dtype=torch.uint8), label.to(torch.uint8)

    def image_name(self, index: int) -> str:
        return f"picture-{index}"


def make_stream(seed: int = 3) -> TrainingStream:
    return TrainingStream(Numbered(), training_transform(16, scale=(32, 24)), seed)


def pass_through(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return image, label


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    stream = make_stream()
    epochs = [[stream.image_index(10 * e + i) for i in range(10)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_sample_depends_on_seed_and_counter_only() -> None:
    stream, other = make_stream(), make_stream()
    forward = [stream[n] for n in range(25)]
    torch.manual_seed(99)
    for n in reversed(range(25)):
        torch.rand(7)  # whatever else the process draws
        assert all(map(torch.equal, other[n], forward[n]))
    changed = make_stream(seed=4)
    assert any(not torch.equal(changed[n][0], forward[n][0]) for n in range(25))


def test_one_image_is_augmented_differently_in_each_epoch() -> None:
    stream = TrainingStream(Numbered(), lambda image, label: (torch.rand(5), label), seed=0)
    draws = {tuple(stream[n][0].tolist()) for n in range(50)}
    assert len(draws) == 50


def test_global_generator_is_given_back() -> None:
    stream = make_stream()
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    assert stream[3][0].shape == (3, 16, 16)
    assert torch.equal(torch.rand(4), expected)


def test_global_generator_is_given_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(7):
        torch.rand(3)
        raise KeyError("in the block")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_workers_and_ranks_equals_the_stream(workers: int) -> None:
    stream = make_stream()
    for rank in range(2):
        batches = rank_indices(1, 4, batch_size=6, rank=rank, world_size=2)
        loader = DataLoader(stream, batch_sampler=batches, num_workers=workers)
        assert len(loader) == 3
        for iteration, (images, labels) in enumerate(loader, start=1):
            counters = [6 * iteration + 3 * rank + j for j in range(3)]
            assert images.shape == (3, 3, 16, 16) and labels.shape == (3, 16, 16)
            for position, n in enumerate(counters):
                image, label = stream[n]
                assert torch.equal(images[position], image)
                assert torch.equal(labels[position], label)


def test_failing_sample_is_named() -> None:
    def fail(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("no such crop")

    stream = TrainingStream(Numbered(), fail, seed=0)
    index = stream.image_index(12)
    message = rf"sample 12 \(index {index}, image 'picture-{index}'\).*ValueError: no such crop"
    with pytest.raises(RuntimeError, match=message):
        stream[12]


def test_negative_counter_and_empty_dataset() -> None:
    with pytest.raises(IndexError, match="at least 0, got -1"):
        make_stream()[-1]

    class Empty(Numbered):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ValueError, match="at least one image, got 0"):
        TrainingStream(Empty(), pass_through, seed=0)


@given(st.integers(0, 20), st.integers(0, 20), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4))
def test_ranks_share_every_batch(start: int, more: int, world: int, per_rank: int) -> None:
    batch = world * per_rank
    ranks = [list(rank_indices(start, start + more, batch, r, world)) for r in range(world)]
    served = [n for parts in zip(*ranks, strict=True) for part in parts for n in part]
    assert served == list(range(start * batch, (start + more) * batch))


def test_resuming_continues_the_same_counters() -> None:
    whole = list(rank_indices(0, 9, 4, rank=1, world_size=2))
    assert list(rank_indices(5, 9, 4, rank=1, world_size=2)) == whole[5:]
    sampler = rank_indices(5, 9, 4)
    assert len(sampler) == 4 and list(sampler) == list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 6, 0, 4), "positive multiple of the world size 4, got 6"),
        ((0, 5, 0, 0, 1), "positive multiple of the world size 1, got 0"),
        ((0, 5, 4, 2, 2), r"`rank` must lie in 0\.\.world_size-1, got 2 of 2"),
        ((0, 5, 4, 0, 0), "got 0 of 0"),
        ((6, 5, 4, 0, 1), r"`start_iteration` must lie in 0\.\.5, got 6"),
    ],
)
def test_rank_indices_rejects(arguments: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_indices(*arguments)


def test_mixed_seeds_do_not_collide() -> None:
    seeds = {
        mix_seed(s, n, purpose)
        for s in range(30)
        for n in range(100)
        for purpose in ("order", "augment")
    }
    assert len(seeds) == 6000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) > 5995  # the low bits alone are mixed as well
