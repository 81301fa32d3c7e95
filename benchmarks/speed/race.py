"""Timing that the programs beside this file share: turns, medians, the limit of the machine."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def start(doc: str | None) -> int:
    """Read the only option of these programs, set the threads and return the number of rounds."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of every way")
    rounds: int = parser.parse_args().rounds
    torch.manual_seed(0)
    return rounds


def race(
    ways: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, float]:
    """Median milliseconds of each way. They take turns; a first round warms up.

    With one thread it is the processor's time, which other programs on the machine disturb less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warm_up, rounds):
        for name, way in ways.items():
            began = clock()
            way()
            if turn >= 0:
                times[name].append(1000 * (clock() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def floor_ms(multiply_adds: float) -> float:
    """Milliseconds that a square matrix product takes for so many multiply-adds."""
    a = torch.randn(1024, 1024)
    return race({"product": lambda: a @ a}, 9)["product"] * multiply_adds / 1024**3


def peak_mib(work: Callable[[], object]) -> float:
    """Peak of what PyTorch allocates while the work is done, in MiB."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = top = 0
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top / 2**20


def report(
    row: str, values: dict[str, float], goal: float, floor: float | None = None, unit: str = "ms"
) -> dict[str, object]:
    """Print ours, the first value, beside its peers; returns what the last line of JSON holds.

    `goal` is the least ratio of the fastest peer to ours.
    """
    (_, ours), *peers = values.items()
    ratio = min(value for _, value in peers) / ours
    print(f"{row}: {ratio:.2f} times the best peer, goal {goal:g}")
    for name, value in values.items():
        share = "" if floor is None else f"  {100 * floor / value:4.0f} % of the limit"
        print(f"  {name:<34} {value:9.2f} {unit}  {value / ours:6.2f}{share}")
    settings = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    figures = {"values": values, "ratio": ratio, "goal": goal, "floor": floor, "unit": unit}
    return {"row": row, **figures, **settings}


def finish(rows: list[dict[str, object]]) -> None:
    """Print the last line."""
    print(json.dumps(rows))
