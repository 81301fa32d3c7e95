"""K-Means of 16 images against loops with faiss and scikit-learn, and two batched libraries.

    OMP_NUM_THREADS=1 python benchmarks/speed/kmeans.py

1,024 tokens of 512 channels, 40 % of them masked, 58 and 981 given centres, 10 iterations, cosine.
The tokens are a smooth map with noise, which converges late, or independent. Neither peer accepts
more centres than tokens, so that with 981 no token is masked. Of independent tokens the assignments
must be equal first; on a smooth map clusters end empty, which faiss fills and we do not. The
batched ones know no mask: their row has none, and one cold turn each.
"""

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from fast_pytorch_kmeans import MultiKMeans
from race import finish, floor_ms, race, report, start
from sklearn.cluster import KMeans
from torch import Tensor
from torch_kmeans import KMeans as TorchKMeans

from cliptteacher.kmeans import masked_kmeans, multiscale_centers

B, SIDE, C, ITERATIONS = 16, 32, 512, 10


def faiss_loop(points: np.ndarray, centers: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    found = []
    for image, start_rows, keep in zip(points, centers, mask, strict=True):
        tokens, rows = unit(image[keep]), unit(start_rows)
        options = {"min_points_per_centroid": 1, "max_points_per_centroid": 10**6}
        machine = faiss.Kmeans(C, len(rows), niter=ITERATIONS, spherical=True, **options)
        machine.train(tokens, init_centroids=rows)
        found.append(machine.index.search(tokens, 1)[1][:, 0])
    return found


def sklearn_loop(points: np.ndarray, centers: np.ndarray, mask: np.ndarray) -> None:
    for image, start_rows, keep in zip(points, centers, mask, strict=True):
        machine = KMeans(len(start_rows), init=unit(start_rows), n_init=1, max_iter=ITERATIONS)
        machine.set_params(tol=0, algorithm="lloyd").fit(unit(image[keep]))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def share_equal(assignment: Tensor, mask: Tensor, found: list[np.ndarray]) -> float:
    pairs = zip(assignment, mask, found, strict=True)
    return float(np.mean([(row[keep].numpy() == peer).mean() for row, keep, peer in pairs]))


def measure(kind: str, K: int, rounds: int) -> dict[str, object]:
    noise = torch.randn(B, C, SIDE, SIDE)
    smooth = F.interpolate(torch.randn(B, C, 8, 8), size=(SIDE, SIDE), mode="bilinear")
    dense = smooth + 0.5 * noise if kind == "smooth" else noise
    points = dense.flatten(2).mT.contiguous()
    mask = torch.rand(B, SIDE**2) < (0.6 if K < 600 else 1.1)
    seeding = "grid" if K == 58 else "sliding"
    centers = multiscale_centers(dense, seeding=seeding).contiguous()
    if kind == "independent":  # means of a window are alike; tokens are not
        centers = points[:, :K] + 0.3 * torch.randn(B, K, C)
    arrays = points.numpy(), centers.numpy(), mask.numpy()
    ways = {
        "ours": lambda: masked_kmeans(points, centers, mask, ITERATIONS),
        "faiss-cpu, loop": lambda: faiss_loop(*arrays),
    }
    if K == 58:
        ways["scikit-learn, loop"] = lambda: sklearn_loop(*arrays)
    if kind == "independent":
        equal = share_equal(ways["ours"]().assignment, mask, ways["faiss-cpu, loop"]())
        assert equal > 0.999, equal  # near ties may go either way
    floor = floor_ms((ITERATIONS + 1) * mask.sum().item() * K * C)
    name = f"K-Means, K = {K}, {kind} tokens"
    return report(name, race(ways, rounds if K == 58 else 3), 1.0, floor)


def measure_batched() -> dict[str, object]:
    points = F.normalize(torch.randn(B, SIDE**2, C), dim=2)
    centers = points[:, :58].contiguous()
    everything = torch.ones(B, SIDE**2, dtype=torch.bool)
    slow = TorchKMeans(n_clusters=58, num_init=1, max_iter=ITERATIONS, tol=0.0, verbose=False)
    fast = MultiKMeans(58, max_iter=ITERATIONS, tol=-1.0, mode="cosine")
    ways = {
        "ours": lambda: masked_kmeans(points, centers, everything, ITERATIONS),
        "fast-pytorch-kmeans": lambda: fast.fit_predict(points, centers),
        "torch_kmeans": lambda: slow(points, centers=centers),
    }
    ways["ours"]()
    first = fast.max_sim(points, centers)[1]
    assert torch.equal(masked_kmeans(points, centers, everything, 0).assignment, first)
    return report("K-Means, K = 58, without a mask", race(ways, 1, warm_up=False), 1.0)


if __name__ == "__main__":
    rounds = start(__doc__)
    cases = [("smooth", 58), ("independent", 58), ("smooth", 981)]
    finish([*(measure(kind, K, rounds) for kind, K in cases), measure_batched()])
