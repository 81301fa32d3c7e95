r"""Write a trained student as one file that needs neither CLIP nor this package.

    python examples/export.py --checkpoint runs/first --output student.pt2
    python examples/export.py --checkpoint runs/voc --output student.pt2 student.onnx \
        --classes "sofa, potted plant, wall" --clip ViT-B/16

The ending says which kind: .pt2 for torch.export, .onnx for ONNX (pip install -e '.[export]').
Resizing, normalisation, student, text features and gamma are all inside. Either file takes

    images   uint8 (batch, 3, height, width), RGB; all three sizes are free

and gives

    labels   int64 (batch, height, width)
    logits   float (batch, classes, h, w), at the resolution of the student

With every file comes a description in JSON: the classes in the order of the labels, those that
were unseen in training, gamma. Each file is read back and compared with the predictor on scenes of
ten sizes; where the labels differ by more than rounding explains, the program ends with an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliptteacher.command_line import (
    add_clip_flags,
    clip_settings,
    number,
    one_sentence_errors,
    read_words,
)
from cliptteacher.data.miniworld import MiniWorld
from cliptteacher.export import INPUT, OPSET, export_program, save_onnx, save_program
from cliptteacher.files import write_json
from cliptteacher.inference import Predictor, TrainedSegmenter, load_segmenter

ENDINGS = (".pt2", ".onnx")
# Height and width: small, odd, flat, steep, and multiples of a stride.
SIZES = ((128, 128), (96, 160), (107, 160), (213, 320), (75, 75), (33, 250), (300, 40), (256, 256),
         (191, 97), (64, 129))  # fmt: skip
Program = Callable[[Tensor], tuple[Tensor, Tensor]]  # bytes (B, 3, H, W) -> labels, logits


class Difference(NamedTuple):
    """How far a written program is from the predictor."""

    pictures: int
    pixels: int  # whose labels differ
    largest: float  # difference of two logits
    widest: float  # gap between the two best logits of a pixel whose labels differ
    seconds: float  # a picture, as written
    eager: float  # and by the predictor


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_sentence_errors("export.py"):
        run(args)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a file, or the directory of a run")
    add("--output", type=Path, nargs="+", required=True, help="files ending in .pt2 or .onnx")
    add("--classes", help="words between commas, or a .txt file; default: those of training")
    add_clip_flags(parser, "for words that training did not know")
    add("--gamma", type=number(float), help="bonus of words without labels in training")
    add("--pictures", type=number(int, 1), default=20, help="scenes to compare on")
    add("--json", type=Path, help="file for the figures of the comparison")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write every file that is asked for, and compare it with the predictor."""
    check_outputs(args.output)
    student = load_segmenter(args.checkpoint)
    if args.classes is not None:
        student = student.with_words(read_words(args.classes), args.clip, **clip_settings(args))
    settings = {} if args.gamma is None else {"gamma": args.gamma}
    predictor = student.predictor(**settings)
    program = export_program(predictor)
    text = describe(student, float(predictor.bonus.max()))
    figures: dict[str, dict[str, float]] = {}
    for path in args.output:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt2":
            save_program(program, path, text)
        else:
            save_onnx(program, path, text)
        kind = "torch.export" if path.suffix == ".pt2" else f"ONNX, opset {OPSET}"
        print(f"{path}: {kind}, {path.stat().st_size / 2**20:.1f} MiB", flush=True)
        read = read_program(path)
        if read is None:
            print(f"{path} is not compared: onnxruntime is not installed")
            continue
        found = compare(predictor, read, args.pictures)
        figures[path.suffix] = {"bytes": path.stat().st_size, **found._asdict()}
        print(
            f"{found.pictures} pictures of {len(SIZES)} sizes: {found.pixels} pixels with another "
            f"label, largest difference of logits {found.largest:.1e}; {found.seconds:.3f} s a "
            f"picture, the predictor takes {found.eager:.3f} s",
            flush=True,
        )
        if not is_rounding(found):
            raise ValueError(
                f"{path} must predict what the checkpoint does, but labels differ where the two "
                f"best logits are {found.widest:.1e} apart; report it with the student's name"
            )
    if args.json is not None:
        write_json(figures, args.json)


def check_outputs(paths: list[Path]) -> None:
    """Refuse before the minutes of tracing what could not be written after them.

    Raises:
        ValueError: an ending is unknown, or ONNX is asked for and not installed.
    """
    for path in paths:
        if path.suffix not in ENDINGS:
            raise ValueError(f"--output must end in {' or '.join(ENDINGS)}, got {path}")
        missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
        if path.suffix == ".onnx" and missing:
            raise ValueError(
                f"{path} needs the package {missing[0]}, which is not installed; run "
                "`pip install -e '.[export]'`"
            )


def describe(student: TrainedSegmenter, gamma: float) -> str:
    """What a user of the file must know, as JSON."""
    content = {
        "classes": list(student.class_names),
        "unseen": [student.class_names[k] for k in student.unseen],
        "gamma": gamma,
        "input": "images: uint8 (batch, 3, height, width), RGB",
        "outputs": "labels: int64 (batch, height, width); logits: float (batch, classes, h, w)",
    }
    return json.dumps(content, ensure_ascii=False)


def read_program(path: Path) -> Program | None:
    """Read a written file back; None for ONNX without onnxruntime."""
    if path.suffix == ".pt2":
        module: Any = torch.export.load(path).module()
        return module  # type: ignore[no-any-return]
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def program(images: Tensor) -> tuple[Tensor, Tensor]:
        labels, logits = session.run(None, {INPUT: images.numpy()})
        return torch.from_numpy(labels), torch.from_numpy(logits)

    return program


def scenes(count: int) -> Iterator[Tensor]:
    """Draw pictures (3, H, W), uint8, every size of `SIZES` by turns."""
    world = MiniWorld("test", size=max(map(max, SIZES)), length=count, cache=False)
    for index in range(count):
        height, width = SIZES[index % len(SIZES)]
        yield world[index][0][:, :height, :width].contiguous()


@torch.no_grad()
def compare(predictor: Predictor, program: Program, count: int) -> Difference:
    """Compare labels and logits of a program with those of the predictor on drawn scenes."""
    pixels, largest, widest, clock = 0, 0.0, 0.0, np.zeros(2)
    for image in scenes(count):
        start = time.perf_counter()
        expected = predictor(image)
        middle = time.perf_counter()
        labels, logits = program(image[None])
        clock += middle - start, time.perf_counter() - middle
        full = predictor.logits(image)
        own = torch.nn.functional.interpolate(logits, image.shape[1:], mode="bilinear")[0]
        largest = max(largest, float((full - own).abs().max()))
        differs = labels[0] != expected
        pixels += int(differs.sum())
        if differs.any() and len(full) > 1:
            best = full.topk(2, dim=0).values[:, differs]
            widest = max(widest, float((best[0] - best[1]).max()))
    eager, seconds = clock / count
    return Difference(count, pixels, largest, widest, float(seconds), float(eager))


def is_rounding(found: Difference) -> bool:
    """Whether labels differ only where two classes tie, closer than the logits themselves do."""
    return found.largest < 1e-2 and found.widest <= 2 * found.largest


if __name__ == "__main__":
    main()
