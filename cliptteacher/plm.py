"""Pixel Learning Module (PLM): pseudo labels and classifiers for the unannotated area.

Section 3.3 of arXiv:2310.02296v1. One training step, for B images with N tokens each:

    centres  = multi-scale windows of CLIP's dense tokens             Eq. (4)-(5), ``kmeans.py``
    clusters = cosine K-Means on the tokens without annotation                     ``kmeans.py``
    groups   = clusters fused by similarity                           Algorithm 1, ``fusion.py``
    L_a      = seen labels + groups                                   Eq. (6), ``merge_labels``
    p        = mean student feature of every label                    Eq. (7), ``class_prototypes``
    P        = VLA(p, CLS tokens)                                     Section 3.3, ``vla.py``
    generate = || P_seen - T_seen ||^2                                Eq. (8), ``generate_loss``
    x        = R^T . cat(T_seen, P_u),  CE(x, L_a)                    Eq. (9)-(10)

Every image has ``slots`` label ids for its groups, used or not, so that all shapes are fixed and
nothing waits for the device: label S + b * slots + g is group g of image b. Unused slots get a
logit bias of -10^4. Padding of a crop (label 254) is no unannotated area: it is neither clustered
nor averaged nor labelled.

Cost: K-Means 2 * iterations * B N K C, prototypes B h w C (S + slots), logits B h w C (S + B *
slots) multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import IGNORE_INDEX
from .distributed import (
    exact_products,
    gather_rows,
    mean_over_processes,
    sum_over_processes,
)
from .fusion import fuse_clusters
from .kmeans import Seeding, masked_kmeans, multiscale_centers
from .logits import Similarity, pixel_logits, upsampled_logsumexp
from .losses import full_precision
from .options import check_fields, field_types, without_none
from .vla import Adapter, build_adapter

NO_LABEL = -1  # pixels without any label; pseudo label ids pass 255, so 255 cannot serve
IGNORED_SHARE = 0.5  # a token is clustered if more than this share of its pixels has no label

LossSize = Literal["labels", "features"]
PotentialScope = Literal["batch", "image"]
GenerateLoss = Literal["mse", "bce"]


class PixelTargets(NamedTuple):
    """Labels of seen and potential classes."""

    labels: Tensor  # (B, H, W) int64: [0, S) seen, S + b * slots + g potential, -1 none
    slots: int  # label ids of potential classes per image


class PixelLosses(NamedTuple):
    """The loss terms of the Pixel Learning Module, Eq. (10) and (8)."""

    ce: Tensor  # scalar
    generate: Tensor  # scalar


def unannotated_share(
    labels: Tensor, grid: tuple[int, int], ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Compute the share of unannotated pixels of every token.

    Args:
        labels: (B, H, W) integers.
        grid: (h, w) of the tokens.
        ignore_index: the value of pixels without a label.

    Returns:
        (B, h, w) float32 in [0, 1]
    """
    ignored = (labels == ignore_index).float()
    return F.adaptive_avg_pool2d(ignored[:, None], grid)[:, 0]


def merge_labels(
    labels: Tensor, groups: Tensor, num_seen: int, slots: int, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Merge seen labels and groups into L_a, Eq. (6), arXiv:2310.02296v1.

    A pixel with a seen label keeps it; a pixel without one gets the group of its token, if it has
    one.

    Args:
        labels: (B, h, w) seen labels in [0, num_seen), ``ignore_index``, or another number, such as
            that of padding, which is no label.
        groups: (B, h, w) groups in [0, slots) or -1.
        num_seen: S.
        slots: label ids of potential classes per image; groups from ``slots`` on are dropped.
        ignore_index: the value of pixels without a label.

    Returns:
        (B, h, w) int64: [0, S) seen, S + b * slots + g for group g of image b, -1 none.
    """
    B = labels.shape[0]
    first = num_seen + slots * torch.arange(B, device=labels.device).view(B, 1, 1)
    found = (groups >= 0) & (groups < slots)
    potential = torch.where(found, groups + first, NO_LABEL)
    seen = torch.where(labels < num_seen, labels.long(), NO_LABEL)
    return torch.where(labels == ignore_index, potential, seen)


def class_prototypes(
    features: Tensor,
    labels: Tensor,
    num_seen: int,
    slots: int,
    among: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the features of every label over the batch, Eq. (7), arXiv:2310.02296v1.

    A product with the labels of each image as one-hot rows: it adds in a fixed order on every
    device and keeps no copy of the features.

    Args:
        features: R (B, C, h, w).
        labels: (B, h, w) int64 as of ``merge_labels``: seen labels in [0, num_seen), potential ones
            num_seen + b * slots + g of image b, -1 for ignored pixels.
        num_seen: S.
        slots: label ids of potential classes per image.
        among: average over the images of all processes, differentiably: the first of these images
            among all of them, and how many there are. None: these are all.

    Returns:
        prototypes (S + images * slots, C), at least float32, zero for absent labels; present
        (S + images * slots,) bool.
    """
    C, S = features.shape[1], num_seen
    rows = full_precision(features).flatten(2).mT  # (B, h * w, C)
    own = own_image_ids(labels, S, slots).flatten(1)  # (B, h * w)
    one_hot = own.unsqueeze(1) == torch.arange(S + slots, device=own.device).view(-1, 1)
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.bmm(one_hot.to(rows.dtype), rows)  # (B, S + slots, C)
    sums = torch.cat((sums, one_hot.sum(dim=2, keepdim=True)), dim=2)  # the last column counts
    seen, potential = sums[:, :S].sum(dim=0), sums[:, S:].flatten(0, 1)
    if among is not None:
        first, images = among
        after = images - first - len(features)
        potential = F.pad(potential, (0, 0, first * slots, after * slots))
    sums = torch.cat((seen, potential))
    if among is not None:
        sums = sum_over_processes(sums)
    counts = sums[:, C]
    return sums[:, :C] / counts.clamp(min=1).unsqueeze(1), counts > 0


def generate_loss(
    generated: Tensor, text: Tensor, present: Tensor, kind: GenerateLoss = "mse"
) -> Tensor:
    """Compare the generated seen classifiers with the text features, Eq. (8), arXiv:2310.02296v1.

    ``mse``: mean over the present classes of ||p_i - t_i||^2.
    ``bce`` (second version of the paper): binary cross entropy of sigmoid(P_seen . T^T) against
    the identity, over the rows of the present classes.

    Args:
        generated: P_seen (S, C), the adapter's output for the seen prototypes.
        text: T (S, C) unit rows.
        present: (S,) bool, the seen classes of this batch.
        kind: "mse" or "bce".

    Returns:
        scalar; 0 without a present class

    Deviation: Eq. (8) sums; the text calls the loss an MSE, so it is averaged over the classes.
    """
    if kind == "mse":
        per_class = (generated - text).square().sum(dim=1)
    else:
        scores = generated @ text.T
        identity = torch.eye(len(text), device=text.device, dtype=scores.dtype)
        per_class = F.binary_cross_entropy_with_logits(scores, identity, reduction="none").mean(1)
    return (per_class * present).sum() / present.sum().clamp(min=1)


def pixel_cross_entropy(
    seen_logits: Tensor,
    potential_logits: Tensor,
    labels: Tensor,
    seen_competition: bool = True,
    over_processes: bool = False,
) -> Tensor:
    """Classify every labelled pixel among seen and potential classes, Eq. (10).

    Args:
        seen_logits: (B, S, h, w).
        potential_logits: (B, P, h, w), of the ids S to S + P - 1.
        labels: (B, H, W) int64 in [0, S + P), or -1 for ignored pixels. Logits are brought to this
            size, bilinear.
        seen_competition: the softmax of pixels with a seen label includes the potential classes.
        over_processes: divide by the mean number of labelled pixels of all processes, so that the
            mean of the losses is that of one process with all images.

    Returns:
        scalar, the mean over the labelled pixels; 0 without one.

    Deviation: the toolbox divides by the number of all pixels.
    """
    num_seen = seen_logits.shape[1]
    seen_total, seen_own = upsampled_logsumexp(seen_logits, labels)
    potential_total, potential_own = upsampled_logsumexp(potential_logits, labels - num_seen)
    total = torch.logaddexp(seen_total, potential_total)
    labelled = labels != NO_LABEL
    if not seen_competition:
        total = torch.where(labelled & (labels < num_seen), seen_total, total)
    return mean_over_labelled(total - seen_own - potential_own, labelled, over_processes)


def mean_over_labelled(losses: Tensor, labelled: Tensor, over_processes: bool = False) -> Tensor:
    """Average losses over the pixels of a bool mask, or divide by the mean count of all processes.

    Args:
        losses: (B, H, W).
        labelled: (B, H, W) bool.
        over_processes: see ``pixel_cross_entropy``.

    Returns:
        scalar; 0 without a labelled pixel.
    """
    count = labelled.sum()
    if over_processes:
        count = mean_over_processes(count.float())
    return losses.masked_fill(~labelled, 0.0).sum() / count.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class PLMConfig:
    """Options of the Pixel Learning Module; the defaults are the literal reading of the paper."""

    tokens: Literal["projected", "final"] = "projected"  # CLIP tokens to cluster
    scales: tuple[int, ...] = (3, 7)  # window scales of Eq. (4)-(5)
    seeding: Seeding = "grid"  # reading of Eq. (4)-(5), see kmeans.multiscale_centers
    kmeans_iterations: int = 10  # Lloyd iterations
    fusion_threshold: float = 0.8  # lambda of Algorithm 1
    potential_slots: int | None = None  # most potential classes of an image; None: no limit
    potential_scope: PotentialScope = "batch"  # softmax over the groups of the batch or the image
    pseudo_similarity: Similarity = "dot"  # student features against potential classifiers
    pseudo_scale: float = 1.0  # factor of the potential logits
    detach_prototypes: bool = False  # no gradient from the VLA's queries into the student
    seen_competition: bool = True  # softmax of seen pixels over the potential classes too
    loss_size: LossSize = "labels"  # logits of CE, focal, dice: upsampled to the labels, or as is
    over_processes: bool = False  # prototypes, VLA keys and CE over the images of all processes
    adapter: Adapter = "decoder"  # Table 5: decoder, mlp, identity
    generate_loss: GenerateLoss = "mse"  # Eq. (8), or "bce" of the paper's second version

    def __post_init__(self) -> None:
        check_fields(self)
        for name, hint in field_types(type(self)).items():
            value, low = getattr(self, name), -1 if name == "fusion_threshold" else 0  # a cosine
            if without_none(hint) in (int, float) and value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}")


class PixelLearningModule(nn.Module):
    """Find potential objects in the unannotated area and train the student to separate them.

    Args:
        channels: C.
        config: options; default the literal reading of the paper.
    """

    def __init__(self, channels: int, config: PLMConfig | None = None) -> None:
        super().__init__()
        self.config = config or PLMConfig()
        self.adapter = build_adapter(self.config.adapter, channels)

    @torch.no_grad()
    def group_tokens(self, dense: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Cluster and fuse the unannotated tokens, Eq. (4)-(5) and Algorithm 1.

        Args:
            dense: D (B, C', h, w), CLIP's dense tokens.
            labels: (B, H, W) seen labels at the size of the image, 255 without, 254 for padding.

        Returns:
            (B, h, w) int64, the group of every token in [0, K), -1 where the token is annotated;
            and K, the number of initial centres of an image.
        """
        B, _, h, w = dense.shape
        config, dense = self.config, dense.float()
        take_part = unannotated_share(labels, (h, w)) > IGNORED_SHARE
        centers = multiscale_centers(dense, config.scales, config.seeding)
        tokens = dense.flatten(2).transpose(1, 2)  # (B, N, C')
        with exact_products():  # nearest centres and a threshold: rounding would flip ties
            clusters = masked_kmeans(
                tokens, centers, take_part.flatten(1), config.kmeans_iterations
            )
            group_of_cluster = fuse_clusters(
                clusters.centers, clusters.counts > 0, config.fusion_threshold
            )
        groups = group_of_cluster.gather(1, clusters.assignment.clamp(min=0))
        groups = groups.where(take_part.flatten(1), NO_LABEL).reshape(B, h, w)
        return groups, centers.shape[1]

    @torch.no_grad()
    def make_targets(
        self, dense: Tensor, labels: Tensor, size: tuple[int, int], num_seen: int
    ) -> PixelTargets:
        """Compute L_a, Eq. (6), at a size (H, W) of its own: labels and groups by nearest pixel."""
        groups, num_clusters = self.group_tokens(dense, labels)
        slots = self.config.potential_slots
        slots = num_clusters if slots is None else slots
        near_labels, near_groups = resize_nearest(labels, size), resize_nearest(groups, size)
        return PixelTargets(merge_labels(near_labels, near_groups, num_seen, slots), slots)

    def forward(
        self,
        features: Tensor,
        seen_logits: Tensor,
        dense: Tensor,
        cls: Tensor,
        labels: Tensor,
        text: Tensor,
    ) -> PixelLosses:
        """Compute L_CE and L_generate, Eq. (6)-(10), arXiv:2310.02296v1.

        Args:
            features: R (B, C, h, w) of the student.
            seen_logits: (B, S, h, w), the student's scores of the seen classes.
            dense: D (B, C', h', w'), CLIP's dense tokens.
            cls: s (B, C), CLIP's CLS tokens.
            labels: (B, H, W) seen labels in [0, S), 255 without, 254 for padding.
            text: T (S, C), unit text features of the seen classes.
        """
        config, S = self.config, text.shape[0]
        B, _, h, w = features.shape
        size = (h, w) if config.loss_size == "features" else (labels.shape[1], labels.shape[2])
        ids, slots = self.make_targets(dense, labels, size, S)
        near_ids = resize_nearest(ids, (h, w))
        first, among = 0, None  # image of this process among all that share prototypes
        if config.over_processes:
            cls, first = gather_rows(cls)
            among = (first, cls.shape[0])
            ids = torch.where(ids < S, ids, ids + first * slots)
        prototypes, present = class_prototypes(features, near_ids, S, slots, among)
        # A group so thin that no position of the features falls on it has no classifier.
        ids = ids.where((ids < S) | present[ids.clamp(min=0)], NO_LABEL)
        if config.detach_prototypes:
            prototypes = prototypes.detach()
        generated = self.adapter(prototypes, cls, present)  # (S + images * slots, C)
        loss = generate_loss(generated[:S], text, present[:S], config.generate_loss)
        potential, exists = generated[S:], present[S:]
        if config.potential_scope == "image":
            own = slice(first * slots, (first + B) * slots)
            potential, exists = potential[own].reshape(B, slots, -1), exists[own].reshape(B, slots)
            ids = own_image_ids(ids, S, slots)
        logits = pixel_logits(
            features, potential, config.pseudo_scale, config.pseudo_similarity, exists
        )
        ce = pixel_cross_entropy(
            seen_logits, logits, ids, config.seen_competition, config.over_processes
        )
        return PixelLosses(ce, loss)


def own_image_ids(labels: Tensor, num_seen: int, slots: int) -> Tensor:
    """Turn batch-wide potential ids S + b * slots + g into S + g."""
    within = num_seen + (labels - num_seen) % slots
    return torch.where(labels < num_seen, labels, within)


def resize_nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an integer map (B, H, W) to (h, w) by nearest sampling at the pixel centres."""
    H, W = labels.shape[1:]
    # floor((i + 1/2) H / h) in integers: a centre on a border never depends on rounding
    rows = (2 * torch.arange(size[0], device=labels.device) + 1) * H // (2 * size[0])
    columns = (2 * torch.arange(size[1], device=labels.device) + 1) * W // (2 * size[1])
    return labels[:, rows[:, None], columns]
