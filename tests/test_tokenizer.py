"""CLIP's tokenizer: the same ids as the published one, and clear errors."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cliptteacher.clip import tokenizer as module
from cliptteacher.clip.tokenizer import clean_text, load_tokenizer, tokenize

START, END = 49406, 49407

# Pieces that meet every branch: words, contractions, digits, marks, entities, broken encodings.
PIECES = (
    *(
        "a photo of a cat.",
        "It's",
        "they'LL",
        "don't",
        "x2y3",
        "1984",
        "&amp;",
        "&amp;amp;lt;b&gt;",
    ),
    *(
        "schÃ¶n",
        "naïve café",
        "日本語",
        "🙂🙂",
        "¿qué?",
        "\t\n ",
        "--- ...",
        "'",
        "''s",
        "İstanbul",
    ),
    *("wall-brick", "ﬁsh", "\u00a0", "\u200b", "a\u0301", "ſ", "Ω≈ç√", "tvmonitor", "\x00", "\x85"),
)


def test_known_sentence() -> None:
    expected = [START, 320, 1125, 539, 320, 2368, 269, END]
    assert tokenize("a photo of a cat.")[0].tolist() == expected + [0] * 69


def test_shape_and_dtype() -> None:
    ids = tokenize(["a cat", "a photo of a large dog"], context_length=12)
    assert ids.shape == (2, 12)
    assert ids.dtype == torch.int64
    assert tokenize([]).shape == (0, 77)


def test_end_mark_is_the_largest_id() -> None:
    tokenizer = load_tokenizer()
    assert len(tokenizer) == 49408
    assert (tokenizer.start_id, tokenizer.end_id) == (START, END)
    assert tokenize("a cat")[0].argmax() == 3


def test_marks_written_in_a_text_are_marks() -> None:
    assert load_tokenizer().encode("<|startoftext|>cat<|ENDOFTEXT|>") == [START, 2368, END]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\tCat \n", "a cat"),
        ("&amp;lt;cat&amp;gt;", "<cat>"),
        ("schÃ¶n", "schön"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_decode_gives_the_words_back() -> None:
    tokenizer = load_tokenizer()
    text = "a photo of a naïve tvmonitor , 日本語 🙂"
    assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()
    assert tokenizer.decode(torch.tensor([320, 2368])) == "a cat "


def test_decode_of_a_broken_sequence() -> None:
    id_of_byte_ff = 187  # the last of the 188 printable bytes; no UTF-8 text holds it
    assert load_tokenizer().decode([2368, id_of_byte_ff]) == "cat \ufffd"


def test_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must fit into 8 tokens, got 22 for 'cat cat"):
        tokenize("cat " * 20, context_length=8)


def test_too_long_is_cut_on_request() -> None:
    ids = tokenize(["cat " * 20, "cat"], context_length=8, truncate=True)
    assert ids.tolist() == [[START, *[2368] * 6, END], [START, 2368, END, *[0] * 5]]


def test_exact_fit_needs_no_cut() -> None:
    assert tokenize("cat cat", context_length=4).tolist() == [[START, 2368, 2368, END]]


def test_errors() -> None:
    with pytest.raises(TypeError, match="must hold strings, got int: 3"):
        tokenize(["cat", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="`context_length` must be at least 2.*got 1"):
        tokenize("cat", context_length=1)


def test_import_is_cheap() -> None:
    code = (
        "import sys; from cliptteacher.clip import tokenizer as t; "
        "assert not {'ftfy', 'regex'} & set(sys.modules); "
        "assert t.load_tokenizer.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_merges_are_read_once() -> None:
    assert load_tokenizer() is load_tokenizer()
    assert module._MERGES_FILE.stat().st_size < 2_000_000


@pytest.fixture(scope="module")
def peer() -> object:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.tokenizer.SimpleTokenizer()


@settings(max_examples=700, deadline=None)
@given(texts=st.lists(st.text(max_size=40) | st.sampled_from(PIECES), min_size=1, max_size=6))
def test_same_ids_as_open_clip(peer, texts: list[str]) -> None:  # type: ignore[no-untyped-def]
    joined = [*texts, " ".join(texts), "".join(texts)]
    ours = tokenize(joined, truncate=True)
    assert torch.equal(ours, peer(joined))
    assert [load_tokenizer().encode(text) for text in joined] == [peer.encode(t) for t in joined]


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.text("abcdefghijklmnopqrstuvwxyz'-", min_size=1), max_size=9))
def test_same_ids_and_text_as_open_clip_on_words(peer, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    ids = load_tokenizer().encode(" ".join(words))
    assert ids == peer.encode(" ".join(words))
    assert load_tokenizer().decode(ids) == peer.decode(ids)
