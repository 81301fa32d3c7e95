"""From archives on a server to a data set, to a table; and what the checks say."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_trees as trees
import numpy as np
import pytest
import torch
from PIL import Image

from cliptteacher.data import FolderDataset, check_folder, open_dataset, prepare_benchmark
from cliptteacher.data.check import check_benchmark
from cliptteacher.data.parallel import parallel_map
from cliptteacher.evaluation import scores_as_percent
from cliptteacher.metrics import SegmentationMetrics
from cliptteacher.training.recipes import get_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("prepare_data").main


def run(main: Callable[..., int], tmp_path: Path, kind: str, *more: str) -> tuple[int, int]:
    """Publish, serve and prepare a miniature; returns the exit status and the files asked for."""
    benchmark = trees.publish(kind, tmp_path / "source", tmp_path / "archives")
    with trees.serve(tmp_path / "archives") as server:
        options = [kind, "--root", str(tmp_path / "root"), "--mirror", server.address, *more]
        status = main(options, benchmarks={kind: benchmark})
    return status, len(server.asked)


def stamps(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "labels").iterdir()}


@pytest.mark.parametrize("kind", list(trees.KINDS))
def test_from_archive_to_data_set_and_again(
    main: Callable[..., int],
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    benchmark = trees.publish(kind, tmp_path / "source", tmp_path / "archives")
    root, given = tmp_path / "root", {kind: benchmark}
    options = [kind, "--root", str(root), "--workers", "1"]
    assert main([*options, "--check"], benchmarks=given) == 1
    printed = capsys.readouterr().out
    for archive in benchmark.archives:
        assert f"{archive.yields} (from {archive.file})" in printed
    assert not root.exists()
    with trees.serve(tmp_path / "archives") as server:
        server.break_after = [20]  # the first transfer breaks and is resumed
        assert main([*options, "--mirror", server.address], benchmarks=given) == 0
        assert "bytes=20-" in {wanted for _, wanted in server.asked}
    printed = capsys.readouterr().out
    (recipe,) = re.findall(rf"next: .*--recipe (\w+) --root {root} --dry-run", printed)
    assert get_recipe(recipe)["data"] == benchmark.name
    assert main([*options, "--check"], benchmarks=given) == 0
    sizes = {split: len(FolderDataset(root, split)) for split in ("train", "val")}
    assert sizes == trees.COUNTS[kind]
    before = stamps(root)
    assert len(before) == sum(sizes.values())
    assert main(options, benchmarks=given) == 0  # nobody serves any more
    assert stamps(root) == before


def test_the_archives_can_be_deleted(main: Callable[..., int], tmp_path: Path) -> None:
    assert run(main, tmp_path, "context", "--delete-archives")[0] == 0
    assert list((tmp_path / "root" / "archives").iterdir()) == []
    assert (tmp_path / "root" / "trainval_merged.json").exists()


def test_archives_that_are_there_are_not_fetched(main: Callable[..., int], tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path / "source", tmp_path / "root" / "archives")
    status = main(["voc", "--root", str(tmp_path / "root")], benchmarks={"voc": benchmark})
    assert status == 0  # the addresses of the miniature answer to nobody


@pytest.mark.slow
def test_processes_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptteacher.data.prepare._CHUNK", 2)
    benchmark = trees.publish("voc", tmp_path / "a", tmp_path / "archives")
    trees.write_voc(tmp_path / "b")
    prepare_benchmark(benchmark, tmp_path / "a", workers=1)
    prepare_benchmark(benchmark, tmp_path / "b", workers=2)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / root / "labels").iterdir()}
        for root in ("a", "b")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 8
    report = check_benchmark(benchmark, tmp_path / "b", workers=2)
    assert not report.problems and report.counts == {"train": 6, "val": 2}


def test_a_conversion_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    asked: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        asked.append(total)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_benchmark(benchmark, tmp_path, progress=interrupt)
    before = stamps(tmp_path)
    assert len(before) == 3 and not (tmp_path / "dataset.json").exists()
    (tmp_path / "labels" / ".2010_000002.99").write_bytes(b"half")  # by a process that was killed
    prepare_benchmark(benchmark, tmp_path, progress=lambda *told: asked.append(told[2]))
    assert asked == [8] * 3 + [5] * 5
    after = stamps(tmp_path)
    assert len(after) == 8 and {path: after[path] for path in before} == before
    assert not check_benchmark(benchmark, tmp_path).problems


def test_the_sizes_of_the_splits_are_verified(tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    official = replace(benchmark, counts=trees.VOC.counts)
    with pytest.raises(
        ValueError, match=r"sizes \{'train': 10582, 'val': 1449\}, got .* 6, 'val': 2"
    ):
        prepare_benchmark(official, tmp_path)
    assert not (tmp_path / "labels").exists()
    prepare_benchmark(benchmark, tmp_path)
    report = check_benchmark(official, tmp_path)
    assert "train.txt must list 10582 images, got 6" in report.problems


def test_missing_official_files_are_named(tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    (tmp_path / "benchmark_RELEASE/dataset/cls/2010_000002.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"but 1 are missing: .*2010_000002\.mat"):
        prepare_benchmark(benchmark, tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt must list the images of a split"):
        prepare_benchmark(benchmark, tmp_path)


def test_labels_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    folder = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    trees.write_palette(folder / "2007_000032.png", np.full((3, 5), 1, np.uint8))
    trees.write_palette(folder / "2007_000039.png", np.full(trees.SIZE, 21, np.uint8))
    with pytest.raises(ValueError, match=r"2 of 8 labels.*got \(5, 3\) for \(48, 40\).*got 21;"):
        prepare_benchmark(benchmark, tmp_path)
    assert len(stamps(tmp_path)) == 6 and not (tmp_path / "dataset.json").exists()


def test_the_disk_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(OSError, match=r"must have about 7\.3 GB of free space for voc, got 1\.0"):
        prepare_benchmark(trees.VOC, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_another_data_set_is_not_written_over(tmp_path: Path) -> None:
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    for text in ('{"classes": ["mine"], "unseen": []}', "{"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="describes another data set; choose another --root"):
            prepare_benchmark(benchmark, tmp_path)
        assert (tmp_path / "dataset.json").read_text() == text


def test_labels_follow_a_photograph_that_is_turned(tmp_path: Path) -> None:
    """Labels are drawn on the pixels as stored; photographs are read upright."""
    benchmark = trees.publish("voc", tmp_path, tmp_path / "archives")
    name = trees.VOC_VAL[0]
    path = tmp_path / "VOCdevkit/VOC2012/JPEGImages" / f"{name}.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as photo:
        photo.load()
        photo.save(path, exif=exif)
    prepare_benchmark(benchmark, tmp_path)
    image, label = open_dataset("voc", tmp_path, "val")[0]
    assert image.shape[1:] == label.shape == trees.SIZE[::-1]
    values = trees.voc_labels(name).astype(int)
    expected = np.where((values == 0) | (values == 255), 255, values - 1)
    assert np.array_equal(label.numpy(), np.rot90(expected, k=-1))


def test_the_program_tells_what_went_wrong(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = trees.publish("context", tmp_path / "source", tmp_path / "archives")
    wrong = replace(benchmark.archives[0], md5="0" * 32)
    benchmark = replace(benchmark, archives=(wrong, *benchmark.archives[1:]))
    with trees.serve(tmp_path / "archives") as server:
        options = ["context", "--root", str(tmp_path / "root"), "--mirror", server.address]
        assert main(options, benchmarks={"context": benchmark}) == 1
    assert "trainval_merged.json must start with 000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["folder", "--root", str(tmp_path)])
    assert "needs no preparation; add --check" in capsys.readouterr().err


def test_parallel_map_keeps_the_order() -> None:
    assert list(parallel_map(abs, [-3, 1, -2], workers=1)) == [3, 1, 2]
    assert list(parallel_map(abs, range(-5, 0), workers=2, chunk=2)) == [5, 4, 3, 2, 1]


# data sets of one's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two training images and one for validation, of three classes."""
    labels = np.repeat(np.array([0, 1, 2, 255], np.uint8), 2)[None].repeat(4, axis=0)
    for name in ("a", "b", "c"):
        trees.write_photo(tmp_path / "images" / f"{name}.jpg", labels)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{name}.png")
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("c\n")
    describe(tmp_path, ["grass", "sky", "cow"])
    return tmp_path


def describe(root: Path, classes: list[str]) -> None:
    content = {"classes": classes, "unseen": [classes[-1]], "ignore_index": 255}
    (root / "dataset.json").write_text(json.dumps(content))


def test_a_good_folder_has_no_problems(
    own: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    report = check_folder(own)
    assert (report.problems, report.notes) == ([], []) and report.counts == {"train": 2, "val": 1}
    assert main(["folder", "--check", "--root", str(own), "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith(f"{own} is complete\n")


def test_everything_that_is_wrong_is_said_at_once(own: Path) -> None:
    (own / "labels" / "a.png").unlink()
    Image.fromarray(np.zeros((3, 8), np.uint8)).save(own / "labels" / "c.png")
    trees.write_photo(own / "images" / "d.jpg", np.zeros((4, 8)))
    (own / "val.txt").write_text("c\nb\nd\nb\n")
    Image.fromarray(np.full((4, 8), 9, np.uint8)).save(own / "labels" / "d.png")
    Image.new("RGB", (8, 4)).save(own / "labels" / "b.png")
    (own / "notes.txt").write_text("made in May\n")
    trees.write_photo(own / "images" / "e.jpg", np.zeros((4, 8)))
    report = check_folder(own)
    text = "\n".join(report.problems)
    for part in (
        "labels: 1 of 2 files of train.txt are missing: a",
        "val.txt lists images more than once: b",
        "1 images are in train.txt and in val.txt",
        "c.png must be as large as its image, got 3 x 8 for an image of 4 x 8",
        "d.png must hold class indices 0..2 or 255 (ignore), got 9",
        "b.png must hold one class index a pixel, got colours instead of indices (mode RGB)",
    ):
        assert part in text
    assert len(report.problems) == 6
    notes = "\n".join(report.notes)
    assert "images: 1 in no split: e" in notes and "notes.txt names none of the images" in notes


def test_classes_without_a_pixel_are_noted(own: Path) -> None:
    describe(own, ["grass", "sky", "cow", "horse"])
    assert check_folder(own).notes == [
        f"{split}: no pixel of horse; such a class has no score" for split in ("train", "val")
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dataset.json", r"dataset\.json must describe the data set"),
        ("train.txt", r"train\.txt must list the images of split 'train', but there is no"),
        ("images", "images must be a folder, but there is none"),
        ("labels", "labels must be a folder, but there is none"),
    ],
)
def test_missing_parts_are_named_once(own: Path, path: str, message: str) -> None:
    (own / path).rename(own.parent / "elsewhere")
    found = [problem for problem in check_folder(own).problems if "must" in problem]
    (own.parent / "elsewhere").rename(own / path)
    assert len([problem for problem in found if re.search(message, problem)]) == 1


def test_broken_files_and_links_are_named(own: Path, tmp_path: Path) -> None:
    whole = (own / "images" / "a.jpg").read_bytes()
    (own / "images" / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (own / "labels" / "b.png").write_bytes(b"no image")
    (problem, other) = check_folder(own).problems
    assert problem.startswith("train: a: ") and "truncated" in problem.lower()
    assert other.startswith("train: b: ") and "b.png" in other
    (own / "images" / "c.jpg").unlink()
    (own / "images" / "c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert "images: 1 of 1 files of val.txt are missing: c" in check_folder(own).problems


def test_no_folder_at_all(tmp_path: Path, main: Callable[..., int]) -> None:
    assert check_folder(tmp_path / "no").problems == [
        f"{tmp_path / 'no'} must be a folder, but there is none; check --root"
    ]
    assert main(["folder", "--check", "--root", str(tmp_path / "no")]) == 1


# from an archive to a table


TINY = """--clip miniworld --segmenter fpn_small --segmenter-weights none --batch-size 2
    --crop 32 --resize 64 32 --workers 0 --kmeans-iterations 2 --log-interval 1
    --device cpu --output run"""


@pytest.mark.slow
def test_a_miniature_voc_run(
    main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Archives, data set, training with the bundled CLIP, and the table of every class."""
    monkeypatch.chdir(tmp_path)
    assert run(main, tmp_path, "voc")[0] == 0
    options = "--recipe paper --data voc --root root --iterations 3 --warmup 1 --eval-interval 3"
    start("train.py", *options.split(), *TINY.split(), "--checkpoint-interval", "3")
    options = "--checkpoint run --root root --json scores.json --save-dir predictions"
    printed = start("evaluate.py", *options.split())
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["unseen"] == list(trees.VOC.unseen)
    check_table(printed, summary["scores"])
    check_pictures(tmp_path / "predictions", tmp_path / "root", summary["scores"])


def check_table(printed: str, scores: dict[str, Any]) -> None:
    """Every class with its group, best first, those without a pixel last; then the four scores."""
    rows = re.findall(r"^  (\w+) +(seen|unseen) +([\d.]+|-)$", printed, re.MULTILINE)
    groups = {name: group == "unseen" for name, group, _ in rows}
    assert groups == {name: name in trees.VOC.unseen for name in trees.VOC.class_names}
    cells = {k: "-" if value is None else f"{value:.1f}" for k, value in scores["IoU"].items()}
    assert {name: cell for name, _, cell in rows} == cells
    order = [-1.0 if cell == "-" else float(cell) for _, _, cell in rows]
    assert order == sorted(order, reverse=True) and -1.0 in order
    head, line = (text.split() for text in printed.splitlines()[-2:])
    assert head == ["pAcc", "mIoU(S)", "mIoU(U)", "hIoU"]
    assert line == [f"{scores[name]:.1f}" for name in head]


def check_pictures(folder: Path, root: Path, scores: dict[str, Any]) -> None:
    """The index PNGs, scored against the labels, give the scores; the overlays are pictures."""
    dataset = open_dataset("voc", root, "val")
    metrics = SegmentationMetrics(20, unseen=dataset.unseen)
    for index, name in enumerate(trees.VOC_VAL):
        image, label = dataset[index]
        with Image.open(folder / f"{name}.png") as file:
            assert file.mode == "L"
            metrics.update(torch.from_numpy(np.array(file)), label)
        with Image.open(folder / f"{name}_overlay.png") as file:
            assert file.mode == "RGB" and file.height >= image.shape[1]
            assert np.ptp(np.array(file)) > 0
    assert scores_as_percent(metrics.compute(), dataset.class_names) == scores
    assert len(list(folder.iterdir())) == 2 * len(trees.VOC_VAL)


@pytest.mark.slow
def test_a_student_of_coco_is_scored_on_the_other_two(
    main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table 2 in miniature: other words, read by the CLIP; unseen is what training never named."""
    monkeypatch.chdir(tmp_path)
    for kind in trees.KINDS:
        prepare_benchmark(trees.publish(kind, tmp_path / kind, tmp_path / "archives"), kind)
    train, evaluate = (importlib.import_module(name) for name in ("train", "evaluate"))
    options = "--recipe paper --data coco_stuff --root coco-stuff --iterations 1 --eval-interval 0"
    train.main([*options.split(), *TINY.split(), "--templates", "single"])
    for kind, unseen in (("voc", 7), ("context", 17)):
        name = trees.KINDS[kind].name
        options = (
            f"--checkpoint run --data {name} --root {kind} --clip miniworld --json {kind}.json"
        )
        evaluate.main(options.split())
        summary = json.loads((tmp_path / f"{kind}.json").read_text())
        assert list(summary["scores"]["IoU"]) == list(trees.KINDS[kind].class_names)
        assert len(summary["unseen"]) == unseen


def start(program: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / program), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
