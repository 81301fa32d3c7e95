"""Class names to prompts to unit text features."""

import pytest
import torch
from torch import Tensor

from cliptteacher.clip import CLIP, CLIPConfig, class_text_features, tokenize
from cliptteacher.clip import prompts as module
from cliptteacher.clip.prompts import ENSEMBLE, SINGLE, class_prompts, clean_class_name

NAMES = ["cat", "wall-brick", "sky-other", "traffic light", "desk-stuff"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(
        embed_dim=24, image_size=32, vision_width=64, vision_layers=1, text_width=64, text_layers=2
    )
    return CLIP(config).double()


def slow_reference(clip: CLIP, name: str, templates: tuple[str, ...]) -> Tensor:
    """One prompt at a time, with the full context, as the formula reads."""
    total = torch.zeros(clip.embed_dim, dtype=torch.float64)
    for template in templates:
        feature = clip.encode_text(tokenize(template.format(name)))[0]
        total += feature / feature.norm()
    mean = total / len(templates)
    return mean / mean.norm()


def test_templates() -> None:
    assert SINGLE == ("a photo of a {}.",)
    assert len(set(ENSEMBLE)) == 15
    assert ENSEMBLE[0] == SINGLE[0]
    assert all(template.count("{}") == 1 for template in ENSEMBLE)


def test_the_fifteen_templates_word_for_word() -> None:
    """ZegCLIP's list is a grammar: four sizes, twice, then seven sentences about the scene."""
    sizes = ("a", "a small", "a medium", "a large")
    beginnings = ("a", "a photo of a", "There is a", "There is the", "This is a", "This is the")
    assert ENSEMBLE == (
        *(f"a photo of {size} {{}}." for size in sizes),
        *(f"This is a photo of {size} {{}}." for size in sizes),
        *(f"{words} {{}} in the scene." for words in (*beginnings, "This is one")),
    )


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("cat", "cat"),
        ("wall-brick", "wall brick"),
        ("sky-other", "sky"),
        ("mirror-stuff", "mirror"),
        ("traffic light", "traffic light"),
        ("other", "other"),
        ("  two   words ", "two words"),
        ("other-stuffing", "other stuffing"),
        ("a-name of-five words", "a name of five words"),
    ],
)
def test_clean_class_name(name: str, cleaned: str) -> None:
    assert clean_class_name(name) == cleaned


def test_prompts_are_grouped_by_class() -> None:
    templates = ["the {}.", "no {}!"]
    expected = ["the cat.", "no cat!", "the sky.", "no sky!"]
    assert class_prompts(["cat", "sky-other"], templates) == expected
    assert len(class_prompts(NAMES, "ensemble")) == 5 * 15
    assert class_prompts(["{0} {name}"]) == ["a photo of a {0} {name}."]


@pytest.mark.parametrize(
    ("keyword", "templates"),
    [("single", SINGLE), ("ensemble", ENSEMBLE), (("one {}", "two {}"), ("one {}", "two {}"))],
)
def test_features_equal_a_slow_loop(clip: CLIP, keyword, templates) -> None:  # type: ignore[no-untyped-def]
    features = class_text_features(clip, NAMES, keyword)
    expected = torch.stack([slow_reference(clip, clean_class_name(n), templates) for n in NAMES])
    assert features.shape == (5, 24)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


def test_features_are_unit_rows_without_gradient(clip: CLIP) -> None:
    features = class_text_features(clip, NAMES, "ensemble")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert not features.requires_grad
    assert not features.is_inference()  # usable in a loss that saves it for the backward pass


def test_passes_of_any_size_agree(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = class_text_features(clip, NAMES, "ensemble")
    sizes = []
    encode_text = CLIP.encode_text

    def record_size(self: CLIP, ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return encode_text(self, ids)

    monkeypatch.setattr(CLIP, "encode_text", record_size)
    monkeypatch.setattr(module, "_PROMPTS_PER_PASS", 20)
    torch.testing.assert_close(class_text_features(clip, NAMES, "ensemble"), expected)
    assert sizes == [20, 20, 20, 15]


def test_short_context_is_respected() -> None:
    config = CLIPConfig(
        embed_dim=8, image_size=16, vision_width=64, vision_layers=1, text_width=64, text_layers=1,
        context_length=12,
    )  # fmt: skip
    clip = CLIP(config)
    assert class_text_features(clip, ["cat"]).shape == (1, 8)
    with pytest.raises(ValueError, match="must fit into 12 tokens"):
        class_text_features(clip, ["cat and dog and cow and sheep"])


@pytest.mark.parametrize("names", [[], "cat"])
def test_names_must_be_a_list(clip: CLIP, names) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="`names` must be a list of at least one class name"):
        class_text_features(clip, names)


@pytest.mark.parametrize("name", ["", "  ", "-", "-other"])
def test_blank_names_are_refused(clip: CLIP, name: str) -> None:
    with pytest.raises(ValueError, match="a class name must hold at least one word, got"):
        class_text_features(clip, ["cat", name])


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("a photo of a {}.", "must be 'single', 'ensemble' or a list.*into a list"),
        ([], "at least one template, got none"),
        (["a photo of a cat."], "must hold '{}' once.*got 'a photo of a cat.'"),
        (["{} and {}"], "must hold '{}' once"),
    ],
)
def test_template_errors(templates, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        class_prompts(["cat"], templates)
