"""Mask fusion, Algorithm 1 of section 3.3: merge similar clusters.

K-Means from many centres leaves many small regions. Like NMS, a greedy scan merges them::

    similar[i, j] = cos(center_i, center_j) > threshold
    for i in 0 .. K-1:                         ties of the unit diagonal: the first row comes first
        if cluster i is valid and not yet taken:
            i leads a new group; it takes every remaining valid j with similar[i, j]

Whether a cluster leads depends on all before it: which clusters come out is the lexicographically
first maximal independent set of a graph, a problem complete for P (Cook, 1985), so no fixed number
of matrix steps can be expected to solve it for any K. Two forms give the same result. On the CPU
images follow one another, with the k valid clusters of each (k*k*C multiply-adds, a row of k*k
bytes for each leader). Other devices take the whole batch in fixed shapes and wait for nothing:
B*K*K*C multiply-adds and one tiny kernel per cluster.
"""

import torch
from torch import Tensor


@torch.no_grad()
def pairwise_cosine(centers: Tensor) -> Tensor:
    """Compute the cosine similarity among all centres of an image.

    S = T·T^T / |T|^2, line 3 of Algorithm 1, arXiv:2310.02296v1.

    Args:
        centers: (B, K, C) centres of any length.

    Returns:
        (B, K, K) similarities in float32 (float64 for float64 centres). Those of a zero centre,
        which has no direction, are NaN.

    >>> pairwise_cosine(torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    unit = _unit_rows(centers)
    # Autocast would compute the product in half precision, too coarse for a threshold.
    with torch.autocast(unit.device.type, enabled=False):
        return torch.bmm(unit, unit.mT)


def _unit_rows(centers: Tensor) -> Tensor:
    rows = centers if centers.dtype == torch.float64 else centers.float()
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length


@torch.no_grad()
def fuse_clusters(centers: Tensor, valid: Tensor, threshold: float = 0.8) -> Tensor:
    """Fuse the clusters of each image greedily by the similarity of their centres.

    Algorithm 1, arXiv:2310.02296v1. A leader always belongs to its own group, whatever the
    threshold and rounding; a zero or NaN centre is similar to none and forms a group by itself.

    Args:
        centers: (B, K, C) cluster centres of any length.
        valid: (B, K) bool, True = the cluster holds tokens.
        threshold: lambda of Algorithm 1, a cosine; clusters strictly above it fuse.

    Returns:
        (B, K) int64 group of each cluster: -1 where invalid, else 0 .. G-1 in the order of the
        leaders; the leader of a group is its first cluster.

    Raises:
        ValueError: a shape does not fit or there is no cluster.
        TypeError: `valid` is not boolean or `centers` not floating point.

    Deviation: the printed algorithm removes only the leader from the similarity matrix, which lets
    a cluster join several groups; its comment ("The masks selected can not be selected again")
    removes the whole group, as NMS does, which is what this function does. The result is a
    partition.

    >>> centers = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    >>> fuse_clusters(centers, torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[0, 1, 0]]
    """
    _check_clusters(centers, valid)
    if centers.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            fused: Tensor = _fuse_images(centers, valid, threshold)
        return fused
    return _fuse_batch(centers, valid, threshold)


# An operator of its own, because torch.compile cannot trace shapes that depend on numbers.
@torch.library.custom_op("cliptteacher::fuse_images", mutates_args=())
def _fuse_images(centers: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Fuse the valid clusters of one image after another."""
    group = valid.long() - 1  # -1 where invalid
    for b, keep in enumerate(valid):
        unit = _unit_rows(centers[b].index_select(0, keep.nonzero().squeeze(1)))  # (k, C)
        similar = _exceeds(unit @ unit.mT, threshold).fill_diagonal_(True)  # (k, k)
        leaders = _find_leaders(similar)
        if leaders:
            number = similar[leaders].max(dim=0).indices  # of the first leader that takes it
            group[b].masked_scatter_(keep, number)
    return group


@_fuse_images.register_fake
def _describe_groups(centers: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return valid.long()


def _find_leaders(similar: Tensor) -> list[int]:
    """Scan the clusters of an image; a set of clusters is a number with a byte for each of them."""
    k, table = len(similar), similar.numpy().tobytes()
    left = int.from_bytes(b"\1" * k, "little")
    leaders = []
    while left:
        lowest = (left & -left).bit_length() // 8
        leaders.append(lowest)
        left &= ~int.from_bytes(table[lowest * k : lowest * k + k], "little")
    return leaders


def _fuse_batch(centers: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Fuse the clusters of all images at once, in fixed shapes and without reading a number."""
    similar = _exceeds(pairwise_cosine(centers), threshold).triu(1)  # (B, K, K), only i < j
    leads: Tensor = _scan_leaders(similar, valid)  # (B, K)
    # A cluster is taken by the first leader at or before it that is similar or the cluster itself.
    itself = torch.eye(centers.shape[1], dtype=torch.bool, device=similar.device)
    takes = (similar | itself) & leads.unsqueeze(2)
    leader = takes.to(torch.uint8).argmax(dim=1)  # (B, K), the first maximum
    group = (leads.cumsum(dim=1) - 1).gather(1, leader)
    return group.masked_fill(~valid, -1)


def _exceeds(similarity: Tensor, threshold: float) -> Tensor:
    # In float64: float32 similarities would round the threshold, and ties on it would change sides.
    return similarity.double() > threshold


# An operator of its own, because torch.compile would unroll the loop into K steps and spend
# minutes on them; as it is, the compiled graph calls it and fuses what stands around it.
@torch.library.custom_op("cliptteacher::scan_leaders", mutates_args=())
def _scan_leaders(similar: Tensor, valid: Tensor) -> Tensor:
    """Find the leaders: the valid clusters that no earlier leader takes.

    A cluster that is free has the number 0.5, one that is taken infinity. Step i adds reach[i] / x
    to every number, with x that of cluster i: 0 for a dissimilar cluster or a taken i, else the
    largest float divided by 0.5, which is infinity. Written with booleans a step is two kernels.

    Args:
        similar: (B, K, K) bool, strictly upper triangular.
        valid: (B, K) bool.
    """
    reach = similar.float() * torch.finfo(torch.float32).max
    state = torch.where(valid, 0.5, torch.inf)  # (B, K)
    for i, row in enumerate(reach.unbind(dim=1)):
        state = torch.addcdiv(state, row, state[:, i : i + 1])
    return state == 0.5


@_scan_leaders.register_fake
def _describe_leaders(similar: Tensor, valid: Tensor) -> Tensor:
    return torch.empty_like(valid)


def _check_clusters(centers: Tensor, valid: Tensor) -> None:
    if centers.ndim != 3 or centers.shape[1] == 0:
        raise ValueError(
            f"`centers` must have shape (B, K, C) with K at least 1, got {tuple(centers.shape)}; "
            "add the batch dimension for a single image"
        )
    if not centers.is_floating_point():
        raise TypeError(f"`centers` must be floating point, got {centers.dtype}; use .float()")
    if valid.dtype != torch.bool:
        raise TypeError(f"`valid` must be boolean, got {valid.dtype}; pass `counts > 0`")
    if valid.shape != centers.shape[:2]:
        raise ValueError(
            f"`valid` must have shape (B, K) = {tuple(centers.shape[:2])}, "
            f"got {tuple(valid.shape)}; give one value per cluster"
        )
