r"""Score a trained student: pAcc, mIoU of seen and unseen classes, and their hIoU.

    python examples/evaluate.py --checkpoint runs/miniworld --split test
    torchrun --standalone --nproc_per_node=8 examples/evaluate.py --checkpoint runs/paper \
        --data folder --root DIR --split val --mode slide
    python examples/evaluate.py --checkpoint runs/miniworld --split test --calibrate val
    python examples/evaluate.py --clip-only --clip miniworld --split test    # no student at all
    python examples/evaluate.py --help

A student is not bound to the data set it was trained on. If the class names are those of its
training run, their stored text features serve and no CLIP is needed; otherwise the CLIP reads the
new names, and unseen are those that training had no labels for.

``--calibrate val`` first chooses gamma by the hIoU of another split: never choose it on the split
that is reported. ``--clip-only`` asks what the teacher can do alone: its dense tokens against the
text features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cliptteacher.clip import load_clip
from cliptteacher.command_line import add_clip_flags, clip_settings, number, one_sentence_errors
from cliptteacher.data import SegmentationDataset, open_dataset
from cliptteacher.data.catalog import BENCHMARKS
from cliptteacher.distributed import DEVICES, Process, start_process, stop_process
from cliptteacher.evaluation import (
    SCORES,
    evaluate,
    format_scores,
    scores_as_percent,
    sweep_gamma,
)
from cliptteacher.files import check_writable, write_json
from cliptteacher.inference import TrainedSegmenter, clip_segmenter, load_segmenter
from cliptteacher.visualize import overlay, write_png

SECONDS_BETWEEN_LINES = 30
GAMMAS = (-4, -2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 5)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_sentence_errors("evaluate.py"):
        process = start_process(args.device)
        try:
            run(args, process)
        finally:
            stop_process()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--checkpoint", type=Path, help="a file, or the directory of a run")
    scored.add_argument("--clip-only", action="store_true", help="no student: dense CLIP tokens")
    add("--data", choices=("miniworld", "folder", *BENCHMARKS), help="default: that of training")
    add("--root", help="folder of the data set; default: that of training")
    add("--split", default="val")
    add("--mode", choices=("whole", "slide"), default="whole")
    add(
        "--window",
        type=number(int, 1),
        help="side of a sliding window; default: the crop of training",
    )
    add("--stride", type=number(int, 1), help="step between windows; default: 5/6 of the window")
    sides = {"nargs": 2, "metavar": ("LONG", "SHORT"), "type": number(int, 1)}
    add("--resize", **sides, help="default: as in training")
    add("--size-divisor", type=number(int, 1), help="mirror images to a multiple of this")
    add("--gamma", type=number(float), help="bonus of unseen classes; default: as in training")
    add("--calibrate", metavar="SPLIT", help="choose gamma on this split, by hIoU")
    add("--gammas", type=number(float), nargs="+", default=GAMMAS, help="those to choose from")
    add("--templates", choices=("single", "ensemble"), default="single", help="of --clip-only")
    add_clip_flags(parser, "for class names that training did not know")
    add("--save-dir", type=Path, help="write NAME.png (class indices) and NAME_overlay.png here")
    add("--json", type=Path, help="write the scores here")
    add(
        "--batch-size",
        type=number(int, 1),
        default=1,
        help="images of equal size predicted together",
    )
    add("--workers", type=number(int, 0), default=0, help="processes that read images ahead")
    add("--device", choices=DEVICES, default="auto")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, process: Process) -> None:
    """Evaluate, print and save."""
    if args.json is not None:
        check_writable(args.json)
    trained = None if args.clip_only else load_segmenter(args.checkpoint)
    config = trained.checkpoint.get("config", {}) if trained else {}
    dataset = open_split(args, config)
    if trained is None:
        student = clip_alone(args, dataset)
    else:
        student = trained.with_words(dataset.class_names, args.clip, **clip_settings(args))
    # A student that has seen all classes is the upper bound of the data set's own unseen ones.
    groups = student.unseen or dataset.unseen
    settings = inference_settings(args, config)
    gamma, sweep = choose_gamma(args, student, groups, settings, process)
    if process.is_main:
        print_plan(args, student, dataset, gamma)
    result = evaluate(
        student.predictor(gamma=gamma, **settings).to(process.device),
        dataset,
        **pass_settings(args, groups, process),
        progress=print_progress() if process.is_main else None,
        on_sample=prediction_writer(args.save_dir, student, dataset) if args.save_dir else None,
    )
    if process.is_main:
        if args.json is not None:
            scores = scores_as_percent(result, dataset.class_names)
            write_json({**summary(args, student, gamma, scores), "sweep": sweep}, args.json)
        print(format_scores(result, dataset.class_names, groups))


def pass_settings(
    args: argparse.Namespace, groups: Sequence[int], process: Process
) -> dict[str, Any]:
    """How one pass over a data set is made, whatever is scored in it."""
    return {
        **{"device": process.device, "rank": process.rank, "world_size": process.world_size},
        **{"workers": args.workers, "batch_size": args.batch_size, "unseen": groups},
    }


def choose_gamma(
    args: argparse.Namespace,
    student: TrainedSegmenter,
    groups: Sequence[int],
    settings: dict[str, Any],
    process: Process,
) -> tuple[float, list[dict[str, Any]]]:
    """Take the gamma that was asked for, or the one with the best hIoU on another split."""
    if args.calibrate is None:
        return float(student.settings["gamma"]) if args.gamma is None else args.gamma, []
    if args.gamma is not None or args.calibrate == args.split:
        raise ValueError(
            "--calibrate chooses gamma on another split than --split, got "
            + (f"--gamma {args.gamma} too" if args.gamma is not None else f"{args.split} for both")
        )
    results = sweep_gamma(
        student.predictor(**settings).to(process.device),
        open_dataset(args.data, args.root, args.calibrate),
        args.gammas,
        **pass_settings(args, groups, process),
    )
    sweep = [
        {"gamma": gamma, **scores_as_percent(result, student.class_names)}
        for gamma, result in zip(args.gammas, results, strict=True)
    ]
    best = max(sweep, key=lambda row: (row["hIoU"] or 0.0, -abs(row["gamma"])))
    if process.is_main:
        for row in sweep:
            four = "  ".join(f"{name} {row[name] or 0:5.1f}" for name in SCORES)
            mark = "  <- chosen" if row is best else ""
            print(f"{args.calibrate}, gamma {row['gamma']:>5g}: {four}{mark}")
    return float(best["gamma"]), sweep


def clip_alone(args: argparse.Namespace, dataset: SegmentationDataset) -> TrainedSegmenter:
    """Let the dense tokens of a CLIP take the place of a student's features."""
    if args.clip is None:
        raise ValueError("--clip-only needs a CLIP, got none; name one with --clip")
    clip = load_clip(args.clip, **clip_settings(args))
    alone = clip_segmenter(clip, dataset.class_names, args.templates)
    return replace(alone, unseen=tuple(dataset.unseen))


def open_split(args: argparse.Namespace, config: dict[str, Any]) -> SegmentationDataset:
    """Open the data set that was asked for; what was not said is as in training."""
    args.data = args.data or ("folder" if args.root else config.get("data", "miniworld"))
    if args.data != "miniworld" and args.root is None:
        args.root = config.get("root")
    return open_dataset(args.data, args.root, args.split)


def inference_settings(args: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Collect the arguments of the predictor that are asked for; the others are as in training."""
    window = args.window or config.get("crop", 512)
    settings = {"mode": args.mode, "window": window, "stride": args.stride or window * 5 // 6 or 1}
    if args.resize:
        settings["resize"] = tuple(args.resize)
    if args.size_divisor:
        settings["size_divisor"] = args.size_divisor
    return settings


def print_plan(
    args: argparse.Namespace,
    student: TrainedSegmenter,
    dataset: SegmentationDataset,
    gamma: float,
) -> None:
    """Say what is about to be measured, and which classes count as unseen."""
    name, step = student.checkpoint["segmenter_name"], student.checkpoint["step"]
    setting = student.checkpoint.get("setting", "inductive")
    names = ", ".join(student.class_names[k] for k in student.unseen)
    source = f"CLIP {args.clip}" if args.clip_only else f"{args.checkpoint} after {step} iterations"
    print(
        f"{name} of {source}, on {args.root or args.data} "
        f"{args.split}: {len(dataset)} images, {len(student.class_names)} classes"
    )
    if names:
        print(f"{setting} setting; unseen in training, with a bonus of {gamma:g}: {names}")
    else:
        print("training had labels of all these classes: an upper bound, no zero-shot result")
    if student.unread:
        words = ", ".join(student.unread)
        print(f"warning: the CLIP never read the words {words}; expect nothing of them")


def print_progress() -> Callable[[int, int], None]:
    """Print how far the main process is, from time to time."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{done} of {total} images", flush=True)

    return show


def prediction_writer(
    folder: Path, student: TrainedSegmenter, dataset: SegmentationDataset
) -> Callable[[int, Tensor, Tensor, Tensor], None]:
    """Write every prediction as an index map and as a picture."""
    names = student.class_names

    def write(index: int, image: Tensor, label: Tensor, prediction: Tensor) -> None:
        name = dataset.image_name(index)
        picture = overlay(image, prediction, names, unseen=student.unseen)
        write_png(Image.fromarray(prediction.numpy().astype(np.uint8)), folder / f"{name}.png")
        write_png(picture, folder / f"{name}_overlay.png")

    return write


def summary(
    args: argparse.Namespace,
    student: TrainedSegmenter,
    gamma: float,
    scores: dict[str, Any],
) -> dict[str, Any]:
    """Collect the scores and everything they depend on."""
    return {
        "scores": scores,
        "checkpoint": None if args.clip_only else str(args.checkpoint),
        "clip": student.checkpoint.get("clip", args.clip),
        "step": student.checkpoint["step"],
        "setting": student.checkpoint.get("setting", "inductive"),
        "data": args.data,
        "root": args.root,
        "split": args.split,
        "unseen": [student.class_names[k] for k in student.unseen],
        "gamma": gamma,
        "calibrated_on": args.calibrate,
        "mode": args.mode,
        "resize": args.resize or student.settings.get("resize"),
        "size_divisor": args.size_divisor or student.settings.get("size_divisor", 1),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


if __name__ == "__main__":
    main()
