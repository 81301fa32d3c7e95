"""Algorithm 1 against a literal loop over one image, bit for bit."""

import doctest
import random
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cliptteacher import fusion
from cliptteacher.fusion import fuse_clusters, pairwise_cosine


@pytest.fixture(scope="module", params=["image by image", "the batch at once"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test with both forms of the scan: the CPU's, and that of other devices."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "the batch at once":
            patch.setattr(fusion, "_scan_images", fusion._scan_batch)
        yield request.param


def loop_fusion(similarity: list[list[float]], valid: list[bool], threshold: float) -> list[int]:
    """Follow Algorithm 1 for one image: take the first remaining row and remove its group."""
    group = [-1] * len(valid)
    remaining = [k for k, alive in enumerate(valid) if alive]
    number = 0
    while remaining:
        leader = remaining[0]
        members = [j for j in remaining if j == leader or similarity[leader][j] > threshold]
        for j in members:
            group[j] = number
        remaining = [j for j in remaining if j not in members]
        number += 1
    return group


def assert_equals_loop(centers: Tensor, valid: Tensor, threshold: float) -> None:
    similarity = pairwise_cosine(centers).tolist()
    expected = [
        loop_fusion(rows, alive, threshold)
        for rows, alive in zip(similarity, valid.tolist(), strict=True)
    ]
    group = fuse_clusters(centers, valid, threshold)
    assert group.dtype == torch.int64
    assert group.tolist() == expected
    assert (group.amax(dim=1) + 1).tolist() == [max(row) + 1 for row in expected]


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_literal_loop_on_2400_images(seed: int) -> None:
    torch.manual_seed(seed)
    B, K, C = 40, (1, 2, 5, 13, 30, 58)[seed % 6], 2 + seed % 5
    # Few integer values give many exact ties, zero centres and cosines on the threshold itself.
    ties = torch.randint(-1, 2, (B, K, C)).float()
    centers = ties if seed % 2 else torch.randn(B, K, C) + 0.5
    valid = torch.rand(B, K) < (0.0, 0.5, 0.9, 1.0)[seed % 4]
    for threshold in (0.8, 0.5, 0.0, 1.0, -0.3, 2**-0.5):
        assert_equals_loop(centers, valid, threshold)


def exact_fusion(centers: list[list[int]], valid: list[bool], threshold: Fraction) -> list[int]:
    """Follow Algorithm 1 in whole numbers: cos > t is a.b > t |a| |b|, squared for t > 0."""

    def similar(a: list[int], b: list[int]) -> bool:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = sum(x * x for x in a) * sum(x * x for x in b)
        return dot > 0 and dot * dot > threshold**2 * lengths

    table = [[float(similar(a, b)) for b in centers] for a in centers]
    return loop_fusion(table, valid, 0.5)


def test_equals_exact_arithmetic_on_5000_cases() -> None:
    """Small whole numbers: many equal centres, opposite ones, K = 1, nothing valid."""
    # A cosine of exactly 41/50 or 61/100 would need a product a.b that is a multiple of 41 or 61,
    # and it is at most 36. So no case lies on the threshold, where rounding would decide.
    rng = random.Random(0)
    for _ in range(100):
        K, C = rng.choice((1, 2, 3, 5, 8, 12)), rng.choice((1, 2, 3, 4))
        threshold, share = rng.choice((41 / 50, 61 / 100)), rng.choice((0.0, 0.5, 0.9, 1.0))
        exact = Fraction(threshold).limit_denominator(100)
        images = [random_whole_numbers(rng, K, C) for _ in range(50)]
        valid = [[rng.random() < share for _ in range(K)] for _ in images]
        group = fuse_clusters(torch.tensor(images).double(), torch.tensor(valid), threshold)
        expected = [exact_fusion(*case, exact) for case in zip(images, valid, strict=True)]
        assert group.tolist() == expected


def random_whole_numbers(rng: random.Random, K: int, C: int) -> list[list[int]]:
    """Draw K vectors, some of them several times, none of them zero."""
    pool = [[rng.randint(-3, 3) for _ in range(C)] for _ in range(max(1, K // rng.randint(1, 3)))]
    pool = [vector if any(vector) else [1] * C for vector in pool]
    return [rng.choice(pool) for _ in range(K)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_invalid_clusters_are_inert(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 15, 4, generator=generator) + 0.5
    valid = torch.rand(3, 15, generator=generator) < 0.7
    group = fuse_clusters(centers, valid)
    for filler in (0.0, 1.0, float("nan"), float("inf")):
        spoiled = centers.masked_fill(~valid.unsqueeze(2), filler)
        assert torch.equal(fuse_clusters(spoiled, valid), group)
    for b in range(3):  # they may as well not be there
        alone = fuse_clusters(centers[b : b + 1, valid[b]], valid[b : b + 1, valid[b]])
        assert torch.equal(alone[0], group[b, valid[b]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_literal_loop_on_any_input(data: st.DataObject) -> None:
    B, K, C = (data.draw(st.integers(1, top)) for top in (3, 8, 3))
    value = st.floats(allow_nan=True, allow_infinity=True, width=32)
    centers = data.draw(st.lists(value, min_size=B * K * C, max_size=B * K * C))
    valid = data.draw(st.lists(st.booleans(), min_size=B * K, max_size=B * K))
    threshold = data.draw(st.floats(-1.5, 1.5))
    assert_equals_loop(
        torch.tensor(centers).view(B, K, C), torch.tensor(valid).view(B, K), threshold
    )


@pytest.mark.parametrize("threshold", [-1.9106899717574043e-305, 1e-300, 0.8, 2**-0.5, 0.6])
def test_the_threshold_is_not_rounded(threshold: float) -> None:
    centers = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [1.0, 1.0]]])
    assert_equals_loop(centers, torch.ones(1, 4, dtype=torch.bool), threshold)


def test_by_hand() -> None:
    # 0-1 and 1-2 are similar, 0-2 are not: 0 takes 1, and 2 stays without a partner.
    centers = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.28, 0.96], [1.0, 0.01], [0.3, 0.9]]])
    valid = torch.tensor([[True, True, True, True, True]])
    assert fuse_clusters(centers, valid, 0.75).tolist() == [[0, 0, 1, 0, 1]]
    valid[0, 0] = False
    assert fuse_clusters(centers, valid, 0.75).tolist() == [[-1, 0, 0, 0, 0]]


def test_similarity_on_the_threshold_does_not_fuse() -> None:
    centers = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.6, 0.8]]], dtype=torch.float64)
    valid = torch.ones(1, 3, dtype=torch.bool)
    cosine = pairwise_cosine(centers)[0, 0, 1].item()
    assert fuse_clusters(centers, valid, cosine).tolist() == [[0, 1, 1]]
    assert fuse_clusters(centers, valid, cosine - 1e-9).tolist() == [[0, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1, 1))
def test_result_is_a_partition_in_leader_order(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(4, 20, 3, generator=generator)
    valid = torch.rand(4, 20, generator=generator) < 0.8
    group = fuse_clusters(centers, valid, threshold)
    assert torch.equal(group >= 0, valid)
    for row, count in zip(group.tolist(), (group.amax(dim=1) + 1).tolist(), strict=True):
        seen = list(dict.fromkeys(number for number in row if number >= 0))
        assert seen == list(range(count))


def test_extreme_thresholds() -> None:
    centers, valid = torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    assert (fuse_clusters(centers, valid, -1.1) == 0).all()
    assert torch.equal(fuse_clusters(centers, valid, 1.1), torch.arange(9).expand(2, 9))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.8])
def test_zero_center_forms_its_own_group(threshold: float) -> None:
    centers = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert fuse_clusters(centers, valid, threshold).tolist() == [[0, 1, 0, 2]]


def test_single_cluster_and_no_valid_cluster() -> None:
    valid = torch.tensor([[True], [False]])
    group = fuse_clusters(torch.ones(2, 1, 3), valid)
    assert group.tolist() == [[0], [-1]]
    assert (group.amax(dim=1) + 1).tolist() == [1, 0]


def test_autocast_and_inference_mode_change_nothing() -> None:
    torch.manual_seed(0)
    centers, valid = torch.randn(3, 58, 16) + 0.7, torch.rand(3, 58) < 0.9
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        mixed = fuse_clusters(centers, valid)
    assert torch.equal(mixed, fuse_clusters(centers, valid))


def test_autocast_does_not_blur_the_threshold() -> None:
    # Cosines of 0.801 and 0.799: half precision has no number between them and 0.8.
    centers = torch.tensor([[[1.0, 0.0], [0.801, 0.598667], [0.799, -0.601331]]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fuse_clusters(centers, valid, 0.8).tolist() == [[0, 0, 1]]


def test_records_no_gradient() -> None:
    centers = torch.randn(1, 5, 4, requires_grad=True)
    assert not pairwise_cosine(centers).requires_grad
    assert not fuse_clusters(centers, torch.ones(1, 5, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("K", [58, 981])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(K: int, backend: str) -> None:
    torch.compiler.reset()  # all functions under no_grad share one limit of compilations
    torch.manual_seed(0)
    centers, valid = torch.randn(2, K, 8) + 0.7, torch.rand(2, K) < 0.8
    compiled = torch.compile(fuse_clusters, fullgraph=True, dynamic=False, backend=backend)
    assert torch.equal(compiled(centers, valid), fuse_clusters(centers, valid))


def test_scan_operator_is_registered_correctly() -> None:
    similar = (torch.rand(2, 6, 6) < 0.4).triu(1)
    valid = torch.rand(2, 6) < 0.8
    results = torch.library.opcheck(fusion._scan_leaders, (similar, valid))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("centers", "valid", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, dtype=torch.bool), ValueError, r"got \(3, 4\); add the"),
        (torch.ones(1, 0, 4), torch.ones(1, 0, dtype=torch.bool), ValueError, "K at least 1"),
        (
            torch.ones(1, 3, 4),
            torch.ones(1, 2, dtype=torch.bool),
            ValueError,
            r"`valid` .*\(1, 2\)",
        ),
        (
            torch.ones(1, 3, 4),
            torch.ones(1, 3),
            TypeError,
            "`valid` must be boolean, got .*float32",
        ),
        (torch.ones(1, 3, 4).int(), torch.ones(1, 3) > 0, TypeError, "`centers` .* got .*int32"),
    ],
)
def test_errors(centers: Tensor, valid: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fuse_clusters(centers, valid)


def test_doctests() -> None:
    result = doctest.testmod(fusion)
    assert result.attempted > 0
    assert result.failed == 0
