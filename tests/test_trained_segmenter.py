"""A student on disk: saved from any loop, loaded ready to predict, for its own words and others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_inference import Student, picture
from tiny import tiny_clip
from torch import Tensor, nn

from cliptteacher.checkpoint import load_checkpoint, save_checkpoint, student_content
from cliptteacher.clip import CLIP, class_text_features, save_clip
from cliptteacher.inference import Predictor, TrainedSegmenter, load_segmenter, save_segmenter
from cliptteacher.segmenters import build_segmenter

NAMES = ("grass", "sky", "cow", "boat")


def description(**changes: Any) -> dict[str, Any]:
    settings = {
        "names": NAMES,
        "unseen": [2],
        "text_features": F.normalize(torch.eye(4, 5) + 0.1, dim=1),
        "gamma": 0.3,
        "logit_scale": 2.0,
        "similarity": "cosine",
        "clip": "miniworld",
    }
    return {**settings, **changes}


def saved(folder: Path, student: nn.Module, **changes: Any) -> Path:
    save_segmenter(folder / "student.pt", student, **description(**changes))
    return folder / "student.pt"


# --- saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segformer_nano", "fpn_small"])
def test_load_segmenter_gives_back_what_was_saved(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    student = build_segmenter(name, channels=5).train()
    trained = load_segmenter(saved(tmp_path, student))
    assert trained.class_names == NAMES and trained.unseen == (2,)
    assert trained.checkpoint["clip"] == "miniworld"
    assert type(trained.segmenter) is type(student) and not trained.segmenter.training
    image = picture(3, 32, 48)
    settings: dict[str, Any] = {"unseen": [2], "logit_scale": 2.0, "similarity": "cosine"}
    expected = Predictor(student, trained.text_features, gamma=0.3, **settings)
    assert torch.equal(trained.predictor().logits(image), expected.logits(image))
    assert torch.equal(trained(image), expected(image))
    shifted = trained.predictor(gamma=1.3).logits(image) - trained.predictor().logits(image)
    torch.testing.assert_close(shifted[2], torch.ones(32, 48))
    assert not shifted[[0, 1, 3]].any()


def test_a_student_built_with_options_is_built_again_with_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"auxiliary": True, "drop_path": 0.25}
    student = build_segmenter("swin_nano", channels=5, **options)
    trained = load_segmenter(saved(tmp_path, student))
    assert trained.segmenter.auxiliary is not None
    image = picture(3, 32, 48)
    expected = Predictor(student, trained.text_features, unseen=[2], **trained.settings)
    assert torch.equal(trained(image), expected(image))


def test_the_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    text = torch.eye(2, 5)
    save_segmenter(tmp_path / "s.pt", Student(), names=("cat", "dog"), text_features=text)
    trained = load_segmenter(tmp_path / "s.pt", Student())
    assert trained.unseen == () and torch.equal(trained.text_features, text)
    assert trained.settings == {
        "gamma": 1.5, "logit_scale": 1.0, "similarity": "dot", "resize": None, "size_divisor": 1,
    }  # fmt: skip


def test_resize_and_divisor_come_back(tmp_path: Path) -> None:
    student = build_segmenter("fpn_small", channels=5)
    trained = load_segmenter(saved(tmp_path, student, resize=(40, 30), size_divisor=32))
    seen: list[torch.Size] = []
    trained.segmenter.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    trained.predictor()(picture(3, 60, 80))
    trained.predictor(size_divisor=1)(picture(3, 60, 80))
    assert seen == [(1, 3, 32, 64), (1, 3, 30, 40)]


def test_saving_keeps_the_student_as_it_is(tmp_path: Path) -> None:
    student = Student().train()
    text = torch.randn(4, 5, requires_grad=True)  # with a graph, as a caller may have it
    saved(tmp_path, student, text_features=text * 1)
    assert student.training and student.norm.training
    assert not load_segmenter(tmp_path / "student.pt", Student()).text_features.requires_grad
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]  # no temporary file


def test_a_checkpoint_of_a_run_loads_without_its_training_state(tmp_path: Path) -> None:
    content = student_content(build_segmenter("segformer_nano", 5), **description())
    folder = tmp_path / "checkpoints"
    save_checkpoint({"step": 7, **content, "training": {"optimizer": {}}}, folder)
    for path in (tmp_path, folder / "last.pt"):
        trained = load_segmenter(path)
        assert trained.checkpoint["step"] == 7 and "training" not in trained.checkpoint


def test_load_segmenter_fills_a_network_of_the_caller(tmp_path: Path) -> None:
    path = saved(tmp_path, Student())
    other = Student()
    nn.init.zeros_(other.conv.weight)
    assert load_segmenter(path, other).segmenter is other
    assert torch.equal(other.conv.weight, Student().conv.weight)
    assert load_checkpoint(path)["segmenter_name"] is None


def test_a_network_that_cannot_be_built_again_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"built by build_segmenter; pass the network"):
        load_segmenter(saved(tmp_path, Student()))


def test_load_segmenter_rejects_other_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, build_segmenter("segformer_nano", 5))
    message = r"(?s)must fit the segmenter 'segformer_nano'.*as `segmenter`"
    with pytest.raises(ValueError, match=message):
        load_segmenter(path, Student())
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        load_segmenter(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t > 0, "'conv.weight' holds torch.bool, not torch.float32"),
        (lambda t: t.long(), "'conv.weight' holds torch.int64, not torch.float32"),
        (lambda t: t * float("nan"), "the entry 'segmenter' of .*student.pt is missing or of the"),
        (lambda t: t[:1], "size mismatch for conv.weight"),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    student = Student()
    state = student.state_dict()
    student.state_dict = lambda: {**state, "conv.weight": change(state["conv.weight"])}  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match=message):
        load_segmenter(saved(tmp_path, student), Student())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_weights_of_a_wrapped_student_load(tmp_path: Path, prefix: str) -> None:
    student = Student()
    state = student.state_dict()
    student.state_dict = lambda: {f"{prefix}{k}": v for k, v in state.items()}  # type: ignore[method-assign,assignment]
    other = Student()
    nn.init.zeros_(other.conv.weight)
    load_segmenter(saved(tmp_path, student), other)
    assert torch.equal(other.conv.weight, state["conv.weight"])


def test_names_and_text_features_must_be_equally_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one row per name, got 4 rows for 2 names"):
        saved(tmp_path, Student(), names=("cat", "dog"))
    assert not list(tmp_path.iterdir())


# --- images and words ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return tiny_clip().eval()


def segmenter_of(teacher: CLIP, **checkpoint: Any) -> TrainedSegmenter:
    torch.manual_seed(3)
    return TrainedSegmenter(
        segmenter=Student(teacher.embed_dim).eval(),
        class_names=NAMES,
        unseen=(2,),
        text_features=class_text_features(teacher, NAMES),
        settings={"gamma": 0.3},
        checkpoint=checkpoint,
    )


def test_an_image_may_be_a_path_a_picture_an_array_or_a_tensor(clip: CLIP, tmp_path: Path) -> None:
    segment = segmenter_of(clip)
    array = (np.random.default_rng(0).random((20, 26, 3)) * 255).astype(np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "picture.png")
    expected = segment.predictor()(torch.from_numpy(array).permute(2, 0, 1))
    assert expected.shape == (20, 26) and len(expected.unique()) > 1
    for image in (
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        picture,
        picture.convert("RGBA"),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        labels = segment(image)
        assert torch.equal(labels, expected), type(image)
        labels[labels == 1] = 255


def test_own_words_need_no_clip_and_others_are_encoded(clip: CLIP) -> None:
    segment, image = segmenter_of(clip), picture(3, 16, 16)
    assert torch.equal(segment(image, words=NAMES), segment(image))
    shuffled = segment.with_words(("Boat", "cow"))
    assert torch.equal(shuffled.text_features, segment.text_features[[3, 2]])
    assert shuffled.unseen == (1,) and shuffled.class_names == ("Boat", "cow")
    words = ("grass", "frisbee", "cow")
    other = segment.with_words(words, clip)
    torch.testing.assert_close(other.text_features, class_text_features(clip, words))
    assert other.unseen == (1, 2) and other.class_names == words
    labels = segment(image, words=list(words), clip=clip)
    expected = Predictor(
        segment.segmenter, class_text_features(clip, words), unseen=(1, 2), gamma=0.3
    )
    assert torch.equal(labels, expected(image))


def test_other_words_take_the_templates_of_training(clip: CLIP) -> None:
    found = segmenter_of(clip, templates="ensemble").with_words(["frisbee"], clip)
    expected = class_text_features(clip, ["frisbee"], "ensemble")
    torch.testing.assert_close(found.text_features, expected)


def test_the_teacher_is_found_by_the_path_in_the_checkpoint(clip: CLIP, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / "clip.pt")
    segment = segmenter_of(clip, clip=str(tmp_path / "clip.pt"))
    expected = class_text_features(clip, ["frisbee"])
    torch.testing.assert_close(
        segment.with_words(["frisbee"]).text_features, expected, atol=5e-3, rtol=0
    )


def test_words_that_the_teacher_never_read_are_named(clip: CLIP) -> None:
    clip = tiny_clip().eval()
    with torch.no_grad():
        clip.token_embedding.weight[1000:49406] = 0
    found = segmenter_of(clip).with_words(["a", "frisbee"], clip)
    assert found.unread == ("frisbee",)
    assert segmenter_of(clip).with_words(["cow"], clip).unread == ()


def test_words_need_the_right_teacher(clip: CLIP, tmp_path: Path) -> None:
    segment, image = segmenter_of(clip), picture(3, 16, 16)
    with pytest.raises(ValueError, match="need its teacher, got none; name it as `clip`"):
        segment(image, words=["frisbee"])
    gone = segmenter_of(clip, clip=str(tmp_path / "gone.pt"))
    with pytest.raises(FileNotFoundError, match=r"gone\.pt.*name it as `clip`"):
        gone(image, words=["frisbee"])
    narrow = TrainedSegmenter(
        **{**vars(segment), "text_features": torch.eye(4, 8), "segmenter": Student(8).eval()}
    )
    with pytest.raises(ValueError, match="taught the student, with 8 channels, got 16"):
        narrow(image, words=["frisbee"], clip=clip)
    with pytest.raises(ValueError, match="at least one word"):
        segment(image, words=["cow", " "], clip=clip)


def test_tensors_of_a_segmenter_follow_its_student(clip: CLIP) -> None:
    segment = segmenter_of(clip)
    segment.segmenter.to(torch.float64)
    predictor = segment.predictor()
    assert predictor.text_features.device == next(segment.segmenter.parameters()).device
    labels: Tensor = segment.segmenter.to(torch.float32) and segment(picture(3, 8, 8))
    assert labels.dtype == torch.int64
