r"""Train a student with a frozen CLIP: the whole story, top to bottom.

    torchrun --standalone --nproc_per_node=2 examples/train.py             # miniworld, CPU, minutes
    torchrun --standalone --nproc_per_node=8 examples/train.py --recipe paper \
        --data folder --root DIR --clip ViT-B/16                           # eight GPUs
    python examples/train.py --help                                        # every option

One process per device, no framework: torchrun starts them, DistributedDataParallel averages the
gradients, everything else happens below. The run directory holds config.json, environment.json,
metrics.jsonl, checkpoints/ and panels/.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from faults import leave, name_dead_worker, report_nonfinite
from learning import prepare_learner, prepare_student, train_step
from plan import dry_run, print_plan
from saving import Run, choose_output, resume, save
from scoring import score, was_scored
from torch import Tensor
from torch.utils.data import DataLoader

from cliptteacher.clip import class_text_features, load_clip
from cliptteacher.data import (
    SeenOnly,
    TrainingStream,
    open_dataset,
    rank_indices,
    training_transform,
)
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter
from cliptteacher.training.config import (
    TrainConfig,
    config_as_dict,
    parse_arguments,
    read_json,
    resolve_config,
)
from cliptteacher.training.distributed import (
    Process,
    start_process,
    stop_process,
)
from cliptteacher.training.interruption import StopSignal, ignore_signals
from cliptteacher.training.optimizer import build_optimizer, parameter_groups, set_learning_rate
from cliptteacher.training.prefetch import move_batches
from cliptteacher.training.progress import Progress, format_time
from cliptteacher.training.recipes import default_recipe, get_recipe
from cliptteacher.training.run import (
    MetricsLog,
    check_tensorboard,
    describe_environment,
    record_start,
)
from cliptteacher.training.schedule import learning_rate_factor
from cliptteacher.training.workers import WatchedSamples


def main(argv: list[str] | None = None) -> None:
    recipe, config, method = read_configuration(argv)
    process = start_process(config.device)
    try:
        train(recipe, config, method, process)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        stop_process()


def read_configuration(argv: list[str] | None) -> tuple[str, TrainConfig, CLIPTeacherConfig]:
    """Defaults, then the recipe, then --config, then the command line; later ones win."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="default: as --data, or paper; see training/recipes.py")
    parser.add_argument("--config", type=Path, help="JSON file, such as config.json of a run")
    classes = (TrainConfig, CLIPTeacherConfig)
    namespace, given = parse_arguments(parser, classes, argv)
    try:
        file = read_json(namespace.config, classes, ("recipe",)) if namespace.config else {}
        data = given.get("data", file.get("data", "miniworld"))
        recipe = namespace.recipe or file.get("recipe", default_recipe(data))
        file.pop("recipe", None)
        config, method = resolve_config(classes, (get_recipe(recipe), file, given))
        if config.tensorboard:
            check_tensorboard()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    return recipe, config, method


def train(
    recipe: str, config: TrainConfig, method: CLIPTeacherConfig, process: Process
) -> dict[str, Any] | None:
    """Train, evaluate and save; returns the final scores in percent."""
    if config.dry_run:
        if process.is_main:
            dry_run(recipe, config, method, process)
        return None
    torch.manual_seed(config.seed)  # equal on all ranks: they build equal networks

    # Data: training gets seen labels and seen names only.
    train_set = open_dataset(config.data, config.root, "train")
    seen_set = SeenOnly(train_set, closed_set=config.closed_set)

    # Teacher, student, optimiser.
    clip = load_clip(config.clip)
    extra = {"auxiliary": True} if method.auxiliary_weight > 0 else {}
    try:
        segmenter = build_segmenter(
            config.segmenter, clip.embed_dim, config.segmenter_weights, **extra
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    segmenter = prepare_student(segmenter, config, process)
    model = CLIPTeacher(clip, segmenter, seen_set.class_names, method).to(process.device)
    groups = parameter_groups(
        model, config.learning_rate, config.weight_decay, config.head_multiplier
    )
    if process.is_main:
        seen = len(seen_set.class_names)
        classes = (seen, len(train_set.class_names) - seen)
        print_plan(recipe, config, groups, classes, len(train_set), process)
    learner = prepare_learner(model, build_optimizer(groups), config, process)

    # Run directory, and where an earlier run stopped.
    output = choose_output(recipe, config, process)
    start = resume(output, learner, config, process)
    log = open_log(recipe, output, start, config, method, process)

    # Evaluation and prediction, not training, need the words of all classes.
    text = class_text_features(clip, train_set.class_names, method.templates)
    run = Run(config, process, output, train_set, text, log)
    if is_due(start, config) and not was_scored(run, config.eval_split, start):
        score(learner, run, config.eval_split, start)

    # The loop.
    schedule = (config.iterations, config.warmup, config.warmup_start, config.power)
    progress = Progress(config.iterations, start, config.batch_size, process.device, log)
    loader = build_loader(seen_set, config, process, start)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    batches = move_batches(progress.time_batches(name_dead_worker(loader)), process.device, layout)
    with StopSignal() as signal:
        for step, (images, labels) in enumerate(batches, start):
            set_learning_rate(learner.optimizer, learning_rate_factor(step, *schedule))
            progress.add(train_step(learner, images, labels, step, config))
            done, stopping = step + 1, signal.agreed()
            logging = done == config.iterations or done % config.log_interval == 0
            saving = stopping or done == config.iterations or done % config.checkpoint_interval == 0
            if logging or saving or learner.guard.immediate:
                report_nonfinite(learner.guard.check(), loader.dataset.stream, run)
            if logging:
                line = progress.report(done, learner.optimizer.param_groups[0]["lr"])
                if line is not None:
                    print(line, flush=True)
            with progress.paused() if saving or is_due(done, config) else nullcontext():
                if saving:
                    save(done, learner, run)
                if stopping:
                    leave(done, run)
                if is_due(done, config):
                    score(learner, run, config.eval_split, done)

    # The result.
    if process.is_main:
        print(f"trained in {format_time(progress.seconds)}, everything is in {output}", flush=True)
    return score(learner, run, config.test_split, config.iterations, full=True)


def is_due(done: int, config: TrainConfig) -> bool:
    """Whether the student is evaluated on the way, after so many iterations."""
    every = config.eval_interval
    return every > 0 and done > 0 and done % every == 0 and done < config.iterations


def open_log(
    recipe: str,
    output: Path,
    start: int,
    config: TrainConfig,
    method: CLIPTeacherConfig,
    process: Process,
) -> MetricsLog | None:
    """Write config.json and environment.json, open metrics.jsonl (main process only)."""
    environment = describe_environment(process)  # of all processes
    if not process.is_main:
        return None
    record_start({"recipe": recipe, **config_as_dict(config, method)}, environment, output, start)
    return MetricsLog(output / "metrics.jsonl", start, tensorboard=config.tensorboard)


def build_loader(
    dataset: SeenOnly, config: TrainConfig, process: Process, start: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's part of every batch, from iteration ``start`` on."""
    transform = training_transform(
        config.crop,
        scale=config.resize,
        ratio=config.ratio,
        max_class_share=config.max_class_share,
        flip=config.flip,
        photometric=config.photometric,
    )
    batches = rank_indices(
        start, config.iterations, config.batch_size, process.rank, process.world_size
    )
    return DataLoader(
        WatchedSamples(TrainingStream(dataset, transform, config.seed), config.workers),
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=process.device.type == "cuda",
        persistent_workers=config.workers > 0,
        worker_init_fn=ignore_signals,
        # The loader draws a seed when it starts; drawn from the global generator it would shift
        # the dropout of a resumed run.
        generator=torch.Generator(),
    )


if __name__ == "__main__":
    main()
