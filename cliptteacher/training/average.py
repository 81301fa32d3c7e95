"""An exponential moving average of the weights (EMA): evaluated and shipped in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average the parameters of a module over the steps: a <- decay a + (1 - decay) w.

    Buffers, such as the running statistics of BatchNorm, are averages already and are copied.

    Args:
        module: whose weights are averaged; it is not changed.
        decay: in [0, 1); the average spans about 1 / (1 - decay) steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}; 0.999 spans 1,000 steps")
        self.module, self.decay = module, decay
        self._average = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(self._average, self._weights(), 1 - self.decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for the duration of a block."""
        weights, own = self._weights(), [weight.clone() for weight in self._weights()]
        torch._foreach_copy_(weights, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict with the averages in it; plain names."""
        names = [name for name, _ in self.module.named_parameters()]
        state = dict(self.module.state_dict())
        return {**state, **dict(zip(names, (a.clone() for a in self._average), strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the averages of ``state_dict``."""
        for (name, _), average in zip(self.module.named_parameters(), self._average, strict=True):
            average.copy_(state[name])

    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.module.parameters()]
