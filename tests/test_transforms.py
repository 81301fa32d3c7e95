"""The training augmentation: geometry shared by image and labels, colours by plain formulas."""

import colorsys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cliptteacher.data.colours import photometric_distortion, turn_colours
from cliptteacher.data.transforms import (
    PADDING_COLOUR,
    Window,
    is_dominated,
    keep_ratio_size,
    pad_to,
    random_flip,
    random_size,
    random_window,
    resize_image,
    resize_keep_ratio,
    resize_label,
    training_transform,
)


def noise(*shape: int, high: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator, dtype=torch.uint8)


def drawn_label(height: int = 60, width: int = 90) -> Tensor:
    """Four regions of unequal size, so that every flip or shift shows."""
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[: height // 3, : width // 2] = 1
    label[height // 2 :, width // 4 :] = 2
    label[height // 5 : height // 2, 2 * width // 3 :] = 3
    return label


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((480, 640), (2048, 512), (512, 683)),
        ((640, 480), (2048, 512), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((100, 1000), (512, 2048), (205, 2048)),
        ((213, 320), (128, 128), (85, 128)),
        ((1, 5000), (64, 64), (1, 64)),
    ],
)
def test_keep_ratio_size(
    size: tuple[int, int], scale: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert keep_ratio_size(*size, scale) == expected


@given(st.integers(8, 3000), st.integers(8, 3000))
def test_keep_ratio_size_touches_one_limit_and_exceeds_none(height: int, width: int) -> None:
    long, short = sorted(keep_ratio_size(height, width, (2048, 512)), reverse=True)
    assert long <= 2048 and short <= 512
    assert long == 2048 or short == 512


def test_resize_keep_ratio_takes_bytes_floats_and_batches() -> None:
    image = noise(3, 40, 60)
    resized = resize_keep_ratio(image, (64, 20))
    assert resized.shape == (3, 20, 30) and resized.dtype == torch.uint8
    batch = resize_keep_ratio(image.float().expand(2, 3, 40, 60), (64, 20))
    assert (batch[1] - resized.float()).abs().max() <= 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("upright", [True, False])
def test_resizing_moves_image_and_label_together(seed: int, upright: bool) -> None:
    stripes = noise(17, high=2).repeat_interleave(5)  # borders every few pixels
    label = stripes.expand(60, -1) if upright else stripes[:, None].expand(-1, 60)
    image = (255 * label).expand(3, -1, -1).contiguous()
    torch.manual_seed(seed)
    size = random_size(60, 85, (85, 60), (0.5, 2.0))
    resized = resize_image(image, size, Window(0, 0, *size))
    resized_label = resize_label(label.contiguous(), size, Window(0, 0, *size))
    # Half-way between black and white, the image changes exactly where the label does.
    clear = (resized.int() - 128).abs() > 16
    assert torch.equal((resized > 127)[clear], resized_label.bool().expand(3, -1, -1)[clear])
    assert clear.float().mean() > 0.9


def test_random_size_covers_the_range_of_factors() -> None:
    torch.manual_seed(0)
    heights = [random_size(10, 20, (200, 100), (0.5, 2.0))[0] for _ in range(200)]
    assert 50 <= min(heights) < 60 and 190 < max(heights) <= 200
    assert 115 < sum(heights) / len(heights) < 135  # U(0.5, 2) has mean 1.25


@settings(deadline=None)
@given(st.data())
def test_resizing_a_window_equals_cutting_it_out(data: st.DataObject) -> None:
    """To the last bit, whatever lies together in memory."""
    draw = data.draw
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    size = draw(st.tuples(st.integers(1, 90), st.integers(2, 90)))  # PyTorch is wrong at width 1
    height, width = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
    top, left = draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width))
    window = Window(top, left, height, width)
    image, label = noise(3, *shape), noise(*shape)
    whole = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    expected = whole[:, top : top + height, left : left + width]
    packed = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(resize_image(image, size, window), expected)
    assert torch.equal(resize_image(packed, size, window), expected)
    whole = F.resize(label[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    differs = torch.zeros(size, dtype=torch.bool)
    inside = differs[top : top + height, left : left + width]  # a view
    inside |= resize_label(label, size, window) != whole[top : top + height, left : left + width]
    # PyTorch is not of one mind about centres on the border of two pixels.
    rows, columns = (clear_centres(*pair) for pair in zip(shape, size, strict=True))
    assert not differs[rows][:, columns].any()


def clear_centres(pixels: int, resized: int) -> Tensor:
    """Which resized pixels have their centre within a pixel, not on the border of two."""
    return (2 * torch.arange(resized) + 1) * pixels % (2 * resized) != 0


@pytest.mark.parametrize(
    ("pixels", "sizes"),
    [(128, range(96, 193)), (320, range(80, 321, 16)), (480, range(256, 1025, 48))],
)
def test_labels_at_a_tie_go_where_pytorch_puts_them(pixels: int, sizes: range) -> None:
    """Miniworld resizes 128 to 96..192; 96 and many others have centres on borders."""
    label = noise(pixels, 6)
    assert not all(clear_centres(pixels, resized).all() for resized in sizes)
    for resized in sizes:
        whole = F.resize(label[None], [resized, 6], InterpolationMode.NEAREST_EXACT)[0]
        window = Window(0, 0, resized, 6)
        assert torch.equal(resize_label(label, (resized, 6), window), whole)


def plain_crop(label: Tensor, crop: int, share: float) -> tuple[int, int]:
    """Draw windows as the description says, counting pixels one by one."""
    height, width = label.shape
    for _ in range(11):
        top = int(torch.randint(height - crop + 1, ()))
        left = int(torch.randint(width - crop + 1, ()))
        pixels = [
            int(label[y, x]) for y in range(top, top + crop) for x in range(left, left + crop)
        ]
        counts = Counter(value for value in pixels if value != 255)
        if share == 1 or (counts and max(counts.values()) <= share * sum(counts.values())):
            break
    return top, left


@pytest.mark.parametrize("share", [0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("second", [9, 4, 255])
def test_random_window_equals_a_plain_loop(share: float, second: int) -> None:
    """With two classes; and with one or none, where every window is tried in vain."""
    label = torch.full((30, 40), 255, dtype=torch.uint8)
    label[5:20, 3:38] = second if second == 255 else 4
    label[12:28, 20:30] = second
    for seed in range(25):
        torch.manual_seed(seed)
        top, left = plain_crop(label, 8, share)
        drawn = torch.rand(())
        torch.manual_seed(seed)
        window, cut = random_window(label, (30, 40), 8, share)
        assert window == (top, left, 8, 8)
        assert torch.equal(cut, label[top : top + 8, left : left + 8])
        assert torch.equal(torch.rand(()), drawn)  # as many numbers were drawn


def test_random_window_looks_at_the_resized_labels() -> None:
    label = drawn_label(24, 36)
    resized = F.resize(label[None], [48, 72], InterpolationMode.NEAREST_EXACT)[0]
    for seed in range(10):
        torch.manual_seed(seed)
        top, left = plain_crop(resized, 16, 0.6)
        torch.manual_seed(seed)
        window, cut = random_window(label, (48, 72), 16, 0.6)
        assert window == (top, left, 16, 16)
        assert torch.equal(cut, resized[top : top + 16, left : left + 16])


def test_random_window_avoids_dominated_ones() -> None:
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 56:] = 1

    def share_of_mixed(limit: float) -> float:
        torch.manual_seed(1)
        crops = [random_window(label, (64, 64), 16, limit)[1] for _ in range(200)]
        return sum(not is_dominated(crop, 0.75) for crop in crops) / len(crops)

    assert share_of_mixed(1.0) < 0.2  # 5 of 49 columns are good: one draw
    assert share_of_mixed(0.75) > 0.55  # 1 - (44/49)^11 = 0.69: eleven draws


def test_random_window_keeps_images_smaller_than_the_crop() -> None:
    label = noise(5, 7, high=3)
    window, cut = random_window(label, (5, 7), 16, 0.75)
    assert window == (0, 0, 5, 7) and torch.equal(cut, label)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 0, 1], False),  # exactly 75% is not over 75%
        ([0, 0, 0, 0], True),
        ([0, 0, 0, 255], True),  # ignored pixels do not count
        ([0, 1, 255, 255], False),
        ([255, 255, 255, 255], True),
    ],
)
def test_is_dominated(values: list[int], expected: bool) -> None:
    assert is_dominated(torch.tensor([values], dtype=torch.uint8), 0.75) is expected
    assert is_dominated(torch.tensor([values], dtype=torch.uint8), 1.0) is False


def test_random_flip_mirrors_both_half_of_the_time() -> None:
    image, label = noise(3, 4, 6), noise(4, 6, high=5)
    torch.manual_seed(0)
    flips = 0
    for _ in range(400):
        flipped, flipped_label = random_flip(image, label, 0.5)
        mirrored = torch.equal(flipped, image.flip(2))
        assert mirrored or torch.equal(flipped, image)
        assert torch.equal(flipped_label, label.flip(1) if mirrored else label)
        flips += mirrored
    assert 160 < flips < 240


def plain_distortion(image: Tensor, strength: float) -> list[list[float]]:
    """Distort pixel by pixel with the standard library's HSV, drawing in the same order."""
    pixels = [[int(v) / 255 for v in image[:, y, x]] for y in range(4) for x in range(5)]

    def coin() -> bool:
        return float(torch.rand(())) < 0.5

    def draw(limit: float) -> float:
        return limit * strength * (2 * float(torch.rand(())) - 1)

    def clip(value: float) -> float:
        return min(max(value, 0.0), 1.0)

    def contrast() -> list[list[float]]:
        if not coin():
            return pixels
        factor = 1 + draw(0.5)
        return [[clip(v * factor) for v in pixel] for pixel in pixels]

    first = coin()
    if coin():
        shift = draw(32 / 255)
        pixels = [[clip(v + shift) for v in pixel] for pixel in pixels]
    if first:
        pixels = contrast()
    if coin():
        factor = 1 + draw(0.5)
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
        pixels = [list(colorsys.hsv_to_rgb(h, min(s * factor, 1), v)) for h, s, v in hsv]
    if coin():
        turn = draw(0.1)
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
        pixels = [list(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) for h, s, v in hsv]
    if not first:
        pixels = contrast()
    return pixels


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_photometric_distortion_equals_plain_formulas(strength: float) -> None:
    image = noise(3, 4, 5, seed=3)
    for seed in range(40):
        torch.manual_seed(seed)
        expected = 255 * torch.tensor(plain_distortion(image, strength)).T.reshape(3, 4, 5)
        torch.manual_seed(seed)
        distorted = photometric_distortion(image, strength)
        assert distorted.dtype == torch.uint8
        assert (distorted.float() - expected).abs().max() < 0.51  # rounding to a byte


def test_photometric_distortion_of_strength_zero_changes_nothing() -> None:
    image = noise(3, 16, 16)
    for seed in range(10):
        torch.manual_seed(seed)
        assert torch.equal(photometric_distortion(image, 0.0), image)


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(0, 255)] * 3),
    st.sampled_from([0.0, 1.0]) | st.floats(0, 3),
    st.sampled_from([0.0]) | st.floats(-0.5, 0.5, width=32),
)
def test_turn_colours_equals_hsv(rgb: tuple[int, int, int], saturation: float, turn: float) -> None:
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    expected = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, min(s * saturation, 1.0), v))
    for scale in (1, 255):
        pixels = torch.tensor(rgb).reshape(3, 1, 1) * (scale / 255)
        turned = turn_colours(pixels, saturation, turn).flatten() / scale
        # A hue in sixths of the circle carries some roundings of size 6 times float32's 6e-8.
        assert torch.allclose(turned, expected, rtol=0, atol=4e-6)


def test_turn_colours_of_every_hue_and_of_none() -> None:
    """On the borders between the sectors of the hue, all at once."""
    levels = torch.tensor([0.0, 64, 128, 255])
    pixels = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 8, 8)
    for sixths in range(-7, 8):
        turned = turn_colours(pixels.clone(), 1.0, sixths / 6)
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels.flatten(1).T.tolist()]
        expected = [colorsys.hsv_to_rgb((h + sixths / 6) % 1, s, v) for h, s, v in hsv]
        assert torch.allclose(turned.flatten(1).T, torch.tensor(expected), rtol=0, atol=1e-3)


def test_pad_to_fills_right_and_bottom() -> None:
    image, label = noise(3, 4, 6), noise(4, 6, high=5)
    padded, padded_label = pad_to(image, label, 8)
    assert torch.equal(padded[:, :4, :6], image) and torch.equal(padded_label[:4, :6], label)
    assert (padded_label[4:] == 254).all() and (padded_label[:, 6:] == 254).all()
    for channel, value in enumerate(PADDING_COLOUR):
        assert (padded[channel, 4:] == value).all() and (padded[channel, :, 6:] == value).all()


def test_padding_is_zero_after_normalisation() -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (torch.tensor(PADDING_COLOUR) / 255 - mean) / std
    assert normalised.abs().max() < 0.5 / 255 / 0.224  # less than half a grey level


@pytest.mark.parametrize("size", [(60, 90), (200, 30), (64, 64), (7, 5)])
def test_training_transform_has_a_fixed_output(size: tuple[int, int]) -> None:
    transform = training_transform(48, scale=(96, 64))
    for seed in range(6):
        torch.manual_seed(seed)
        image, label = transform(noise(3, *size), noise(*size, high=5))
        assert image.shape == (3, 48, 48) and label.shape == (48, 48)
        assert image.dtype == label.dtype == torch.uint8
        assert image.is_contiguous() and label.is_contiguous()


def test_training_transform_keeps_image_and_label_together() -> None:
    label = drawn_label()
    image = (label * 60 + 20).expand(3, -1, -1).contiguous()
    transform = training_transform(48, scale=(90, 60), photometric=False)
    for seed in range(20):
        torch.manual_seed(seed)
        out, out_label = transform(image, label)
        inside = out_label < 254
        agrees = ((out[0].int() - 60 * out_label.int() - 20).abs() <= 2)[inside]
        assert agrees.float().mean() > 0.85
        assert (out[:, ~inside].T == torch.tensor(PADDING_COLOUR)).all()


def test_training_transform_draws_from_the_global_generator_only() -> None:
    transform = training_transform(32, scale=(64, 64))
    image, label = noise(3, 50, 70), noise(50, 70, high=6)
    before = image.clone(), label.clone()
    torch.manual_seed(5)
    first = transform(image, label)
    torch.manual_seed(5)
    again = transform(image, label)
    other = transform(image, label)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


def test_switched_off_transform_is_a_plain_resize() -> None:
    transform = training_transform(
        64, scale=(64, 64), ratio=(1, 1), max_class_share=1, flip=0, photometric=False
    )
    image, label = noise(3, 64, 64), noise(64, 64, high=6)
    assert all(map(torch.equal, transform(image, label), (image, label)))


def test_repr_shows_the_settings() -> None:
    assert "crop=32" in repr(training_transform(32, photometric=0.5))
    assert "strength=0.5" in repr(training_transform(32, photometric=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0}, "at least 1 pixel, got 0"),
        ({"crop": 8, "ratio": (2.0, 0.5)}, r"0 < low <= high, got \(2\.0, 0\.5\)"),
        ({"crop": 8, "max_class_share": 0.0}, r"`max_class_share` must lie in \(0, 1\]"),
        ({"crop": 8, "flip": 1.5}, r"`flip` must be a probability in \[0, 1\], got 1\.5"),
        ({"crop": 8, "photometric": 3.0}, r"strength in \[0, 2\], got 3\.0"),
    ],
)
def test_training_transform_rejects_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_transform(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (torch.zeros(3, 8, 8), noise(8, 8), r"must be uint8 \(3, H, W\), got torch.float32"),
        (noise(8, 8, 3), noise(8, 8), r"must be uint8 \(3, H, W\), got torch.uint8 \(8, 8, 3\)"),
        (noise(3, 8, 8), noise(8, 9), r"must be uint8 \(8, 8\) like the image"),
        (noise(3, 8, 8), noise(8, 8).long(), r"got torch.int64 \(8, 8\)"),
    ],
)
def test_training_transform_rejects_pairs(image: Tensor, label: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_transform(8)(image, label)
