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
from pathlib import Path
from typing import Any

import torch
from plan import dry_run, print_plan
from saving import checkpoint_content, choose_output, resume
from scoring import assess, report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
from cliptteacher.training.checkpoint import save_checkpoint
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
from cliptteacher.training.optimizer import build_optimizer, parameter_groups, set_learning_rate
from cliptteacher.training.progress import Progress, format_time
from cliptteacher.training.recipes import default_recipe, get_recipe
from cliptteacher.training.run import (
    MetricsLog,
    check_tensorboard,
    describe_environment,
    record_start,
)
from cliptteacher.training.schedule import learning_rate_factor


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
        file = read_json(namespace.config) if namespace.config else {}
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
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    segmenter = segmenter.to(memory_format=layout)
    model = CLIPTeacher(clip, segmenter, seen_set.class_names, method).to(process.device)
    groups = parameter_groups(
        model, config.learning_rate, config.weight_decay, config.head_multiplier
    )
    if process.is_main:
        seen = len(seen_set.class_names)
        classes = (seen, len(train_set.class_names) - seen)
        print_plan(recipe, config, groups, classes, len(train_set), process)
    optimizer = build_optimizer(groups)

    # Run directory, and where an earlier run stopped.
    output = choose_output(recipe, config, process)
    start = resume(output, config, model, optimizer, process)
    log = open_log(recipe, output, start, config, method, process)

    # The loop. Evaluation and prediction, not training, need the words of all classes.
    text = class_text_features(clip, train_set.class_names, method.templates)
    schedule = (config.iterations, config.warmup, config.warmup_start, config.power)
    wrapped = wrap(model, process).train()
    progress = Progress(config.iterations, start, config.batch_size, process.device, log)
    loader = build_loader(seen_set, config, process, start)
    for step, (images, labels) in enumerate(progress.time_batches(loader), start):
        set_learning_rate(optimizer, learning_rate_factor(step, *schedule))
        images = images.to(process.device, non_blocking=True, memory_format=layout)
        labels = labels.to(process.device, non_blocking=True)
        progress.add(train_step(wrapped, optimizer, images, labels, config))
        done = step + 1
        if done % config.log_interval == 0 or done == config.iterations:
            line = progress.report(done, optimizer.param_groups[0]["lr"])
            if line is not None:
                print(line, flush=True)
        if done % config.checkpoint_interval == 0 or done == config.iterations:
            with progress.paused():
                content = checkpoint_content(
                    done, model, optimizer, config, train_set, text, process
                )
                if process.is_main:
                    save_checkpoint(content, output / "checkpoints", config.keep_checkpoints)
        if config.eval_interval and done % config.eval_interval == 0 and done < config.iterations:
            with progress.paused():
                scores = assess(model, text, config, config.eval_split, process, output, done)
                report(scores, done, log)
            wrapped.train()

    # The result.
    scores = assess(model, text, config, config.test_split, process, output, config.iterations)
    if process.is_main:
        print(f"trained in {format_time(progress.seconds)}, everything is in {output}")
    report(scores, config.iterations, log, full=True)
    return scores


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


def wrap(model: CLIPTeacher, process: Process) -> nn.Module:
    """Average gradients over processes, if there are several."""
    if process.world_size == 1:
        return model
    devices = [process.local_rank] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


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
        TrainingStream(dataset, transform, config.seed),
        batch_sampler=batches,
        num_workers=config.workers,
        pin_memory=process.device.type == "cuda",
        persistent_workers=config.workers > 0,
        # The loader draws a seed when it starts; drawn from the global generator it would shift
        # the dropout of a resumed run.
        generator=torch.Generator(),
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """Update the student once; returns the losses, detached and still on the device."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        losses = model(images, labels)
    optimizer.zero_grad(set_to_none=True)
    losses["total"].backward()
    if config.clip_gradient > 0:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_gradient)
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


if __name__ == "__main__":
    main()
