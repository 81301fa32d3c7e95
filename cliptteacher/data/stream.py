"""Turn a data set into an endless stream in which sample n is the same wherever it is made.

Iterations, not epochs (section 4.2 of arXiv:2310.02296v1): training counts samples, n = 0, 1, ...

    image of n         position n mod L in the permutation of epoch n // L, seeded by (seed, epoch)
    augmentation of n  the global CPU generator, seeded by (seed, n), given back untouched
    batch i, rank r    n = i B + r B / R + 0, 1, ..., B / R - 1

So a sample depends on (seed, n) and nothing else: not on the number of workers or ranks, nor on
where a run was interrupted; to resume is to start counting at another iteration. Cost: one
permutation per epoch, one reseeding (microseconds) per sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .splits import SegmentationDataset

PairTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TrainingStream(Dataset[tuple[Tensor, Tensor]]):
    """Serve augmented training samples by a global counter; a map-style data set without end.

    Args:
        dataset: images with the labels training may see (`SeenOnly`).
        transform: augmentation (image, label) -> (image, label); it must draw its random numbers
            from PyTorch's global CPU generator only.
        seed: seed of the order and of the augmentation.

    Raises:
        ValueError: if the data set is empty.
    """

    def __init__(self, dataset: SegmentationDataset, transform: PairTransform, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("`dataset` must hold at least one image, got 0; check the split")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def image_index(self, n: int) -> int:
        """Return which image of the data set sample n shows."""
        epoch, position = divmod(n, len(self.dataset))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, "order"))
            order = torch.randperm(len(self.dataset), generator=generator)
            self._order = (epoch, order.tolist())
        return self._order[1][position]

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        """Return sample n: image, uint8 (3, crop, crop), and labels, uint8 (crop, crop).

        Raises:
            IndexError: if n is negative.
            RuntimeError: if the sample cannot be made; the message names it.
        """
        if n < 0:
            raise IndexError(f"the sample counter must be at least 0, got {n}")
        index = self.image_index(n)
        try:
            image, label = self.dataset[index]
            with seeded(mix_seed(self.seed, n, "augment")):
                return self.transform(image, label)
        except Exception as error:
            raise RuntimeError(
                f"sample {n} (index {index}, image {self.dataset.image_name(index)!r}) could not "
                f"be made: {type(error).__name__}: {error}"
            ) from error


class RankBatches(Sampler[list[int]]):
    """Iterate over the batches of global sample counters of one rank; see `rank_indices`."""

    def __init__(self, iterations: range, batch_size: int, rank: int, world_size: int) -> None:
        self.iterations = iterations
        self.batch_size = batch_size
        self.rank_size = batch_size // world_size
        self.offset = rank * self.rank_size

    def __len__(self) -> int:
        """Return the number of iterations left."""
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list of batch_size / world_size counters per iteration."""
        for iteration in self.iterations:
            first = iteration * self.batch_size + self.offset
            yield list(range(first, first + self.rank_size))


def rank_indices(
    start_iteration: int, iterations: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> RankBatches:
    """Return the `batch_sampler` that gives one rank its part of every global batch.

    Args:
        start_iteration: first iteration to serve: 0, or the step of the checkpoint.
        iterations: length of the whole run; iterations start_iteration..iterations-1 are served.
        batch_size: images per iteration over all ranks.
        rank: this process, 0..world_size-1.
        world_size: number of processes.

    Returns:
        Sampler of lists of sample counters for `DataLoader(stream, batch_sampler=...)`.

    Raises:
        ValueError: if the ranks cannot share the batch evenly, or an argument is out of range.

    >>> list(rank_indices(1, 3, batch_size=4, rank=1, world_size=2))
    [[6, 7], [10, 11]]
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie in 0..world_size-1, got {rank} of {world_size}")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"`batch_size` must be a positive multiple of the world size {world_size}, got "
            f"{batch_size}; it counts the images of all ranks together"
        )
    if not 0 <= start_iteration <= iterations:
        raise ValueError(
            f"`start_iteration` must lie in 0..{iterations}, got {start_iteration}; "
            "`iterations` is the length of the whole run"
        )
    return RankBatches(range(start_iteration, iterations), batch_size, rank, world_size)


def mix_seed(seed: int, counter: int, purpose: str) -> int:
    """Hash a seed and a counter to 63 well-mixed bits, another stream for every purpose.

    Neighbouring seeds and counters must not share samples, as seed + counter would.
    """
    text = f"{purpose}:{seed}:{counter}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generator for the duration of a block, then restore its state.

    `torch.manual_seed` would reseed the accelerators as well, and with it the student's dropout.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
