r"""Segment photographs with a trained student and any words.

    python examples/predict.py --checkpoint runs/miniworld --image photo.jpg --output out
    python examples/predict.py --checkpoint runs/paper --clip ViT-B/16 --image photos/ \
        --classes "dog, grass, frisbee, sky" --output out

For every image it writes NAME_overlay.png (colours and a legend) and NAME_index.png (one class
index a pixel, in the order of the words). Without --classes, or with words of the training run
only, no CLIP is needed; for other words its text encoder is loaded, never its image encoder.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from cliptteacher.training.distributed import start_process
from PIL import Image
from torch import Tensor
from words import with_words

from cliptteacher.data.folder import read_image
from cliptteacher.inference import Predictor, TrainedSegmenter, load_segmenter
from cliptteacher.visualize import Pixels, class_palette, overlay, write_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
MAX_WORDS = 255  # an index map has one byte a pixel, and 255 means "ignore"
# Pillow raises these for files that are damaged, no pictures, or larger than it accepts.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        failed = run(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"predict.py: {error}") from error
    if failed:
        raise SystemExit(1)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a file, or the directory of a run")
    add("--image", type=Path, required=True, help="an image, or a directory of images")
    add("--classes", help='words between commas, such as "cat, sofa"; default: those of training')
    add("--output", type=Path, required=True, help="directory to write to")
    add("--clip", help="name or path of the CLIP, for words that training did not know")
    add("--gamma", type=float, help="bonus of words without labels in training")
    add("--resize", type=int, nargs=2, metavar=("LONG", "SHORT"), help="default: as in training")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Predict all images; returns how many could not be read."""
    images = list_images(args.image, args.output)
    trained = load_segmenter(args.checkpoint)
    words = split_words(args.classes) if args.classes is not None else trained.class_names
    student, unread = with_words(trained, words, args.clip)
    gamma = student.gamma if args.gamma is None else args.gamma
    print_plan(student, gamma, unread)
    resize = tuple(args.resize) if args.resize else student.resize
    predictor = student.predictor(gamma=gamma, resize=resize)
    predictor.to(start_process(args.device).device)
    palette = class_palette(len(words))
    stems = Counter(path.stem for path in images)
    failed = 0
    for path in images:
        try:
            image = read_image(path)
        except UNREADABLE as error:
            failed += 1
            print(f"{path} must be a readable image, but {error}", file=sys.stderr, flush=True)
            continue
        # Two images of one name, such as a.jpg and a.png, must not overwrite each other.
        target = args.output / (path.stem if stems[path.stem] == 1 else path.name)
        print(predict(predictor, student, image, target, palette), flush=True)
    return failed


def list_images(source: Path, output: Path) -> list[Path]:
    """List the images that are asked for.

    Raises:
        FileNotFoundError: if there is no such file or directory, or no image in it.
        ValueError: if the results would be written among the images.
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
    files = (path for path in source.iterdir() if path.is_file() and path.name[0] != ".")
    images = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{source} must hold an image ({', '.join(SUFFIXES)}), got none")
    return images


def split_words(text: str) -> tuple[str, ...]:
    """Split "a, b, c" into words.

    Raises:
        ValueError: if there is none, one occurs twice, or there are too many.
    """
    words = tuple(" ".join(word.split()) for word in text.split(",") if word.strip())
    repeated = sorted({word for word in words if words.count(word) > 1})
    if not 1 <= len(words) <= MAX_WORDS or repeated:
        got = f"{', '.join(repeated)} twice" if repeated else str(len(words))
        raise ValueError(f"--classes must hold 1 to {MAX_WORDS} different words, got {got}")
    return words


def print_plan(student: TrainedSegmenter, gamma: float, unread: list[str]) -> None:
    """Say which words get the bonus, and which ones mean nothing to the CLIP."""
    names = ", ".join(student.class_names[k] for k in student.unseen)
    print(f"words without labels in training, with a bonus of {gamma:g}: {names or 'none'}")
    for word in unread:
        print(
            f"warning: the CLIP never read the word {word!r}, so what is found for it means "
            "nothing; use a word of its captions or a larger CLIP",
            file=sys.stderr,
        )


def predict(
    predictor: Predictor,
    student: TrainedSegmenter,
    image: Tensor,
    target: Path,
    palette: Pixels,
) -> str:
    """Predict one image and write both files; returns a line that says what was found."""
    labels = predictor(image).cpu()
    picture = overlay(image, labels, student.class_names, palette, unseen=student.unseen)
    overlay_file = target.with_name(f"{target.name}_overlay.png")
    index_file = target.with_name(f"{target.name}_index.png")
    write_png(picture, overlay_file)
    write_png(Image.fromarray(labels.numpy().astype(np.uint8)), index_file)
    shares = torch.bincount(labels.flatten(), minlength=len(student.class_names)) / labels.numel()
    order = shares.argsort(descending=True, stable=True).tolist()
    found = (f"{student.class_names[k]} {100 * float(shares[k]):.1f}%" for k in order if shares[k])
    return f"{target.name}: {', '.join(found)} -> {overlay_file}, {index_file}"


if __name__ == "__main__":
    main()
