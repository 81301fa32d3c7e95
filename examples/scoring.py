"""Evaluate the student of a run: scores, a panel of predictions, a line of the log."""

from __future__ import annotations

import json
from typing import Any

from learning import Learner
from saving import Run
from torch import Tensor

from cliptteacher.data import open_dataset
from cliptteacher.data.splits import SegmentationDataset
from cliptteacher.evaluation import SCORES, evaluate, format_scores, scores_as_percent
from cliptteacher.framework import CLIPTeacher
from cliptteacher.inference import Predictor
from cliptteacher.training.config import TrainConfig
from cliptteacher.training.distributed import from_main, share_buffers
from cliptteacher.training.run import MetricsLog
from cliptteacher.visualize import prediction_panel, write_png

PANEL_IMAGES = 6


def score(learner: Learner, run: Run, split: str, step: int, full: bool = False) -> dict[str, Any]:
    """Evaluate what a checkpoint of this moment offers as the student; print and log it."""
    share_buffers(learner.model.segmenter)
    with learner.evaluating():
        scores = assess(learner.model, run, split, step)
    learner.wrapped.train()
    report(scores, step, run.log, full)
    return scores


def was_scored(run: Run, split: str, step: int) -> bool:
    """Whether the log holds these scores: a run may have been killed before it had them."""
    found = False
    if run.process.is_main:
        rows = map(json.loads, (run.output / "metrics.jsonl").read_text().splitlines())
        found = any((row["step"], row.get("split")) == (step, split) for row in rows)
    return from_main(found)


def assess(model: CLIPTeacher, run: Run, split: str, step: int) -> dict[str, Any]:
    """Evaluate the student on all classes, every process its share, and draw a panel."""
    config, process, output = run.config, run.process, run.output
    dataset = open_dataset(config.data, config.root, split)
    predictor = build_predictor(model, run.text, config, dataset)
    shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(index: int, image: Tensor, label: Tensor, prediction: Tensor) -> None:
        if len(shown) < PANEL_IMAGES:
            shown.append((image.cpu(), label.cpu(), prediction.cpu()))

    result = evaluate(
        predictor,
        dataset,
        device=process.device,
        rank=process.rank,
        world_size=process.world_size,
        batch_size=8,
        on_sample=keep,
    )
    if process.is_main and shown:
        images, labels, predictions = (list(column) for column in zip(*shown, strict=True))
        panel = prediction_panel(images, labels, predictions, dataset.class_names, dataset.unseen)
        write_png(panel, output / "panels" / f"{split}_{step:08d}.png")
    scores = {"split": split, **scores_as_percent(result, dataset.class_names)}
    scores["table"] = format_scores(result, dataset.class_names, dataset.unseen)
    return scores


def build_predictor(
    model: CLIPTeacher, text: Tensor, config: TrainConfig, dataset: SegmentationDataset
) -> Predictor:
    """The student with the text features of all classes: here the unseen words come in."""
    return Predictor(
        model.segmenter,
        text,
        unseen=() if config.closed_set else dataset.unseen,
        gamma=config.gamma,
        logit_scale=model.config.logit_scale,
        logits=model.config.logits,
        mode=config.eval_mode,
        window=config.crop,
        stride=max(1, config.crop * 5 // 6),
        resize=config.eval_resize,
        size_divisor=config.eval_size_divisor,
    )


def report(scores: dict[str, Any], step: int, log: MetricsLog | None, full: bool = False) -> None:
    """Print and log the scores (main process only)."""
    if log is None:
        return
    table = str(scores.pop("table"))
    log.write({"step": step, **scores})
    four = "  ".join(f"{name} {_percent(scores[name])}" for name in SCORES)
    print(table if full else f"{step:>6} {scores['split']}: {four}", flush=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
