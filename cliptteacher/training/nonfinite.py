"""A loss or gradient that is not finite: the weights stay where they are, the step is named.

Nothing here waits for the device before ``check`` does:

    seed    the gradient of the total loss: 1, or NaN where the loss is not finite. The gradients
            of all processes are averaged, so all of them see it, without a collective of its own
    judge   the norm of the gradients is not finite -> ``found_inf``, by which the fused AdamW
            leaves weights and moments alone; too many such steps -> every later seed is NaN
    check   reads the record, on the CPU after every step, on a device at the lines of the log and
            before every checkpoint: what moved before it was finite
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .distributed import gather_from_processes

GRADIENT = "gradient"


@dataclass(frozen=True)
class NonFiniteStep:
    """The first step since the last check whose loss or gradient was not finite."""

    step: int
    terms: dict[int, tuple[str, ...]]  # by rank: loss terms, or "gradient" if these were finite
    count: int  # such steps in the whole run, as far as this process has seen
    allowed: int

    @property
    def is_fatal(self) -> bool:
        """Whether there were more of them than the run may skip."""
        return self.count > self.allowed


class NonFiniteGuard:
    """Keep a record on the device of steps that must not move the weights.

    Args:
        allowed: such steps that the run may skip.
        device: of the losses.
        scaled: the loss is scaled, for float16: gradients may overflow, and only losses count.
    """

    def __init__(self, allowed: int, device: torch.device, scaled: bool = False) -> None:
        self.allowed, self.scaled = allowed, scaled
        self.immediate = device.type == "cpu" and not scaled
        self._names: tuple[str, ...] = ()
        self._bad_terms = torch.zeros(0, dtype=torch.bool, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._first_terms = self._bad_terms

    def seed(self, losses: Mapping[str, Tensor], share: float = 1.0) -> Tensor:
        """Give the gradient to start the backward pass with, and note terms that are not finite.

        Args:
            losses: scalars by name, ``total`` among them.
            share: of this part in the step, with gradient accumulation.

        Returns:
            scalar: ``share``, or NaN.
        """
        if not self._names:
            self._names = (*losses, GRADIENT)
            self._bad_terms = self._bad_terms.new_zeros(len(losses))
            self._first_terms = self._bad_terms.new_zeros(len(self._names))
        bad = ~torch.stack([value.detach() for value in losses.values()]).isfinite()
        self._bad_terms = self._bad_terms | bad
        stop = bad.any() | (self._count > self.allowed)
        return torch.where(stop, torch.nan, share).to(losses["total"].dtype)

    def judge(self, step: int, norm: Tensor) -> Tensor:
        """Close a step: note whether its gradients are finite.

        Args:
            step: its number.
            norm: scalar norm of all gradients, averaged over the processes.

        Returns:
            ``found_inf`` for the optimiser: scalar float32, 1 if it must not move.
        """
        bad_gradient = ~norm.isfinite()
        terms = torch.cat((self._bad_terms, (bad_gradient & ~self._bad_terms.any()).view(1)))
        bad = self._bad_terms.any() if self.scaled else bad_gradient
        bad = bad & (self._count <= self.allowed)  # behind the fatal one all steps are frozen
        new = bad & (self._first < 0)
        self._first = torch.where(new, step, self._first)
        self._first_terms = torch.where(new, terms, self._first_terms)
        self._count = self._count + bad
        self._bad_terms = torch.zeros_like(self._bad_terms)
        return bad_gradient.float()

    def check(self) -> NonFiniteStep | None:
        """Read the record and start a new one; all processes must call it.

        Returns:
            The first bad step since the last check, the same on all processes, or None.
        """
        own = torch.cat((self._count.view(1), self._first.view(1), self._first_terms.long()))
        if self.immediate and int(self._first) < 0:  # a gradient is bad everywhere or nowhere
            return None
        rows = [row.tolist() for row in gather_from_processes(own, own.device)]
        self._first = torch.full_like(self._first, -1)
        steps = [first for _, first, *_ in rows if first >= 0]
        if not steps:
            return None
        first = {rank: row for rank, row in enumerate(rows) if row[1] == min(steps)}
        terms = {rank: self._bad_names(row) for rank, row in first.items()}
        # A gradient that another process spoilt is no news where some loss tells whose it was.
        terms = {rank: bad for rank, bad in terms.items() if bad != (GRADIENT,)} or terms
        return NonFiniteStep(min(steps), terms, max(row[0] for row in rows), self.allowed)

    def _bad_names(self, row: list[int]) -> tuple[str, ...]:
        found = [name for name, bad in zip(self._names, row[2:], strict=True) if bad]
        parts = [name for name in found if name != "total"]
        return tuple(parts or found)

    def state_dict(self) -> int:
        """The steps skipped so far."""
        return int(self._count)

    def load_state_dict(self, count: int) -> None:
        """Take back what ``state_dict`` gave."""
        self._count = torch.full_like(self._count, count)


def gradient_norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Norm of all gradients together, a scalar on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))
