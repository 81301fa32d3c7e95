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
from ..clip.prompts import free_text_tower, spell_class_name
from ..data import SeenOnly, open_dataset
from ..data.catalog import BENCHMARKS
from ..distributed import Process
from ..framework import CLIPTeacher, CLIPTeacherConfig
from ..segmenters import build_segmenter
from .config import TrainConfig, changed_fields, show_flag, show_value
from .cost import ASSUMED_LAUNCH_SECONDS, ASSUMED_TFLOPS, StepCost, count_model
from .optimizer import parameter_groups
from .paper_recipes import PAPER_ROWS, ROOTS, ZEGCLIP_TRANSDUCTIVE, Scores

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
    free_text_tower(clip)
    counts = _count(model, config, sorted({process.world_size, PAPER_GPUS}))
    lines = [
        describe_run(recipe, config, groups, (seen, unseen), images, process),
        f"run directory: {config.output or f'runs/{recipe}-<date>'}",
        *_memory_lines(config, process.world_size, counts[process.world_size]),
        *(_row_lines(recipe, config) if recipe in PAPER_ROWS else ()),
        *_cost_lines(config, counts),
        *_peer_lines(config),
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
        f"{images} images, {classes[0]} classes with labels, {classes[1]} without, "
        f"{config.setting} setting",
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


def _memory_lines(config: TrainConfig, processes: int, step: StepCost) -> Iterator[str]:
    yield (
        f"memory of a process, counted by CUDA's rules for {step.crops} crops of {config.crop} "
        f"pixels in {config.precision}: {step.memory_gib(processes):.2f} GiB ="
    )
    yield (
        f"  {step.state_gib:.2f} GiB weights and AdamW's moments (12 B x {step.trainable:.1f} M), "
        f"teacher (4 B x {step.frozen:.1f} M)"
    )
    yield (
        f"  {step.peak_gib:.2f} GiB at the peak of a step, {step.saved_gib:.2f} of them saved for "
        "the backward pass"
    )
    if processes > 1:
        yield f"  {step.buckets_gib:.2f} GiB gradients in DistributedDataParallel's buckets"
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
    yield f"paper, Table {row.table}: {_four(row.scores)}"
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


def _peer_lines(config: TrainConfig) -> Iterator[str]:
    """What ZegCLIP reached where training knows the names of the unseen classes."""
    if config.setting == "transductive" and config.data in ZEGCLIP_TRANSDUCTIVE:
        yield f"ZegCLIP, transductive: {_four(ZEGCLIP_TRANSDUCTIVE[config.data])}"


def _four(scores: Scores) -> str:
    return "pAcc, mIoU(S), mIoU(U), hIoU  " + "  ".join(f"{score:.1f}" for score in scores)


def _cost_lines(config: TrainConfig, counts: dict[int, StepCost]) -> Iterator[str]:
    """Hours and memory of GPUs, and the arithmetic behind them."""
    if config.iterations * max(step.seconds() for step in counts.values()) < 600:
        return  # a run for a CPU, whose speed nobody knows
    yield (
        f"estimated, not measured: the longer of operations at {ASSUMED_TFLOPS:g} TFLOP/s, assumed "
        f"of an A100 in bf16, and launches at {ASSUMED_LAUNCH_SECONDS * 1e6:g} us"
    )
    for gpus, step in counts.items():
        seconds = config.accumulate * step.seconds()
        yield (
            f"  {gpus} GPU{'s' if gpus > 1 else ''}: {step.crops} crops x {step.gflop:.1f} GFLOP, "
            f"{step.launches} launches: {1e3 * seconds:.0f} ms an iteration, "
            f"{config.iterations * seconds / 3600:.1f} hours, {step.memory_gib(gpus):.1f} GiB each"
        )


def _count(
    model: CLIPTeacher, config: TrainConfig, processes: Sequence[int]
) -> dict[int, StepCost]:
    """Count a step of one among so many processes; the model cannot train afterwards."""
    crops = [-(-config.batch_size // (number * config.accumulate)) for number in processes]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    counts = count_model(model, crops, config.crop, kind)
    return dict(zip(processes, counts, strict=True))


def _count_data(config: TrainConfig) -> tuple[int, int, int]:
    """Count the classes with and without labels and the training images."""
    if config.data in BENCHMARKS:
        benchmark = BENCHMARKS[config.data]
        names, unseen = len(benchmark.class_names), len(benchmark.unseen)
        unseen = 0 if config.setting == "closed_set" else unseen
        return names - unseen, unseen, benchmark.counts["train"]
    dataset = open_dataset(config.data, config.root, "train")
    seen = len(SeenOnly(dataset, closed_set=config.setting == "closed_set").class_names)
    return seen, len(dataset.class_names) - seen, len(dataset)


def _build_clip(config: TrainConfig) -> CLIP:
    """Build a published CLIP without its numbers; any other is loaded."""
    if config.clip not in OPENAI_SIZES:
        return load_clip(config.clip, activation=config.clip_activation, heads=config.clip_heads)
    with torch.device("meta"):
        return CLIP(OPENAI_SIZES[config.clip])
