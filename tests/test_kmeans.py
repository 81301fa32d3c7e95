"""Multi-scale centres and K-Means against explicit windows and a slow, obvious loop."""

import doctest
import itertools
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliptteacher import kmeans
from cliptteacher.kmeans import assign_clusters, masked_kmeans, multiscale_centers


@pytest.fixture(scope="module", params=["images one by one", "the batch at once"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test with both forms of the algorithm: the CPU's, and that of other devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "the batch at once":
            patch.setattr(kmeans, "_cluster_images", kmeans._cluster_batch)
        yield request.param


def random_problem(
    seed: int, B: int = 3, N: int = 40, K: int = 7, C: int = 8, keep: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    centers = torch.randn(B, K, C, generator=generator, dtype=torch.float64)
    return points, centers, torch.rand(B, N, generator=generator) < keep


def cosine_inertia(points: Tensor, mask: Tensor, centers: Tensor, assignment: Tensor) -> Tensor:
    own = centers.gather(1, assignment.clamp(min=0).unsqueeze(2).expand_as(points))
    return ((1 - torch.cosine_similarity(points, own, dim=2)) * mask).sum(dim=1)


def loop_windows(dense: Tensor, scale: int, seeding: str) -> list[Tensor]:
    h, w = dense.shape[1:]
    if seeding == "grid":
        rows, columns = (
            [(i * n // scale, math.ceil((i + 1) * n / scale)) for i in range(scale)] for n in (h, w)
        )
    else:
        stride = scale if seeding == "window" else max(scale // 2, 1)
        rows, columns = ([(i, i + scale) for i in range(0, n - scale + 1, stride)] for n in (h, w))
    return [dense[:, a:b, c:d].mean(dim=(1, 2)) for a, b in rows for c, d in columns]


def loop_kmeans(
    points: Tensor, centers: Tensor, mask: Tensor, iterations: int
) -> tuple[list[Tensor], list[int]]:
    """Run spherical K-Means on one image, one token and one cluster at a time."""
    tokens = [p / p.norm() for p in points]
    means = [c / c.norm() for c in centers]

    def nearest(token: Tensor) -> int:
        return max(range(len(means)), key=lambda k: float(token @ means[k]))

    for _ in range(iterations):
        owner = [nearest(t) if keep else -1 for t, keep in zip(tokens, mask, strict=True)]
        for k in range(len(means)):
            members = [t for t, o in zip(tokens, owner, strict=True) if o == k]
            if members:
                total = torch.stack(members).sum(dim=0)
                means[k] = total / total.norm()
    return means, [nearest(t) if keep else -1 for t, keep in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("seeding", ["grid", "window", "sliding"])
@pytest.mark.parametrize("size", [(7, 7), (9, 8), (10, 13)])
@pytest.mark.parametrize("scales", [(3, 7), (7, 1), (2,)])
def test_centers_equal_explicit_windows(
    seeding: kmeans.Seeding, size: tuple[int, int], scales: tuple[int, ...]
) -> None:
    dense = torch.randn(2, 5, *size, dtype=torch.float64)
    centers = multiscale_centers(dense, scales, seeding)
    for image, rows in zip(dense, centers, strict=True):
        expected = [mean for scale in scales for mean in loop_windows(image, scale, seeding)]
        torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize(("seeding", "K"), [("grid", 58), ("window", 116), ("sliding", 981)])
def test_number_of_centers_at_32_tokens(seeding: kmeans.Seeding, K: int) -> None:
    centers = multiscale_centers(torch.randn(1, 4, 32, 32).half(), seeding=seeding)
    assert centers.shape == (1, K, 4)
    assert centers.dtype == torch.float32


def test_grid_scale_beyond_the_map_repeats_tokens() -> None:
    dense = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    centers = multiscale_centers(dense, scales=(4,))
    assert centers.flatten().tolist() == [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("shape", "scales", "seeding", "message"),
    [
        ((2, 49, 8), (3, 7), "grid", r"`dense` must have shape \(B, C, h, w\), got \(2, 49, 8\)"),
        ((1, 4, 7, 7), (3, 7), "rows", "`seeding` must be .* got 'rows'"),
        ((1, 4, 7, 7), (), "grid", r"`scales` must hold positive integers, got \(\)"),
        ((1, 4, 7, 7), (3, 0), "grid", r"`scales` must hold positive integers, got \(3, 0\)"),
        ((1, 4, 9, 6), (3, 7), "window", "must not exceed the 6 tokens"),
        ((1, 4, 6, 9), (3, 7), "sliding", "must not exceed the 6 tokens"),
    ],
)
def test_seeding_errors(
    shape: tuple[int, ...], scales: tuple[int, ...], seeding: kmeans.Seeding, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        multiscale_centers(torch.zeros(shape), scales, seeding)


def test_kmeans_by_hand() -> None:
    points = torch.tensor([[[2.0, 0.0], [3.0, 4.0], [0.0, 5.0], [-1.0, 0.0]]])
    centers = torch.tensor([[[1.0, 0.0], [0.0, 9.0]]])
    result = masked_kmeans(points, centers, torch.tensor([[True, True, True, False]]), 1)
    # (3, 4)/5 is nearer to (0, 1): center 1 moves to the direction of (0.6, 0.8) + (0, 1).
    direction = torch.tensor([0.6, 1.8]) / math.hypot(0.6, 1.8)
    torch.testing.assert_close(result.centers[0, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(result.centers[0, 1], direction)
    assert result.assignment.tolist() == [[0, 1, 1, -1]]
    assert result.counts.tolist() == [[1, 2]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 9), st.integers(0, 6))
def test_kmeans_equals_the_loop(seed: int, N: int, K: int, iterations: int) -> None:
    points, centers, mask = random_problem(seed, B=2, N=N, K=K, C=4)
    result = masked_kmeans(points, centers, mask, iterations)
    for b in range(2):
        means, owner = loop_kmeans(points[b], centers[b], mask[b], iterations)
        assert result.assignment[b].tolist() == owner
        assert result.counts[b].tolist() == [owner.count(k) for k in range(K)]
        torch.testing.assert_close(result.centers[b], torch.stack(means))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_inertia_never_rises(seed: int) -> None:
    points, centers, mask = random_problem(seed)
    steps = [masked_kmeans(points, centers, mask, iterations) for iterations in range(8)]
    inertia = [cosine_inertia(points, mask, step.centers, step.assignment) for step in steps]
    for before, after in itertools.pairwise(inertia):
        assert (after <= before + 1e-12).all()
    assert (inertia[-1] < inertia[0]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_result_belongs_together(seed: int, keep: float) -> None:
    points, centers, mask = random_problem(seed, keep=keep)
    result = masked_kmeans(points.float(), centers.float(), mask)
    assert torch.equal(result.assignment, assign_clusters(points.float(), result.centers, mask))
    assert torch.equal(result.assignment >= 0, mask)
    assert torch.equal(result.counts.sum(dim=1), mask.sum(dim=1))
    torch.testing.assert_close(result.centers.norm(dim=2), torch.ones(3, 7))


@pytest.mark.parametrize("seed", range(8))
def test_every_step_agrees_with_scikit_learn(seed: int) -> None:
    """Lloyd's algorithm there and here, ten steps from the same centres.

    On unit vectors |x - c|^2 = 2 - 2 cos(x, c), so one step from unit centres assigns alike and
    moves to the same direction; scikit-learn's centres are shorter, so each step starts from ours.
    """
    cluster = pytest.importorskip("sklearn.cluster")
    pairwise = pytest.importorskip("sklearn.metrics")
    points, centers, _ = random_problem(seed, B=1, N=300, K=7)
    mask = torch.ones(1, 300, dtype=torch.bool)
    unit = (points / points.norm(dim=2, keepdim=True))[0].numpy()
    for iteration in range(10):
        before = masked_kmeans(points, centers, mask, iteration)
        assert (before.counts > 0).all()  # scikit-learn would move an empty cluster elsewhere
        nearest = pairwise.pairwise_distances_argmin(unit, before.centers[0].numpy())
        assert before.assignment[0].tolist() == nearest.tolist()
        peer = cluster.KMeans(
            7, init=before.centers[0].numpy(), n_init=1, max_iter=1, tol=0, algorithm="lloyd"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step does not converge
            moved = torch.from_numpy(peer.fit(unit).cluster_centers_)
        after = masked_kmeans(points, centers, mask, iteration + 1)
        torch.testing.assert_close(
            after.centers[0], moved / moved.norm(dim=1, keepdim=True), rtol=0, atol=1e-12
        )


def test_separated_clusters_agree_with_scikit_learn_to_the_end() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(0)
    blobs = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    noise = 0.15 * torch.randn(6, 40, 6, generator=generator, dtype=torch.float64)
    points = (blobs[:, None] + noise).reshape(1, 240, 6)
    start = points[:, ::40] / points[:, ::40].norm(dim=2, keepdim=True)
    unit = (points / points.norm(dim=2, keepdim=True))[0].numpy()
    peer = cluster.KMeans(6, init=start[0].numpy(), n_init=1, algorithm="lloyd").fit(unit)
    ours = masked_kmeans(points, start, torch.ones(1, 240, dtype=torch.bool))
    assert ours.assignment[0].tolist() == peer.labels_.tolist()
    assert ours.assignment[0].tolist() == [k for k in range(6) for _ in range(40)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_the_tokens_does_not_matter(seed: int) -> None:
    points, centers, mask = random_problem(seed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    first = masked_kmeans(points, centers, mask)
    second = masked_kmeans(points[:, order], centers, mask[:, order])
    assert torch.equal(first.assignment[:, order], second.assignment)
    assert torch.equal(first.counts, second.counts)
    # Only the order of the sums differs: some rounding of numbers up to 1.
    torch.testing.assert_close(first.centers, second.centers, rtol=0, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_permuted_centers_give_permuted_clusters(seed: int) -> None:
    points, centers, mask = random_problem(seed)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    first = masked_kmeans(points, centers, mask)
    second = masked_kmeans(points, centers[:, order], mask)
    assert torch.equal(first.counts[:, order], second.counts)
    torch.testing.assert_close(first.centers[:, order], second.centers, rtol=0, atol=1e-13)


def test_batch_equals_singles() -> None:
    points, centers, mask = random_problem(0, B=5)
    batch = masked_kmeans(points, centers, mask)
    for b in range(5):
        single = masked_kmeans(points[b : b + 1], centers[b : b + 1], mask[b : b + 1])
        assert torch.equal(single.assignment[0], batch.assignment[b])
        torch.testing.assert_close(single.centers[0], batch.centers[b], rtol=0, atol=1e-14)


@pytest.mark.parametrize("filler", [0.0, 1e6, math.inf, math.nan])
def test_masked_tokens_are_inert(filler: float) -> None:
    points, centers, mask = random_problem(1)
    spoiled = points.masked_fill(~mask.unsqueeze(2), filler)
    for clean, other in zip(
        masked_kmeans(points, centers, mask), masked_kmeans(spoiled, centers, mask), strict=True
    ):
        assert torch.equal(clean, other)


def test_everything_masked_keeps_the_centers() -> None:
    points, centers, mask = random_problem(2)
    result = masked_kmeans(points, centers, torch.zeros_like(mask))
    assert (result.assignment == -1).all()
    assert (result.counts == 0).all()
    torch.testing.assert_close(result.centers, centers / centers.norm(dim=2, keepdim=True))


def test_empty_cluster_keeps_its_center() -> None:
    points = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]]])
    centers = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]]])
    result = masked_kmeans(points, centers, torch.ones(1, 2, dtype=torch.bool))
    assert result.counts.tolist() == [[2, 0]]
    assert result.centers[0, 1].tolist() == [0.0, 0.0, -1.0]


def test_zero_tokens_and_zero_centers_give_no_nan() -> None:
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    centers = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    result = masked_kmeans(points, centers, torch.ones(1, 3, dtype=torch.bool), 1)
    assert result.centers.tolist() == [[[-1.0, 0.0], [1.0, 0.0]]]
    assert result.assignment.tolist() == [[0, 1, 0]]


def test_cluster_whose_tokens_cancel_keeps_its_center() -> None:
    points = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    result = masked_kmeans(points, torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 2, dtype=torch.bool))
    assert result.centers.tolist() == [[[0.0, 1.0]]]
    assert result.counts.tolist() == [[2]]


def test_cluster_whose_tokens_cancel_but_for_rounding_keeps_its_center() -> None:
    angles = torch.tensor([0.1, 0.1 + 2 * math.pi / 3, 0.1 + 4 * math.pi / 3])
    points = torch.stack([angles.cos(), angles.sin(), torch.zeros(3)], dim=1)[None]
    assert 0 < points.sum(dim=1).norm() < 1e-6  # what is left is noise and no direction
    center = torch.tensor([[[0.0, 0.0, 1.0]]])
    result = masked_kmeans(points, center, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(result.centers, center)


def test_ties_go_to_the_lowest_index() -> None:
    centers = torch.eye(4)[None, [3, 1, 1, 3]]
    assignment = assign_clusters(torch.eye(4)[None], centers, torch.ones(1, 4, dtype=torch.bool))
    assert assignment.tolist() == [[0, 1, 0, 0]]


def test_length_of_tokens_and_centers_does_not_matter() -> None:
    points, centers, mask = random_problem(3)
    scaled = masked_kmeans(points * 8, centers / 4, mask)
    assert torch.equal(scaled.assignment, masked_kmeans(points, centers, mask).assignment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_full_precision(dtype: torch.dtype) -> None:
    points, centers, mask = random_problem(4)
    points, centers = points.to(dtype), centers.to(dtype)
    plain = masked_kmeans(points, centers, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = masked_kmeans(points, centers, mask)
    assert plain.centers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_blur_near_ties() -> None:
    # Both cosines, 0.99995 and 1, are 1 in half precision.
    centers = torch.tensor([[[math.cos(0.01), math.sin(0.01)], [1.0, 0.0]]])
    points, mask = torch.tensor([[[3.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert assign_clusters(points, centers, mask).tolist() == [[1]]


def test_is_deterministic_and_records_no_gradient() -> None:
    points, centers, mask = random_problem(5)
    first = masked_kmeans(points.requires_grad_(), centers, mask)
    assert not first.centers.requires_grad
    for a, b in zip(first, masked_kmeans(points, centers, mask), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    torch.compiler.reset()  # all functions under no_grad share one limit of compilations
    points, centers, mask = random_problem(6)
    centers[:, 2] = 0
    compiled = torch.compile(masked_kmeans, fullgraph=True, backend=backend)(
        points, centers, mask, 3
    )
    eager = masked_kmeans(points, centers, mask, 3)
    assert torch.equal(compiled.assignment, eager.assignment)
    assert torch.equal(compiled.counts, eager.counts)
    torch.testing.assert_close(compiled.centers, eager.centers, rtol=0, atol=1e-14)


def test_operator_is_registered_correctly() -> None:
    points, centers, mask = random_problem(7)
    unit = kmeans._unit_rows(centers)
    arguments = (points.mT.contiguous().mT, unit.mT.contiguous().mT, mask, 2)
    results = torch.library.opcheck(torch.ops.cliptteacher.cluster_images.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


BOOLS = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("points", "centers", "mask", "error", "message"),
    [
        (torch.zeros(4, 196), torch.zeros(2, 3, 4), BOOLS, ValueError, r"got \(4, 196\); flatten"),
        (torch.zeros(2, 5, 4), torch.zeros(3, 4), BOOLS, ValueError, r"`centers` .* got \(3, 4\)"),
        (torch.zeros(2, 5, 4), torch.zeros(1, 3, 4), BOOLS, ValueError, "`centers` .* B = 2"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 0, 4), BOOLS, ValueError, "K at least 1"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 3, 4), BOOLS[:1], ValueError, r"`mask` .* \(1, 5\)"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 3, 4), BOOLS.int(), TypeError, "`mask` .*int32"),
        (torch.zeros(2, 5, 4).long(), torch.zeros(2, 3, 4), BOOLS, TypeError, "int64 and .*32"),
    ],
)
def test_clustering_errors(
    points: Tensor, centers: Tensor, mask: Tensor, error: type[Exception], message: str
) -> None:
    for function in (masked_kmeans, assign_clusters):
        with pytest.raises(error, match=message):
            function(points, centers, mask)


def test_negative_iterations_are_an_error() -> None:
    with pytest.raises(ValueError, match="`iterations` must be at least 0, got -1"):
        masked_kmeans(*random_problem(0), iterations=-1)


def test_doctests() -> None:
    result = doctest.testmod(kmeans)
    assert result.attempted > 0
    assert result.failed == 0
