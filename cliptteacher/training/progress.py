"""How a run goes: one line on the main process, the same facts in ``metrics.jsonl``.

The losses stay on the device until a line is due; that is the only place where the loop waits for
it. Three clocks, all of the host:

    training   from one line to the next, without what happens inside ``paused()``
    data       inside that, blocked in ``next(loader)``
    paused     evaluation and checkpoints

Images a second and the share of data are those since the last line. The time that is left follows
the median of the last lines' seconds a step, so that a slow start is soon forgotten; evaluations
still to come are not in it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ..distributed import gather_from_processes
from .records import MetricsLog

Batch = TypeVar("Batch")
RECENT_LINES = 10


class Progress:
    """Sums losses on the device and times the loop; waits for the device only when a line is due.

    Args:
        iterations: length of the run.
        start: iterations already done when this process starts.
        images: images of one iteration, over all processes.
        device: where the losses are.
        log: None on all but the main process.
    """

    def __init__(
        self,
        iterations: int,
        start: int,
        images: int,
        device: torch.device,
        log: MetricsLog | None = None,
    ) -> None:
        self.iterations, self.images, self.device, self.log = iterations, images, device, log
        self._began = self._mark = time.monotonic()
        self._last = start  # iterations done when the last line was due
        self._waited = self._paused = 0.0  # seconds since then
        self._sums: dict[str, Tensor] = {}
        self._adds = 0  # parts of steps in the sums
        self._recent: deque[float] = deque(maxlen=RECENT_LINES)  # seconds a step

    @property
    def seconds(self) -> float:
        """Time since the loop began, evaluation and checkpoints included."""
        return time.monotonic() - self._began

    def time_batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches of a loader on, and note how long each of them kept us waiting."""
        batches = iter(loader)
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps that are still under way are training
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step, or of a part of it."""
        self._sums = {k: self._sums.get(k, 0) + value.detach() for k, value in losses.items()}
        self._adds += 1

    def report(self, done: int, lr: float) -> str | None:
        """Log what happened since the last line, over all processes; all of them must call it.

        Losses and the share of data are means over the processes, the memory is that of the
        process that needs most.

        Args:
            done: iterations done in all.
            lr: learning rate of the backbone in the last of them.

        Returns:
            The line to print on the main process, None on the others.
        """
        steps = done - self._last
        own = torch.stack(tuple(self._sums.values())).float() / self._adds
        host = own.new_tensor([self._waited, peak_memory() / 2**30])
        rows = torch.stack(gather_from_processes(torch.cat((own, host)), self.device))
        now = time.monotonic()  # the device has caught up
        seconds = max(now - self._mark - self._paused, 1e-9)
        *means, waited, _ = rows.mean(dim=0).tolist()
        self._recent.append(seconds / steps)
        row = {
            "step": done,
            **dict(zip(self._sums, means, strict=True)),
            "lr": lr,
            "images_per_second": self.images * steps / seconds,
            "data_wait": min(waited / seconds, 1.0),
            "peak_memory_gib": float(rows[:, -1].max()),
            "seconds_left": (self.iterations - done) * statistics.median(self._recent),
        }
        losses = tuple(self._sums)
        self._sums, self._adds, self._waited, self._paused = {}, 0, 0.0, 0.0
        self._mark, self._last = now, done
        if self.log is None:
            return None
        self.log.write(row)
        return progress_line(row, losses, self.iterations)


def progress_line(row: Mapping[str, float], losses: Iterable[str], iterations: int) -> str:
    """Format one progress line.

    Args:
        row: what ``Progress.report`` writes to ``metrics.jsonl``.
        losses: the keys of ``row`` that are losses, in their order.
        iterations: length of the run.
    """
    terms = "  ".join(f"{name} {row[name]:.3f}" for name in losses)
    return (
        f"{row['step']:>6}/{iterations}  {terms}  lr {row['lr']:.1e}  "
        f"{row['images_per_second']:.3g} images/s  data {100 * row['data_wait']:.0f} %  "
        f"{row['peak_memory_gib']:.1f} GiB  {format_time(row['seconds_left'])} left"
    )


def format_time(seconds: float) -> str:
    """Format a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory() -> int:
    """Largest memory so far in bytes: of the CUDA allocator, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
