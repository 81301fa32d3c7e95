"""Classes, splits and encodings of the benchmarks: the numbers, and the known traps."""

import shutil
from collections import Counter
from pathlib import Path

import benchmark_trees as trees
import matlab_files as mat
import numpy as np
import pytest
import torch
from PIL import Image

from cliptteacher.data import BENCHMARKS, coco_stuff, open_dataset, pascal_context, voc
from cliptteacher.data.prepare import missing_archives, prepare_benchmark
from cliptteacher.data.splits import ClassSplit, SeenOnly


@pytest.mark.parametrize(
    ("kind", "classes", "unseen", "counts"),
    [
        ("voc", 20, 5, (10_582, 1_449)),
        ("coco_stuff", 171, 15, (118_287, 5_000)),
        ("pascal_context", 59, 10, (4_996, 5_104)),
    ],
)
def test_the_published_numbers(
    kind: str, classes: int, unseen: int, counts: tuple[int, int]
) -> None:
    benchmark = BENCHMARKS[kind]
    assert (len(benchmark.class_names), len(benchmark.unseen)) == (classes, unseen)
    assert dict(benchmark.counts) == dict(zip(("train", "val"), counts, strict=True))
    indices = tuple(benchmark.class_names.index(name) for name in benchmark.unseen)
    split = ClassSplit(benchmark.class_names, indices)  # names are unique, unseen ones exist
    assert len(split.seen_names) == classes - unseen


def encoded(read: object, path: Path) -> list[int]:
    found = read(path)
    assert found.dtype == np.uint8
    return found.ravel().tolist()


def test_voc_background_and_border_are_ignored(tmp_path: Path) -> None:
    trees.write_palette(tmp_path / "a.png", np.array([[0, 1, 2, 20, 255]], np.uint8))
    assert encoded(voc.read_label, tmp_path / "a.png") == [255, 0, 1, 19, 255]
    assert voc.CLASS_NAMES[0] == "aeroplane" and voc.CLASS_NAMES[19] == "tvmonitor"
    mat.write_sbd(tmp_path / "a.mat", np.array([[0, 1, 15, 20]], np.uint8))
    assert encoded(voc.read_label, tmp_path / "a.mat") == [255, 0, 14, 19]


def test_voc_indices_are_not_the_greys_or_colours_of_the_palette(tmp_path: Path) -> None:
    """Person is index 15 and shown as (192, 128, 128); a reader that converts gets 147."""
    path = tmp_path / "a.png"
    trees.write_palette(path, np.full((2, 2), 15, np.uint8))
    with Image.open(path) as file:
        assert file.mode == "P" and file.convert("RGB").getpixel((0, 0)) == (192, 128, 128)
        assert file.convert("L").getpixel((0, 0)) == 147
        file.convert("RGB").save(tmp_path / "colours.png")
        file.convert("L").save(tmp_path / "grey.png")
    assert encoded(voc.read_label, path) == [voc.CLASS_NAMES.index("person")] * 4
    with pytest.raises(ValueError, match=r"colours\.png .* got colours .* \(mode RGB\)"):
        voc.read_label(tmp_path / "colours.png")
    with pytest.raises(
        ValueError, match=r"grey\.png must hold the values of its data set, got 147"
    ):
        voc.read_label(tmp_path / "grey.png")


def test_coco_leaves_out_eleven_values(tmp_path: Path) -> None:
    everything = np.arange(256, dtype=np.uint8)[None]
    Image.fromarray(everything[:, :182]).save(tmp_path / "a.png")
    train_ids = encoded(coco_stuff.read_label, tmp_path / "a.png")
    unused = [value for value, id_ in enumerate(train_ids) if id_ == 255]
    assert unused == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert [id_ for id_ in train_ids if id_ != 255] == list(range(171))
    # value = COCO id - 1: person 1, stop sign 13, book 84, banner 92, wood 182
    for coco_id, name in ((1, "person"), (13, "stop sign"), (84, "book"), (92, "banner")):
        assert coco_stuff.CLASS_NAMES[train_ids[coco_id - 1]] == name
    assert coco_stuff.CLASS_NAMES[train_ids[181]] == "wood"
    Image.fromarray(np.full((1, 1), 255, np.uint8)).save(tmp_path / "b.png")
    assert encoded(coco_stuff.read_label, tmp_path / "b.png") == [255]
    for value in (182, 254):
        Image.fromarray(np.full((1, 1), value, np.uint8)).save(tmp_path / "b.png")
        with pytest.raises(ValueError, match=f"got {value};"):
            coco_stuff.read_label(tmp_path / "b.png")


def test_context_has_59_classes_and_no_background(tmp_path: Path) -> None:
    mat.write(tmp_path / "a.mat", mat.array("LabelMap", np.arange(460, dtype="u2")[None]))
    train_ids = encoded(pascal_context.read_label, tmp_path / "a.mat")
    assert "background" not in pascal_context.CLASS_NAMES
    found = Counter(train_ids)
    assert found.pop(255) == 460 - 59  # 0, and the 400 ids that others call background
    assert found == dict.fromkeys(range(59), 1)
    for id_, name in ((2, "aeroplane"), (98, "cow"), (284, "person"), (427, "tvmonitor")):
        assert pascal_context.CLASS_NAMES[train_ids[id_]] == name
    assert pascal_context.CLASS_NAMES == tuple(sorted(pascal_context.CLASS_NAMES))


@pytest.mark.parametrize("value", [460, 65535])
def test_context_refuses_other_ids(tmp_path: Path, value: int) -> None:
    mat.write(tmp_path / "a.mat", mat.array("LabelMap", np.array([[1, value]], "u2")))
    with pytest.raises(ValueError, match=f"got {value};"):
        pascal_context.read_label(tmp_path / "a.mat")


@pytest.mark.parametrize("value", [1.5, -1.0])
def test_labels_are_natural_numbers(tmp_path: Path, value: float) -> None:
    mat.write(tmp_path / "a.mat", mat.array("LabelMap", np.array([[2.0, value]])))
    with pytest.raises(ValueError, match=f"got {value};"):
        pascal_context.read_label(tmp_path / "a.mat")


def test_trainaug_is_the_union_without_val(tmp_path: Path) -> None:
    trees.write_voc(tmp_path)
    splits = voc.list_items(tmp_path)
    assert [item.name for item in splits["val"]] == list(trees.VOC_VAL)
    train = {item.name: item.label.suffix for item in splits["train"]}
    own, added = dict.fromkeys(trees.VOC_TRAIN, ".png"), dict.fromkeys(trees.VOC_ADDED, ".mat")
    assert train == own | added


EXPECTED = {
    "voc": ({0: 255, 255: 255} | {v: v - 1 for v in range(1, 21)}, trees.voc_labels),
    "coco-stuff": (
        {v: r for r, v in enumerate(coco_stuff.CLASS_VALUES)}
        | dict.fromkeys((*coco_stuff.UNUSED_VALUES, 255), 255),
        trees.coco_labels,
    ),
    "context": (
        {v: r for r, v in enumerate(pascal_context.LABELMAP_IDS.values())} | {1: 255, 459: 255},
        trees.context_labels,
    ),
}


@pytest.mark.parametrize("kind", list(trees.KINDS))
def test_a_prepared_benchmark_is_a_data_set(tmp_path: Path, kind: str) -> None:
    """From the unpacked official files, without a download."""
    benchmark = trees.publish(kind, tmp_path / "root", tmp_path / "archives")
    prepare_benchmark(benchmark, tmp_path / "root")
    table, written = EXPECTED[kind]
    for split, count in trees.COUNTS[kind].items():
        dataset = open_dataset(benchmark.name, tmp_path / "root", split)
        assert len(dataset) == count and dataset.class_names == benchmark.class_names
        assert tuple(dataset.class_names[i] for i in dataset.unseen) == benchmark.unseen
        assert dataset.ignore_index == 255
        for index in range(count):
            image, label = dataset[index]
            values = written(dataset.image_name(index))
            if dataset.image_name(index) in trees.VOC_ADDED:
                values[values == 255] = 0
            assert image.dtype == label.dtype == torch.uint8
            assert image.shape == (3, *trees.SIZE)
            assert label.tolist() == [[table[value] for value in row] for row in values.tolist()]
        seen = SeenOnly(dataset)
        assert not set(seen.class_names) & set(benchmark.unseen)
        assert seen[0][1][seen[0][1] != 255].max() < len(seen.class_names)


def test_open_says_how_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py context --root .*nowhere"):
        open_dataset("pascal_context", tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py coco-stuff --root"):
        open_dataset("coco_stuff", tmp_path, "val")
    with pytest.raises(ValueError, match="'voc' needs a root, got none"):
        open_dataset("voc", None, "val")
    with pytest.raises(ValueError, match=r'one of "miniworld", "folder", "voc".* got \'city\''):
        open_dataset("city", tmp_path, "val")


def test_open_refuses_the_classes_of_another(tmp_path: Path) -> None:
    benchmark = trees.publish("context", tmp_path / "root", tmp_path / "archives")
    prepare_benchmark(benchmark, tmp_path / "root")
    with pytest.raises(ValueError, match=r"classes of voc, got 59 classes of which 10 are unseen"):
        open_dataset("voc", tmp_path / "root", "val")


def test_the_folder_that_most_people_have_takes_the_place_of_sbd(tmp_path: Path) -> None:
    """SegmentationClassAug: the labels of trainaug as PNGs, those of val among them."""
    root = tmp_path / "root"
    benchmark = trees.publish("voc", root, tmp_path / "archives")
    before = {
        split: {item.name: voc.read_label(item.label).tolist() for item in items}
        for split, items in voc.list_items(root).items()
    }
    folder = root / "VOCdevkit/VOC2012/SegmentationClassAug"
    for name in (*before["train"], *before["val"]):
        labels = trees.voc_labels(name)
        labels[labels == 255] = 0
        folder.mkdir(exist_ok=True)
        Image.fromarray(labels).save(folder / f"{name}.png")
    shutil.rmtree(root / "benchmark_RELEASE")
    after = {
        split: {item.name: voc.read_label(item.label).tolist() for item in items}
        for split, items in voc.list_items(root).items()
    }
    assert after == before
    assert missing_archives(benchmark, root) == []
    prepare_benchmark(benchmark, root)
    assert len(open_dataset("voc", root, "train")) == len(before["train"])
