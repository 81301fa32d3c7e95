"""Activation checkpointing computes the same numbers and leaves the same state behind."""

from typing import Any

import pytest
import torch
from cliptteacher.training.recompute import checkpoint_activations

from cliptteacher.segmenters import build_segmenter


def step(name: str, recompute: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two passes of a network; its gradients and its state."""
    torch.manual_seed(0)
    network = build_segmenter(name, 16).train()
    if recompute:
        assert checkpoint_activations(network)
    for _ in range(2):
        network(torch.rand(2, 3, 64, 64)).square().sum().backward()
    return {n: p.grad for n, p in network.named_parameters()}, network.state_dict()


@pytest.mark.parametrize("name", ["fpn_small", "segnext_nano", "segformer_nano"])
def test_gradients_and_statistics_are_those_of_one_pass(name: str) -> None:
    plain, recomputed = step(name, False), step(name, True)
    for first, second in zip(plain, recomputed, strict=True):
        assert list(first) == list(second)
        for path, value in first.items():
            assert torch.equal(value, second[path]), path
    counts = [v for n, v in recomputed[1].items() if n.endswith("num_batches_tracked")]
    assert all(count == 2 for count in counts)
