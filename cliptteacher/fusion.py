"""Mask fusion, Algorithm 1 of section 3.3: merge similar clusters.

K-Means from many centres leaves many small regions. Like NMS, a greedy scan merges them::

    similar[i, j] = cos(center_i, center_j) > threshold
    for i in 0 .. K-1:                         ties of the unit diagonal: the first row comes first
        if cluster i is valid and not yet taken:
            i leads a new group; it takes every remaining valid j with similar[i, j]

Whether a cluster leads depends on all before it: which clusters come out is the lexicographically
first maximal independent set of a graph, a problem complete for P (Cook, 1985), so no fixed number
of matrix steps can be expected to solve it for any K. Cost: B*K*K*C multiply-adds, then a scan: on
the CPU a row of K bytes for each leader, elsewhere one tiny kernel per cluster. Every shape is
fixed and nothing waits for the device.
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
    similar = _exceeds(pairwise_cosine(centers), threshold).triu(1)  # (B, K, K), only i < j
    leads: Tensor = _scan_leaders(similar, valid)  # (B, K)
    # A cluster is taken by the first leader at or before it that is similar or the cluster itself.
    itself = torch.eye(centers.shape[1], dtype=torch.bool, device=similar.device)
    takes = (similar | itself) & leads.unsqueeze(2)
    leader = takes.to(torch.uint8).max(dim=1).indices  # (B, K), the first maximum
    group = (leads.cumsum(dim=1) - 1).gather(1, leader)
    return group.masked_fill(~valid, -1)


def _exceeds(similarity: Tensor, threshold: float) -> Tensor:
    # In float64: float32 similarities would round the threshold, and ties on it would change sides.
    return similarity.double() > threshold


# An operator of its own, because torch.compile would unroll the loop into K steps and spend
# minutes on them; as it is, the compiled graph calls it and fuses what stands around it.
@torch.library.custom_op("cliptteacher::scan_leaders", mutates_args=())
def _scan_leaders(similar: Tensor, valid: Tensor) -> Tensor:
    """Find the leaders (B, K): the valid clusters that no earlier leader takes.

    Args:
        similar: (B, K, K) bool, strictly upper triangular.
        valid: (B, K) bool.
    """
    return (_scan_images if similar.device.type == "cpu" else _scan_batch)(similar, valid)


@_scan_leaders.register_fake
def _describe_leaders(similar: Tensor, valid: Tensor) -> Tensor:
    return torch.empty_like(valid)


def _scan_images(similar: Tensor, valid: Tensor) -> Tensor:
    """Scan image after image; a set of clusters is a number with a byte for each, lowest first."""
    K, leads = valid.shape[1], torch.zeros_like(valid)
    for b in range(len(valid)):
        table = similar[b].numpy().tobytes()
        left, leaders = int.from_bytes(valid[b].numpy().tobytes(), "little"), []
        while left:
            first = (left & -left).bit_length() // 8
            leaders.append(first)
            taken = int.from_bytes(table[first * K : first * K + K], "little")
            left &= ~(taken | 1 << 8 * first)
        leads[b, leaders] = True
    return leads


def _scan_batch(similar: Tensor, valid: Tensor) -> Tensor:
    """Scan all images at once without reading a number, one tiny kernel per cluster.

    A cluster that is free has the number 0.5, one that is taken infinity. Step i adds reach[i] / x
    to every number, with x that of cluster i: 0 for a dissimilar cluster or a taken i, else the
    largest float divided by 0.5, which is infinity. Written with booleans a step is two kernels.
    """
    reach = similar.float() * torch.finfo(torch.float32).max
    state = torch.where(valid, 0.5, torch.inf)  # (B, K)
    for i, row in enumerate(reach.unbind(dim=1)):
        state = torch.addcdiv(state, row, state[:, i : i + 1])
    return state == 0.5


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
