"""Activation checkpointing: keep less for the backward pass, compute it again there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_STAGES = re.compile(r"stages|features|blocks|layers?\d*")


def checkpoint_activations(module: nn.Module) -> list[str]:
    """Let every stage of a network keep its input alone; numbers and names stay as they are.

    Stages are the members of the outermost containers called ``stages``, ``features``, ``blocks``,
    ``layers`` or ``layer1`` and so on; without one, the whole module counts as a stage. Dropout is
    drawn alike again, and the second pass leaves the statistics of BatchNorm alone.

    Returns:
        The paths of the stages.
    """
    stages = dict(_find_stages(module, ""))
    if not stages:
        stages = {"": module}
    for stage in stages.values():
        stage.forward = partial(_recompute, stage, stage.forward)
    return list(stages)


def _find_stages(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inside = f"{path}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _STAGES.fullmatch(name):
            yield from ((f"{inside}.{index}", member) for index, member in child.named_children())
        else:
            yield from _find_stages(child, f"{inside}.")


def _recompute(module: nn.Module, forward: Any, *args: Any) -> Any:
    if not module.training:
        return forward(*args)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fixed_statistics(module)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _fixed_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch as before, but counts it once only.

    A momentum of 0 leaves the statistics as they are; without them the second pass would save
    other tensors than the first, which PyTorch refuses.
    """
    norms = [
        (norm, norm.momentum, norm.num_batches_tracked)
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    ]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
