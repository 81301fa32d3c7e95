"""Which sample a data worker was making when it died: killed for its memory, or crashed below."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, get_worker_info

IDLE = -1


class Samples(Protocol):
    """A map-style data set that may be asked for any n."""

    def __getitem__(self, n: int) -> Any: ...


class WatchedSamples(Dataset[Any]):
    """A data set whose workers note in shared memory what they are at.

    Args:
        stream: the data set.
        workers: number of processes that will read it.
    """

    def __init__(self, stream: Samples, workers: int) -> None:
        self.stream = stream
        self._at = torch.full((workers,), IDLE, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, n: int) -> Any:
        """Return sample n of the data set."""
        worker = get_worker_info()
        if worker is None:
            return self.stream[n]
        self._at[worker.id] = n
        sample = self.stream[n]
        self._at[worker.id] = IDLE
        return sample

    def in_the_making(self) -> list[int]:
        """Samples that were begun and not finished, in order."""
        return sorted(n for n in self._at.tolist() if n != IDLE)
