"""The transductive setting, beyond the paper: groups of the PLM get the names of unseen classes.

The names of the unseen classes are known in training, their pixels still have no label. The student
and CLIP vote on what every nameless group of the Pixel Learning Module shows:

    score(g, u) = mean over g of the student's logits of u  +  PRIOR * CLIP's logit of (s, T_u)

with the image's CLS token s. The best u becomes the label of the pixels of g, and unseen classes
train like seen ones.

Why so, in numbers: benchmarks/transductive.md. A group has one name because its pixels err less
together than alone; the CLS token is what keeps rare classes from drowning in frequent ones.
"""

import torch
from torch import Tensor

from . import IGNORE_INDEX
from .plm import class_prototypes, merge_labels, resize_nearest

PRIOR = 0.3  # weight of CLIP's CLS token beside the student


@torch.no_grad()
def name_groups(
    groups: Tensor, count: int, scores: Tensor, labels: Tensor, agreement: Tensor
) -> Tensor:
    """Give every group the unseen class that fits it best.

    Args:
        groups: (B, h', w') in [0, count), -1 without a group; of ``group_tokens``.
        count: K.
        scores: (B, U, h, w), the student's logits of the unseen classes.
        labels: (B, H, W) seen labels, 255 without.
        agreement: (B, U), CLIP's logits of the unseen classes for the images.

    Returns:
        (B, H, W) int64, the unseen class of every pixel without a label that has a group, else -1.
    """
    B, U, h, w = scores.shape
    near = resize_nearest(labels, (h, w)), resize_nearest(groups, (h, w))
    means, _ = class_prototypes(scores, merge_labels(*near, 0, count), 0, count)
    votes = means.view(B, count, U) + PRIOR * agreement[:, None]
    wide = resize_nearest(groups, (labels.shape[1], labels.shape[2]))
    names = votes.argmax(dim=2).gather(1, wide.clamp(min=0).flatten(1)).view_as(wide)
    return names.where((wide >= 0) & (labels == IGNORE_INDEX), -1)
