"""Two layers of Swin with UPerNet, written so that one traced program takes images of every size.

    adaptive average pooling   ONNX has none for a size that is known only when the program runs;
                               each axis is multiplied by a matrix of averages instead
    shifted windows            torchvision asks whether the grid is larger than a window, a branch
                               that tracing would freeze; the shift becomes an index instead

Both compute what the layers that they replace compute, up to rounding. Cost: that of the layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

_APART = -100.0  # torchvision's bias between tokens that were not neighbours before the shift


def pool_to_grid(x: Tensor, size: int) -> Tensor:
    """Average a map over a grid of cells, as ``F.adaptive_avg_pool2d`` does.

    Args:
        x: (B, C, H, W).
        size: cells along either side; where the map is smaller, they overlap.

    Returns:
        (B, C, size, size).

    >>> pool_to_grid(torch.arange(6.0).view(1, 1, 2, 3), 1).item()
    2.5
    """
    rows, columns = (_averages(side, size, x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _averages(side: int, size: int, like: Tensor) -> Tensor:
    """Weights (size, side): row i is the mean of i side / size up to (i + 1) side / size."""
    cells = torch.arange(size, device=like.device)[:, None]
    first = cells * side // size
    end = ((cells + 1) * side + size - 1) // size
    positions = torch.arange(side, device=like.device)
    inside = (positions >= first) & (positions < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


class FreeSizeAttention(nn.Module):
    """Run a ``ShiftedWindowAttention`` of torchvision, in eval mode, without branches on the size.

    Args:
        attention: the layer; its parameters are used, not copied.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: (B, H, W, C) -> (B, H, W, C)."""
        layer: Any = self.attention
        window, _ = layer.window_size
        shift, _ = layer.shift_size
        B, H, W, C = x.shape
        down, across = (H + window - 1) // window, (W + window - 1) // window  # windows
        height, width = down * window, across * window
        x = nn.functional.pad(x, (0, 0, 0, width - W, 0, height - H))
        if shift:
            there_y, back_y, part_y = _shifted(height, window, shift, x.device)
            there_x, back_x, part_x = _shifted(width, window, shift, x.device)
            x = x.index_select(1, there_y).index_select(2, there_x)
        tokens = window * window
        x = x.view(B, down, window, across, window, C).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, down * across, tokens, C)
        heads = layer.num_heads
        parts = layer.qkv(x).view(B, down * across, tokens, 3, heads, C // heads)
        query, key, value = parts.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, tokens, .)
        scores = (query * (C // heads) ** -0.5) @ key.transpose(-2, -1)
        scores = scores + layer.get_relative_position_bias()
        if shift:
            part = 3 * part_y[:, None] + part_x
            part = part.view(down, window, across, window).permute(0, 2, 1, 3)
            part = part.reshape(down * across, tokens)
            apart = (part[:, None] != part[:, :, None]).to(x.dtype) * _APART
            scores = scores + apart[:, None]
        x = layer.proj((scores.softmax(dim=-1) @ value).transpose(2, 3).flatten(-2))
        x = x.view(B, down, across, window, window, C).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, height, width, C)
        if shift:
            x = x.index_select(1, back_y).index_select(2, back_x)
        return x[:, :H, :W]


def free_sizes(network: nn.Module) -> nn.Module:
    """Replace every shifted window attention inside a network, in place; returns the network."""
    from torchvision.models.swin_transformer import ShiftedWindowAttention  # slow to import

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, ShiftedWindowAttention):
                setattr(module, name, FreeSizeAttention(child))
    return network


def _shifted(
    side: int, window: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where shifted rows come from, where they go back to, and which part they belonged to.

    A grid of one window is not shifted.
    """
    positions = torch.arange(side, device=device)
    moved = shift * (positions[-1] >= window)
    part = (positions >= side - window).long() + (positions >= side - moved).long()
    there, back = positions + moved, positions - moved
    # Not `%`: ONNX has no remainder by a size that is known only when the program runs.
    return there.where(there < side, there - side), back.where(back >= 0, back + side), part
