r"""Segment photographs with a trained student, or with CLIP alone, and any words.

    python examples/predict.py --checkpoint runs/first --image photo.jpg --output out
    python examples/predict.py --checkpoint runs/voc --clip ViT-B/16 --image photos/ \
        --classes "dog, sofa/couch, tall grass, sky" --output out
    python examples/predict.py --clip-only --clip ViT-B/16 --image a.jpg b.jpg list.txt \
        --classes words.txt --template "a satellite photo of {}." --mode slide --output out

For every image it writes NAME_overlay.png (colours, outlines, names, and a legend) and
NAME_index.png (one class index a pixel, in the order of the words); with --confidence also
NAME_confidence.png (255 = certain), and with --html one page of all images, gallery.html. Of words
with a slash between them the best one counts. A word has the same colour in every picture.

Without --classes, or with words of the training run only, no CLIP is needed; for other words or a
--template its text encoder is loaded, never its image encoder. --clip-only needs no training: every
pixel gets the word nearest to its dense token of CLIP.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
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
from cliptteacher.files import read_text, write_text
from cliptteacher.inference import Predictor, TrainedSegmenter, clip_segmenter, load_segmenter
from cliptteacher.pages import gallery
from cliptteacher.palette import word_palette
from cliptteacher.synonyms import Synonyms, split_synonyms
from cliptteacher.visualize import overlay, write_png

GALLERY_SIDE = 640  # pixels of the long side
CLIP_SCALE = 100.0  # of CLIP's cosines, for the confidence of --clip-only


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
    help_image = "images, directories of images, or .txt files with one image a line"
    add("--image", type=Path, nargs="+", required=True, help=help_image)
    add("--classes", help="words between commas, or a .txt file; default: those of training")
    add("--template", help="the prompt of all words, such as 'a satellite photo of {}.'")
    add("--output", type=Path, required=True, help="directory to write to")
    add_clip_flags(parser, "for words that training did not know")
    add("--gamma", type=number(float), help="bonus of words without labels in training")
    sides = {"nargs": 2, "metavar": ("LONG", "SHORT"), "type": number(int, 1)}
    add("--resize", **sides, help="default: as in training")
    add("--mode", choices=("whole", "slide"), default="whole", help="slide: for large pictures")
    add("--html", action="store_true", help="write gallery.html: opacity, classes on and off")
    add("--confidence", action="store_true", help="write how sure every pixel is, too")
    add("--device", choices=DEVICES, default="auto")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Predict all images; returns how many could not be read."""
    images = find_images(args.image, args.output)
    student, synonyms = make_student(args)
    settings = {"mode": args.mode}
    if args.gamma is not None:
        settings["gamma"] = args.gamma
    if args.resize:
        settings["resize"] = tuple(args.resize)
    predictor = student.predictor(**settings).to(start_process(args.device).device)
    unseen = synonyms.unseen(student.unseen)
    print_plan(student, synonyms, unseen, {**student.settings, **settings}["gamma"])
    scale = CLIP_SCALE if args.clip_only else 1.0
    targets = name_targets(images, args.output)
    shown: list[tuple[str, Image.Image, Image.Image]] = []
    failed, start = 0, time.monotonic()
    for count, (path, target) in enumerate(zip(images, targets, strict=True), 1):
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
            continue
        words, confidence = predict(predictor, image, scale if args.confidence else None)
        labels = synonyms.merge(words)
        line = write_prediction(image, labels, synonyms.names, unseen, target)
        if args.html:
            shown.append((target.name, *for_gallery(image, labels)))
        if confidence is not None:
            write_png(Image.fromarray(confidence.numpy()), suffixed(target, "confidence"))
        left = (time.monotonic() - start) / count * (len(images) - count)
        progress = f"{count}/{len(images)}" + (f", {left:.0f} s left" if len(images) > 1 else "")
        print(f"{progress}  {line}", flush=True)
    if args.html:
        title, colours = f"{len(shown)} predictions", word_palette(synonyms.names)
        write_text(gallery(title, shown, synonyms.names, colours), args.output / "gallery.html")
    return failed


def for_gallery(image: Tensor, labels: Tensor) -> tuple[Image.Image, Image.Image]:
    """Photograph and label map as pictures of one size, shrunk to what a page shows."""
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = [max(1, round(side * min(1, GALLERY_SIDE / max(photo.size)))) for side in photo.size]
    index = Image.fromarray(labels.numpy().astype(np.uint8))
    return photo.resize(size), index.resize(size, Image.Resampling.NEAREST)


def predict(
    predictor: Predictor, image: Tensor, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Predict the word of every pixel and, given a scale of the logits, how sure it is, 0..255."""
    if scale is None:
        return predictor(image).cpu(), None
    best, words = (scale * predictor.logits(image)).softmax(dim=0).max(dim=0)
    return words.cpu(), (255 * best).round().to(torch.uint8).cpu()


def make_student(args: argparse.Namespace) -> tuple[TrainedSegmenter, Synonyms]:
    """Load the student, or let CLIP take its place, with the words that are asked for."""
    names = None if args.classes is None else read_words(args.classes)
    templates = None if args.template is None else [args.template]
    if args.clip_only and (args.clip is None or names is None):
        raise ValueError("--clip-only needs a CLIP and words; name them with --clip and --classes")
    synonyms = None if names is None else split_synonyms(names)
    if args.clip_only and synonyms is not None:
        clip = load_clip(args.clip, **clip_settings(args))
        student = clip_segmenter(clip, synonyms.words, templates or "single")
    else:
        student = load_segmenter(args.checkpoint)
        own = student.class_names  # whose slashes stay slashes
        synonyms = synonyms or Synonyms(own, own, tuple(range(len(own))))
        if names is not None or templates is not None:
            student = student.with_words(
                synonyms.words, args.clip, templates=templates, **clip_settings(args)
            )
    unseen = synonyms.words_of(synonyms.unseen(student.unseen))
    return replace(student, unseen=unseen), synonyms


def find_images(sources: Sequence[Path], output: Path) -> list[Path]:
    """List the images that are asked for; says which files of a directory are passed over.

    Raises:
        FileNotFoundError: there is no such file or directory, or no image in it.
        ValueError: the results would be written among the images.
    """
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"the image {source} does not exist; check --image")
        if source.suffix.lower() == ".txt":
            lines = [line.strip() for line in read_text(source).splitlines()]
            found += [source.parent / line for line in lines if line]
        elif source.is_dir():
            found += images_of(source, output)
        else:
            found.append(source)
    if not found:
        raise FileNotFoundError(f"{sources[0]} must name at least one image, got none")
    return list(dict.fromkeys(found))


def images_of(folder: Path, output: Path) -> list[Path]:
    if folder.resolve() == output.resolve():
        raise ValueError(
            f"--output must not be the directory of the images, got {output} for both; "
            "the next run would take the results for images"
        )
    images, others = list_images(folder)
    if not images:
        endings = ", ".join(sorted(readable_suffixes()))
        raise FileNotFoundError(f"{folder} must hold an image, got none of {endings}")
    for path in others:
        print(f"{path} is passed over: no ending of an image that Pillow reads", file=sys.stderr)
    return images


def name_targets(images: Sequence[Path], output: Path) -> list[Path]:
    """Name the results: two images of one name, a.jpg and a.png, must not overwrite each other."""
    stems, names = Counter(p.stem for p in images), Counter(p.name for p in images)

    def name(path: Path) -> str:
        if stems[path.stem] == 1:
            return path.stem
        whole = "_".join(part for part in path.parts if part not in (path.anchor, ".", ".."))
        return path.name if names[path.name] == 1 else whole

    return [output / name(path) for path in images]


def suffixed(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}_{kind}.png")


def print_plan(
    student: TrainedSegmenter, synonyms: Synonyms, unseen: Sequence[int], gamma: float
) -> None:
    """Say which words get the bonus, and which ones mean nothing to the CLIP."""
    names = ", ".join(synonyms.names[k] for k in unseen)
    print(f"words without labels in training, with a bonus of {gamma:g}: {names or 'none'}")
    for word in student.unread:
        print(
            f"warning: the CLIP never read the word {word!r}, so what is found for it means "
            "nothing; use a word of its captions or a larger CLIP",
            file=sys.stderr,
        )


def write_prediction(
    image: Tensor, labels: Tensor, names: Sequence[str], unseen: Sequence[int], target: Path
) -> str:
    """Write both files of one image; returns a line that says what was found."""
    overlay_file, index_file = suffixed(target, "overlay"), suffixed(target, "index")
    write_png(overlay(image, labels, names, unseen=unseen), overlay_file)
    write_png(Image.fromarray(labels.numpy().astype(np.uint8)), index_file)
    shares = torch.bincount(labels.flatten(), minlength=len(names)) / labels.numel()
    order = shares.argsort(descending=True, stable=True).tolist()
    found = (f"{names[k]} {100 * float(shares[k]):.1f}%" for k in order if shares[k])
    return f"{target.name}: {', '.join(found)} -> {overlay_file}, {index_file}"


if __name__ == "__main__":
    main()
