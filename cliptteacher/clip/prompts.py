"""Turn class names into text features, the fixed classifier of section 3.4.

Sketch: clean the name, put it into each template, encode every prompt, scale each feature to unit
length, average over the templates, scale again.

The templates are those of ZegCLIP's published configuration, whose setting the paper follows: one
for PASCAL VOC, fifteen for COCO-Stuff and PASCAL Context.

Cost: one pass of the text encoder per prompt, 171 * 15 = 2,565 of them for COCO-Stuff.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import CLIP
from .tokenizer import clean_text, load_tokenizer, tokenize

SINGLE = ("a photo of a {}.",)
ENSEMBLE = (
    "a photo of a {}.",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)

Templates = Literal["single", "ensemble"] | Sequence[str]

_PROMPTS_PER_PASS = 256  # bounds the memory of the text encoder, whatever the number of classes


def class_text_features(
    clip: CLIP, names: Sequence[str], templates: Templates = "single"
) -> Tensor:
    """Encode class names as unit vectors: t_i = unit(mean over templates of unit(text(prompt))).

    The T of Eq. (9), arXiv:2310.02296v1.

    Args:
        clip: the teacher; the features are on its device and in its dtype.
        names: n class names, as the data set spells them.
        templates: ``"single"``, ``"ensemble"`` or own templates, each with one ``{}``.

    Returns:
        (n, C) features, rows of unit length, without gradient.

    Raises:
        ValueError: if there is no name, a name is blank, or a template has no ``{}``.

    Assumption: names are cleaned first (see `clean_class_name`); the paper does not say.
    """
    prompts = class_prompts(names, templates)
    features = F.normalize(_encode_prompts(clip, prompts), dim=1)
    per_class = features.reshape(len(names), len(prompts) // len(names), features.shape[1])
    return F.normalize(per_class.mean(dim=1), dim=1)  # (n, C)


def free_text_tower(clip: CLIP) -> None:
    """Drop what encodes text, 0.24 GiB of ViT-B/16, once all words are encoded.

    >>> import cliptteacher as ct
    >>> clip = ct.load_clip("miniworld")
    >>> free_text_tower(clip)
    >>> ct.class_text_features(clip, ["cat"])
    Traceback (most recent call last):
    ValueError: the text tower of this CLIP was freed; load it again for new words
    """
    clip.transformer = clip.token_embedding = clip.ln_final = None  # type: ignore[assignment]
    clip.positional_embedding = clip.text_projection = None  # type: ignore[assignment]


def class_prompts(names: Sequence[str], templates: Templates = "single") -> list[str]:
    """Put every class name into every template.

    Args:
        names: n class names, as the data set spells them.
        templates: ``"single"``, ``"ensemble"`` or own templates, each with one ``{}``.

    Returns:
        The prompts: all templates of the first class, then all of the second, and so on.

    Raises:
        ValueError: if there is no name, a name is blank, or a template has no ``{}``.

    >>> class_prompts(["wall-brick", "sky-other"])
    ['a photo of a wall brick.', 'a photo of a sky.']
    """
    if isinstance(names, str) or len(names) == 0:
        raise ValueError(f"`names` must be a list of at least one class name, got {names!r}")
    cleaned = [clean_class_name(name) for name in names]
    lines = _resolve_templates(templates)
    return [line.replace("{}", name) for name in cleaned for line in lines]


def clean_class_name(name: str) -> str:
    """Write a data set's class name as plain words.

    A "-other" or "-stuff" at the end tells a data set's classes apart and says nothing about the
    picture, so it is dropped; other hyphens and underscores become blanks.

    Raises:
        ValueError: if nothing is left.

    >>> clean_class_name("wall-concrete"), clean_class_name("dining_table")
    ('wall concrete', 'dining table')
    """
    plain = name.strip().removesuffix("-other").removesuffix("-stuff")
    words = plain.replace("-", " ").replace("_", " ").split()
    if not any(character.isalnum() for character in clean_text(" ".join(words))):
        raise ValueError(f"a class name must hold at least one word, got {name!r}")
    return " ".join(words)


def spell_class_name(word: str) -> str:
    """Spell a word as the text encoder reads it, so that "Wall-Brick" is "wall brick"."""
    return clean_class_name(word).lower()


def unread_words(clip: CLIP, words: Sequence[str]) -> tuple[str, ...]:
    """List the words with a token that the CLIP was never trained on.

    A CLIP of `pretrain_clip.py` has zero rows for all tokens that no caption held. OpenAI's has
    none, so nothing is listed there.
    """
    read = clip.token_embedding.weight.any(dim=1)
    encode = load_tokenizer().encode
    return tuple(word for word in words if not read[encode(clean_class_name(word))].all())


def _resolve_templates(templates: Templates) -> Sequence[str]:
    if isinstance(templates, str):
        named = {"single": SINGLE, "ensemble": ENSEMBLE}
        if templates not in named:
            raise ValueError(
                f"`templates` must be 'single', 'ensemble' or a list of templates, "
                f"got {templates!r}; put a single template of your own into a list"
            )
        return named[templates]
    if len(templates) == 0:
        raise ValueError("`templates` must hold at least one template, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"a template must hold '{{}}' once, where the class name goes, got {template!r}"
            )
    return templates


@torch.no_grad()
def _encode_prompts(clip: CLIP, prompts: Sequence[str]) -> Tensor:
    """Encode prompts (p of them) as (p, C), in passes of bounded memory."""
    if clip.token_embedding is None:
        raise ValueError("the text tower of this CLIP was freed; load it again for new words")
    ids = tokenize(prompts, context_length=clip.config.context_length)
    # Attention is causal: what stands behind the last end of text cannot change a feature.
    ids = ids[:, : int(ids.argmax(dim=1).max()) + 1].to(clip.logit_scale.device)
    starts = range(0, len(ids), _PROMPTS_PER_PASS)
    return torch.cat([clip.encode_text(ids[i : i + _PROMPTS_PER_PASS]) for i in starts])
