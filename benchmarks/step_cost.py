r"""Count what a training step computes and keeps in memory, per crop, without a GPU.

    python benchmarks/step_cost.py segformer_b0 segformer_b4 segnext_b swin_b

Each student sees one training step of two crops under a CLIP ViT-B/16, all of it on tensors that
have sizes but no numbers. The operations are those of matrix products, convolutions and attention,
as torch.utils.flop_counter counts them in the forward pass, times three for what is trained; the
memory is that of all tensors but parameters which autograd saves under bf16 autocast.
A line per student comes out, for STEP_COSTS in cliptteacher/training/cost.py; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.training.cost import StepCost, count_step, without_numbers

SEEN = 49  # classes with labels, as in PASCAL Context
CROPS = 2  # what a GPU gets when eight share the paper's batch of 16


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("segmenters", nargs="+", choices=list_segmenters())
    parser.add_argument("--crop", type=int, default=512)
    args = parser.parse_args(argv)
    costs = {}
    for name in args.segmenters:
        costs[name] = asdict(count(name, args.crop))
        fields = ", ".join(f"{field}={value}" for field, value in costs[name].items())
        print(f'    "{name}": StepCost({fields}),', flush=True)
    print(json.dumps({"crop": args.crop, "clip": "ViT-B/16", "costs": costs}))


def count(name: str, crop: int) -> StepCost:
    """Count one step of the literal recipe with this student."""
    auxiliary = name.startswith("swin")
    options = {"auxiliary": True} if auxiliary else {}
    with torch.device("meta"):
        clip = CLIP(CLIPConfig())
        student = build_segmenter(name, clip.embed_dim, **options)
    names = [f"class {number}" for number in range(SEEN)]
    method = CLIPTeacherConfig(auxiliary_weight=0.4 if auxiliary else 0.0)
    model = CLIPTeacher(clip, student, names, method).train()
    with without_numbers(model), torch.autocast("cpu", torch.bfloat16):
        images = torch.empty(CROPS, 3, crop, crop)
        labels = torch.empty(CROPS, crop, crop, dtype=torch.uint8)
        step = count_step(
            step=lambda: model(images, labels)["total"],
            teacher_pass=lambda: model.encode(images),
            model=model,
            teacher=clip,
            crops=CROPS,
        )
    return StepCost(
        gflop=round(step.gflop, 1),
        saved_gib=round(step.saved_gib, 2),
        trainable=round(step.trainable, 1),
        frozen=round(step.frozen, 1),
    )


if __name__ == "__main__":
    main()
