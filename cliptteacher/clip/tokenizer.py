"""Turn text into CLIP's token ids.

The text side of section 3.1: CLIP reads words as byte pairs of a fixed vocabulary of 49,408 ids.
This file gives the same ids as OpenAI's own tokenizer.

Sketch: clean the text (repair the encoding, unescape HTML, collapse blanks, lower case); split it
into words; write each word as its UTF-8 bytes, the last one marked as the end of the word; merge
the neighbours that were merged first in training until none is left; look up the ids.

Cost: reading the merges takes about 0.1 s, once, on first use. Importing this module reads
nothing. Words are cached, so a repeated word is a dictionary look-up.
"""

import functools
import gzip
import html
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49_408
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

_MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_END_OF_WORD = "</w>"
# 256 bytes, the same 256 at the end of a word, and the two marks are not merges.
_NUM_MERGES = VOCABULARY_SIZE - 2 * 256 - 2
_WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Encode text as CLIP's byte-pair ids, and decode it again.

    Args:
        merges: the pairs of symbols in the order in which they were learned.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        import regex  # imported here, so that importing the module stays cheap

        self._symbol_of_byte = _printable_symbols()
        symbols = list(self._symbol_of_byte.values())
        symbols += [symbol + _END_OF_WORD for symbol in symbols]
        symbols += [first + second for first, second in merges]
        symbols += [START_OF_TEXT, END_OF_TEXT]
        self._symbols = symbols
        self._id_of_symbol = {symbol: i for i, symbol in enumerate(symbols)}
        self._rank_of_pair = {pair: rank for rank, pair in enumerate(merges)}
        self._words = regex.compile(_WORD_PATTERN, regex.IGNORECASE)
        self._ids_of_word: dict[str, list[int]] = {
            mark: [self._id_of_symbol[mark]] for mark in (START_OF_TEXT, END_OF_TEXT)
        }

    @property
    def start_id(self) -> int:
        """Return the id that begins every text."""
        return self._id_of_symbol[START_OF_TEXT]

    @property
    def end_id(self) -> int:
        """Return the id that ends every text; it is the largest of all ids."""
        return self._id_of_symbol[END_OF_TEXT]

    def __len__(self) -> int:
        return len(self._symbols)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without the marks of its start and end."""
        ids: list[int] = []
        for word in self._words.findall(clean_text(text)):
            if word not in self._ids_of_word:
                self._ids_of_word[word] = [self._id_of_symbol[s] for s in self._merge(word)]
            ids += self._ids_of_word[word]
        return ids

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Return the text of some ids; a broken UTF-8 sequence becomes U+FFFD.

        Args:
            ids: token ids; the marks of start and end are written out, as OpenAI's decoder does.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else ids
        written = "".join(self._symbols[i] for i in values)
        byte_of_symbol = {symbol: byte for byte, symbol in self._symbol_of_byte.items()}
        raw = bytes(byte_of_symbol[symbol] for symbol in written)
        return raw.decode("utf-8", errors="replace").replace(_END_OF_WORD, " ")

    def _merge(self, word: str) -> list[str]:
        """Return the symbols of one word after all merges, the earliest learned first."""
        parts = [self._symbol_of_byte[byte] for byte in word.encode("utf-8")]
        parts[-1] += _END_OF_WORD
        unknown = len(self._rank_of_pair)
        while len(parts) > 1:
            best = min(
                itertools.pairwise(parts), key=lambda pair: self._rank_of_pair.get(pair, unknown)
            )
            if best not in self._rank_of_pair:
                break
            parts = _join_pair(parts, best)
        return parts


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> Tensor:
    """Turn texts into rows of token ids, padded with zeros.

    Args:
        texts: one text or several.
        context_length: T, the number of ids in a row, the two marks included.
        truncate: cut a text that is too long, instead of refusing it; its last id is then the
            mark of the end.

    Returns:
        (n, T) int64 ids: the mark of the start, the text, the mark of the end, zeros.

    Raises:
        TypeError: if `texts` is not a string or a sequence of strings.
        ValueError: if a text is too long and `truncate` is False.

    >>> tokenize("a photo of a cat.", context_length=8).tolist()
    [[49406, 320, 1125, 539, 320, 2368, 269, 49407]]
    """
    if context_length < 2:
        raise ValueError(
            f"`context_length` must be at least 2, the marks of start and end, got {context_length}"
        )
    texts = [texts] if isinstance(texts, str) else texts
    tokenizer = load_tokenizer()
    rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(f"`texts` must hold strings, got {type(text).__name__}: {text!r}")
        ids = [tokenizer.start_id, *tokenizer.encode(text), tokenizer.end_id]
        if len(ids) > context_length and not truncate:
            raise ValueError(
                f"a text must fit into {context_length} tokens, got {len(ids)} for {text!r}; "
                "shorten it or pass truncate=True"
            )
        ids = ids[: context_length - 1] + ids[-1:] if len(ids) > context_length else ids
        row[: len(ids)] = torch.tensor(ids)
    return rows


@functools.cache
def load_tokenizer() -> Tokenizer:
    """Return CLIP's tokenizer; the merges are read on the first call only."""
    with gzip.open(_MERGES_FILE, mode="rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _NUM_MERGES + 1]  # the first line is a version
    pairs = (line.split() for line in lines)
    return Tokenizer([(first, second) for first, second in pairs])


def clean_text(text: str) -> str:
    """Repair the encoding, unescape HTML twice, collapse blanks and lower the case."""
    import ftfy  # imported here, so that importing the module stays cheap

    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.split()).lower()


def _printable_symbols() -> dict[int, str]:
    """Give each of the 256 bytes a character that is neither a blank nor a control code.

    A byte that prints in Latin-1 stands for itself; the others get the characters from U+0100 on.
    The order of the dictionary is that of the first 256 ids.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return symbols


def _join_pair(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair of neighbours, from left to right."""
    joined: list[str] = []
    position = 0
    while position < len(parts):
        if tuple(parts[position : position + 2]) == pair:
            joined.append(pair[0] + pair[1])
            position += 2
        else:
            joined.append(parts[position])
            position += 1
    return joined
