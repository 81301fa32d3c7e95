"""What a long training run needs beside the loop, which is ``examples/train.py``.

config, recipes, paper_recipes   options, and named sets of them
optimizer                        parameter groups and the learning rate
loading                          batches on the device
run                              the run directory: resume, log, checkpoints, evaluation, signals
plan, cost                       what a run is going to be: hours and memory
"""

from __future__ import annotations

import importlib
from typing import Any

_FILES = {
    *("config", "cost", "finite", "interruption", "loading", "optimizer", "paper_recipes", "plan"),
    *("progress", "recipes", "records", "run"),
}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    """Import a file of this folder on first use (PEP 562)."""
    if name in _FILES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILES})
