"""Training never learns how an unseen class looks on a label map, nor what it is called."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip, tiny_student
from torch import Tensor, nn

from cliptteacher.clip import class_text_features
from cliptteacher.data import MiniWorld, SeenOnly, TrainingStream, training_transform
from cliptteacher.data.miniworld import CLASS_NAMES, UNSEEN_NAMES
from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.distributed import Process
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.training.config import TrainConfig
from cliptteacher.training.loading import build_loader

UNSEEN = tuple(CLASS_NAMES.index(name) for name in UNSEEN_NAMES)
SEEN = tuple(i for i in range(len(CLASS_NAMES)) if i not in UNSEEN)


class Telltale:
    """A data set whose images show the full label map: every channel is the label of the pixel."""

    class_names = CLASS_NAMES
    unseen = UNSEEN
    ignore_index = 255

    def __init__(self, length: int = 8, size: int = 64) -> None:
        self.world = MiniWorld("train", size, length)

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _, labels = self.world[index]
        return labels.expand(3, -1, -1).clone(), labels

    def image_name(self, index: int) -> str:
        return f"telltale_{index}"


def load_program(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    if str(path.parent) not in sys.path:  # a program finds the files beside it
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def assert_only_seen(truth: Tensor, labels: Tensor) -> None:
    """``truth`` holds full labels, ``labels`` what training is given."""
    expected = torch.full((256,), 255, dtype=torch.uint8)
    for rank, index in enumerate(SEEN):
        expected[index] = rank
    assert torch.equal(labels, expected[truth.long()])
    for index in UNSEEN:
        assert (labels[truth == index] == 255).all()
    assert ((labels < len(SEEN)) | (labels == 255)).all()


def test_seen_only_hides_the_unseen_classes() -> None:
    hidden, everything = SeenOnly(Telltale()), Telltale()
    shown = torch.cat([everything[i][1].flatten() for i in range(8)])
    assert any((shown == index).any() for index in UNSEEN)
    for i in range(8):
        image, labels = hidden[i]
        assert_only_seen(image[0], labels)


def test_seen_only_tells_no_unseen_name() -> None:
    hidden = SeenOnly(Telltale())
    assert hidden.class_names == tuple(CLASS_NAMES[i] for i in SEEN)
    assert hidden.unseen == ()


def test_the_augmentation_sees_hidden_labels_only() -> None:
    given: list[tuple[Tensor, Tensor]] = []
    augment = training_transform(48, scale=(64, 64), ratio=(1.0, 1.0), photometric=False)

    def watch(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        given.append((image.clone(), labels.clone()))
        return augment(image, labels)

    stream = TrainingStream(SeenOnly(Telltale()), watch, seed=0)
    for n in range(8):
        image, labels = stream[n]
        assert_only_seen(image[0], labels)
    assert len(given) == 8
    for image, labels in given:
        assert_only_seen(image[0], labels)


def test_crops_do_not_depend_on_how_the_unseen_area_is_divided() -> None:
    """The crop test on class frequency must not look behind the 255."""

    class Merged(Telltale):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, labels = super().__getitem__(index)
            for other in UNSEEN[1:]:
                labels = torch.where(labels == other, UNSEEN[0], labels)
            return image, labels.to(torch.uint8)

    augment = training_transform(
        24, scale=(64, 64), ratio=(1.0, 1.0), max_class_share=0.3, photometric=False
    )
    first = TrainingStream(SeenOnly(Telltale()), augment, seed=3)
    second = TrainingStream(SeenOnly(Merged()), augment, seed=3)
    for n in range(16):
        assert all(torch.equal(a, b) for a, b in zip(first[n], second[n], strict=True))


# --- the model --------------------------------------------------------------------------------


def things_within(root: object) -> Iterator[Any]:
    """Everything reachable from an object: attributes, items, keys; modules and dataclasses too."""
    known: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in known or isinstance(item, type | ModuleType):
            continue
        known.add(id(item))
        yield item
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        elif not isinstance(item, Tensor | str | bytes | int | float):
            waiting += [vars(item)] if hasattr(item, "__dict__") else []


def build_model() -> CLIPTeacher:
    torch.manual_seed(0)
    config = CLIPTeacherConfig(scales=(1, 2))
    return CLIPTeacher(tiny_clip(), tiny_student(), SeenOnly(Telltale()).class_names, config)


def test_the_search_finds_what_is_hidden() -> None:
    model = build_model()
    model.plm.secret = [{"deep": (UNSEEN_NAMES[0],)}]
    assert UNSEEN_NAMES[0] in {item for item in things_within(model) if isinstance(item, str)}


def test_the_model_holds_no_unseen_name() -> None:
    model = build_model()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(len(SEEN), (2, 32, 32))
    model(images, labels)["total"].backward()  # what a step leaves behind counts as well
    words = {item for item in things_within(model) if isinstance(item, str)}
    assert set(SeenOnly(Telltale()).class_names) <= words
    for word in words:
        assert not set(UNSEEN_NAMES) & set(word.lower().replace(".", " ").split()), word
    settings = dataclasses.asdict(model.config)
    assert not {"unseen", "gamma"} & set(settings)


def test_the_model_holds_no_unseen_index() -> None:
    model = build_model()
    for item in things_within(model):
        if isinstance(item, list | tuple) and item and all(type(i) is int for i in item):
            assert tuple(item) != UNSEEN
        if isinstance(item, Tensor) and item.numel() == len(UNSEEN):
            assert item.flatten().tolist() != list(UNSEEN)


@pytest.mark.parametrize("templates", ["single", "ensemble"])
def test_the_model_holds_no_unseen_text_feature(templates: str) -> None:
    torch.manual_seed(0)
    config = CLIPTeacherConfig(scales=(1, 2), templates=templates)
    model = CLIPTeacher(tiny_clip(), tiny_student(), SeenOnly(Telltale()).class_names, config)
    unseen = class_text_features(model.clip, UNSEEN_NAMES, templates)
    seen = class_text_features(model.clip, [CLASS_NAMES[i] for i in SEEN], templates)
    seen_once = 0
    inside = {id(p) for p in (*model.clip.parameters(), *model.clip.buffers())}
    for item in things_within(model):
        if isinstance(item, Tensor) and id(item) not in inside and item.is_floating_point():
            if item.ndim == 0 or item.shape[-1] != unseen.shape[1]:
                continue
            rows = F.normalize(item.detach().reshape(-1, unseen.shape[1]), dim=1)
            assert ((rows[:, None] - unseen).norm(dim=2) > 1e-4).all()
            seen_once += int(((rows[:, None] - seen).norm(dim=2) < 1e-4).any())
    assert seen_once >= 1  # the same search does find the features of the seen classes
    assert model.seen_text.shape[0] == len(SEEN)


# --- the program ------------------------------------------------------------------------------


def small_config(**changes: Any) -> TrainConfig:
    settings = {
        "iterations": 4, "batch_size": 4, "crop": 48, "resize": (64, 64), "ratio": (1.0, 1.0),
        "photometric": False,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


ALONE = Process(0, 0, 1, torch.device("cpu"))


def test_the_loader_of_training_shows_seen_labels_only() -> None:
    augment = training_transform(48, scale=(64, 64), ratio=(1.0, 1.0), photometric=False)
    stream = TrainingStream(SeenOnly(Telltale()), augment, seed=0)
    loader = build_loader(stream, range(4), 4, 0, ALONE)
    batches = list(loader)
    assert len(batches) == 4
    truths = torch.cat([images[:, 0] for images, _ in batches])
    assert any((truths == index).any() for index in UNSEEN)
    assert_only_seen(truths, torch.cat([labels for _, labels in batches]))


@pytest.mark.parametrize("setting", ["inductive", "transductive"])
def test_the_program_trains_on_seen_names_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """One whole run; what reaches the model and its constructor is recorded on the way.

    In the transductive setting the names of the unseen classes may come too, their labels never.
    """
    train = load_program("train")
    named: list[tuple[str, ...]] = []
    labelled: list[Tensor] = []

    class Watched(CLIPTeacher):
        def __init__(self, clip: Any, segmenter: nn.Module, names: Any, *rest: Any) -> None:
            named.append((*names, *rest[1]))
            super().__init__(clip, segmenter, names, *rest)

        def forward(self, images: Tensor, labels: Tensor, *rest: Any) -> dict[str, Tensor]:
            labelled.append(torch.stack((images[:, 0], labels)))
            return super().forward(images, labels, *rest)

    def open_telltale(kind: str, root: Any, split: str, **_: Any) -> SegmentationDataset:
        return Telltale(4) if split == "train" else MiniWorld(split, 32, 2)

    monkeypatch.setattr(train, "CLIPTeacher", Watched)
    monkeypatch.setattr(train, "open_dataset", open_telltale)
    monkeypatch.setattr(train, "load_clip", lambda *_, **__: tiny_clip())
    monkeypatch.setattr(train, "build_segmenter", lambda *_, **__: tiny_student())
    config = small_config(iterations=2, output=str(tmp_path / "run"), setting=setting)
    method = CLIPTeacherConfig(scales=(1, 2))
    train.train("miniworld", config, method, ALONE)
    may_know = SEEN if setting == "inductive" else (*SEEN, *UNSEEN)
    assert named == [tuple(CLASS_NAMES[i] for i in may_know)]
    assert len(labelled) == 2
    for truth, labels in labelled:
        assert_only_seen(truth, labels)
