"""Multi-scale centres and a batched, masked, cosine K-Means: section 3.3, Eq. (4)-(5).

CLIP's dense tokens of one object are similar, so clustering them finds the potential objects in
the unannotated area::

    centers = window means of the token map at every scale       Eq. (4)-(5), K of them
    repeat iterations times:                                      Lloyd, per image
        assignment = argmax_k cos(token, center_k)                unmasked tokens only
        center_k   = unit(sum of the unit tokens assigned to k)   an empty cluster keeps its own
    assignment = argmax_k cos(token, center_k)                    counts 0 = invalid cluster

Two forms give the same result. On the CPU images follow one another, with the n unmasked tokens of
each, until no token changes its cluster: n*K*C multiply-adds an iteration, a third of the other
form's, and often 3 iterations are enough. Other devices take the whole batch in fixed shapes and
wait for nothing: nine launches an iteration, two of them products of B*N*K*C multiply-adds.
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
    tokens = _full_precision(dense)
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
    return _run_lloyd(points, centers, mask, iterations=0)[1]


@torch.no_grad()
def masked_kmeans(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int = 10
) -> KMeansResult:
    """Cluster the unmasked tokens of each image by cosine similarity.

    `iterations` Lloyd iterations (assign, then move every centre to the unit mean of its tokens)
    are followed by a final assignment, so that the result is consistent: `assignment` is
    ``assign_clusters(points, result.centers, mask)``, up to the rounding of equal similarities,
    and `counts` counts it. A cluster without tokens, or whose tokens cancel out, keeps its centre.

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
    centers, assignment = _run_lloyd(points, centers, mask, iterations)
    counts = assignment.new_zeros(centers.shape[:2])  # (B, K)
    counts.scatter_add_(1, assignment.clamp(min=0), mask.long())
    return KMeansResult(centers, assignment, counts)


def _pool_windows(tokens: Tensor, scale: int, seeding: Seeding) -> Tensor:
    if seeding == "grid":
        return F.adaptive_avg_pool2d(tokens, scale)
    return F.avg_pool2d(tokens, scale, stride=scale if seeding == "window" else max(scale // 2, 1))


def _unit_rows(rows: Tensor) -> Tensor:
    return F.normalize(_full_precision(rows), dim=-1)


def _full_precision(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _run_lloyd(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the unit centres (B, K, C) after the iterations, and the assignment (B, N) to them."""
    centers = _unit_rows(centers).to(_full_precision(points[:0]).dtype)
    # Autocast would round both factors to half precision and flip near ties.
    with torch.autocast(points.device.type, enabled=False):
        if points.device.type != "cpu":
            return _cluster_batch(points, centers, mask, iterations)
        centers, assignment = _cluster_images(points, centers, mask, iterations)
        return centers, assignment


# An operator of its own, because torch.compile cannot trace shapes that depend on numbers.
@torch.library.custom_op("cliptteacher::cluster_images", mutates_args=())
def _cluster_images(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Cluster one image after another, the unmasked tokens alone, from unit centres."""
    centers = centers.clone(memory_format=torch.contiguous_format)  # fast rows to add to
    assignment = mask.long() - 1  # -1 where masked out
    for b, keep in enumerate(mask):
        tokens = _unit_rows(points[b].index_select(0, keep.nonzero().squeeze(1)))  # (n, C)
        centers[b], assignment[b, keep] = _cluster_tokens(tokens, centers[b], iterations)
    return centers, assignment


@_cluster_images.register_fake
def _describe_clusters(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    return centers.new_empty(centers.shape), mask.long()


def _cluster_tokens(tokens: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster unit tokens (n, C) from unit centres (K, C); returns centres and assignment (n,)."""
    assignment = _nearest(tokens, centers)
    for _ in range(iterations):
        sums = torch.zeros_like(centers).index_add_(0, assignment, tokens)
        centers = _move_centers(sums, centers)
        before, assignment = assignment, _nearest(tokens, centers)
        if torch.equal(assignment, before):  # equal members give equal centres, for ever
            break
    return centers, assignment


def _nearest(tokens: Tensor, centers: Tensor) -> Tensor:
    # Of a transposed product the indices of `max` take a tenth of the time of `argmax`.
    return (centers @ tokens.mT).max(dim=0).indices


def _cluster_batch(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Cluster all images at once from unit centres, in fixed shapes, without reading a number.

    The sums are a product with the one-hot assignment: it costs no more than the similarity did
    and adds in a fixed order on every device, where the atomics of `index_add` do not.
    """
    # A masked token is zero wherever it is assigned; its own values may be NaN, and 0 * NaN is NaN.
    tokens = _unit_rows(points).masked_fill(~mask.unsqueeze(2), 0.0)
    clusters = torch.arange(centers.shape[1], device=points.device)
    for _ in range(iterations):
        nearest = torch.bmm(tokens, centers.mT).argmax(dim=2)  # (B, N)
        one_hot = (nearest.unsqueeze(2) == clusters).to(tokens.dtype)  # (B, N, K)
        centers = _move_centers(torch.bmm(one_hot.mT, tokens), centers)
    nearest = torch.bmm(tokens, centers.mT).argmax(dim=2)
    return centers, nearest.masked_fill(~mask, -1)


def _move_centers(sums: Tensor, centers: Tensor) -> Tensor:
    """Give the sums of unit tokens (..., K, C) unit length; an empty cluster keeps its centre."""
    length = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(length > _MIN_NORM, sums / length, centers)


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
