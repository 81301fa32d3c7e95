r"""Segment photographs with a trained student, or with CLIP alone, and any words.

    python examples/predict.py --checkpoint runs/first --image photo.jpg --output out
    python examples/predict.py --checkpoint runs/voc --clip ViT-B/16 --image photos/ \
        --classes "dog, tall grass, sky" --output out
    python examples/predict.py --clip-only --clip ViT-B/16 --image photo.jpg \
        --classes words.txt --output out

For every image it writes NAME_overlay.png (colours and a legend) and NAME_index.png (one class
index a pixel, in the order of the words). Without --classes, or with words of the training run
only, no CLIP is needed; for other words its text encoder is loaded, never its image encoder.
--clip-only needs no training: every pixel gets the word nearest to its dense token of CLIP.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cliptteacher.clip import load_clip
from cliptteacher.command_line import (
    add_clip_flags,
    clip_settings,
    number,
    one_sentence_errors,
    read_words,
)
from cliptteacher.data.images import list_images, read_image, readable_suffixes
from cliptteacher.distributed import DEVICES, start_process
from cliptteacher.inference import TrainedSegmenter, clip_segmenter, load_segmenter
from cliptteacher.visualize import class_palette, overlay, write_png


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_sentence_errors("predict.py"):
        failed = run(args)
    if failed:
        raise SystemExit(1)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a file, or the directory of a run")
    source.add_argument("--clip-only", action="store_true", help="no student: dense CLIP tokens")
    add("--image", type=Path, required=True, help="an image, or a directory of images")
    add("--classes", help="words between commas, or a .txt file; default: those of training")
    add("--output", type=Path, required=True, help="directory to write to")
    add_clip_flags(parser, "for words that training did not know")
    add("--gamma", type=number(float), help="bonus of words without labels in training")
    sides = {"nargs": 2, "metavar": ("LONG", "SHORT"), "type": number(int, 1)}
    add("--resize", **sides, help="default: as in training")
    add("--mode", choices=("whole", "slide"), default="whole", help="slide: for large pictures")
    add("--device", choices=DEVICES, default="auto")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Predict all images; returns how many could not be read."""
    images = find_images(args.image, args.output)
    student = make_student(args)
    settings = {"mode": args.mode}
    if args.gamma is not None:
        settings["gamma"] = args.gamma
    if args.resize:
        settings["resize"] = tuple(args.resize)
    predictor = student.predictor(**settings).to(start_process(args.device).device)
    print_plan(student, {**student.settings, **settings}["gamma"])
    stems = Counter(path.stem for path in images)
    failed = 0
    for count, path in enumerate(images, 1):
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
            continue
        # Two images of one name, such as a.jpg and a.png, must not overwrite each other.
        target = args.output / (path.stem if stems[path.stem] == 1 else path.name)
        line = write_prediction(image, predictor(image).cpu(), student, target)
        print(f"{count}/{len(images)}  {line}", flush=True)
    return failed


def make_student(args: argparse.Namespace) -> TrainedSegmenter:
    """Load the student, or let CLIP take its place, with the words that are asked for."""
    words = None if args.classes is None else read_words(args.classes)
    if not args.clip_only:
        trained = load_segmenter(args.checkpoint)
        if words is None:
            return trained
        return trained.with_words(words, args.clip, **clip_settings(args))
    if args.clip is None or words is None:
        raise ValueError("--clip-only needs a CLIP and words; name them with --clip and --classes")
    return clip_segmenter(load_clip(args.clip, **clip_settings(args)), words)


def find_images(source: Path, output: Path) -> list[Path]:
    """List the images that are asked for; says which files of a directory are passed over.

    Raises:
        FileNotFoundError: there is no such file or directory, or no image in it.
        ValueError: the results would be written among the images.
    """
    if not source.exists():
        raise FileNotFoundError(f"the image {source} does not exist; check --image")
    if not source.is_dir():
        return [source]
    if source.resolve() == output.resolve():
        raise ValueError(
            f"--output must not be the directory of the images, got {output} for both; "
            "the next run would take the results for images"
        )
    images, others = list_images(source)
    if not images:
        endings = ", ".join(sorted(readable_suffixes()))
        raise FileNotFoundError(f"{source} must hold an image, got none of {endings}")
    for path in others:
        print(f"{path} is passed over: no ending of an image that Pillow reads", file=sys.stderr)
    return images


def print_plan(student: TrainedSegmenter, gamma: float) -> None:
    """Say which words get the bonus, and which ones mean nothing to the CLIP."""
    names = ", ".join(student.class_names[k] for k in student.unseen)
    print(f"words without labels in training, with a bonus of {gamma:g}: {names or 'none'}")
    for word in student.unread:
        print(
            f"warning: the CLIP never read the word {word!r}, so what is found for it means "
            "nothing; use a word of its captions or a larger CLIP",
            file=sys.stderr,
        )


def write_prediction(image: Tensor, labels: Tensor, student: TrainedSegmenter, target: Path) -> str:
    """Write both files of one image; returns a line that says what was found."""
    names = student.class_names
    overlay_file = target.with_name(f"{target.name}_overlay.png")
    index_file = target.with_name(f"{target.name}_index.png")
    palette = class_palette(len(names))
    write_png(overlay(image, labels, names, palette, unseen=student.unseen), overlay_file)
    write_png(Image.fromarray(labels.numpy().astype(np.uint8)), index_file)
    shares = torch.bincount(labels.flatten(), minlength=len(names)) / labels.numel()
    order = shares.argsort(descending=True, stable=True).tolist()
    found = (f"{names[k]} {100 * float(shares[k]):.1f}%" for k in order if shares[k])
    return f"{target.name}: {', '.join(found)} -> {overlay_file}, {index_file}"


if __name__ == "__main__":
    main()
