"""Mirroring images to a multiple of the coarsest stride: against PyTorch, and what is cut off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliptteacher.segmenters import build_segmenter
from cliptteacher.segmenters.padding import features_of_multiple, mirror_to_multiple


@pytest.mark.parametrize("size", [(17, 31), (20, 32), (32, 25), (18, 18)])
def test_mirroring_is_reflection_padding(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    padding = (0, -size[1] % 16, 0, -size[0] % 16)
    assert torch.equal(mirror_to_multiple(images, 16), F.pad(images, padding, mode="reflect"))


def test_small_images_are_mirrored_to_and_fro() -> None:
    row = torch.tensor([[1.0, 2.0, 3.0]])
    assert mirror_to_multiple(row, 8).tolist() == [[1, 2, 3, 2, 1, 2, 3, 2]] * 8
    assert torch.equal(mirror_to_multiple(torch.ones(1, 1), 4), torch.ones(4, 4))


def test_a_multiple_is_not_copied() -> None:
    images = torch.rand(1, 3, 32, 64)
    assert mirror_to_multiple(images, 32) is images
    assert mirror_to_multiple(images[..., :31, :63], 1).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("stride", [1, 4, 8, 32])
@pytest.mark.parametrize("size", [(32, 64), (33, 31), (107, 160), (5, 70)])
def test_cells_of_mirrored_pixels_alone_are_cut_off(stride: int, size: tuple[int, int]) -> None:
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.avg_pool2d(images, stride)

    images = torch.rand(1, 3, *size)
    features = features_of_multiple(Means(), images, 32)
    assert features.shape[2:] == tuple(-(-side // stride) for side in size)
    whole = tuple(side // stride for side in size)  # cells without a mirrored pixel
    if min(whole):
        expected = F.avg_pool2d(images, stride)
        torch.testing.assert_close(features[..., : whole[0], : whole[1]], expected)


@pytest.mark.parametrize("name", ["fpn_small", "segformer_nano"])
def test_students_see_whole_cells_only(name: str) -> None:
    torch.manual_seed(0)
    student = build_segmenter(name, channels=8).eval()
    images = torch.rand(2, 3, 107, 150)
    features = features_of_multiple(student, images, 32)
    assert features.shape == (2, 8, 27, 38)
    expected = student(F.pad(images, (0, 10, 0, 21), mode="reflect"))[..., :27, :38]
    assert torch.equal(features, expected)
