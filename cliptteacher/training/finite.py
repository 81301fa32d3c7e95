"""Notice a loss or gradient that is not finite, without waiting for the device at every step.

Each step leaves a note on the device; ``check`` reads it, at the lines of the log and before every
checkpoint, so that no checkpoint is written behind such a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import gather_from_processes

GRADIENT = "gradient"


class NonFiniteStep(NamedTuple):
    """The first step whose loss or gradient was not finite."""

    step: int
    terms: dict[int, list[str]]  # by rank: loss terms, or "gradient" if these were finite


class FiniteCheck:
    """Keep a note of the first step that was not finite.

    Args:
        device: of the losses.
        scaled: the loss is scaled, for float16: gradients may overflow, and only losses count.
    """

    def __init__(self, device: torch.device, scaled: bool = False) -> None:
        self.scaled = scaled
        self._names: list[str] = []
        self._bad = torch.zeros(0, dtype=torch.bool, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)  # 1 + step; 0: none yet
        self._terms = self._bad

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Look at the losses of a step, or of a part of it."""
        bad = ~torch.stack([value.detach() for value in losses.values()]).isfinite()
        self._names = [*losses, GRADIENT]
        self._bad = self._bad | bad if len(self._bad) else bad

    def end_step(self, step: int, norm: Tensor) -> None:
        """Close a step.

        Args:
            step: its number.
            norm: scalar norm of all gradients, averaged over the processes.
        """
        bad_norm = ~norm.isfinite() & (not self.scaled)
        terms = torch.cat((self._bad, bad_norm.view(1)))
        first = terms.any() & (self._first == 0)
        self._first = torch.where(first, step + 1, self._first)
        self._terms = torch.where(first, terms, self._terms) if len(self._terms) else terms
        self._bad = torch.zeros_like(self._bad)

    def check(self) -> NonFiniteStep | None:
        """Read the note; all processes must call it, and get the same answer."""
        own = torch.cat((self._first.view(1), self._terms.long()))
        rows = [row.tolist() for row in gather_from_processes(own, own.device)]
        first = min((row[0] for row in rows if row[0] > 0), default=0)
        if first == 0:
            return None
        bad = {rank: self._name_terms(row) for rank, row in enumerate(rows) if row[0] == first}
        # The gradients are averaged: where a loss was the reason, its process is the one to name.
        return NonFiniteStep(first - 1, {r: t for r, t in bad.items() if t != [GRADIENT]} or bad)

    def _name_terms(self, row: list[int]) -> list[str]:
        found = [name for name, bad in zip(self._names, row[1:], strict=True) if bad]
        causes = [name for name in found if name not in ("total", GRADIENT)]
        return causes or [name for name in found if name != GRADIENT] or found
