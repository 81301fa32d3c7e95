r"""Train a student with a frozen CLIP: the whole story, top to bottom.

    torchrun --standalone --nproc_per_node=2 examples/train.py             # miniworld, CPU, minutes
    torchrun --standalone --nproc_per_node=8 examples/train.py --recipe voc_segformer_b4 \
        --root data/voc                                                    # eight GPUs
    python examples/train.py --help                                        # every option

One process per device, no framework: torchrun starts the processes, DistributedDataParallel
averages the gradients, everything else happens below. The run directory holds config.json,
environment.json, metrics.jsonl, checkpoints/, panels/ and report.html.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cliptteacher.checkpoint import student_content
from cliptteacher.clip import class_text_features, load_clip
from cliptteacher.clip.prompts import free_text_tower
from cliptteacher.command_line import one_sentence_errors
from cliptteacher.data import SeenOnly, TrainingStream, open_dataset, training_transform
from cliptteacher.distributed import Process, set_precision, start_process, stop_process
from cliptteacher.evaluation import evaluate, format_line, format_scores, scores_as_percent
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.inference import Predictor
from cliptteacher.report import report_run
from cliptteacher.segmenters import build_segmenter
from cliptteacher.training.config import TrainConfig, parse_arguments, read_json, resolve_config
from cliptteacher.training.loading import build_loader
from cliptteacher.training.optimizer import (
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)
from cliptteacher.training.plan import describe_dry_run, describe_run
from cliptteacher.training.recipes import default_recipe, get_recipe
from cliptteacher.training.records import check_tensorboard
from cliptteacher.training.run import TrainingRun

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> None:
    recipe, config, method = read_configuration(argv)
    with one_sentence_errors("train.py"):
        process = start_process(config.device)
        try:
            if not config.dry_run:
                train(recipe, config, method, process)
            elif process.is_main:
                print(describe_dry_run(recipe, config, method, process))
        finally:
            stop_process()


def train(
    recipe: str, config: TrainConfig, method: CLIPTeacherConfig, process: Process
) -> dict[str, Any]:
    """Train, evaluate and save; returns the final scores in percent."""
    torch.manual_seed(config.seed)  # equal on all ranks: they build equal networks
    device, parts = process.device, config.accumulate
    share = config.batch_size // process.world_size
    if share % parts:
        raise ValueError(
            f"`accumulate` must divide the {share} images that each process has of a batch, got "
            f"{parts}"
        )

    # Data. Unseen labels become 255 here, before augmentation looks at them; training gets the
    # names of the seen classes only, in the transductive setting those of the unseen ones too.
    dataset = open_dataset(config.data, config.root, "train")
    seen = SeenOnly(dataset, closed_set=config.setting == "closed_set")
    unseen = () if config.setting == "closed_set" else dataset.unseen
    named = [dataset.class_names[k] for k in unseen] if config.setting == "transductive" else ()
    transform = training_transform(
        config.crop, scale=config.resize, ratio=config.ratio, photometric=config.photometric
    )
    stream = TrainingStream(seen, transform, config.seed)

    # Teacher and student. CLIP is frozen: the model's parameters are the student's and those of
    # the Vision-Language Adapter.
    clip = load_clip(
        config.clip, device, activation=config.clip_activation, heads=config.clip_heads
    )
    options = {"auxiliary": True} if method.auxiliary_weight > 0 else {}
    student = build_segmenter(
        config.segmenter, clip.embed_dim, config.segmenter_weights, **options
    ).to(device)
    if config.channels_last:
        student = student.to(memory_format=torch.channels_last)
    if config.sync_batch_norm and process.world_size > 1:
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        elif process.is_main:
            print("warning: `sync_batch_norm` needs CUDA; every process normalises its own images")
    model = CLIPTeacher(clip, student, seen.class_names, method, named).to(device)

    # Optimiser: norms do not decay, the head and the adapter learn faster than the backbone.
    groups = parameter_groups(
        model, config.learning_rate, config.weight_decay, config.head_multiplier
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    if process.is_main:
        classes = (len(seen.class_names), len(dataset.class_names) - len(seen.class_names))
        print(describe_run(recipe, config, groups, classes, len(dataset), process), flush=True)

    # Speed. Both compile in place, so that the names in checkpoints stay plain.
    set_precision(config.precision, process)
    if config.compile:
        student.compile()
        clip.visual.compile()

    # One process per device; gradients are averaged over all of them.
    ddp: nn.Module = model
    if process.world_size > 1:
        devices = [process.local_rank] if device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    # Evaluation and checkpoints, not training, need the words of all classes.
    text = class_text_features(clip, dataset.class_names, method.templates)
    free_text_tower(clip)
    settings: dict[str, Any] = {
        "unseen": unseen,
        "gamma": config.gamma,
        "logit_scale": method.logit_scale,
        "similarity": method.similarity,
        "resize": config.eval_resize,
        "size_divisor": config.eval_size_divisor,
    }
    predictor = Predictor(student, text, **settings)
    words = {"names": dataset.class_names, "text_features": text, "templates": method.templates}
    teacher = {
        "clip": config.clip,
        "clip_activation": clip.config.activation,
        "clip_heads": clip.config.heads,
        "setting": config.setting,
    }
    run = TrainingRun(
        config,
        method,
        recipe,
        process,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        student=partial(student_content, student, **words, **teacher, **settings),
        evaluate=partial(score, predictor, config, process),
    )
    start = run.resume()

    # The loop.
    iterations = range(start, config.iterations)
    loader = build_loader(stream, iterations, config.batch_size, config.workers, process)
    parameters = list(model.parameters())
    precision = AUTOCAST.get(config.precision)
    ddp.train()
    for step, (images, labels) in run.steps(loader):
        set_learning_rate(optimizer, learning_rate_factor(step, config.iterations, config.warmup))
        optimizer.zero_grad(set_to_none=True)
        for part, batch in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            alone = process.world_size == 1 or part == parts - 1  # no exchange before the last
            with nullcontext() if alone else ddp.no_sync():
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    # Teacher, student, GLM, PLM: Eq. (1)-(12). The CLS tokens of the batch enter
                    # the bank, which spans `bank_size` iterations of `parts` calls.
                    losses = ddp(*batch, parts)
                scaler.scale(losses["total"] / parts).backward()
            run.add(losses)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_gradient or math.inf)
        scaler.step(optimizer)
        scaler.update()
        run.end_step(step, norm)  # log, checkpoint, evaluation and signals, when they are due
    scores = run.finish()
    if process.is_main:
        tested = open_dataset(config.data, config.root, config.test_split)
        report_run(run.output, model, predictor, tested)  # report.html
    return scores


def score(
    predictor: Predictor, config: TrainConfig, process: Process, split: str, panel: Path
) -> dict[str, Any]:
    """Evaluate the student on all classes of a split, every process its share of the images."""
    dataset = open_dataset(config.data, config.root, split)
    result = evaluate(
        predictor,
        dataset,
        device=process.device,
        rank=process.rank,
        world_size=process.world_size,
        batch_size=8,
        panel=panel,
    )
    scores = scores_as_percent(result, dataset.class_names)
    table = format_scores(result, dataset.class_names, dataset.unseen)
    return {**scores, "line": format_line(scores), "table": table}


def read_configuration(argv: list[str] | None) -> tuple[str, TrainConfig, CLIPTeacherConfig]:
    """Defaults, then the recipe, then --config, then the command line; later ones win."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="default: that of --data; see training/recipes.py")
    parser.add_argument("--config", type=Path, help="JSON file, such as config.json of a run")
    classes = (TrainConfig, CLIPTeacherConfig)
    namespace, given = parse_arguments(parser, classes, argv)
    try:
        file = read_json(namespace.config, classes, ("recipe",)) if namespace.config else {}
        asked = {**file, **given}
        stored = file.pop("recipe", None)
        recipe = namespace.recipe or stored or default_recipe(asked)
        config, method = resolve_config(classes, (get_recipe(recipe), file, given))
        if config.tensorboard:
            check_tensorboard()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    return recipe, config, method


if __name__ == "__main__":
    main()
