"""Map a function over many files in processes; the results come in order, as they are ready."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, chunk: int = 1
) -> Iterator[Result]:
    """Yield ``function(task)`` of each task.

    Args:
        function: one that can be pickled, such as a function of a module or a `partial` of one.
        tasks: what to call it with.
        workers: processes; 1 works in this one.
        chunk: tasks handed over at a time.
    """
    if workers <= 1 or len(tasks) <= chunk:
        yield from map(function, tasks)
        return
    # Not forked: the caller may hold threads of PyTorch, and a forked copy of their locks hangs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(function, tasks, chunksize=chunk)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for what has not begun
