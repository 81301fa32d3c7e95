"""The toolbox's default schedule: parameter groups, and the learning rate of every step.

The learning rate warms up linearly, then decays polynomially to zero (Section 4.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_WARMUP_START = 1e-6  # first factor of the warm-up
_POSITION = re.compile(r"(^|[._])(pos_embed|position)")  # but no "decomposition"


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    head_multiplier: float = 10.0,
    head_prefixes: tuple[str, ...] = ("segmenter.head", "segmenter.auxiliary", "plm.adapter"),
) -> list[dict[str, Any]]:
    """Sort trainable parameters by learning rate and weight decay.

    Norms and positional tables do not decay; the head and the adapter, which start from random
    numbers, learn faster than the backbone.

    Args:
        model: a ``CLIPTeacher`` or any module.
        learning_rate: of the backbone.
        weight_decay: of everything but norms and positional tables.
        head_multiplier: learning rate of the head over that of the backbone.
        head_prefixes: attribute paths of the modules that count as head; a foreign network's head
            may lie anywhere inside it, so parameters are matched by identity, not by name.

    Returns:
        Up to four groups with ``params``, ``lr``, ``base_lr``, ``weight_decay``, ``name``.
    """
    heads = {parameter for path in head_prefixes for parameter in _parameters_at(model, path)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for path, parameter, is_norm in _named_parameters(model):
        if not parameter.requires_grad:
            continue
        head = parameter in heads
        decays = not is_norm and not _POSITION.search(path)
        groups.setdefault((head, decays), []).append(parameter)
    return [
        {
            "name": ("head" if head else "backbone") + ("" if decays else ", no decay"),
            "params": parameters,
            "lr": learning_rate * (head_multiplier if head else 1.0),
            "base_lr": learning_rate * (head_multiplier if head else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in sorted(groups.items())
    ]


def learning_rate_factor(step: int, iterations: int, warmup: int) -> float:
    """Compute the factor on the base learning rate at one step, Section 4.2.

    During the first ``warmup`` steps the factor grows linearly from 1e-6 to 1, after that it is
    1 - (step - warmup) / (iterations - warmup).

    Args:
        step: iterations already done, 0 <= step < iterations.
        iterations: length of the run.
        warmup: steps of the warm-up; a run that is shorter never leaves it, so shorten it too.

    >>> [round(learning_rate_factor(s, 10, warmup=2), 3) for s in (0, 1, 2, 6, 9)]
    [0.0, 0.5, 1.0, 0.5, 0.125]
    """
    if step < warmup:
        return _WARMUP_START + (1 - _WARMUP_START) * step / warmup
    return 1 - (step - warmup) / (iterations - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to its base learning rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _parameters_at(model: nn.Module, path: str) -> Iterator[nn.Parameter]:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    if isinstance(found, nn.Module):
        yield from found.parameters()


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    known: set[nn.Parameter] = set()  # a tied parameter counts where it is met first
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in known:
                known.add(parameter)
                yield f"{path}.{name}" if path else name, parameter, isinstance(module, _NORMS)
