"""Attention within shifted windows (arXiv:2103.14030), for Swin.

    tokens, padded to whole windows, in the order of the windows; every second layer moves the
    windows by half of their side, and tokens that come together from opposite borders are apart
    scores = q . k / sqrt(d) + bias of the relative position, or -inf between tokens apart

Parameters, their names and the results are those of torchvision's layer, which puts -100 in place
of -inf: exp(-100) is a denormal number, on which a CPU spent 40 % of the layer's time. The order is
an index and not a branch on the size, so that one traced program takes images of every size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention


class WindowAttention(ShiftedWindowAttention):  # type: ignore[misc]  # torchvision has no types
    """Compute what ``ShiftedWindowAttention`` does without dropout: (B, H, W, C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows of w x w tokens; a grid of one window is not shifted."""
        (window, _), (shift, _), heads = self.window_size, self.shift_size, self.num_heads
        B, H, W, C = x.shape
        down, across = (H + window - 1) // window, (W + window - 1) // window
        height, width = down * window, across * window
        x = F.pad(x, (0, 0, 0, width - W, 0, height - H))
        there_y, back_y, part_y = _shifted(height, window, shift, x.device)
        there_x, back_x, part_x = _shifted(width, window, shift, x.device)

        def by_window(grid: Tensor) -> Tensor:
            """Bring a map (height, width) to (windows, tokens of a window)."""
            return grid.view(down, window, across, window).transpose(1, 2).flatten(2).flatten(0, 1)

        there = by_window(there_y[:, None] * width + there_x)
        x = x.reshape(B, height * width, C).index_select(1, there.flatten())
        parts = self.qkv(x).view(B, down * across, window * window, 3, heads, C // heads)
        query, key, value = parts.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, tokens, d)
        bias = self.get_relative_position_bias()  # (1, heads, tokens, tokens)
        if shift:
            part = by_window(3 * part_y[:, None] + part_x)
            apart = part[:, None, :, None] != part[:, None, None, :]
            bias = bias.masked_fill(apart, -torch.inf)
        attention = ((query * (C // heads) ** -0.5) @ key.mT + bias).softmax(dim=-1)
        x = self.proj((attention @ value).transpose(2, 3).reshape(B, height * width, C))
        row, column = back_y[:, None], back_x
        back = (row // window * across + column // window) * window + row % window
        back = (back * window + column % window).flatten()
        return x.index_select(1, back).view(B, height, width, C)[:, :H, :W]


def _shifted(
    side: int, window: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where shifted rows come from, where they go back to, and which part they belonged to."""
    positions = torch.arange(side, device=device)
    moved = shift * (positions[-1] >= window)
    part = (positions >= side - window).long() + (positions >= side - moved).long()
    there, back = positions + moved, positions - moved
    # Not `%`: ONNX has no remainder by a size that is known only when the program runs.
    return there.where(there < side, there - side), back.where(back >= 0, back + side), part
