"""The transductive setting: what groups are called, and what changes when they have names."""

from itertools import product
from pathlib import Path

import pytest
import torch
from small_runs import make_space, options, program
from tiny import tiny_clip, tiny_student
from torch import Tensor

import cliptteacher as ct
from cliptteacher.checkpoint import load_checkpoint
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.transductive import PRIOR, name_groups

SEEN, UNSEEN = ("grass", "sand", "tile"), ("arrow", "brick")


def test_names_are_those_of_a_literal_loop() -> None:
    B, U, K, h, w = 3, 4, 5, 6, 8
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(-1, K, (B, h // 2, w // 2), generator=generator)
    scores = torch.randn(B, U, h, w, generator=generator)
    agreement = torch.randn(B, U, generator=generator)
    labels = torch.tensor([0, 2, 254, 255])[
        torch.randint(0, 4, (B, 2 * h, 2 * w), generator=generator)
    ]
    names = name_groups(groups, K, scores, labels, agreement)
    near = labels[:, 1::2, 1::2]  # the pixel at or after each centre of a cell of 2 x 2
    for b, g in product(range(B), range(K)):
        of_group = (groups[b] == g).repeat_interleave(2, 0).repeat_interleave(2, 1)
        inside = of_group & (near[b] == 255)
        mean = scores[b][:, inside].mean(dim=1) if inside.any() else torch.zeros(U)
        wide = of_group.repeat_interleave(2, 0).repeat_interleave(2, 1) & (labels[b] == 255)
        assert (names[b][wide] == (mean + PRIOR * agreement[b]).argmax()).all()
    everywhere = (groups >= 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(names >= 0, everywhere & (labels == 255))


def test_the_image_can_outvote_the_student() -> None:
    groups, labels = torch.zeros(1, 1, 1, dtype=torch.long), torch.full((1, 4, 4), 255)
    scores = torch.tensor([1.0, 0.9]).view(1, 2, 1, 1)
    assert (name_groups(groups, 1, scores, labels, torch.zeros(1, 2)) == 0).all()
    assert (name_groups(groups, 1, scores, labels, torch.tensor([[0.0, 0.4]])) == 1).all()


def build(unseen: tuple[str, ...] = (), **settings: object) -> CLIPTeacher:
    torch.manual_seed(0)
    config = CLIPTeacherConfig(scales=(1, 2), **settings)
    return CLIPTeacher(tiny_clip(), tiny_student(), SEEN, config, unseen)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(len(SEEN), (2, 32, 32), generator=generator)
    labels[:, :, 16:] = 255
    labels[:, 28:] = 254
    return images, labels


@pytest.mark.parametrize("loss_size", ["labels", "features"])
def test_named_groups_train_like_labels(monkeypatch: pytest.MonkeyPatch, loss_size: str) -> None:
    """Where the vote is unanimous, the losses are those of the labels of all classes."""
    images, labels = batch()
    everything = labels.masked_fill(labels == 255, len(SEEN) + 1)
    model = build(UNSEEN, loss_size=loss_size)
    monkeypatch.setattr(
        "cliptteacher.framework.name_groups",
        lambda groups, count, scores, labels, agreement: torch.where(labels == 255, 1, -1),
    )
    torch.manual_seed(0)
    config = CLIPTeacherConfig(scales=(1, 2), loss_size=loss_size)
    closed = CLIPTeacher(tiny_clip(), tiny_student(), (*SEEN, *UNSEEN), config)
    named, told = model(images, labels), closed(images, everything)
    for name in told:
        torch.testing.assert_close(named[name], told[name], rtol=1e-5, atol=1e-6)
    named["total"].backward()
    told["total"].backward()
    for mine, reference in zip(model.parameters(), closed.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_padding_and_seen_labels_keep_what_they_are() -> None:
    images, labels = batch()
    model = build(UNSEEN)
    teacher = model.encode(images.float() / 255)
    features = model.segmenter(images.float() / 255)
    named = model._name_groups(features, teacher.dense, teacher.cls, labels)
    assert torch.equal(named[labels != 255], labels[labels != 255])
    # a token that has seen labels too may be in no group; its pixels stay without a name
    assert set(named[labels == 255].tolist()) <= {len(SEEN), len(SEEN) + 1, 255}
    assert (named[labels == 255] != 255).float().mean() > 0.8


def test_a_run_knows_names_and_says_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, train = make_space(tmp_path), program(monkeypatch)
    known: list[tuple[str, ...]] = []
    forward = CLIPTeacher.forward

    def watched(self: CLIPTeacher, images: Tensor, labels: Tensor, *rest: int) -> dict[str, Tensor]:
        known.append(self.unseen_names)
        assert int(labels[labels < 254].max()) < 3  # labels of seen classes alone
        return forward(self, images, labels, *rest)

    monkeypatch.setattr(CLIPTeacher, "forward", watched)
    for setting, names in (("transductive", ("water",)), ("inductive", ())):
        known.clear()
        train.main(options(space, tmp_path / setting, "--setting", setting))
        assert set(known) == {names}
        assert load_checkpoint(tmp_path / setting)["setting"] == setting
        assert f"{setting} setting" in (tmp_path / setting / "report.html").read_text()


def test_a_saved_student_says_its_setting(tmp_path: Path) -> None:
    text = torch.eye(8)[:2]
    for setting, given in (("inductive", {}), ("transductive", {"setting": "transductive"})):
        path = tmp_path / f"{setting}.pt"
        ct.save_segmenter(path, tiny_student(), names=["a", "b"], text_features=text, **given)
        assert load_checkpoint(path)["setting"] == setting


@pytest.mark.parametrize(
    "unseen", ["brick", ("brick", "sand"), tuple(f"class {n}" for n in range(252))]
)
def test_names_that_cannot_be(unseen: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="`unseen_names` must be a list of names that are not in"):
        build(unseen)
