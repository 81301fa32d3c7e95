"""The class split, and the guard that keeps unseen classes out of training."""

import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cliptteacher.data
from cliptteacher.data.splits import ClassSplit, SeenOnly

NAMES = ("grass", "zebra", "sky", "unicorn", "road")


class FiveClasses:
    """Two images whose labels hold every class and the ignore index."""

    class_names = NAMES
    unseen = (1, 3)
    ignore_index = 255

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.tensor([[0, 1, 2], [3, 4, 255]], dtype=torch.uint8)
        return torch.full((3, 2, 3), index, dtype=torch.uint8), label

    def image_name(self, index: int) -> str:
        return f"picture-{index}"


def test_split_names_both_groups_in_order() -> None:
    split = ClassSplit(NAMES, unseen=(3, 1))
    assert split.seen == (0, 2, 4)
    assert split.seen_names == ("grass", "sky", "road")
    assert split.unseen_names == ("unicorn", "zebra")


def test_split_accepts_lists_and_is_hashable_and_picklable() -> None:
    split = ClassSplit(list(NAMES), [1])  # type: ignore[arg-type]
    assert hash(split) == hash(ClassSplit(NAMES, (1,)))
    assert pickle.loads(pickle.dumps(split)) == split


def test_lookup_by_hand() -> None:
    table = ClassSplit(NAMES, (1, 3)).seen_lookup()
    assert table.dtype == torch.uint8 and table.shape == (256,)
    assert table[:5].tolist() == [0, 255, 1, 255, 2]
    assert (table[5:] == 255).all()


@given(st.integers(1, 254).flatmap(lambda a: st.tuples(st.just(a), st.sets(st.integers(0, a - 1)))))
def test_lookup_matches_a_loop(case: tuple[int, set[int]]) -> None:
    num_classes, unseen = case
    if len(unseen) == num_classes:
        unseen = unseen - {0}
    split = ClassSplit(tuple(f"c{i}" for i in range(num_classes)), tuple(sorted(unseen)))
    expected, rank = [], 0
    for value in range(256):
        known = value < num_classes and value not in unseen
        expected.append(rank if known else 255)
        rank += known
    assert split.seen_lookup().tolist() == expected


@pytest.mark.parametrize(
    ("names", "unseen", "message"),
    [
        ((), (), "1 to 254 classes, got 0"),
        (("a", "b", "a"), (), r"must be unique, got \['a'\]"),
        (("a", "b"), (2,), r"in 0\.\.1, got \[2\]"),
        (("a", "b"), (-1,), r"in 0\.\.1, got \[-1\]"),
        (("a", "b", "c"), (1, 1), r"list each class once, got \(1, 1\)"),
        (("a", "b"), (0, 1), "at least one class must be seen, got all 2"),
        (tuple(map(str, range(256))), (), "got 256"),
    ],
)
def test_split_rejects(names: tuple[str, ...], unseen: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassSplit(names, unseen)


def test_seen_only_maps_labels_and_keeps_images() -> None:
    view = SeenOnly(FiveClasses())
    image, label = view[1]
    assert label.dtype == torch.uint8
    assert label.tolist() == [[0, 255, 1], [255, 2, 255]]
    assert (image == 1).all()
    assert len(view) == 2 and view.image_name(1) == "picture-1"
    assert view.class_names == ("grass", "sky", "road")
    assert view.unseen == () and view.ignore_index == 255


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _strings(item)
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor):
        yield from _strings(vars(value))


def test_seen_only_does_not_know_unseen_names() -> None:
    raw = FiveClasses()
    own = {key: value for key, value in vars(SeenOnly(raw)).items() if value is not raw}
    known = set(_strings(own))
    assert {"grass", "sky", "road"} <= known  # the walk does find names
    assert not known & {"zebra", "unicorn"}


def test_seen_only_closed_set_keeps_everything() -> None:
    view = SeenOnly(FiveClasses(), closed_set=True)
    assert view.class_names == NAMES and view.unseen == ()
    assert torch.equal(view[0][1], FiveClasses()[0][1])


def test_folder_exports_resolve_and_load_nothing_before_use() -> None:
    for name in cliptteacher.data.__all__:
        assert hasattr(cliptteacher.data, name)
    with pytest.raises(AttributeError, match="no attribute 'FolderDatset'"):
        _ = cliptteacher.data.FolderDatset
    code = "import sys, cliptteacher.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("value", "dtype"), [(5, torch.uint8), (-1, torch.int16)])
def test_a_label_of_no_class_is_refused(value: int, dtype: torch.dtype) -> None:
    """It would become 255, as if nobody had labelled the pixel."""

    class Wrong(FiveClasses):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            image, label = super().__getitem__(index)
            return image, label.to(dtype).clamp(max=255).index_fill(0, torch.tensor([1]), value)

    message = rf"the labels of picture-1 must be 0\.\.4 or 255, got \[{value}\]"
    with pytest.raises(ValueError, match=message):
        SeenOnly(Wrong())[1]
