"""Give a trained student its words: stored text features where they suffice, else the CLIP's.

What `evaluate.py` and `predict.py` share. A checkpoint holds the text features of the words of
its training run, so a student that is asked for those needs no CLIP; for any other word the CLIP
that taught it is loaded and its text encoder reads the word (section 3.4, arXiv:2310.02296v1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cliptteacher.clip import CLIP, class_text_features, load_clip
from cliptteacher.clip.prompts import clean_class_name
from cliptteacher.clip.tokenizer import load_tokenizer
from cliptteacher.inference import TrainedSegmenter


def with_words(
    trained: TrainedSegmenter, words: Sequence[str], clip: str | None = None
) -> tuple[TrainedSegmenter, list[str]]:
    """Let a student predict other words than those of its checkpoint.

    Args:
        trained: the student.
        words: what its labels 0, 1, ... shall mean; not necessarily words of training.
        clip: name or path of the teacher, if it is not where the training run had it. It is
            loaded only if a word is unknown.

    Returns:
        The student with these words; unseen are those that training had no labels for. And those
        words that the CLIP has never read, whose features mean nothing.

    Raises:
        FileNotFoundError: if the CLIP is needed and not there.
        ValueError: if a word is blank, or the CLIP is not the one that taught the student.
    """
    known = {spelling(name): k for k, name in enumerate(trained.class_names)}
    seen = {spelling(name) for k, name in enumerate(trained.class_names) if k not in trained.unseen}
    keys = [spelling(word) for word in words]
    unread: list[str] = []
    if all(key in known for key in keys):
        text = trained.text_features[[known[key] for key in keys]]
    else:
        teacher = _load_teacher(trained, clip)
        text = class_text_features(teacher, words, trained.checkpoint.get("templates", "single"))
        unread = unread_words(teacher, words)
    unseen = tuple(k for k, key in enumerate(keys) if key not in seen)
    words = tuple(words)
    return replace(trained, class_names=words, unseen=unseen, text_features=text), unread


def unread_words(clip: CLIP, words: Sequence[str]) -> list[str]:
    """List the words with a token that the CLIP was never trained on.

    A CLIP of `pretrain_clip.py` has zero rows for all tokens that no caption held. OpenAI's has
    none, so nothing is listed there.
    """
    read = clip.token_embedding.weight.any(dim=1)
    encode = load_tokenizer().encode
    return [word for word in words if not bool(read[encode(clean_class_name(word))].all())]


def spelling(word: str) -> str:
    """Spell a word as the text encoder sees it, so that "Wall-Brick" is "wall brick"."""
    return clean_class_name(word).lower()


def _load_teacher(trained: TrainedSegmenter, source: str | None) -> CLIP:
    source = source or str(trained.checkpoint.get("clip"))
    try:
        clip = load_clip(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"words that the student was not trained with need its teacher, but {error}; "
            "tell where it is with --clip"
        ) from error
    width = trained.text_features.shape[1]
    if clip.embed_dim != width:
        raise ValueError(
            f"the CLIP must be the one that taught the student, with {width} channels, got "
            f"{clip.embed_dim} in {source}; give another --clip"
        )
    return clip
