r"""Count what a training step computes, launches and keeps in memory, without a GPU.

    python benchmarks/step_cost.py segformer_b0 segformer_b4 segnext_b swin_b

Each student sees one training step of the literal method under a CLIP ViT-B/16, in bf16, on tensors
that have sizes but no numbers (cliptteacher/training/cost.py): of two crops, what a GPU gets when
eight share the paper's batch of 16, and of all 16. A line per student comes out; the last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch

from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.clip.prompts import free_text_tower
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.training.cost import StepCost, count_model

SEEN = 49  # classes with labels, as in PASCAL Context
CROPS = (2, 16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("segmenters", nargs="+", choices=list_segmenters())
    parser.add_argument("--crop", type=int, default=512)
    args = parser.parse_args(argv)
    costs = {}
    for name in args.segmenters:
        costs[name] = [
            {key: round(value, 2) for key, value in asdict(cost).items()}
            for cost in count(name, CROPS, args.crop)
        ]
        for cost in costs[name]:
            print(name, json.dumps(cost), flush=True)
    print(json.dumps({"crop": args.crop, "clip": "ViT-B/16", "costs": costs}))


def count(name: str, crops: Sequence[int], crop: int) -> list[StepCost]:
    """Count a step of the literal method with this student, for each batch size."""
    auxiliary = name.startswith("swin")
    options = {"auxiliary": True} if auxiliary else {}
    with torch.device("meta"):
        clip = CLIP(CLIPConfig())
        student = build_segmenter(name, clip.embed_dim, **options)
    names = [f"class {number}" for number in range(SEEN)]
    method = CLIPTeacherConfig(auxiliary_weight=0.4 if auxiliary else 0.0)
    model = CLIPTeacher(clip, student, names, method)
    free_text_tower(clip)
    return count_model(model, crops, crop, torch.bfloat16)


if __name__ == "__main__":
    main()
