"""The learning rate as a function of the step: linear warm-up, then polynomial decay to zero."""

from __future__ import annotations


def learning_rate_factor(
    step: int, iterations: int, warmup: int, warmup_start: float = 1e-6, power: float = 1.0
) -> float:
    """Compute the factor on the base learning rate at one step, Section 4.2.

    During the first ``warmup`` steps the factor grows linearly from ``warmup_start`` to 1, after
    that it is (1 - (step - warmup) / (iterations - warmup)) ^ power.

    Args:
        step: iterations already done, 0 <= step < iterations.
        iterations: length of the run.
        warmup: steps of the warm-up; a run that is shorter never leaves it, so shorten it too.
        warmup_start: first factor.
        power: of the decay.

    >>> [round(learning_rate_factor(s, 10, warmup=2), 3) for s in (0, 1, 2, 6, 9)]
    [0.0, 0.5, 1.0, 0.5, 0.125]
    """
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    return float((1 - (step - warmup) / (iterations - warmup)) ** power)
