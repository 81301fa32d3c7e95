"""From samples to batches on the device: this process's part, read ahead, copied ahead.

A worker that dies, killed for its memory or crashed below Python, is reported with the sample it
was making; on CUDA the next batch is copied while one is computed with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..data import TrainingStream, rank_indices
from ..distributed import Process
from .interruption import ignore_signals

Batch = tuple[Tensor, ...]
_IDLE = -1
_NAMED_SAMPLES = 8


class WatchedSamples(Dataset[Any]):
    """The samples of a stream; workers note in shared memory which one they are making.

    Args:
        stream: the samples.
        workers: number of processes that will read it.
    """

    def __init__(self, stream: TrainingStream, workers: int) -> None:
        self.stream = stream
        self._at = torch.full((workers,), _IDLE, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, n: int) -> Any:
        """Return sample n of the stream."""
        worker = get_worker_info()
        if worker is None:
            return self.stream[n]
        self._at[worker.id] = n
        sample = self.stream[n]
        self._at[worker.id] = _IDLE
        return sample

    def unfinished(self) -> list[int]:
        """Samples that were begun and not finished, in order."""
        return sorted(n for n in self._at.tolist() if n != _IDLE)


def build_loader(
    stream: TrainingStream, iterations: range, batch_size: int, workers: int, process: Process
) -> DataLoader[Any]:
    """Load this process's part of every batch.

    Args:
        stream: the samples.
        iterations: those still to do, ``range(start, end)``.
        batch_size: images of an iteration over all processes.
        workers: data loading processes.
        process: this process.
    """
    return DataLoader(
        WatchedSamples(stream, workers),
        batch_sampler=rank_indices(
            iterations.start, iterations.stop, batch_size, process.rank, process.world_size
        ),
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
        # The loader draws a seed when it starts; drawn from the global generator it would shift
        # the dropout of a resumed run.
        generator=torch.Generator(),
    )


def name_dead_worker(loader: DataLoader[Any]) -> Iterator[Any]:
    """Pass batches on; if a worker was killed, name the samples that were being made.

    Raises:
        SystemExit: a worker died.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise  # an error inside a worker, which names its sample itself
        samples: WatchedSamples = loader.dataset  # type: ignore[assignment]
        names = [f"{n} (image {_image_of(samples.stream, n)})" for n in samples.unfinished()]
        raise SystemExit(
            f"error: a data worker died while samples {_shorten(names) or '(none)'} were being "
            f"made; lack of memory, or of room in /dev/shm, is the usual reason: try fewer "
            "--workers"
        ) from error


def name_samples(stream: TrainingStream, first: int, count: int) -> str:
    """Name samples first .. first + count - 1 and their images."""
    names = [_image_of(stream, first + i) for i in range(count)]
    return f"samples {first} to {first + count - 1} (images {_shorten(names)})"


def _image_of(stream: TrainingStream, n: int) -> str:
    return stream.dataset.image_name(stream.image_index(n))


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_SAMPLES
    return ", ".join([*names[:_NAMED_SAMPLES], *([f"and {more} more"] if more > 0 else [])])


def move_batches(
    batches: Iterable[Batch],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:
    """Yield every batch on the device, in order.

    On CUDA, batches in pinned memory are copied by a stream of their own, one ahead; the host
    waits for nothing, and the copy of the next batch overlaps with the step on this one.

    Args:
        batches: tuples of tensors on the CPU.
        device: where they go.
        memory_format: of the tensors with four axes.
    """
    if device.type != "cuda":
        yield from (_move(batch, device, memory_format) for batch in batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: list[tuple[Batch, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = _move(batch, device, memory_format)
            waiting.append((moved, stream.record_event()))
        if len(waiting) == 2:
            yield _take(*waiting.pop(0))
    for moved, event in waiting:
        yield _take(moved, event)


def _move(batch: Batch, device: torch.device, memory_format: torch.memory_format) -> Batch:
    return tuple(
        tensor.to(device, non_blocking=True, memory_format=memory_format)
        if tensor.ndim == 4
        else tensor.to(device, non_blocking=True)
        for tensor in batch
    )


def _take(batch: Batch, event: torch.cuda.Event) -> Batch:
    """Let the computing stream wait for the copy, and the allocator for the computing stream."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in batch:
        tensor.record_stream(current)
    return batch
