"""The run directory's checkpoints: what they hold, and how a run takes them up again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning import Learner
from torch import Tensor

from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.training.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint
from cliptteacher.training.config import TrainConfig, config_as_dict
from cliptteacher.training.distributed import (
    Process,
    from_main,
    gather_from_processes,
    launch_id,
    was_restarted,
)
from cliptteacher.training.run import MetricsLog, default_output, write_json


@dataclass(frozen=True)
class Run:
    """What stays the same from the first iteration to the last."""

    config: TrainConfig
    process: Process
    output: Path
    dataset: SegmentationDataset  # of training, with the names of all classes
    text: Tensor  # (A, C) text features of all classes: for prediction, not for training
    log: MetricsLog | None  # on the main process


LAUNCH = "launch.json"  # which torchrun made the directory: a restarted attempt goes on there


def choose_output(recipe: str, config: TrainConfig, process: Process) -> Path:
    """The run directory, the same on all processes; a used one is an error unless it resumes."""
    chosen = _choose_output(recipe, config) if process.is_main else (Path(), "")
    output, problem = from_main(chosen)
    if problem:
        raise SystemExit(problem if process.is_main else 1)
    return output


def _choose_output(recipe: str, config: TrainConfig) -> tuple[Path, str]:
    output = Path(config.output) if config.output else default_output(recipe)
    if was_restarted() and not config.output:
        output = find_launched(output.parent, recipe) or output
    if (output / "checkpoints").exists() and not (config.resume or was_restarted()):
        return output, f"{output} already holds a run; add --resume or choose another --output"
    output.mkdir(parents=True, exist_ok=True)
    write_json({"launch": launch_id()}, output / LAUNCH)
    return output, ""


def find_launched(folder: Path, recipe: str) -> Path | None:
    """The newest run directory that an earlier attempt of this torchrun made."""
    files = folder.glob(f"{recipe}-*/{LAUNCH}")
    own = [f.parent for f in files if json.loads(f.read_text())["launch"] == launch_id()]
    return max(own, default=None)  # names end in the date


def resume(output: Path, learner: Learner, config: TrainConfig, process: Process) -> int:
    """Take up the newest undamaged checkpoint, if there is one; returns the step to start with."""
    torch.manual_seed(config.seed + 1000 * (process.rank + 1))  # dropout differs between ranks
    path = from_main(_find_checkpoint(output) if process.is_main else None)
    if path is None:
        return 0
    if isinstance(path, str):
        raise SystemExit(path if process.is_main else 1)
    state = read_checkpoint(path)
    learner.load_state_dict(state["training"], state["segmenter"])
    restore_random_numbers(state["training"], process)
    if process.is_main:
        print(f"resumed from step {state['step']} in {output}", flush=True)
    return int(state["step"])


def _find_checkpoint(output: Path) -> Path | str | None:
    """The main process alone compares digests; what is wrong, as a sentence for all."""
    try:
        return newest_checkpoint(output / "checkpoints")
    except ValueError as error:
        return f"error: {error}"


def restore_random_numbers(training: dict[str, Any], process: Process) -> None:
    """Let dropout go on where it stopped, on every process."""
    if len(training["rng"]) != process.world_size:
        if process.is_main:
            print("warning: another number of processes than before: dropout starts anew")
        return
    torch.set_rng_state(training["rng"][process.rank])
    if process.device.type == "cuda" and training["cuda_rng"]:
        torch.cuda.set_rng_state(training["cuda_rng"][process.rank], process.device)


def save(step: int, learner: Learner, run: Run) -> None:
    """Write a checkpoint; every process takes part, the main one writes.

    A disk that is full ends the run on all processes, with one sentence.
    """
    content = checkpoint_content(step, learner, run)
    problem, is_main = "", run.process.is_main
    if is_main:
        try:
            save_checkpoint(content, run.output / "checkpoints", run.config.keep_checkpoints)
        except OSError as error:
            problem = f"error: {error.strerror or error}"
    problem = from_main(problem)
    if problem:
        raise SystemExit(problem if is_main else 1)


def checkpoint_content(step: int, learner: Learner, run: Run) -> dict[str, Any]:
    """Everything to go on from, and everything to predict with; every process takes part."""
    model, config, process, dataset = learner.model, run.config, run.process, run.dataset
    method, cuda = model.config, process.device.type == "cuda"
    rng = gather_from_processes(torch.get_rng_state(), process.device)
    cuda_rng = torch.cuda.get_rng_state(process.device) if cuda else torch.empty(0)
    unseen = () if config.closed_set else dataset.unseen
    return {
        "step": step,
        "segmenter": learner.student_weights(),
        "segmenter_name": config.segmenter,
        "channels": model.clip.embed_dim,
        "class_names": list(dataset.class_names),
        "unseen": list(unseen),
        "text_features": run.text.cpu(),
        "gamma": config.gamma,
        "logit_scale": method.logit_scale,
        "logits": method.logits,
        "resize": list(config.eval_resize or ()),
        "size_divisor": config.eval_size_divisor,
        "templates": method.templates,
        "clip": config.clip,
        "training": {
            **learner.state_dict(),
            "rng": rng,
            "cuda_rng": gather_from_processes(cuda_rng, process.device) if cuda else [],
        },
        "config": config_as_dict(config, method),
    }
