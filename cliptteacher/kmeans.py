"""Multi-scale centres and a batched, masked, cosine K-Means: section 3.3, Eq. (4)-(5).

CLIP's dense tokens of one object are similar, so clustering them finds the potential objects in
the unannotated area::

    centers = window means of the token map at every scale       Eq. (4)-(5), K of them
    repeat iterations times:                                      Lloyd, per image
        assignment = argmax_k cos(token, center_k)                unmasked tokens only
        center_k   = unit(sum of the unit tokens assigned to k)   an empty cluster keeps its own
    assignment = argmax_k cos(token, center_k)                    counts 0 = invalid cluster

Cost: two batched matrix products of B*N*K*C multiply-adds per iteration and one (B, N, K)
similarity in memory; at 16 images, 1,024 tokens, 58 centres and C = 512 about 2 GFLOP each
iteration. Every shape is fixed and nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Seeding = Literal["grid", "window", "sliding"]

# Below this length a sum of unit tokens has cancelled out and has no direction.
_MIN_NORM = 1e-6


class KMeansResult(NamedTuple):
    """The clusters of a batch of images.

    Attributes:
        centers: (B, K, C) unit rows, in float32 (float64 for float64 points).
        assignment: (B, N) int64 index of each token's centre, -1 where masked out.
        counts: (B, K) int64 number of tokens of each cluster; 0 marks an invalid one.
    """

    centers: Tensor
    assignment: Tensor
    counts: Tensor


def multiscale_centers(
    dense: Tensor, scales: Sequence[int] = (3, 7), seeding: Seeding = "grid"
) -> Tensor:
    """Average the token map in windows of several sizes, as starting centres for K-Means.

    C_d = sum over a window of D / (K_w * K_h), K_h = H / s, K_w = W / s,
    Eq. (4)-(5), arXiv:2310.02296v1.

    Args:
        dense: (B, C, h, w) dense tokens of the teacher.
        scales: the S of Eq. (5), one positive integer per scale.
        seeding: ``"grid"`` cuts the map into s x s windows of h/s x w/s tokens (adaptive average
            pooling: neighbours overlap by a token where s does not divide h); ``"window"`` takes
            windows of s x s tokens at stride s; ``"sliding"`` takes them at stride s // 2, at
            least 1. Both drop the rows and columns that fill no whole window.

    Returns:
        (B, K, C) window means, scale by scale in the order given, row by row within a scale; not
        normalised. K is 58, 116 and 981 for the three seedings at 32 x 32 tokens.

    Raises:
        ValueError: a wrong shape, no scale, a scale below 1, an unknown seeding, or a window
            of s x s tokens that is larger than the map.

    Deviation: Eq. (4)-(5) do not type-check as printed (the windows are indexed by i + s and the
    scales are summed). The normaliser K_h * K_w says that a window holds K_h x K_w tokens, which
    is ``"grid"``; the other two read s as the side of the window.

    >>> multiscale_centers(torch.arange(16.0).view(1, 1, 4, 4), scales=(1, 2)).flatten().tolist()
    [7.5, 2.5, 4.5, 10.5, 12.5]
    """
    _check_seeding(dense, scales, seeding)
    tokens = dense if dense.dtype == torch.float64 else dense.float()
    pooled = [_pool_windows(tokens, scale, seeding) for scale in scales]  # (B, C, rows, columns)
    return torch.cat([windows.flatten(2) for windows in pooled], dim=2).mT


@torch.no_grad()
def assign_clusters(points: Tensor, centers: Tensor, mask: Tensor) -> Tensor:
    """Assign every unmasked token to the centre of largest cosine similarity.

    Args:
        points: (B, N, C) tokens of any length; a zero token has similarity 0 with every centre.
        centers: (B, K, C) centres of any length.
        mask: (B, N) bool, True = keep.

    Returns:
        (B, N) int64 index of the centre, -1 where masked out. Equal similarities go to the lowest
        index.

    Raises:
        ValueError: a shape does not fit.
        TypeError: `mask` is not boolean or `points` not floating point.

    >>> points, centers = torch.eye(3)[None], torch.eye(3)[None, 1:]
    >>> assign_clusters(points, centers, torch.tensor([[True, True, False]]))
    tensor([[ 0,  0, -1]])
    """
    _check_clustering(points, centers, mask)
    return _assign_units(_unit_tokens(points, mask), _unit_rows(centers), mask)


@torch.no_grad()
def masked_kmeans(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int = 10
) -> KMeansResult:
    """Cluster the unmasked tokens of each image by cosine similarity.

    `iterations` Lloyd iterations (assign, then move every centre to the unit mean of its tokens)
    are followed by a final assignment, so that the result is consistent: `assignment` is
    ``assign_clusters(points, result.centers, mask)`` and `counts` counts it. A cluster without
    tokens, or whose tokens cancel out, keeps its centre.

    Args:
        points: (B, N, C) tokens of any length. Masked-out tokens may hold NaN.
        centers: (B, K, C) starting centres, e.g. of `multiscale_centers`.
        mask: (B, N) bool, True = cluster this token.
        iterations: number of Lloyd iterations, 0 to assign only.

    Returns:
        The `KMeansResult`. A zero starting centre stays zero until a token is assigned to it.

    Raises:
        ValueError: a shape does not fit or `iterations` is negative.
        TypeError: `mask` is not boolean or `points` not floating point.

    Assumption: the paper names neither metric nor stopping rule; cosine is the similarity of
    Algorithm 1, and a fixed number of iterations does not depend on the data.

    >>> points = torch.tensor([[[1.0, 0.1], [1.0, -0.1], [0.0, 2.0]]])
    >>> result = masked_kmeans(points, torch.eye(2)[None], torch.ones(1, 3, dtype=torch.bool))
    >>> result.assignment.tolist(), result.counts.tolist()
    ([[0, 0, 1]], [[2, 1]])
    """
    _check_clustering(points, centers, mask)
    if iterations < 0:
        raise ValueError(f"`iterations` must be at least 0, got {iterations}; use 0 to assign only")
    tokens, centers = _unit_tokens(points, mask), _unit_rows(centers)
    for _ in range(iterations):
        centers = _move_centers(tokens, _assign_units(tokens, centers, mask), centers)
    assignment = assign_clusters(points, centers, mask)
    counts = _one_hot(assignment, centers.shape[1]).sum(dim=1)  # (B, K)
    return KMeansResult(centers, assignment, counts)


def _pool_windows(tokens: Tensor, scale: int, seeding: Seeding) -> Tensor:
    if seeding == "grid":
        return F.adaptive_avg_pool2d(tokens, scale)
    return F.avg_pool2d(tokens, scale, stride=scale if seeding == "window" else max(scale // 2, 1))


def _unit_rows(rows: Tensor) -> Tensor:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=2)


def _unit_tokens(points: Tensor, mask: Tensor) -> Tensor:
    """Normalise the tokens and zero the masked ones, whose NaN would remain in a product with 0."""
    return _unit_rows(points).masked_fill(~mask.unsqueeze(2), 0.0)


def _assign_units(tokens: Tensor, centers: Tensor, mask: Tensor) -> Tensor:
    # Autocast would round both factors to half precision and flip near ties.
    with torch.autocast(tokens.device.type, enabled=False):
        similarity = torch.bmm(tokens, centers.to(tokens.dtype).mT)  # (B, N, K)
    return similarity.argmax(dim=2).masked_fill(~mask, -1)


def _one_hot(assignment: Tensor, num_clusters: int) -> Tensor:
    """Mark each token's cluster: (B, N) -> (B, N, K) bool, all False where the index is -1."""
    return assignment.unsqueeze(2) == torch.arange(num_clusters, device=assignment.device)


def _move_centers(tokens: Tensor, assignment: Tensor, centers: Tensor) -> Tensor:
    """Take one Lloyd step of the centres.

    The sums are a product with the one-hot assignment: it costs no more than the similarity did
    and adds in a fixed order on every device, where the atomics of `index_add` do not.
    """
    one_hot = _one_hot(assignment, centers.shape[1])
    with torch.autocast(tokens.device.type, enabled=False):
        sums = torch.bmm(one_hot.to(tokens.dtype).mT, tokens)  # (B, K, C)
    length = torch.linalg.vector_norm(sums, dim=2, keepdim=True)
    return torch.where(length > _MIN_NORM, sums / length.clamp(min=_MIN_NORM), centers)


def _check_seeding(dense: Tensor, scales: Sequence[int], seeding: str) -> None:
    if dense.ndim != 4:
        raise ValueError(
            f"`dense` must have shape (B, C, h, w), got {tuple(dense.shape)}; "
            "fold the tokens back into their grid first"
        )
    if seeding not in ("grid", "window", "sliding"):
        raise ValueError(f'`seeding` must be "grid", "window" or "sliding", got {seeding!r}')
    if not scales or min(scales) < 1:
        raise ValueError(f"`scales` must hold positive integers, got {tuple(scales)}; try (3, 7)")
    side = min(dense.shape[2:])
    if seeding != "grid" and max(scales) > side:
        raise ValueError(
            f"`scales` must not exceed the {side} tokens of the map's shorter side with "
            f'"{seeding}" seeding, got {tuple(scales)}; drop the larger scales or use "grid"'
        )


def _check_clustering(points: Tensor, centers: Tensor, mask: Tensor) -> None:
    if points.ndim != 3:
        raise ValueError(
            f"`points` must have shape (B, N, C), got {tuple(points.shape)}; flatten the grid first"
        )
    if not points.is_floating_point() or not centers.is_floating_point():
        raise TypeError(
            "`points` and `centers` must be floating point, "
            f"got {points.dtype} and {centers.dtype}; convert them with .float()"
        )
    B, N, C = points.shape
    if centers.ndim != 3 or centers.shape[::2] != (B, C) or centers.shape[1] == 0:
        raise ValueError(
            f"`centers` must have shape (B, K, C) with B = {B}, C = {C} and K at least 1, "
            f"got {tuple(centers.shape)}; seed one set of centres per image"
        )
    if mask.dtype != torch.bool:
        raise TypeError(
            f"`mask` must be boolean (True = keep), got {mask.dtype}; compare it with a threshold"
        )
    if mask.shape != (B, N):
        raise ValueError(
            f"`mask` must have shape (B, N) = ({B}, {N}), got {tuple(mask.shape)}; "
            "give one value per token"
        )
