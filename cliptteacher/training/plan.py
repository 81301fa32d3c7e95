"""Describe a run before it begins: classes, parameters, the paper's scores, hours and memory.

A dry run needs neither the weights of a published CLIP nor a prepared benchmark: networks are
built on PyTorch's meta device, where tensors have sizes but no numbers, and the classes of the
benchmarks are known by name. Everything here returns text; the program prints it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..clip import load_clip
from ..clip.model import CLIP, OPENAI_SIZES
from ..clip.prompts import spell_class_name
from ..data import SeenOnly, open_dataset
from ..data.catalog import BENCHMARKS
from ..distributed import Process
from ..framework import CLIPTeacher, CLIPTeacherConfig
from ..segmenters import build_segmenter
from .config import TrainConfig, changed_fields, show_flag, show_value
from .cost import ASSUMED_TFLOPS, COUNTED_FOR, STEP_COSTS, StepCount, count_step, without_numbers
from .optimizer import parameter_groups
from .paper_recipes import PAPER_ROWS, ROOTS

PAPER_GPUS = 8


def describe_dry_run(
    recipe: str, config: TrainConfig, method: CLIPTeacherConfig, process: Process
) -> str:
    """Describe a run of which nothing has been downloaded yet.

    Args:
        recipe: its name.
        config: of the run.
        method: configuration of the model.
        process: this process among those that would train.

    Raises:
        ValueError: the student is unknown, or the configuration does not fit.
    """
    seen, unseen, images = _count_data(config)
    clip = _build_clip(config).to("meta")
    options: dict[str, Any] = {"auxiliary": True} if method.auxiliary_weight > 0 else {}
    with torch.device("meta"):
        segmenter = build_segmenter(config.segmenter, clip.embed_dim, **options)
    # Words and templates change no size; encoding fifteen templates of 156 names takes a while.
    names = [f"class {number}" for number in range(seen)]
    model = CLIPTeacher(clip, segmenter, names, replace(method, templates="single"))
    groups = parameter_groups(
        model, config.learning_rate, config.weight_decay, config.head_multiplier
    )
    step = _count(model, config, process.world_size)
    lines = [
        describe_run(recipe, config, groups, (seen, unseen), images, process),
        f"run directory: {config.output or f'runs/{recipe}-<date>'}",
        *_memory_lines(config, step),
        *(_row_lines(recipe, config) if recipe in PAPER_ROWS else ()),
        *_cost_lines(config, step),
        *_change_lines(config, method),
    ]
    return "\n".join(lines)


def describe_run(
    recipe: str,
    config: TrainConfig,
    groups: Sequence[dict[str, Any]],
    classes: tuple[int, int],
    images: int,
    process: Process,
) -> str:
    """Describe what is about to happen; `classes` are those with and those without labels."""
    epochs = config.iterations * config.batch_size / images
    lines = [
        f"recipe {recipe}: {config.segmenter} taught by CLIP {config.clip} on {config.data}, "
        f"{images} images, {classes[0]} classes with labels, {classes[1]} without",
        f"{config.iterations} iterations of {config.batch_size} crops of {config.crop} pixels, "
        f"{epochs:.1f} epochs, {process.world_size} processes on {process.device.type}, "
        f"{torch.get_num_threads()} threads each, seed {config.seed}",
    ]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"  {group['name']:<20} {count / 1e6:7.3f} M parameters, "
            f"learning rate {group['base_lr']:.1e}, weight decay {group['weight_decay']}"
        )
    return "\n".join(lines)


def _memory_lines(config: TrainConfig, step: StepCount) -> Iterator[str]:
    state = step.state_gib
    yield (
        f"memory of a process, counted for {step.crops} crops of {config.crop} pixels in "
        f"{config.precision}: {state + step.peak_gib:.2f} GiB ="
    )
    yield (
        f"  {state:.2f} GiB weights and AdamW's moments (12 B x {step.trainable:.1f} M), "
        f"teacher (4 B x {step.frozen:.1f} M)"
    )
    yield (
        f"  {step.peak_gib:.2f} GiB at the peak of a step: gradients, tensors saved for the "
        "backward pass, temporaries"
    )
    yield (
        "  not in it: PyTorch itself, workspaces and reserves of the libraries, data loading, "
        "evaluation"
    )


def _change_lines(config: TrainConfig, method: CLIPTeacherConfig) -> Iterator[str]:
    """List the fields that differ from the defaults, which are the paper's."""
    changes = changed_fields(config, method)
    changes.pop("dry_run", None)
    yield "differs from the defaults:" if changes else "every field is as its default"
    for name, (value, default) in changes.items():
        yield f"  {show_flag(name, value):<38} default {show_value(default)}"


def _row_lines(recipe: str, config: TrainConfig) -> Iterator[str]:
    """What the paper reached, and the commands that try it."""
    row = PAPER_ROWS[recipe]
    four = "  ".join(f"{score:.1f}" for score in row.scores)
    yield f"paper, Table {row.table}: pAcc, mIoU(S), mIoU(U), hIoU  {four}"
    trained = f"coco_stuff_{config.segmenter}" if row.evaluate_on else recipe
    launch = f"torchrun --standalone --nproc_per_node={PAPER_GPUS}"
    yield (
        f"train:    {launch} examples/train.py --recipe {trained} "
        f"--root {shlex.quote(str(config.root))} --output runs/{trained}"
    )
    if row.evaluate_on:
        coco, target = BENCHMARKS["coco_stuff"], BENCHMARKS[row.evaluate_on].class_names
        # "building" is what training called "building-other".
        seen = {spell_class_name(name) for name in coco.class_names if name not in coco.unseen}
        unseen = [name for name in target if spell_class_name(name) not in seen]
        yield (
            f"evaluate: {launch} examples/evaluate.py --checkpoint runs/{trained} "
            f"--data {row.evaluate_on} --root {ROOTS[row.evaluate_on]}"
        )
        yield f"{len(unseen)} of its {len(target)} classes are unseen: {', '.join(unseen)}"


def _cost_lines(config: TrainConfig, step: StepCount) -> Iterator[str]:
    """Hours and memory of GPUs, and the arithmetic behind them."""
    kept = all(getattr(config, name) == value for name, value in COUNTED_FOR.items())
    cost = STEP_COSTS.get(config.segmenter, step) if kept else step
    crops = config.iterations * config.batch_size
    hours = cost.gpu_hours(crops)
    if hours < 0.05:  # a run for a CPU, whose speed nobody knows
        yield f"operations: {crops} crops x {cost.gflop:.1f} GFLOP"
        return
    yield (
        f"cost, estimated: {crops} crops x {cost.gflop:.1f} GFLOP / {ASSUMED_TFLOPS:g} TFLOP/s, "
        f"assumed of an A100 in bf16, = {hours:.1f} GPU hours; a GPU takes "
        f"{cost.crops_per_second():.0f} crops a second"
    )
    for gpus in (1, PAPER_GPUS):
        share = -(-config.batch_size // gpus)
        yield (
            f"  {gpus} GPU{'s' if gpus > 1 else ''}: {hours / gpus:.1f} hours, "
            f"{cost.memory_gib(share):.1f} GiB each = 16 B x {cost.trainable:.1f} M + "
            f"4 B x {cost.frozen:.1f} M + {share} crops x {cost.saved_gib:.2f} GiB"
        )


def _count(model: CLIPTeacher, config: TrainConfig, processes: int) -> StepCount:
    """Count a step of one process; the model cannot be used afterwards."""
    crops = -(-config.batch_size // (processes * config.accumulate))
    size = (crops, config.crop, config.crop)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    with without_numbers(model), torch.autocast("cpu", kind, enabled=kind is not None):
        images = torch.empty(size[0], 3, *size[1:])
        labels = torch.empty(size, dtype=torch.uint8)
        return count_step(
            step=lambda: model.train()(images, labels)["total"],
            teacher_pass=lambda: model.encode(images),
            model=model,
            teacher=model.clip,
            crops=crops,
        )


def _count_data(config: TrainConfig) -> tuple[int, int, int]:
    """Count the classes with and without labels and the training images."""
    if config.data in BENCHMARKS:
        benchmark = BENCHMARKS[config.data]
        names, unseen = len(benchmark.class_names), len(benchmark.unseen)
        unseen = 0 if config.closed_set else unseen
        return names - unseen, unseen, benchmark.counts["train"]
    dataset = open_dataset(config.data, config.root, "train")
    seen = len(SeenOnly(dataset, closed_set=config.closed_set).class_names)
    return seen, len(dataset.class_names) - seen, len(dataset)


def _build_clip(config: TrainConfig) -> CLIP:
    """Build a published CLIP without its numbers; any other is loaded."""
    if config.clip not in OPENAI_SIZES:
        return load_clip(config.clip, activation=config.clip_activation, heads=config.clip_heads)
    with torch.device("meta"):
        return CLIP(OPENAI_SIZES[config.clip])
