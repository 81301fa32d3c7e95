r"""What a person with a GPU should run first, and send back: about five minutes, one JSON.

    python benchmarks/first_gpu.py --output first_gpu.json

1. Agreement: the bundled teacher, one training step and one prediction on fixed inputs, on the GPU
   and on the CPU, in fp32, tf32 and bf16: pseudo labels that agree, losses, gradients, labels.
2. Waits: a training step under `torch.cuda.set_sync_debug_mode("error")`.
3. Repeats: two equal steps, with and without deterministic algorithms: are all bits equal?
4. Time and memory of a step of the paper's size (CLIP ViT-B/16 of random weights, crops of 512
   pixels, bf16), beside what was counted without a GPU.

Every part is tried and reported, also when one fails. `--quick` takes small sizes and any device.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_cost import count
from torch import Tensor, nn

import cliptteacher as ct
from cliptteacher.clip.model import CLIP, CLIPConfig
from cliptteacher.clip.prompts import free_text_tower
from cliptteacher.distributed import set_precision, start_process
from cliptteacher.files import write_json
from cliptteacher.training.records import describe_environment

SEEN = ("grass", "sand", "lava", "snow", "wood", "star", "moon", "heart")
STUDENTS = ("segformer_b0", "segformer_b4", "segnext_b", "swin_b")
KINDS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps")
    parser.add_argument("--output", type=Path, default=Path("first_gpu.json"))
    args = parser.parse_args(argv)
    process = start_process(args.device)
    device = process.device
    set_precision("fp32", process)
    result: dict[str, Any] = {"environment": describe_environment(process)}
    students = ("segformer_nano",) if args.quick else STUDENTS
    crops = (2,) if args.quick else (2, 16)
    parts: dict[str, Callable[[], Any]] = {
        **{f"agreement {kind}": lambda kind=kind: agreement(device, kind) for kind in KINDS},
        "waits": lambda: waits(device),
        "repeats": lambda: repeats(device, deterministic=False),
        "repeats, deterministic": lambda: repeats(device, deterministic=True),
        **{
            f"step {name}, {n} crops": lambda name=name, n=n: step(device, name, n, args.quick)
            for name in students
            for n in crops
        },
    }
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception as error:  # the other parts are worth having
            traceback.print_exc(limit=-2)
            result[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {json.dumps(result[name])}", flush=True)
        write_json(result, args.output)
    print(f"written to {args.output}; please send it back")


def build(device: torch.device) -> ct.CLIPTeacher:
    """The literal method with the bundled teacher and a small student; equal on every device."""
    torch.manual_seed(0)
    clip = ct.load_clip("miniworld")
    student = ct.build_segmenter("segformer_nano", clip.embed_dim, drop_path=0.0, dropout=0.0)
    model = ct.CLIPTeacher(clip, student, SEEN)
    return copy.deepcopy(model).to(device)


def batch(device: torch.device, size: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(4, 3, size // 8, size // 8, generator=generator)
    images = nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    labels = torch.randint(len(SEEN), (4, size // 16, size // 16), generator=generator)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[:, size // 4 :] = 255
    return images.to(device), labels.to(device)


def run(device: torch.device, kind: str) -> dict[str, Tensor]:
    """One step; everything comes back on the CPU."""
    model, (images, labels) = build(device).train(), batch(device)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"  # PyTorch rounds convolutions by default
    try:
        with torch.autocast(device.type, KINDS[kind], enabled=KINDS[kind] is not None):
            losses = model(images, labels)
            dense = model.encode(images).dense
        losses["total"].backward()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    gradients = [p.grad.flatten() for p in model.segmenter.parameters() if p.grad is not None]
    predictor = ct.Predictor(model.segmenter, model.seen_text, unseen=[7])
    found = {
        **{name: value.detach() for name, value in losses.items()},
        "teacher": dense,
        "groups": model.plm.group_tokens(dense.float(), labels)[0],
        "gradient": torch.cat(gradients),
        "labels": predictor(images),
    }
    return {name: value.detach().cpu() for name, value in found.items()}


def agreement(device: torch.device, kind: str) -> dict[str, float]:
    """Compare with the CPU in fp32: shares of equal numbers, else the relative distance."""
    here, there = run(torch.device("cpu"), "fp32"), run(device, kind)
    return {name: distance(there[name], here[name]) for name in here}


def distance(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return round(float((found == expected).float().mean()), 6)
    gap = torch.linalg.vector_norm((found - expected).double())
    return float(f"{float(gap / torch.linalg.vector_norm(expected.double())):.3g}")


def waits(device: torch.device) -> str:
    """Take three steps, of which the last two may not wait for the device."""
    model = build(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, labels = batch(device)
    for number in range(3):
        strict = device.type == "cuda" and number > 0
        torch.cuda.set_sync_debug_mode("error") if strict else None
        try:
            optimizer.zero_grad(set_to_none=True)
            model(images, labels)["total"].backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default") if strict else None
    return "none"


def repeats(device: torch.device, deterministic: bool) -> dict[str, bool]:
    """Do two equal steps give equal bits?"""
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, second = run(device, "fp32"), run(device, "fp32")
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: torch.equal(value, second[name]) for name, value in first.items()}


def step(device: torch.device, name: str, crops: int, quick: bool) -> dict[str, float]:
    """Seconds and memory of training steps, beside what was counted."""
    crop = 64 if quick else 512
    warm, timed = (1, 2) if quick else (5, 20)
    auxiliary = name.startswith("swin")
    options = {"auxiliary": True} if auxiliary else {}
    clip = CLIP(CLIPConfig(vision_layers=1) if quick else CLIPConfig())
    student = ct.build_segmenter(name, clip.embed_dim, **options)
    names = [f"class {number}" for number in range(49)]
    method = ct.CLIPTeacherConfig(auxiliary_weight=0.4 if auxiliary else 0.0)
    model = ct.CLIPTeacher(clip.to(device), student, names, method).to(device).train()
    free_text_tower(clip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    images = torch.rand(crops, 3, crop, crop, device=device)
    labels = torch.randint(49, (crops, crop, crop), device=device)
    labels[:, crop // 2 :] = 255
    seconds = []
    on_gpu = device.type == "cuda"
    for number in range(warm + timed):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats() if number == warm else None
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(images, labels)
        losses["total"].backward()
        optimizer.step()
        torch.cuda.synchronize() if on_gpu else None
        seconds.append(time.perf_counter() - began)
    found = {"ms": round(1e3 * statistics.median(seconds[warm:]), 1)}
    if on_gpu:
        found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    (cost,) = count(name, [crops], crop)
    return found | {
        "counted_ms": round(1e3 * cost.seconds(), 1),
        "counted_gib": round(cost.memory_gib(), 2),
        "counted_launches": cost.launches,
    }


if __name__ == "__main__":
    main()
