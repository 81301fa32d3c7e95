"""Bring batches to the device: while one is computed with, the next is on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


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
