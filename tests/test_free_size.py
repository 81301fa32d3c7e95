"""Layers written for every size compute what the layers that they replace compute."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from cliptteacher.segmenters import build_segmenter
from cliptteacher.segmenters.free_size import FreeSizeAttention, free_sizes, pool_to_grid


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (6, 6), (7, 13), (32, 16)])
def test_pooling_is_adaptive_average_pooling(size: int, height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    ours, theirs = pool_to_grid(x, size), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(ours, theirs)
    (mine,) = torch.autograd.grad(ours.square().sum(), x)
    (reference,) = torch.autograd.grad(theirs.square().sum(), x)
    torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("shift", [0, 2, 3])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (4, 4), (7, 7), (7, 9), (9, 3), (14, 21), (15, 8)]
)
def test_attention_is_that_of_torchvision(shift: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = ShiftedWindowAttention(12, [7, 7], [shift, shift], num_heads=3).eval()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(2, height, width, 12)
    torch.testing.assert_close(FreeSizeAttention(layer)(x), layer(x), rtol=1e-5, atol=1e-6)


def test_a_whole_swin() -> None:
    torch.manual_seed(0)
    swin = build_segmenter("swin_nano", channels=8).eval()
    images = torch.rand(2, 3, 75, 100)
    with torch.no_grad():
        expected = swin(images)
        again = free_sizes(swin)(images)
    assert any(isinstance(module, FreeSizeAttention) for module in swin.modules())
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
