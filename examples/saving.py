"""The run directory's checkpoints: what they hold, and how a run takes them up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.framework import CLIPTeacher
from cliptteacher.training.checkpoint import load_checkpoint
from cliptteacher.training.config import TrainConfig, config_as_dict
from cliptteacher.training.distributed import Process, gather_from_processes, wait_for_all
from cliptteacher.training.run import default_output


def choose_output(recipe: str, config: TrainConfig, process: Process) -> Path:
    """The run directory; a used one is an error unless the run resumes."""
    output = Path(config.output) if config.output else default_output(recipe)
    if not config.resume and (output / "checkpoints").exists():
        raise SystemExit(f"{output} already holds a run; add --resume or choose another --output")
    if process.is_main:
        output.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    return output


def resume(
    output: Path,
    config: TrainConfig,
    model: CLIPTeacher,
    optimizer: torch.optim.Optimizer,
    process: Process,
) -> int:
    """Take up the newest checkpoint, if asked and there is one; returns the step to start with."""
    torch.manual_seed(config.seed + 1000 * (process.rank + 1))  # dropout differs between ranks
    if not (config.resume and (output / "checkpoints" / "last.pt").exists()):
        return 0
    state = load_checkpoint(output)
    training = state["training"]
    model.segmenter.load_state_dict(state["segmenter"])
    model.plm.adapter.load_state_dict(training["adapter"])
    for module, bank in zip(model.glm, training["bank"], strict=True):
        module.bank.load_state_dict(bank, process.device)
    optimizer.load_state_dict(training["optimizer"])
    if len(training["rng"]) != process.world_size:
        print("warning: another number of processes than before: dropout starts from new numbers")
    else:
        torch.set_rng_state(training["rng"][process.rank])
        if process.device.type == "cuda" and training["cuda_rng"]:
            torch.cuda.set_rng_state(training["cuda_rng"][process.rank], process.device)
    if process.is_main:
        print(f"resumed from step {state['step']} in {output}")
    return int(state["step"])


def checkpoint_content(
    step: int,
    model: CLIPTeacher,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    dataset: SegmentationDataset,
    text: Tensor,
    process: Process,
) -> dict[str, Any]:
    """Everything to go on from, and everything to predict with; every process takes part."""
    method, cuda = model.config, process.device.type == "cuda"
    rng = gather_from_processes(torch.get_rng_state(), process.device)
    cuda_rng = torch.cuda.get_rng_state(process.device) if cuda else torch.empty(0)
    unseen = () if config.closed_set else dataset.unseen
    return {
        "step": step,
        "segmenter": model.segmenter.state_dict(),
        "segmenter_name": config.segmenter,
        "channels": model.clip.embed_dim,
        "class_names": list(dataset.class_names),
        "unseen": list(unseen),
        "text_features": text.cpu(),
        "gamma": config.gamma,
        "logit_scale": method.logit_scale,
        "logits": method.logits,
        "resize": list(config.eval_resize or ()),
        "templates": method.templates,
        "clip": config.clip,
        "training": {
            "optimizer": optimizer.state_dict(),
            "bank": [module.bank.state_dict() for module in model.glm],
            "adapter": model.plm.adapter.state_dict(),
            "rng": rng,
            "cuda_rng": gather_from_processes(cuda_rng, process.device) if cuda else [],
        },
        "config": config_as_dict(config, method),
    }
