"""SIGTERM and SIGUSR1: every process stops behind the same iteration, after a checkpoint.

Clusters announce the end of a job by a signal, sometimes to one process only, and processes that
train together must stop together. After each iteration they compare a flag, by an all-reduce of
one number over gloo, between hosts: no device is waited for. It is started behind one iteration
and read behind the next, so that its latency is hidden; a signal during iteration i ends the run
behind i (one process) or i + 1 (several).
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)
EXIT_CODE = 75  # "temporary failure, try again" of sysexits.h: stopped, goes on with --resume


class StopSignal:
    """Catch the signals within a ``with`` block; ``agreed()`` once an iteration, on all processes.

    Outside the block, and outside the main thread, signals do what they did before.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None  # a gloo group, if there are several processes
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._work: dist.Work | None = None

    def __enter__(self) -> StopSignal:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # NCCL cannot compare without a device
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def agreed(self) -> bool:
        """Whether all processes stop here; the same answer on each of them."""
        if self._group is None:
            return self.received
        if self._finish():
            return True
        self._flag = torch.tensor([self.received], dtype=torch.uint8)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:  # else another process may be gone, and waiting would not end
            self._finish()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _finish(self) -> bool:
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def ignore_signals(worker: int) -> None:
    """Let a data worker ignore the signals that clusters send to whole process trees.

    A SIGTERM of its parent, which is how a loader ends its workers, still ends it.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: the only way to learn who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
