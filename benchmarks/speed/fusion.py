"""Mask fusion of 16 images against a loop over images in numpy.

OMP_NUM_THREADS=1 python benchmarks/speed/fusion.py
"""

import numpy as np
import torch
from race import finish, floor_ms, race, report, start

from cliptteacher.fusion import fuse_clusters

B, C, THRESHOLD = 16, 512, 0.8
VALID = {58: 0.9, 116: 0.9, 981: 0.56}  # the shares that K-Means leaves
GOALS = {58: 1.0, 116: 1.0, 981: 2.0}


def numpy_loop(centers: np.ndarray, valid: np.ndarray) -> np.ndarray:
    group = np.full(valid.shape, -1)
    for b, rows in enumerate(centers):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        similar, left, number = unit @ unit.T > THRESHOLD, valid[b].copy(), 0
        for i in range(len(rows)):
            if left[i]:
                taken = similar[i] & left
                taken[i] = True
                group[b][taken], left[taken], number = number, False, number + 1
    return group


def measure(K: int, rounds: int) -> dict[str, object]:
    objects = torch.randn(B, K // 4, C)
    own = torch.randint(K // 4, (B, K, 1)).expand(-1, -1, C)
    centers = objects.gather(1, own) + 0.3 * torch.randn(B, K, C)
    valid = torch.rand(B, K) < VALID[K]
    ways = {
        "ours": lambda: fuse_clusters(centers, valid, THRESHOLD),
        "numpy, loop": lambda: numpy_loop(centers.numpy(), valid.numpy()),
    }
    assert ways["ours"]().tolist() == ways["numpy, loop"]().tolist()
    floor = floor_ms(valid.sum(dim=1).square().sum().item() * C)
    return report(f"fusion, K = {K}", race(ways, rounds), GOALS[K], floor)


if __name__ == "__main__":
    rounds = start(__doc__)
    finish([measure(K, rounds) for K in VALID])
