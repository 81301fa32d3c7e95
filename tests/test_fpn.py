"""The small convolutional student: shapes, modes and gradients."""

import copy

import pytest
import torch

from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.segmenters.fpn import PyramidHead


@pytest.fixture
def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_segmenter("fpn_small", channels=24)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (33, 70), (16, 129)])
def test_any_size_gives_features_at_a_quarter(student: torch.nn.Module, size: tuple[int, int]):
    features = student.eval()(torch.rand(1, 3, *size))
    assert features.shape == (1, 24, -(-size[0] // 4), -(-size[1] // 4))
    assert torch.isfinite(features).all()


def test_coarse_cells_stay_over_their_pixels():
    head = PyramidHead((1, 1), 1, 1).eval()
    head.merge, head.classifier = torch.nn.Identity(), torch.nn.Identity()
    torch.nn.init.ones_(head.lateral[1].weight)
    torch.nn.init.zeros_(head.lateral[1].bias)
    coarse = torch.arange(7.0).view(1, 1, 1, 7)  # 0 to 6, each over two finer cells
    merged = head((torch.zeros(1, 1, 1, 13), coarse)) - head.lateral[0].bias
    # Bilinear: finer cell i has its centre at (i + 0.5) / 2 - 0.5 coarse cells.
    expected = ((torch.arange(13.0) + 0.5) / 2 - 0.5).clamp(min=0)
    assert torch.allclose(merged.flatten(), expected)


def test_every_parameter_learns(student: torch.nn.Module):
    student(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_images_are_normalised_inside(student: torch.nn.Module):
    seen: list[torch.Tensor] = []
    student.stem.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    student.eval()(mean.expand(1, 3, 32, 32))
    assert torch.allclose(seen[0], torch.zeros(1, 3, 32, 32), atol=1e-6)


def test_a_batch_equals_single_images_and_a_copy(student: torch.nn.Module):
    images = torch.rand(3, 3, 48, 32)
    student.eval()
    whole = student(images)
    single = torch.cat([student(image[None]) for image in images])
    assert torch.allclose(whole, single, atol=1e-5)
    assert torch.equal(copy.deepcopy(student)(images), whole)


def test_channels_last_and_autocast(student: torch.nn.Module):
    images = torch.rand(2, 3, 64, 64)
    student.eval()
    reference = student(images)
    last = copy.deepcopy(student).to(memory_format=torch.channels_last)
    assert torch.allclose(last(images.to(memory_format=torch.channels_last)), reference, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = student(images).float()
    assert torch.isfinite(low).all()
    assert (low - reference).norm() < 0.05 * reference.norm()


def test_compiles_as_one_graph_and_exports(student: torch.nn.Module):
    images = torch.rand(2, 3, 32, 32)
    student.eval()
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), student(images), atol=1e-6)
    exported = torch.export.export(student, (images,)).module()
    assert torch.allclose(exported(images), student(images), atol=1e-6)


def test_options_and_errors():
    assert "fpn_small" in list_segmenters()
    narrow = build_segmenter("fpn_small", channels=8, widths=(8, 8), depth=1, pyramid=8)
    assert narrow(torch.rand(2, 3, 32, 32)).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match="no option 'dept'; did you mean 'depth'"):
        build_segmenter("fpn_small", channels=8, dept=1)
    with pytest.raises(ValueError, match="no published weights"):
        build_segmenter("fpn_small", channels=8, weights="imagenet")
