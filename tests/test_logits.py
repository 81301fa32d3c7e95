"""Eq. (9) against loops over positions, and its argmax with bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliptteacher.logits import pixel_logits, upsample, upsampled_argmax


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_logits_equal_a_loop(similarity: str) -> None:
    features, classifiers = torch.randn(2, 3, 2, 4), torch.randn(5, 3)
    logits = pixel_logits(features, classifiers, 2.5, similarity)
    assert logits.shape == (2, 5, 2, 4)
    for b, k, y, x in torch.cartesian_prod(*map(torch.arange, (2, 5, 2, 4))).tolist():
        r, w = features[b, :, y, x], classifiers[k]
        expected = r @ w if similarity == "dot" else r @ w / (r.norm() * w.norm())
        torch.testing.assert_close(logits[b, k, y, x], 2.5 * expected)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_one_set_of_classifiers_per_image_equals_one_image_at_a_time(similarity: str) -> None:
    features, classifiers = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 3)
    present = torch.rand(2, 5) < 0.5
    logits = pixel_logits(features, classifiers, 2.0, similarity, present)
    for b in range(2):
        alone = pixel_logits(features[b : b + 1], classifiers[b], 2.0, similarity, present[b])
        torch.testing.assert_close(logits[b : b + 1], alone)


def test_absent_classifiers_cannot_win() -> None:
    features, classifiers = torch.randn(2, 3, 2, 4), torch.zeros(3, 3)
    present = torch.tensor([True, False, True])
    logits = pixel_logits(features, classifiers, present=present)
    assert torch.equal(logits[:, ~present], torch.full((2, 1, 2, 4), -1e4))
    assert torch.equal(logits[:, present], torch.zeros(2, 2, 2, 4))
    half = pixel_logits(features.half(), classifiers.half(), present=present)
    assert half.dtype == torch.float16 and half.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_have_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    assert pixel_logits(torch.ones(1, 2, 1, 1, dtype=dtype), torch.eye(2)).dtype == dtype


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradcheck_of_the_logits(similarity: str, per_image: bool) -> None:
    present = torch.tensor([True, False, True])
    present = present.expand(2, 3) if per_image else present
    classifiers = leaf(2, 3, 4, seed=1) if per_image else leaf(3, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda features, rows: pixel_logits(features, rows, 1.5, similarity, present),
        (leaf(2, 4, 2, 3), classifiers),
    )


def test_unknown_similarity() -> None:
    with pytest.raises(ValueError, match='`similarity` must be "dot" or "cosine", got \'euclid\''):
        pixel_logits(torch.ones(1, 2, 1, 1), torch.eye(2), similarity="euclid")  # type: ignore[arg-type]


def test_upsampling_is_bilinear_between_pixel_centres() -> None:
    maps = torch.tensor([[[[0.0, 4.0]]]])
    assert upsample(maps, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    assert upsample(maps, (1, 2)) is maps


@pytest.mark.parametrize("classes", [1, 31, 32, 33, 100])
def test_argmax_in_chunks_equals_argmax(classes: int) -> None:
    logits = torch.randn(2, classes, 5, 6)
    full = F.interpolate(logits, size=(17, 11), mode="bilinear", align_corners=False)
    labels = upsampled_argmax(logits, (17, 11))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, full.argmax(1))


def test_equal_logits_go_to_the_first_class_across_chunks() -> None:
    assert not upsampled_argmax(torch.zeros(1, 70, 2, 2), (3, 3)).any()
