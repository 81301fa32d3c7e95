"""Whole runs of `examples/train.py` in this process, in a second or two each."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_programs import tiny_clip, write_dataset
from torch import Tensor, nn

from cliptteacher.checkpoint import load_checkpoint
from cliptteacher.clip import save_clip

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("grass", "sky", "brick", "water")
CLOCKS = ("images_per_second", "data_wait", "peak_memory_gib", "seconds_left")


class NoisyStudent(nn.Module):
    """A convolution of stride 4, BatchNorm, dropout and a head: whatever a run must carry along."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 4, stride=4), nn.BatchNorm2d(12))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Conv2d(12, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.backbone(images))))


def make_space(folder: Path) -> Path:
    """Write a data set (data/) and a CLIP of random weights (clip.pt)."""
    write_dataset(folder / "data", NAMES, "water")
    torch.manual_seed(0)
    save_clip(tiny_clip(), folder / "clip.pt")
    return folder


def options(space: Path, output: Path | None, *more: str) -> list[str]:
    text = f"""--data folder --root {space / "data"} --clip {space / "clip.pt"}
        --segmenter segformer_nano --iterations 6 --batch-size 4 --crop 64 --resize 64 64
        --checkpoint-interval 2 --eval-interval 0 --log-interval 1
        --warmup 1 --kmeans-iterations 2 --bank-size 2 --device cpu --seed 3"""
    where = [] if output is None else ["--output", str(output)]
    return [*text.split(), *where, *more]


def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import train.py, with a student that costs nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    train = importlib.import_module("train")
    monkeypatch.setattr(
        train, "build_segmenter", lambda _, channels, *__, **___: NoisyStudent(channels)
    )
    torch.set_num_threads(1)
    return train


def rows(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def final(output: Path) -> dict[str, Any]:
    """The newest checkpoint without the flags that two compared runs do not share."""
    content = load_checkpoint(output)
    for flag in ("output", "resume", "workers"):
        content["config"].pop(flag)
    return content
