"""The Pixel Learning Module against loops over images, pixels and classes."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fusion import loop_fusion
from test_kmeans import loop_kmeans, loop_windows
from torch import Tensor

from cliptteacher.fusion import fuse_clusters
from cliptteacher.kmeans import masked_kmeans, multiscale_centers
from cliptteacher.plm import (
    PixelLearningModule,
    PLMConfig,
    class_prototypes,
    generate_loss,
    merge_labels,
    own_image_ids,
    pixel_cross_entropy,
    resize_nearest,
    unannotated_share,
)

B, C, S = 3, 8, 4
SCENE = {"scales": (1, 3), "kmeans_iterations": 3, "fusion_threshold": 0.5}


def build(**options: Any) -> PixelLearningModule:
    return PixelLearningModule(C, PLMConfig(**{"loss_size": "features", **options}))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """features, seen_logits, dense, cls, labels, text; image 0 is annotated throughout."""
    g = seeded(seed)
    features = torch.randn(B, C, 6, 6, generator=g)
    text = F.normalize(torch.randn(S, C, generator=g), dim=1)
    dense = torch.randn(B, 5, 8, 8, generator=g)
    cls = torch.randn(B, C, generator=g)
    labels = torch.randint(S, (B, 32, 32), generator=g)
    blocks = torch.rand(B, 4, 4, generator=g) < 0.6  # unannotated areas of 8 x 8 pixels
    blocks[0] = False
    ignored = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = labels.masked_fill(ignored, 255)
    return features, torch.einsum("bchw,kc->bkhw", features, text), dense, cls, labels, text


# --- labels -----------------------------------------------------------------------------------


def test_unannotated_share_counts_pixels() -> None:
    labels = torch.zeros(1, 4, 8, dtype=torch.uint8)
    labels[0, :2, :4] = 255
    labels[0, 3, 7] = 255
    share = unannotated_share(labels, (2, 4))
    assert share.tolist() == [[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.25]]]


def test_unannotated_share_with_another_ignore_index() -> None:
    labels = torch.tensor([[[0, 7], [7, 7]]])
    assert unannotated_share(labels, (1, 1), ignore_index=7).item() == 0.75


def test_merge_labels_equals_a_loop_and_passes_255() -> None:
    g = seeded(0)
    slots, num_seen, images = 100, 20, 5  # ids up to 519
    labels = torch.randint(num_seen, (images, 6, 7), generator=g).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=g) < 0.6] = 255
    groups = torch.randint(-1, 130, (images, 6, 7), generator=g)
    merged = merge_labels(labels, groups, num_seen, slots)
    assert merged.dtype == torch.int64
    for b in range(images):
        for y in range(6):
            for x in range(7):
                label, group = int(labels[b, y, x]), int(groups[b, y, x])
                potential = num_seen + b * slots + group if 0 <= group < slots else -1
                assert merged[b, y, x] == (potential if label == 255 else label)
    assert merged.max() > 255


def test_a_group_whose_id_is_255_is_not_ignored() -> None:
    labels = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    groups = torch.tensor([0, 55, 10]).view(3, 1, 1)
    merged = merge_labels(labels, groups, num_seen=100, slots=100)
    assert merged.flatten().tolist() == [100, 255, 310]
    _, present = class_prototypes(torch.ones(3, 2, 1, 1), merged, 100, 100)
    assert present.nonzero().flatten().tolist() == [100, 255, 310]
    logits = torch.randn(3, 300, 1, 1, generator=seeded(1))
    expected = F.cross_entropy(torch.cat((torch.zeros(3, 100, 1, 1), logits), 1), merged)
    loss = pixel_cross_entropy(torch.zeros(3, 100, 1, 1), logits, merged)
    torch.testing.assert_close(loss, expected)


def test_own_image_ids() -> None:
    labels = torch.tensor([[[0, 3, -1, 4, 8]], [[2, -1, 1, 9, 13]]])  # S = 4, 5 slots
    assert own_image_ids(labels, 4, 5).tolist() == [[[0, 3, -1, 4, 8]], [[2, -1, 1, 4, 8]]]


SIZES = [((7, 5), (3, 2)), ((3, 4), (9, 11)), ((32, 32), (8, 8)), ((427, 640), (107, 160))]


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resize_nearest_equals_nearest_exact(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    labels = torch.randint(10_000, (2, *size), generator=seeded(0))
    expected = F.interpolate(labels[:, None].double(), target, mode="nearest-exact")[:, 0].long()
    assert torch.equal(resize_nearest(labels, target), expected)


def test_resize_nearest_never_leaves_the_map() -> None:
    for length in range(1, 60):
        labels = torch.arange(length).view(1, 1, length)
        for target in range(1, 60):
            taken = resize_nearest(labels, (1, target)).flatten().tolist()
            exact = [(2 * i + 1) * length // (2 * target) for i in range(target)]
            assert taken == exact


def test_padding_is_no_unannotated_area() -> None:
    _, _, dense, _, labels, _ = random_batch(3)
    labels[1:, 16:], labels[1:, :, 24:] = 254, 254
    module = build(**SCENE)
    targets = module.make_targets(dense, labels, (32, 32), S)
    groups, _ = module.group_tokens(dense, labels)
    assert (targets.labels[labels == 254] == -1).all()
    assert (groups[1:, 4:] == -1).all() and (groups[1:, :, 6:] == -1).all()
    assert (groups[1:, :4, :6] >= 0).any() and (targets.labels[labels == 255] >= S).all()


# --- prototypes and the generate loss ---------------------------------------------------------


def loop_prototypes(features: Tensor, labels: Tensor, num_labels: int) -> dict[int, Tensor]:
    rows: dict[int, list[Tensor]] = {}
    for b in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                rows.setdefault(int(labels[b, y, x]), []).append(features[b, :, y, x])
    return {k: sum(v) / len(v) for k, v in rows.items() if 0 <= k < num_labels}


def test_class_prototypes_equal_a_loop_over_pixels() -> None:
    features = torch.randn(2, 5, 4, 6, generator=seeded(0))
    labels = torch.randint(-1, 8, (2, 4, 6), generator=seeded(1))  # 5 seen, 3 slots an image
    labels[labels == 4] = -1
    labels[1] = torch.where(labels[1] < 5, labels[1], labels[1] + 3)
    prototypes, present = class_prototypes(features, labels, 5, 3)
    expected = loop_prototypes(features, labels, 11)
    assert prototypes.shape == (11, 5)
    assert {i for i in range(11) if present[i]} == set(expected)
    for i in range(11):
        torch.testing.assert_close(prototypes[i], expected.get(i, torch.zeros(5)))


def test_class_prototypes_pass_each_pixel_its_share_of_the_gradient() -> None:
    features = torch.randn(1, 2, 1, 4, generator=seeded(0), requires_grad=True)
    prototypes, _ = class_prototypes(features, torch.tensor([[[0, 0, 1, -1]]]), 1, 1)
    prototypes.sum().backward()
    assert features.grad[0, 0, 0].tolist() == [0.5, 0.5, 1.0, 0.0]


def test_class_prototypes_of_nothing_are_zero() -> None:
    prototypes, present = class_prototypes(
        torch.randn(2, 3, 2, 2), torch.full((2, 2, 2), -1), num_seen=2, slots=1
    )
    assert prototypes.shape == (4, 3)
    assert not present.any() and not prototypes.any()


def test_mse_by_hand() -> None:
    generated = torch.tensor([[1.0, 2.0], [5.0, 5.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    present = torch.tensor([True, False, True])
    # squared distances 4 and 0.36 + 0.04, two classes
    assert generate_loss(generated, text, present).item() == pytest.approx(4.4 / 2)


def test_bce_by_hand() -> None:
    generated = torch.tensor([[1.0, 2.0], [5.0, 5.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    present = torch.tensor([True, False])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    loss = generate_loss(generated, text, present, "bce")
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_no_present_class_costs_nothing(kind: str) -> None:
    generated = torch.randn(3, 4, requires_grad=True)
    loss = generate_loss(generated, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool), kind)
    loss.backward()
    assert loss.item() == 0 and not generated.grad.any()


# --- cross entropy ----------------------------------------------------------------------------


def loop_cross_entropy(
    seen: Tensor, potential: Tensor, labels: Tensor, seen_competition: bool
) -> Tensor:
    terms = []
    for b in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                label = int(labels[b, y, x])
                if label < 0:
                    continue
                scores = list(seen[b, :, y, x])
                if seen_competition or label >= len(scores):
                    scores += list(potential[b, :, y, x])
                terms.append(-(scores[label].exp() / sum(s.exp() for s in scores)).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("seen_competition", [True, False])
def test_cross_entropy_equals_a_loop(seen_competition: bool) -> None:
    g = seeded(0)
    seen = torch.randn(2, 3, 3, 4, generator=g, dtype=torch.float64)
    potential = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, 8, (2, 3, 4), generator=g)
    loss = pixel_cross_entropy(seen, potential, labels, seen_competition)
    expected = loop_cross_entropy(seen, potential, labels, seen_competition)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 70, 10**6])  # values: one class, some, all together
@pytest.mark.parametrize("seen_competition", [True, False])
def test_cross_entropy_at_the_size_of_the_labels(
    seen_competition: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cliptteacher.logits._VALUES_AT_ONCE", at_once)
    seen, potential = leaf(2, 3, 2, 3), leaf(2, 5, 2, 3, seed=1)
    labels = torch.randint(-1, 8, (2, 5, 6), generator=seeded(2))
    loss = pixel_cross_entropy(seen, potential, labels, seen_competition)
    large = F.interpolate(torch.cat((seen, potential), dim=1), size=(5, 6), mode="bilinear")
    expected = loop_cross_entropy(large[:, :3], large[:, 3:], labels, seen_competition)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, true in zip(
        torch.autograd.grad(loss, (seen, potential)),
        torch.autograd.grad(expected, (seen, potential)),
        strict=True,
    ):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seen_competition", [True, False])
def test_a_pixel_without_label_has_no_weight(seen_competition: bool) -> None:
    seen, potential = leaf(1, 3, 2, 2), leaf(1, 2, 2, 2, seed=1)
    labels = torch.tensor([[[0, -1], [4, 1]]])
    loss = pixel_cross_entropy(seen, potential, labels, seen_competition)
    for gradient in torch.autograd.grad(loss, (seen, potential)):
        assert not gradient[:, :, 0, 1].any()
        assert gradient[:, :, 1, 0].all()
    with_two = torch.stack((labels[:, 0, 0], labels[:, 1, 1]), 1)[:, None]  # the seen ones alone
    alone = pixel_cross_entropy(
        torch.stack((seen[:, :, 0, 0], seen[:, :, 1, 1]), 2)[:, :, None],
        torch.stack((potential[:, :, 0, 0], potential[:, :, 1, 1]), 2)[:, :, None],
        with_two,
        seen_competition,
    )
    third = pixel_cross_entropy(
        seen[:, :, 1:, :1], potential[:, :, 1:, :1], labels[:, 1:, :1], seen_competition
    )
    torch.testing.assert_close(loss, (2 * alone + third) / 3)  # every labelled pixel counts once


@pytest.mark.parametrize("seen_competition", [True, False])
def test_without_any_label_the_cross_entropy_is_zero(seen_competition: bool) -> None:
    seen = torch.randn(2, 3, 2, 2, requires_grad=True)
    potential = torch.randn(2, 5, 2, 2, requires_grad=True)
    labels = torch.full((2, 2, 2), -1)
    loss = pixel_cross_entropy(seen, potential, labels, seen_competition)
    loss.backward()
    assert loss.item() == 0
    assert not seen.grad.any() and not potential.grad.any()


# --- gradients in float64 ---------------------------------------------------------------------


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_the_prototypes() -> None:
    labels = torch.randint(-1, 4, (2, 3, 2), generator=seeded(1))
    labels[1] = torch.where(labels[1] < 2, labels[1], labels[1] + 2)
    assert torch.autograd.gradcheck(
        lambda features: class_prototypes(features, labels, 2, 2)[0], leaf(2, 3, 3, 2)
    )


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_gradcheck_of_the_generate_loss(kind: str) -> None:
    text = F.normalize(leaf(4, 3, seed=1).detach(), dim=1)
    present = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda x: generate_loss(x, text, present, kind), leaf(4, 3))


@pytest.mark.parametrize("seen_competition", [True, False])
def test_gradcheck_of_the_cross_entropy(seen_competition: bool) -> None:
    labels = torch.randint(-1, 5, (2, 2, 3), generator=seeded(2))
    assert torch.autograd.gradcheck(
        lambda seen, potential: pixel_cross_entropy(seen, potential, labels, seen_competition),
        (leaf(2, 3, 2, 3), leaf(2, 2, 2, 3, seed=1)),
    )


# --- the module -------------------------------------------------------------------------------


def loop_group_tokens(dense: Tensor, labels: Tensor, options: dict) -> Tensor:
    """One image at a time, and of it only the tokens that take part."""
    result = torch.full((dense.shape[0], *dense.shape[2:]), -1)
    H, W = labels.shape[1] // dense.shape[2], labels.shape[2] // dense.shape[3]
    for b in range(dense.shape[0]):
        places = []
        for y in range(dense.shape[2]):
            for x in range(dense.shape[3]):
                pixels = labels[b, y * H : (y + 1) * H, x * W : (x + 1) * W]
                if int((pixels == 255).sum()) > 0.5 * pixels.numel():
                    places.append((y, x))
        if not places:
            continue
        points = torch.stack([dense[b, :, y, x] for y, x in places])[None]
        everything = torch.ones(1, len(places), dtype=torch.bool)
        seeding = options.get("seeding", "grid")
        centers = multiscale_centers(dense[b : b + 1], options["scales"], seeding)
        clusters = masked_kmeans(points, centers, everything, options["kmeans_iterations"])
        groups = fuse_clusters(clusters.centers, clusters.counts > 0, options["fusion_threshold"])
        for (y, x), cluster in zip(places, clusters.assignment[0].tolist(), strict=True):
            result[b, y, x] = groups[0, cluster]
    return result


def literal_group_tokens(
    dense: Tensor,
    labels: Tensor,
    scales: tuple[int, ...],
    seeding: str,
    kmeans_iterations: int,
    fusion_threshold: float,
) -> Tensor:
    """Eq. (4)-(5) and Algorithm 1 from loops alone, which share no code with the package."""
    result = torch.full((dense.shape[0], *dense.shape[2:]), -1)
    H, W = labels.shape[1] // dense.shape[2], labels.shape[2] // dense.shape[3]
    for b, image in enumerate(dense.double()):
        pixels = labels[b].reshape(dense.shape[2], H, dense.shape[3], W)
        places = [
            (y, x)
            for y in range(dense.shape[2])
            for x in range(dense.shape[3])
            if 2 * int((pixels[y, :, x] == 255).sum()) > H * W
        ]
        seeds = [mean for scale in scales for mean in loop_windows(image, scale, seeding)]
        tokens = torch.stack([image[:, y, x] for y, x in places] or [image[:, 0, 0]])
        keep = torch.full((len(tokens),), bool(places))
        means, owner = loop_kmeans(tokens, torch.stack(seeds), keep, kmeans_iterations)
        cosines = [[float(a @ c / (a.norm() * c.norm())) for c in means] for a in means]
        groups = loop_fusion(cosines, [k in owner for k in range(len(means))], fusion_threshold)
        for place, k in zip(places, owner, strict=False):
            result[b][place] = groups[k]
    return result


@pytest.mark.parametrize(
    ("seeding", "scales"),
    [("grid", (1, 3)), ("grid", (3, 7)), ("window", (3, 7)), ("sliding", (3, 4))],
)
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pseudo_labels_equal_loops_from_windows_to_groups(
    seeding: str, scales: tuple[int, ...], threshold: float
) -> None:
    options = {
        "scales": scales,
        "seeding": seeding,
        "kmeans_iterations": 3,
        "fusion_threshold": threshold,
    }
    _, _, dense, _, labels, _ = random_batch(14)
    groups, _ = build(**options).group_tokens(dense, labels)
    assert torch.equal(groups, literal_group_tokens(dense, labels, **options))
    assert (groups[0] == -1).all() and groups[1:].max() >= 3


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.95])
def test_group_tokens_equal_one_image_at_a_time(threshold: float) -> None:
    options = {**SCENE, "fusion_threshold": threshold}
    module = build(**options)
    for seed in range(3):
        _, _, dense, _, labels, _ = random_batch(seed)
        labels[2, 5:20, 3:21] = 255  # cuts through tokens
        groups, num_clusters = module.group_tokens(dense, labels)
        assert num_clusters == 10
        assert torch.equal(groups, loop_group_tokens(dense, labels, options))
        assert (groups[0] == -1).all() and groups[1].max() >= 1


def test_tf32_does_not_reach_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to ten bits would flip near ties and the threshold of Algorithm 1."""
    found = []

    def watched(*arguments: Any) -> Any:
        found.append(torch.get_float32_matmul_precision())
        return masked_kmeans(*arguments)

    monkeypatch.setattr("cliptteacher.plm.masked_kmeans", watched)
    _, _, dense, _, labels, _ = random_batch()
    torch.set_float32_matmul_precision("high")
    try:
        build(**SCENE).group_tokens(dense, labels)
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_token_takes_part_above_the_share_not_at_it() -> None:
    labels = torch.zeros(1, 2, 4, dtype=torch.uint8)
    labels[0, 0, :] = 255  # half of either token
    labels[0, 1, 3] = 255  # three quarters of the second
    module = build(scales=(1,))
    groups, _ = module.group_tokens(torch.randn(1, 5, 1, 2), labels)
    assert groups.tolist() == [[[-1, 0]]]


def test_targets_join_labels_and_groups_at_the_size_of_the_features() -> None:
    _, _, dense, _, labels, _ = random_batch()
    module = build(**SCENE)
    targets = module.make_targets(dense, labels, (6, 6), S)
    groups = loop_group_tokens(dense, labels, SCENE)
    assert targets.slots == 10
    for b in range(B):
        for y in range(6):
            for x in range(6):
                label = int(labels[b, (2 * y + 1) * 32 // 12, (2 * x + 1) * 32 // 12])
                group = int(groups[b, (2 * y + 1) * 8 // 12, (2 * x + 1) * 8 // 12])
                pseudo = S + 10 * b + group if group >= 0 else -1
                assert targets.labels[b, y, x] == (label if label != 255 else pseudo)


def literal_losses(
    module: PixelLearningModule, batch: tuple[Tensor, ...], scope: str, competition: bool
) -> tuple[Tensor, Tensor]:
    """Eq. (7)-(10) over lists: no slots, no absent classes, no bias."""
    features, seen_logits, dense, cls, labels, text = batch
    ids, slots = module.make_targets(dense, labels, features.shape[2:], S)
    dot = module.config.pseudo_similarity == "dot"
    compare = torch.dot if dot else partial(torch.cosine_similarity, dim=0)
    prototypes = loop_prototypes(features, ids, 10**6)
    names = sorted(prototypes)
    rows = torch.stack([prototypes[name] for name in names])
    made = module.adapter(rows, cls, torch.ones(len(names), dtype=torch.bool))
    P = dict(zip(names, made, strict=True))
    seen_here = [name for name in names if name < S]
    if module.config.generate_loss == "mse":
        each = [((P[i] - text[i]) ** 2).sum() for i in seen_here]
    else:  # row i of the identity, one logistic at a time
        each = [
            sum(F.softplus(-(P[i] @ text[k]) if i == k else P[i] @ text[k]) for k in range(S)) / S
            for i in seen_here
        ]
    generate = sum(each) / len(seen_here)
    terms = []
    for b in range(B):
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                own = int(ids[b, y, x])
                if own < 0:
                    continue
                scores = {i: seen_logits[b, i, y, x] for i in range(S)}
                for i in (i for i in names if i >= S):
                    mine = (i - S) // slots == b
                    if (mine or scope == "batch") and (competition or own >= S):
                        scores[i] = module.config.pseudo_scale * compare(features[b, :, y, x], P[i])
                total = torch.stack(list(scores.values())).logsumexp(0)
                terms.append(total - scores[own])
    return torch.stack(terms).mean(), generate


@pytest.mark.parametrize("competition", [True, False])
@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("adapter", ["decoder", "identity"])
def test_losses_equal_a_loop_over_pixels(adapter: str, scope: str, competition: bool) -> None:
    torch.manual_seed(0)
    module = build(**SCENE, adapter=adapter, potential_scope=scope, seen_competition=competition)
    batch = random_batch(4)
    losses = module(*batch)
    ce, generate = literal_losses(module, batch, scope, competition)
    torch.testing.assert_close(losses.ce, ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.generate, generate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize(
    "options",
    [
        {"generate_loss": "bce"},
        {"pseudo_similarity": "cosine"},
        {"pseudo_scale": 3.0},
        {
            "pseudo_similarity": "cosine",
            "pseudo_scale": 10.0,
            "generate_loss": "bce",
            "seeding": "window",
        },
        {"seeding": "sliding", "scales": (2, 3), "fusion_threshold": 0.9},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_equals_the_loop(options: dict[str, object], scope: str) -> None:
    torch.manual_seed(0)
    module = build(**{**SCENE, **options}, potential_scope=scope)
    batch = random_batch(11)
    losses = module(*batch)
    ce, generate = literal_losses(module, batch, scope, True)
    # Sums of a few hundred float32 terms near 1, in another order.
    torch.testing.assert_close(losses.ce, ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.generate, generate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_losses_at_the_size_of_the_labels(scope: str) -> None:
    torch.manual_seed(0)
    module = build(**SCENE, potential_scope=scope, loss_size="labels", adapter="identity")
    features, seen_logits, dense, cls, labels, text = random_batch(4)
    ids, slots = module.make_targets(dense, labels, (32, 32), S)
    near = resize_nearest(ids, (6, 6))
    prototypes = loop_prototypes(features, near, 10**6)
    names = [name for name in sorted(prototypes) if name >= S]
    scores = [torch.einsum("bchw,c->bhw", features, prototypes[name]) for name in names]
    logits = torch.stack((*seen_logits.unbind(1), *scores), dim=1)
    if scope == "image":
        strange = torch.tensor([[(n - S) // slots != b for n in names] for b in range(B)])
        logits[:, S:] = logits[:, S:].masked_fill(strange[:, :, None, None], -1e4)
    place = {name: S + k for k, name in enumerate(names)} | {-1: -1, **{i: i for i in range(S)}}
    targets = ids.clone().apply_(place.__getitem__)
    large = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, targets, ignore_index=-1)
    torch.testing.assert_close(
        module(features, seen_logits, dense, cls, labels, text).ce, expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("loss_size", ["labels", "features"])
def test_a_group_between_the_positions_of_the_features_has_no_label(loss_size: str) -> None:
    batch = random_batch(4)
    labels = torch.zeros_like(batch[4])
    labels[0, :4, :4], labels[0, 2, 2] = 255, 1  # one token, and its only position
    module = build(**SCENE, loss_size=loss_size)
    features = batch[0][:, :, :2, :2]  # of 16 x 16 pixels, that is at pixels 8 and 24
    losses = module(features, batch[1][:, :, :2, :2], *batch[2:4], labels, batch[5])
    ids, _ = module.make_targets(batch[2], labels, (32, 32), S)
    assert (ids >= S).sum() == 15 and losses.ce < 100


@pytest.mark.parametrize(
    ("seeding", "scales", "K"),
    [("grid", (1, 3), 10), ("window", (2, 3), 20), ("sliding", (2, 3), 85)],
)
def test_the_seeding_reaches_the_clusters(seeding: str, scales: tuple[int, ...], K: int) -> None:
    module = build(**{**SCENE, "seeding": seeding, "scales": scales})
    _, _, dense, _, labels, _ = random_batch(12)
    groups, num_clusters = module.group_tokens(dense, labels)
    assert num_clusters == K  # of 8 x 8 tokens
    assert torch.equal(groups, loop_group_tokens(dense, labels, vars(module.config)))


def test_gradients_equal_those_of_the_loop() -> None:
    torch.manual_seed(0)
    module = build(**SCENE)
    batch = random_batch(5)
    leaf, literal = batch[0].clone().requires_grad_(), batch[0].clone().requires_grad_()
    seen = torch.einsum("bchw,kc->bkhw", leaf, batch[5])
    sum(module(leaf, seen, *batch[2:])).backward()
    seen = torch.einsum("bchw,kc->bkhw", literal, batch[5])
    sum(literal_losses(module, (literal, seen, *batch[2:]), "batch", True)).backward()
    torch.testing.assert_close(leaf.grad, literal.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("adapter", ["decoder", "mlp", "identity"])
def test_gradcheck_of_the_module(adapter: str, scope: str) -> None:
    """Prototypes, adapter, logits and both losses in float64, equal to the loop to the digits."""
    torch.manual_seed(0)
    module = build(**SCENE, adapter=adapter, potential_scope=scope).double()
    batch = [part.double() if part.is_floating_point() else part for part in random_batch(13)]
    features = batch[0][:, :, ::2, ::3].contiguous().requires_grad_()  # (B, C, 3, 2)

    def losses(x: Tensor) -> tuple[Tensor, Tensor]:
        seen_logits = torch.einsum("bchw,kc->bkhw", x, batch[5])
        return tuple(module(x, seen_logits, *batch[2:]))

    seen_logits = torch.einsum("bchw,kc->bkhw", features, batch[5])
    expected = literal_losses(module, (features, seen_logits, *batch[2:]), scope, True)
    for ours, loop in zip(losses(features), expected, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(losses, features)


def test_the_scopes_differ() -> None:
    losses = []
    for scope in ("batch", "image"):
        torch.manual_seed(0)
        losses.append(build(**SCENE, potential_scope=scope)(*random_batch(4)).ce)
    assert losses[1] < losses[0]  # fewer rivals


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_fewer_slots_than_groups_leave_the_later_groups_out(scope: str) -> None:
    options = {
        **SCENE,
        "fusion_threshold": 0.95,
        "potential_slots": 2,
        "potential_scope": scope,
        "adapter": "identity",
    }
    module = build(**options)
    batch = random_batch(6)
    groups, _ = module.group_tokens(batch[2], batch[4])
    assert groups.max() > 2
    targets = module.make_targets(batch[2], batch[4], (8, 8), S)
    assert targets.slots == 2 and targets.labels.max() < S + 2 * B
    dropped = (resize_nearest(batch[4], (8, 8)) == 255) & (groups >= 2)
    assert dropped.any() and (targets.labels[dropped] == -1).all()
    ce, _ = literal_losses(module, batch, scope, True)
    torch.testing.assert_close(module(*batch).ce, ce, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("term", ["ce", "generate"])
def test_gradients_reach_the_student_through_prototypes_unless_detached(
    term: str, detach: bool
) -> None:
    torch.manual_seed(0)
    module = build(**SCENE, detach_prototypes=detach)
    features, _, dense, cls, labels, text = random_batch(7)
    features.requires_grad_()
    # The pixels of one labelled area; the seen logits carry no gradient here.
    loss = getattr(module(features, torch.zeros(B, S, 6, 6), dense, cls, labels, text), term)
    (gradient,) = torch.autograd.grad(loss, features, allow_unused=True, retain_graph=True)
    if term == "generate":
        assert (gradient is None) if detach else (gradient.abs().max() > 1e-6)
    else:  # the direct path R . P stays either way
        assert gradient.abs().max() > 1e-6
    for name, parameter in module.named_parameters():
        (moved,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        assert moved.isfinite().all(), name


def test_detaching_changes_the_gradient_but_not_the_loss() -> None:
    losses, gradients = [], []
    for detach in (False, True):
        torch.manual_seed(0)
        module = build(**SCENE, detach_prototypes=detach)
        features, seen_logits, *rest = random_batch(8)
        features.requires_grad_()
        loss = module(features, seen_logits, *rest).ce
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, features)[0])
    assert torch.equal(*losses)
    assert not torch.allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("fill", [0, 255])
def test_all_annotated_and_nothing_annotated_stay_finite(fill: int) -> None:
    torch.manual_seed(0)
    module = build(**SCENE)
    features, seen_logits, dense, cls, labels, text = random_batch(9)
    features.requires_grad_()
    losses = module(features, seen_logits, dense, cls, torch.full_like(labels, fill), text)
    (losses.ce + losses.generate).backward()
    assert losses.ce.isfinite() and features.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert (losses.generate == 0) == (fill == 255)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_bfloat16_autocast_stays_close(scope: str) -> None:
    torch.manual_seed(0)
    module = build(**SCENE, potential_scope=scope)
    features, seen_logits, dense, cls, labels, text = random_batch(10)
    exact = module(features, seen_logits, dense, cls, labels, text)
    features = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(features, seen_logits.bfloat16(), dense, cls, labels, text)
    sum(rounded).backward()
    assert rounded.ce.dtype == rounded.generate.dtype == torch.float32
    torch.testing.assert_close(rounded.ce, exact.ce, rtol=0.03, atol=0)
    torch.testing.assert_close(rounded.generate, exact.generate, rtol=0.03, atol=0)
    assert features.grad.isfinite().all()
