"""CLIP's dense tokens as if they were a student's features: what the teacher can do alone.

No part of the method (section 3.4 of arXiv:2310.02296v1 needs no CLIP at inference), but the
first baseline to ask for: ``Predictor(DenseTokens(clip), text, similarity="cosine")`` labels
every pixel with the class whose text feature is nearest to its token.

Cost: one pass of CLIP's image encoder.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .model import CLIP


class DenseTokens(nn.Module):
    """Images in [0, 1] (B, 3, H, W) -> dense tokens D (B, C, h, w) of a frozen CLIP.

    CLIP takes whole patches only: images are first resized (bilinear, antialiased) to the nearest
    multiple of the patch, at least one, in either direction.

    Args:
        clip: the teacher.
    """

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        """Encode the images; the tokens are not normalised."""
        patch = self.clip.patch_size
        size = [max(1, (side + patch // 2) // patch) * patch for side in images.shape[2:]]
        if size != list(images.shape[2:]):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.clip.encode_image(images).dense
