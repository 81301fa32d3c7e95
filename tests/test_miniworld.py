"""Miniworld: the same scene for ever, every class findable, and no class one colour."""

import pytest
import torch
from torch import Generator

from cliptteacher.data.miniworld import (
    CLASS_NAMES,
    STUFF,
    THINGS,
    UNSEEN_NAMES,
    MiniWorld,
    caption_of,
    compose_scene,
    draw_scene,
    draw_single_class,
    present_classes,
)
from cliptteacher.data.transforms import training_transform

SIZE = 64
SPLITS = ["train", "val", "test", "pretrain"]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def test_shapes_and_types() -> None:
    for size in (32, 64, 128):
        image, labels = MiniWorld("train", size)[0]
        assert image.shape == (3, size, size) and image.dtype == torch.uint8
        assert labels.shape == (size, size) and labels.dtype == torch.uint8


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_nothing_but_split_index_and_size(split: str) -> None:
    forwards, backwards = MiniWorld(split, SIZE), MiniWorld(split, SIZE, length=9, cache=False)
    torch.manual_seed(1)
    first = [forwards[i] for i in range(6)]
    torch.manual_seed(2)
    second = [backwards[i] for i in reversed(range(6))][::-1]
    again = [forwards[i] for i in range(6)]
    for a, b, c in zip(first, second, again, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    MiniWorld("val", SIZE)[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_no_scene_is_drawn_twice_within_or_across_splits() -> None:
    # PyTorch's CPU generator drops all but 32 bits of a seed: a split in the high bits is lost.
    scenes = {
        MiniWorld(split, 32, cache=False)[i][0].numpy().tobytes()
        for split in SPLITS
        for i in range(50)
    }
    assert len(scenes) == 50 * len(SPLITS)


def test_augmentation_does_not_write_into_the_cache() -> None:
    world = MiniWorld("train", SIZE)
    expected = [tuple(part.clone() for part in world[i]) for i in range(4)]
    augment = training_transform(48, scale=(64, 64), ratio=(1.0, 1.0), photometric=True)
    for i in range(4):
        augment(*world[i])
    for i in range(4):
        assert all(torch.equal(a, b) for a, b in zip(world[i], expected[i], strict=True))


def test_labels_are_classes_or_255() -> None:
    world = MiniWorld("train", SIZE)
    values = torch.cat([world[i][1].unique() for i in range(100)]).unique().tolist()
    assert set(values) == {*range(len(CLASS_NAMES)), 255}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_class_holds_pixels_in_the_first_scenes(split: str) -> None:
    world = MiniWorld(split, 128, cache=False)
    counts = sum(torch.bincount(world[i][1].flatten(), minlength=256) for i in range(60))
    assert (counts[: len(CLASS_NAMES)] > 500).all()
    assert counts[255] > 0


def test_seen_and_unseen() -> None:
    world = MiniWorld()
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 20
    assert CLASS_NAMES == STUFF + THINGS == world.class_names
    assert len(UNSEEN_NAMES) == 5
    assert tuple(CLASS_NAMES[i] for i in world.unseen) == UNSEEN_NAMES
    assert {name in STUFF for name in UNSEEN_NAMES} == {True, False}  # of either kind
    assert world.ignore_index == 255


def test_lengths() -> None:
    assert [len(MiniWorld(split)) for split in ("train", "val", "test")] == [2048, 192, 256]
    short = MiniWorld("train", SIZE, length=3)
    assert len(short) == 3 and len(list(short)) == 3
    assert len({short.image_name(i) for i in range(3)} | {MiniWorld("val").image_name(0)}) == 4


@pytest.mark.parametrize("seed", range(20))
def test_a_caption_names_exactly_the_classes_above_two_percent(seed: int) -> None:
    _, labels = draw_scene(seeded(seed), SIZE)
    present = present_classes(labels, len(CLASS_NAMES))
    large = [i for i in range(len(CLASS_NAMES)) if int((labels == i).sum()) >= 0.02 * SIZE**2]
    assert present == large
    if present:
        caption = caption_of([CLASS_NAMES[i] for i in present], seeded(seed))
        words = caption.replace(",", " ").replace(".", " ").split()
        named = [word for word in words if word in CLASS_NAMES]
        assert sorted(named) == sorted(CLASS_NAMES[i] for i in large)


def test_the_border_of_two_percent() -> None:
    labels = torch.full((10, 10), 255, dtype=torch.uint8)
    labels[0, :2], labels[1, :1], labels[2] = 0, 1, 7
    assert present_classes(labels, 8) == [0, 7]
    assert present_classes(labels, 7) == [0]  # what lies behind the classes does not count
    assert present_classes(torch.full((10, 10), 255), 20) == []


def test_captions_read_as_english_and_vary() -> None:
    captions = {caption_of(["grass", "sand", "water"], seeded(s)) for s in range(100)}
    assert "a photo of grass, sand and water." in captions
    assert "a picture of water, grass and sand." in captions
    assert len(captions) > 15  # 6 orders times the templates
    pair = {caption_of(["grass", "sand"], seeded(s)) for s in range(40)}
    assert "grass and sand." in pair and "a picture of sand and grass." in pair
    assert "moon." in {caption_of(["moon"], seeded(s)) for s in range(40)}


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_a_single_class_is_alone(label: int) -> None:
    for seed in range(3):
        image, labels = draw_single_class(seeded(seed), SIZE, label)
        assert image.shape == (3, SIZE, SIZE)
        share = float((labels == label).float().mean())
        if label < len(STUFF):
            assert share == 1
        else:
            assert 0.02 < share < 0.8
            assert set(labels.unique().tolist()) == {label, 255}


def test_composed_scenes_hold_what_was_asked_for() -> None:
    image, labels = compose_scene(seeded(0), 128, [3, -1], [6])
    assert set(labels.unique().tolist()) == {3, 255, len(STUFF) + 6}
    assert image.float().std() > 5


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_no_class_is_one_colour(label: int) -> None:
    means, spreads = [], []
    for seed in range(12):
        image, labels = draw_single_class(seeded(seed), SIZE, label)
        pixels = image[:, labels == label].float()
        means.append(pixels.mean(dim=1))
        spreads.append(pixels.std(dim=1).mean())
    assert torch.stack(means).std(dim=0).max() > 6  # between scenes, of 255
    assert torch.stack(spreads).min() > 5  # within a scene


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="must be one of train, val, test, pretrain, got 'trian'"):
        MiniWorld("trian")


@pytest.mark.parametrize("index", [-1, 192])
def test_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match=f"miniworld val has 192 scenes, got index {index}"):
        MiniWorld("val")[index]
