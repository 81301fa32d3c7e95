"""Mask fusion, Algorithm 1 of section 3.3: merge the clusters that look alike.

K-Means from many centres leaves many small regions. Like NMS, a greedy scan merges them::

    similar[i, j] = cos(center_i, center_j) > threshold
    for i in 0 .. K-1:                         ties of the unit diagonal: the first row comes first
        if cluster i is valid and not yet taken:
            i leads a new group; it takes every remaining valid j with similar[i, j]

The scan is inherently sequential, but its only state is which clusters are taken, one row of
B x K booleans; the groups follow from the leaders in one step.

Cost: one product of B*K*K*C multiply-adds, then 2 tiny kernels per cluster; the similarity of
shape (B, K, K) is the largest tensor. Nothing waits for the device.
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
    rows = centers if centers.dtype == torch.float64 else centers.float()
    unit = rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    # Autocast would compute the product in half precision, too coarse for a threshold.
    with torch.autocast(unit.device.type, enabled=False):
        return torch.bmm(unit, unit.mT)


@torch.no_grad()
def fuse_clusters(centers: Tensor, valid: Tensor, threshold: float = 0.8) -> Tensor:
    """Fuse the clusters of each image greedily by the similarity of their centres.

    Algorithm 1, arXiv:2310.02296v1. A leader always belongs to its own group, whatever the
    threshold and rounding; a zero or NaN centre resembles nothing and forms a group of its own.

    Args:
        centers: (B, K, C) cluster centres of any length.
        valid: (B, K) bool, True = the cluster holds tokens.
        threshold: lambda of Algorithm 1, a cosine; clusters strictly above it fuse.

    Returns:
        (B, K) int64 group of each cluster: -1 where invalid, else 0 .. G-1 in the order of their
        leaders, which are the lowest cluster of each group.

    Raises:
        ValueError: if a shape does not fit or there is no cluster.
        TypeError: if `valid` is not boolean or `centers` not floating point.

    Deviation: the printed algorithm removes only the leader from the similarity matrix, which lets
    a cluster join several groups; its comment ("The masks selected can not be selected again")
    removes the whole group, as NMS does, and so do we. The result is a partition.

    >>> centers = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    >>> fuse_clusters(centers, torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[0, 1, 0]]
    """
    _check_clusters(centers, valid)
    K = centers.shape[1]
    # In float64: float32 similarities would round the threshold, and ties on it would change sides.
    similar = (pairwise_cosine(centers).double() > threshold).triu(1)  # (B, K, K), only i < j
    leads: Tensor = _scan_leaders(similar, valid)  # (B, K)
    # A cluster is taken by the first leader at or before it that is similar or the cluster itself.
    itself = torch.eye(K, dtype=torch.bool, device=similar.device)
    takes = (similar | itself) & leads.unsqueeze(2)
    leader = takes.to(torch.uint8).argmax(dim=1)  # (B, K), the first maximum
    group = (leads.cumsum(dim=1) - 1).gather(1, leader)
    return group.masked_fill(~valid, -1)


# An operator of its own, because torch.compile would unroll the loop into K steps and spend
# minutes on them; as it is, the compiled graph calls it and fuses what stands around it.
@torch.library.custom_op("cliptteacher::scan_leaders", mutates_args=())
def _scan_leaders(similar: Tensor, valid: Tensor) -> Tensor:
    """Find the leaders: the valid clusters that no earlier leader takes.

    Args:
        similar: (B, K, K) bool, strictly upper triangular.
        valid: (B, K) bool.
    """
    taken = ~valid
    for i, row in enumerate(similar.unbind(dim=1)):
        # row > taken is "row and not taken": only a cluster that is still there can take others.
        taken = taken | (row > taken[:, i : i + 1])
    return ~taken


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
