"""Options, words, tensors and targets of writing: what callers and command lines give."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from judge import ROOT, Case, Draw
from PIL import Image
from tiny import tiny_clip, tiny_student
from torch import Tensor, nn

from cliptteacher.checkpoint import save_checkpoint
from cliptteacher.clip import CLIP, class_text_features, save_clip
from cliptteacher.clip.prompts import class_prompts
from cliptteacher.command_line import read_words
from cliptteacher.data.splits import ClassSplit
from cliptteacher.files import write_json, write_text
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.inference import Predictor, TrainedSegmenter, save_segmenter
from cliptteacher.metrics import confusion_matrix
from cliptteacher.training.config import TrainConfig, read_json, resolve_config
from cliptteacher.visualize import write_png

BOTH = (TrainConfig, CLIPTeacherConfig)


@cache
def teacher() -> CLIP:
    return tiny_clip().eval()


def options(draw: Draw, folder: Path) -> Case:
    """Any value for any field, from a file or from code; what is taken must train."""
    cls = draw.one(*BOTH)
    field = draw.one(*fields(cls))
    value = draw.one(
        draw.junk(),
        field.default,
        draw.one("seen", "none", "cosine", "fp16", "all", "mean", "cuda"),
    )
    path, content = (
        folder / "config.json",
        {draw.one(field.name, field.name, field.name[:-1]): value},
    )
    from_file = draw.one(True, False)
    path.write_text(json.dumps(content, default=str))

    def act() -> None:
        layer = read_json(path, BOTH) if from_file else content
        train, method = resolve_config(BOTH, (layer,))
        found = {**asdict(train), **asdict(method)}
        assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))
        kind = type(found[field.name])
        expected = kind(value) if kind in (float, tuple) else value
        assert from_file or found[field.name] == expected
        if cls is CLIPTeacherConfig and is_small(method):
            losses = CLIPTeacher(teacher(), tiny_student(), ["cat", "dog"], method)(*batch())
            assert all(loss.isfinite() for loss in losses.values()), losses

    return Case(act)  # ranges are checked when all sources are joined: the option is named


def is_small(config: CLIPTeacherConfig) -> bool:
    """Whether a step takes no more memory and time than a test has."""
    sizes = (config.bank_size, config.kmeans_iterations, config.potential_slots or 0)
    return max(sizes) < 1000


def direct_options(draw: Draw, folder: Path) -> Case:
    """The same without a parser: `CLIPTeacherConfig(ce="al")`."""
    field, value = draw.one(*fields(CLIPTeacherConfig)), draw.junk()

    def act() -> None:
        config = CLIPTeacherConfig(**{field.name: value})
        if is_small(config):
            losses = CLIPTeacher(teacher(), tiny_student(), ["cat", "dog"], config)(*batch())
            assert all(loss.isfinite() for loss in losses.values()), losses

    return Case(act)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(2, (2, 32, 32), generator=generator, dtype=torch.uint8)
    labels[:, 8:24, 8:] = 255
    return images, labels


@cache
def program(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module(name)


FLAGS = {
    "predict": """--checkpoint --clip-only --image --classes --output --clip --gamma --resize --mode
        --device --clip-heads --clip-activation""",
    "evaluate": """--checkpoint --clip-only --data --root --split --window --stride --resize --json
        --size-divisor --gamma --gammas --batch-size --workers --device --save-dir""",
    "visualize": "--checkpoint --data --root --split --images --output --clip-heads",
    "plot": "runs --keys --log --smooth --output",
    "pretrain_clip": """--iterations --minutes --batch-size --image-size --patch-size --embed-dim
        --vision-layers --learning-rate --weight-decay --max-scale --seed --threads --log-interval
        --precision --data --root""",
    "train": """--recipe --config --segmenter --iterations --batch-size --crop --gamma --data --clip
        --learning-rate --precision --device --resize --ce --glm-windows --clip-heads --output
        --root""",
}
WORDS = (
    *("nan", "inf", "-1", "0", "1", "3", "1e400", "99999999999999999999", "1,2", "x", "é", "--"),
    *("-", "cuda", "cpu", "cuda:9", "mps", "none", "all", "voc", "folder", "bf16", "missing.json"),
    *("/dev/null", ""),
)


def command_lines(draw: Draw, folder: Path) -> Case:
    """Any words after any flags of any program; nothing starts on them, or ends as a traceback."""
    name = draw.one(*FLAGS)
    argv: list[str] = []
    for _ in range(draw.whole(0, 4)):
        flag = draw.one(*FLAGS[name].split())
        argv += [flag, *(draw.one(*WORDS) for _ in range(draw.whole(0, 2)))]
    if name == "train":
        argv += ["--dry-run", "--root", str(folder / "no-data"), "--data", "folder"]
    elif name == "pretrain_clip":
        argv += [
            "--data",
            "folder",
            "--root",
            str(folder / "no-data"),
            "--output",
            str(folder / "out"),
        ]
    elif name == "plot":
        argv += [str(folder / "no-run"), "--output", str(folder / "out.png")]
    else:
        argv += [
            "--checkpoint",
            str(folder / "no-run"),
            "--output" if name != "evaluate" else "--json",
            str(folder / "out"),
        ]
        argv += ["--image", str(folder / "no-image")] * (name == "predict")
    main = program(name).main
    return Case(lambda: main(argv), must="fail")


def words(draw: Draw, folder: Path) -> Case:
    """Class names of any characters."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    usual = st.sampled_from(
        ["cat", "tall grass", "sky-other", "dining_table", "&nbsp;", "草", "a,b", " ", "", "Ä"]
    )
    names = draw(st.lists(st.one_of(usual, text), max_size=4))
    listed = draw.one(True, False)

    def act() -> None:
        found = read_words(", ".join(names)) if listed else tuple(names)
        split = ClassSplit(found)
        features = class_text_features(teacher(), split.names)
        assert features.shape == (len(found), 16) and features.isfinite().all()
        assert all(
            any(c.isalnum() for c in p.removeprefix("a photo of a ")) for p in class_prompts(found)
        )

    return Case(act)


@cache
def segmenter() -> TrainedSegmenter:
    torch.manual_seed(0)
    return TrainedSegmenter(
        nn.Conv2d(3, 16, 3, padding=1).eval(),
        ("a", "b", "c"),
        (2,),
        torch.eye(3, 16),
        {"gamma": 0.1},
        {},
    )


def images(draw: Draw, folder: Path) -> Case:
    """Tensors, arrays and pictures of any shape, type and range, for a student on its own."""
    shape = tuple(draw.one(0, 1, 2, 3, 3, 4, 9) for _ in range(draw.one(2, 3, 3, 3, 4)))
    kind = draw.one(
        "uint8", "float32", "float64", "float16", "int64", "bool", "complex64", "uint16"
    )
    low, high = draw.one((0, 1), (0, 1), (-5, 9), (0, 300))
    values = np.random.default_rng(0).uniform(low, high, shape)
    if kind.startswith(("float", "complex")) and values.size and draw.one(False, False, True):
        values.flat[0] = draw.one(float("nan"), float("inf"))
    array = (
        np.nan_to_num(values).astype(kind)
        if not kind.startswith(("float", "complex"))
        else values.astype(kind)
    )
    image: Any = draw.one(
        array, torch.from_numpy(array), None, "missing.png", str(folder), array.tolist()
    )
    if draw.one(False, False, True):
        image = Image.new(draw.one("RGB", "L", "F", "I;16", "RGBA", "LAB"), (draw.whole(1, 5), 5))

    def act() -> None:
        labels = segmenter()(image)
        assert labels.dtype == torch.int64 and labels.ndim in (2, 3) and int(labels.max()) < 3

    return Case(act)


def predictors(draw: Draw, folder: Path) -> Case:
    """Any value for any argument of a predictor."""
    text: Any = draw.one(
        torch.eye(3, 16),
        torch.eye(3, 16),
        torch.eye(3, 5),
        torch.full((3, 16), float("nan")),
        torch.zeros(3, 16),
        torch.eye(16)[0],
        torch.eye(3, 16).long(),
        None,
    )
    name = draw.one(
        "unseen",
        "gamma",
        "logit_scale",
        "similarity",
        "mode",
        "window",
        "stride",
        "window_batch",
        "resize",
        "size_divisor",
    )
    value = draw.one(draw.junk(), [2], "cosine", "slide", 2, (8, 8), (0, 5), (5,), 10**9)

    def act() -> None:
        predictor = Predictor(tiny_student(), text, **{"gamma": 1.5, name: value})
        if (name == "size_divisor" and value > 99) or (
            name == "resize" and value and max(value) > 99
        ):
            return  # possible, and of a size that nobody waits for
        labels = predictor(torch.rand(3, 9, 9))
        assert labels.shape == (9, 9) and 0 <= int(labels.min()) and int(labels.max()) < 3
        assert predictor.logits(torch.rand(3, 9, 9)).isfinite().all()

    return Case(act)


def steps(draw: Draw, folder: Path) -> Case:
    """Batches whose images or labels are not what a training step takes."""
    pixels, labels = batch()
    same = False
    match draw.one("same", "value", "kind", "shape", "images", "nan", "width", "size", "none"):
        case "same":
            same = True
        case "value":
            labels = labels.to(draw.one(torch.uint8, torch.int64, torch.int32))
            value = draw.one(
                2, 3, 253, 200, *([-1, 256, -255, 2**31 - 1] if labels.dtype != torch.uint8 else [])
            )
            labels[draw.whole(0, 1), draw.whole(0, 31), draw.whole(0, 31)] = value
        case "kind":
            labels = labels.to(draw.one(torch.float32, torch.bool, torch.complex64))
        case "shape":
            labels = draw.one(labels[0], labels[:, None], labels[:, :8], labels[:1], labels[:0])
        case "images":
            pixels = draw.one(
                pixels[:, :1],
                pixels[0],
                pixels.float(),
                pixels.long(),
                pixels[..., :8],
                pixels[:0],
                pixels.transpose(1, 3),
            )
        case "nan":
            pixels = pixels / 255 * draw.one(float("nan"), float("inf"), -9.0)
        case "width":
            pixels = torch.cat([pixels, pixels[:, :1]], 1)
        case "size":
            pixels, labels = pixels[..., :30, :], labels[:, :30]
        case _:
            pixels, labels = draw.one((None, labels), (pixels, None), (pixels.numpy(), labels))  # type: ignore[assignment]
    ce = draw.one("all", "seen", "none")
    off = {"focal_weight": 0.0, "dice_weight": 0.0} if draw.one(True, False) else {}

    def act() -> None:
        config = CLIPTeacherConfig(ce=ce, **off)  # type: ignore[arg-type]
        losses = CLIPTeacher(teacher(), tiny_student(), ["cat", "dog"], config)(pixels, labels)
        assert all(loss.isfinite() for loss in losses.values()), losses

    return Case(act, must="pass" if same else "fail")


def scores(draw: Draw, folder: Path) -> Case:
    """Predictions and labels of any range for the confusion matrix."""
    classes = draw.whole(1, 5)
    kind = draw.one(torch.uint8, torch.int64, torch.int32, torch.int16)
    values = [
        draw.one(0, 1, classes - 1, classes, 255, *([-1, 256] if kind != torch.uint8 else []))
        for _ in range(6)
    ]
    label, pred = torch.tensor(values).to(kind), torch.zeros(draw.one(6, 6, 5), dtype=kind)
    valid = len(pred) == 6 and all(0 <= v < classes or v == 255 for v in label.tolist())

    def act() -> None:
        matrix = confusion_matrix(pred, label, classes)
        assert int(matrix.sum()) == sum(v != 255 for v in label.tolist())

    return Case(act, must="pass" if valid else "fail")


def targets(draw: Draw, folder: Path) -> Case:
    """Files that cannot be written, by every function that writes one."""
    (folder / "file").write_text("kept")
    (folder / "folder").mkdir()
    where = draw.one(
        "new/a.x",
        "file",
        "folder",
        "file/a.x",
        "file/b/a.x",
        "a" * 300,
        "/proc/a.x",
        "/dev/full",
        "/sys/a.x",
        "/dev/null/a",
        "nul\0byte",
    )
    path = Path(where) if where.startswith("/") else folder / where
    writers = {
        "json": lambda: write_json({"a": 1}, path),
        "text": lambda: write_text("a" * 99, path),
        "picture": lambda: write_png(Image.new("RGB", (3, 3)), path),
        "teacher": lambda: save_clip(teacher(), path),
        "student": lambda: save_segmenter(
            path, nn.Conv2d(3, 16, 1), names=["a"], text_features=torch.ones(1, 16)
        ),
        "checkpoint": lambda: save_checkpoint({"step": 1, "w": torch.ones(9)}, path),
    }
    name = draw.one(*writers)
    possible = (
        where == "new/a.x"
        or (where == "file" and name != "checkpoint")
        or (where == "folder" and name == "checkpoint")
    )

    def act() -> None:
        try:
            writers[name]()
        finally:
            assert not possible or path.exists()
            kept = (
                (folder / "file").read_text()
                if (folder / "file").is_file() and not possible
                else "kept"
            )
            assert kept == "kept"
            left = [p for p in folder.rglob("*") if ".tmp" in p.name]
            assert not left, f"{left} is left behind"

    return Case(
        act, "" if possible or "\0" in where else path.name[:99], "pass" if possible else "fail"
    )


CALLS = (options, direct_options, command_lines, words, images, predictors, steps, scores, targets)
