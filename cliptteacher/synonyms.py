"""Several words for one class: "sofa/couch", where the better of them counts in every pixel.

words = ["sofa/couch", "sky"]        ->  columns "sofa", "couch", "sky"
labels over three columns            ->  labels over two classes, by a table
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEPARATOR = "/"


@dataclass(frozen=True)
class Synonyms:
    """Classes and the words that stand for them.

    Args:
        names: the A classes as they were given, such as ``sofa/couch``.
        words: all words, those of the first class first.
        owners: the class of each word.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    owners: tuple[int, ...]

    def merge(self, labels: Tensor) -> Tensor:
        """Turn labels of words into labels of classes, any shape."""
        return torch.tensor(self.owners, device=labels.device)[labels]

    def unseen(self, unseen_words: Sequence[int]) -> tuple[int, ...]:
        """Return the classes all of whose words are unseen: a synonym of a seen class is seen."""
        seen = {owner for k, owner in enumerate(self.owners) if k not in unseen_words}
        return tuple(k for k in range(len(self.names)) if k not in seen)

    def words_of(self, classes: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of all words of some classes."""
        return tuple(k for k, owner in enumerate(self.owners) if owner in classes)


def split_synonyms(names: Sequence[str]) -> Synonyms:
    """Split names at slashes.

    Args:
        names: classes, each a word or several with ``/`` between them.

    Raises:
        ValueError: a word is blank, or stands for two classes.

    >>> split_synonyms(["sofa/couch", "sky"]).owners
    (0, 0, 1)
    """
    words: list[str] = []
    owners: list[int] = []
    for owner, name in enumerate(names):
        for word in name.split(SEPARATOR):
            word = word.strip()
            if not word:
                raise ValueError(f"a word must stand on both sides of '/', got {name!r}")
            if word in words:
                raise ValueError(
                    f"a word must stand for one class, got {word!r} in {name!r} and in "
                    f"{names[owners[words.index(word)]]!r}"
                )
            words.append(word)
            owners.append(owner)
    return Synonyms(tuple(names), tuple(words), tuple(owners))
