"""The predictor of section 3.4: by hand, by a per-pixel loop, and its manners."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import pairwise
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cliptteacher.data.transforms import resize_keep_ratio
from cliptteacher.inference import (
    Predictor,
)
from cliptteacher.logits import pixel_logits
from cliptteacher.sliding import window_starts


class Student(nn.Module):
    """A network with a context: every feature depends on its surroundings and its whole window."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.sizes: list[torch.Size] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(images.shape)
        features: Tensor = self.drop(self.norm(self.conv(images)))
        return features + images.mean(dim=(2, 3)).sum(1)[:, None, None, None] * features.detach()


@pytest.fixture
def text() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def picture(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def test_whole_image_by_hand() -> None:
    """Two channels that are the red and the green of each pixel; classes are red, green, both."""

    class RedGreen(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :2]

    text = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]])  # not unit: the predictor's job
    image = torch.tensor([[[1.0, 0.0], [0.5, 0.1]], [[0.0, 1.0], [0.5, 0.0]], [[0.0] * 2] * 2])
    diagonal = 2**-0.5
    expected = torch.tensor(
        [
            [[10.0, 0.0], [5.0, 1.0]],
            [[0.0, 10.0], [5.0, 0.0]],
            [[10 * diagonal, 10 * diagonal], [10 * diagonal, diagonal]],
        ]
    )
    predictor = Predictor(RedGreen(), text, logit_scale=10.0)
    torch.testing.assert_close(predictor.logits(image), expected)
    assert predictor(image).tolist() == [[0, 1], [2, 0]]
    generous = Predictor(RedGreen(), text, logit_scale=10.0, unseen=[2], gamma=3.0)
    torch.testing.assert_close(
        generous.logits(image) - expected,
        torch.tensor([0.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 2, 2),
    )
    assert generous(image).tolist() == [[2, 2], [2, 2]]


def test_order_of_projection_and_upsampling_does_not_matter(text: Tensor) -> None:
    student = Student().eval()
    image = picture(2, 3, 20, 26)
    features = F.interpolate(student(image), size=(20, 26), mode="bilinear", align_corners=False)
    unit = text / text.norm(dim=1, keepdim=True)
    expected = 3.0 * torch.einsum("bchw,ac->bahw", features, unit)
    expected[:, [1, 3]] += 0.7
    predictor = Predictor(student, text, unseen=(1, 3), gamma=0.7, logit_scale=3.0)
    torch.testing.assert_close(predictor.logits(image), expected.detach())
    assert torch.equal(predictor(image), expected.argmax(1))


def test_cosine_logits_ignore_the_length_of_features(text: Tensor) -> None:
    class Louder(Student):
        def forward(self, images: Tensor) -> Tensor:
            return 50 * super().forward(images)

    image = picture(3, 16, 16)
    quiet, loud = (Predictor(s, text, similarity="cosine") for s in (Student(), Louder()))
    torch.testing.assert_close(quiet.logits(image), loud.logits(image))


def plain_slide(predictor: Predictor, image: Tensor, window: int, stride: int) -> Tensor:
    """Average the windows over every pixel, one pixel at a time."""
    _, height, width = image.shape
    windows = []
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = image[:, top : top + window, left : left + window]
            windows.append((top, left, predictor.logits(part)))
    result = torch.zeros(4, height, width)
    for y in range(height):
        for x in range(width):
            hits = [
                logits[:, y - top, x - left]
                for top, left, logits in windows
                if top <= y < top + logits.shape[1] and left <= x < left + logits.shape[2]
            ]
            result[:, y, x] = torch.stack(hits).mean(0)
    return result


@pytest.mark.parametrize("size", [(16, 16), (25, 31), (40, 12), (9, 30), (7, 8), (17, 16)])
@pytest.mark.parametrize("window_batch", [1, 3])
def test_slide_equals_a_per_pixel_loop(
    text: Tensor, size: tuple[int, int], window_batch: int
) -> None:
    student = Student()
    whole = Predictor(student, text, unseen=[2])
    slide = Predictor(
        student, text, unseen=[2], mode="slide", window=16, stride=10, window_batch=window_batch
    )
    image = picture(3, *size)
    expected = plain_slide(whole, image, 16, 10)
    torch.testing.assert_close(slide.logits(image), expected)
    assert torch.equal(slide(image), slide.logits(image).argmax(0))


def test_slide_windows_have_one_shape_and_come_in_batches(text: Tensor) -> None:
    student = Student()
    predictor = Predictor(student, text, mode="slide", window=16, stride=10, window_batch=4)
    predictor(picture(2, 3, 30, 41))  # 3 x 4 windows
    assert student.sizes == [(4, 3, 16, 16)] * 6


@given(st.integers(1, 3000), st.integers(1, 600), st.data())
def test_windows_cover_the_side(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    assert starts[0] == 0 and starts[-1] == max(length - window, 0)
    assert all(0 < b - a <= stride for a, b in pairwise(starts))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_batch_equals_single_images(text: Tensor, mode: str) -> None:
    predictor = Predictor(Student(), text, mode=mode, window=12, stride=8)  # type: ignore[arg-type]
    images = picture(3, 3, 20, 23)
    labels = predictor(images)
    assert labels.shape == (3, 20, 23) and labels.dtype == torch.int64
    assert predictor.logits(images).shape == (3, 4, 20, 23)
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(predictor(image), label)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_results_are_ordinary_tensors(text: Tensor, mode: str) -> None:
    """What a caller does with them works: assignment in place, and a loss on top of them."""
    settings = {"mode": mode, "window": 12, "stride": 8, "unseen": [1]}
    predictor = Predictor(Student(), text, **settings)  # type: ignore[arg-type]
    image = picture(3, 20, 23)
    results = (predictor(image), predictor.logits(image), predictor.sweep(image, (0.0, 1.0)))
    for result in results:
        assert not result.is_inference() and not result.requires_grad
        result[result == 1] = 2
    labels = predictor(image)
    labels[labels == 1] = 255
    assert set(labels.unique().tolist()) <= {0, 2, 3, 255}
    weight = torch.ones(4, 1, 1, requires_grad=True)
    (predictor.logits(image) * weight).sum().backward()
    assert weight.grad is not None


def test_bytes_equal_floats(text: Tensor) -> None:
    predictor = Predictor(Student(), text)
    image = (picture(3, 12, 12) * 255).to(torch.uint8)
    assert torch.equal(predictor.logits(image), predictor.logits(image.float() / 255))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (30, 44)),
        ({"resize": (64, 20)}, (20, 29)),
        ({"resize": (33, 30)}, (23, 33)),
        ({"resize": (120, 60)}, (60, 88)),
        ({"resize": (120, 60), "size_divisor": 32}, (64, 96)),
        ({"mode": "slide", "window": 30, "stride": 20, "size_divisor": 16}, (32, 32)),
    ],
)
def test_resizing_before_the_network(
    text: Tensor, settings: dict[str, int], expected: tuple[int, int]
) -> None:
    student = Student()
    image = picture(3, 30, 44)
    labels = Predictor(student, text, **settings)(image)  # type: ignore[arg-type]
    assert student.sizes[0][2:] == expected
    assert labels.shape == (30, 44)


def test_resize_is_that_of_the_transforms(text: Tensor) -> None:
    image = picture(3, 30, 44)
    resized = resize_keep_ratio(image, (64, 20))
    student = Student()
    inside = Predictor(student, text)._resized_logits(resized[None])
    expected = F.interpolate(inside, size=(30, 44), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(
        Predictor(student, text, resize=(64, 20)).logits(image), expected.detach()
    )


@pytest.mark.parametrize("size", [(30, 44), (64, 32), (9, 33), (1, 2)])
def test_mirrored_pixels_leave_the_place_of_the_others(text: Tensor, size: tuple[int, int]) -> None:
    """A student that looks at single pixels cannot tell whether there are more beyond."""

    class PixelByPixel(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[2] % 32 == images.shape[3] % 32 == 0
            return images.repeat(1, 2, 1, 1)[:, :5]

    image = picture(3, *size)
    predictor = Predictor(PixelByPixel(), text, size_divisor=32)
    expected = pixel_logits(image.repeat(2, 1, 1)[None, :5], F.normalize(text, dim=1))[0]
    assert torch.equal(predictor.logits(image), expected)


def test_eval_mode_inside_and_each_mode_restored(text: Tensor) -> None:
    student = Student().train()
    student.norm.eval()  # a frozen norm stays frozen
    mean = student.norm.running_mean
    assert mean is not None
    before = mean.clone()
    predictor = Predictor(student, text)
    image = picture(3, 12, 12)
    assert torch.equal(predictor.logits(image), predictor.logits(image))  # no dropout
    assert student.training and student.drop.training and not student.norm.training
    assert torch.equal(mean, before)
    assert not predictor.logits(image).requires_grad


def test_a_student_in_training_is_left_alone_by_threads_that_predict(text: Tensor) -> None:
    """One thread trains, with dropout and BatchNorm; others predict with the same student."""
    student = Student().train()
    predictor, images = Predictor(student, text), [picture(3, 12, 8 + k) for k in range(4)]
    expected = [predictor(image) for image in images]
    statistics = []
    for alone in (True, False):
        student.norm.reset_running_stats()
        # Predictions depend on the statistics, so their own training is done before.
        with ThreadPoolExecutor(8) as pool:
            found = [] if alone else [pool.submit(predictor, image) for image in images * 10]
            if alone:
                for image in images * 10:
                    student(image[None])
            labels = [future.result() for future in found]
        statistics.append(deepcopy(dict(student.norm.named_buffers())))
    assert statistics[1]["num_batches_tracked"] == 0  # forty predictions, no training
    assert statistics[0]["num_batches_tracked"] == 40
    assert all(torch.equal(a, b) for a, b in zip(labels, expected * 10, strict=True))
    assert all(part.training for part in student.modules())


def test_predictions_follow_the_student(text: Tensor) -> None:
    """The view shares the numbers, whatever replaces them: a step, a move, a loaded state."""
    student, image = Student().train(), picture(3, 12, 12)
    predictor = Predictor(student, text)
    with torch.no_grad():
        student.conv.weight.mul_(-1.0)
        student.norm.running_mean = torch.ones(5)  # as `.to` does it
    fresh = deepcopy(student).eval()
    assert torch.equal(predictor.logits(image), Predictor(fresh, text).logits(image))
    student.load_state_dict(Student().state_dict(), assign=True)
    assert torch.equal(predictor.logits(image), Predictor(Student(), text).logits(image))
    twin = deepcopy(predictor)
    assert torch.equal(twin.logits(image), predictor.logits(image))
    assert list(predictor.state_dict()) == [
        "text_features", "bonus", *(f"segmenter.{name}" for name in student.state_dict())
    ]  # fmt: skip


def test_networks_of_other_kinds_predict_in_eval_mode(text: Tensor) -> None:
    image = picture(3, 12, 12)
    expected = Predictor(Student().eval(), text).logits(image)
    patched = Student()
    patched.forward = MethodType(Student.forward, patched)  # type: ignore[method-assign]
    compiled, wrapped = Student(), torch.compile(Student(), backend="eager")
    compiled.compile(backend="eager")
    for student in (patched, compiled, wrapped):
        assert torch.equal(Predictor(student.train(), text).logits(image), expected)
        assert student.training
    plain = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.5))
    scripted = torch.jit.script(plain.train())
    assert torch.equal(
        Predictor(scripted, text).logits(image), Predictor(plain.eval(), text).logits(image)
    )


def test_half_precision_students_work(text: Tensor) -> None:
    image = picture(3, 12, 12)
    predictor = Predictor(Student(), text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = predictor.logits(image)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, predictor.logits(image), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unseen": [4]}, r"`unseen` must hold label values in 0\.\.3, got \[4\]"),
        ({"unseen": [-1]}, r"got \[-1\]"),
        ({"mode": "tiled"}, "`mode` must be one of whole, slide, got 'tiled'"),
        ({"similarity": "euclid"}, "`similarity` must be one of dot, cosine, got 'euclid'"),
        ({"window": 8, "stride": 9}, r"got stride 9 for windows of 8 pixels"),
        ({"stride": 0}, r"`stride` must lie in 1\.\.window, got stride 0"),
        ({"window_batch": 0}, "`window_batch` must be at least 1, got 0"),
        ({"size_divisor": 0}, r"`size_divisor` and `resize` must be at least 1, got \(0,\)"),
    ],
)
def test_settings_are_checked(text: Tensor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(Student(), text, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5,), (0, 5), (1, 4, 5)])
def test_text_features_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`text_features` must have shape \(A, C\)"):
        Predictor(Student(), torch.ones(shape))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(8, 8, 3), r"\(3, H, W\) or \(B, 3, H, W\), got \(8, 8, 3\)"),
        (torch.zeros(8, 8), r"got \(8, 8\)"),
        (torch.full((3, 8, 8), 200.0), r"lie in \[0, 1\], got 200 to 200"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8, or float .* got torch.int64"),
    ],
)
def test_images_are_checked(text: Tensor, image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(Student(), text)(image)
