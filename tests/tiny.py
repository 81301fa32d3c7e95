"""A teacher and a student that are real but tiny, for tests of what joins them."""

import torch
from torch import Tensor, nn

from cliptteacher.clip import CLIP, CLIPConfig

CONFIG = CLIPConfig(
    embed_dim=16, image_size=32, patch_size=8, vision_width=32, vision_layers=1,
    context_length=16, text_width=16, text_layers=1,
)  # fmt: skip


def tiny_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG)


class TinyStudent(nn.Module):
    """One convolution of stride 4 and a 1x1 head."""

    def __init__(self, channels: int = CONFIG.embed_dim) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 12, 4, stride=4)
        self.head = nn.Conv2d(12, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(images)))


def tiny_student(channels: int = CONFIG.embed_dim) -> TinyStudent:
    torch.manual_seed(1)
    return TinyStudent(channels)
