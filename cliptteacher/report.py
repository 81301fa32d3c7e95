"""Write `report.html`: a finished run to look at, in one file without network or scripts.

    the four scores; curves of scores and losses; IoU of every class, seen and unseen
    what is taken for what: the five largest confusions, each with a picture
    image | label | prediction | unseen classes
    attention of the GLM, Eq. (1), and clusters and fused groups of the PLM, on two images
    command, commit, machine, configuration

Confusions and pictures are of the first images of the split, of which each is predicted once more.
Cost: one prediction of at most 64 images.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .data import SegmentationDataset
from .data.splits import ClassSplit, most_varied
from .data.transforms import cut_to_patches
from .evaluation import PANEL_IMAGES, SCORES
from .files import read_json, write_text
from .framework import CLIPTeacher
from .glm import attention_weights
from .inference import Predictor
from .metrics import confusion_matrix
from .pages import css, line_chart, page, picture, table, text
from .palette import word_palette
from .segmenters.student import eval_view
from .visualize import cluster_map, heat_map, prediction_panel

IMAGES = 64  # that are looked at
CONFUSIONS, TEACHER_IMAGES = 5, 2
_NO_LOSS = {"step", "lr", "images_per_second", "data_wait", "peak_memory_gib", "seconds_left"}


class Example(NamedTuple):
    """An image, its labels of all classes, and what was predicted, all on the CPU."""

    image: Tensor  # (3, H, W) uint8
    label: Tensor  # (H, W)
    prediction: Tensor  # (H, W)


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another."""

    label: int
    prediction: int
    pixels: int
    share: float  # of the pixels of the class
    example: int  # the image with the most of them


def report_run(
    folder: Path, model: CLIPTeacher, predictor: Predictor, dataset: SegmentationDataset
) -> None:
    """Write the report of a finished run; a failure is a warning, for the run is complete."""
    try:
        write_report(folder, model, predictor, dataset)
    except Exception as error:
        warnings.warn(f"{folder} has no report.html: {error}; the run is complete", stacklevel=2)


@torch.no_grad()
def write_report(
    folder: Path, model: CLIPTeacher, predictor: Predictor, dataset: SegmentationDataset
) -> Path:
    """Write the report of a finished run into its directory.

    Args:
        folder: the run directory, with config.json, environment.json and metrics.jsonl.
        model: the trained model, for what the teacher sees.
        predictor: the student with the words of the data set.
        dataset: images with the labels of all classes; the one of the last evaluation.

    Returns:
        The file.
    """
    config, environment = (read_json(folder / f"{name}.json") for name in ("config", "environment"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "split" in row]
    final = evaluations[-1]
    names, unseen = dataset.class_names, dataset.unseen
    examples = predict_examples(predictor, dataset)
    shown = examples[:PANEL_IMAGES]
    sections = [
        _tiles(final, config),
        "<h2>Curves</h2>",
        _curves([row for row in rows if "split" not in row], evaluations),
        f"<h2>Classes, {text(final['split'])}</h2>",
        _classes(final["IoU"], names, unseen),
        "<h2>What is taken for what</h2>",
        *_confusions(examples, names, unseen),
        "<h2>Predictions</h2>",
        picture(prediction_panel(*_columns(shown), names, unseen), "", 1400),
        "<h2>What the teacher sees</h2>",
        *_teacher(model, dataset, predictor.resize),
        "<h2>How it was made</h2>",
        _origin(environment, config),
    ]
    path = folder / "report.html"
    write_text(page(f"{config.get('recipe', 'run')}: {folder.name}", "\n".join(sections)), path)
    return path


def predict_examples(predictor: Predictor, dataset: SegmentationDataset) -> list[Example]:
    """Predict the first images of a data set."""
    examples: list[Example] = []
    for index in range(min(IMAGES, len(dataset))):
        image, label = dataset[index]
        examples.append(Example(image, label, predictor(image).cpu()))
    return examples


def largest_confusions(examples: Sequence[Example], num_classes: int) -> list[Confusion]:
    """Find the pairs of a class and another one that took most of its pixels."""
    each = torch.stack([confusion_matrix(e.prediction, e.label, num_classes) for e in examples])
    total = each.sum(dim=0)
    wrong = total.clone().fill_diagonal_(0)
    found: list[Confusion] = []
    for position in wrong.flatten().argsort(descending=True, stable=True)[:CONFUSIONS].tolist():
        label, prediction = divmod(position, num_classes)
        pixels = int(wrong[label, prediction])
        if pixels:
            share = pixels / int(total[label].sum())
            example = int(each[:, label, prediction].argmax())
            found.append(Confusion(label, prediction, pixels, share, example))
    return found


def _tiles(final: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile">{name}<b>{_percent(final[name])}</b></div>' for name in SCORES
    )
    words = (
        f"Split {final['split']}, step {final['step']}. Teacher {config.get('clip')}, student "
        f"{config.get('segmenter')}, data {config.get('data')}, {config.get('setting')} setting, "
        f"seed {config.get('seed')}."
    )
    return f'<p class="note">{text(words)}</p><div class="row">{tiles}</div>'


def _curves(losses: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    scores = {
        name: [(row["step"], row[name]) for row in evaluations if row[name] is not None]
        for name in SCORES
    }
    charts = [line_chart(scores, "", (330, 200))]
    keys = [key for key in dict.fromkeys(key for row in losses for key in row)
            if key not in _NO_LOSS]  # fmt: skip
    for key in ["total", *(key for key in keys if key != "total"), "lr"]:
        points = [
            (row["step"], row[key]) for row in losses if isinstance(row.get(key), int | float)
        ]
        top = max((y for _, y in points[len(points) // 10 :]), default=0.0)
        charts.append(line_chart({key: [p for p in points if p[1] <= top or key == "lr"]}, key))
    note = (
        "Scores in percent; losses as they enter the total, without the points of the first tenth "
        "that are above all later ones; step of training below."
    )
    return f'<p class="note">{note}</p><div class="row">{"".join(charts)}</div>'


def _classes(iou: Mapping[str, float | None], names: Sequence[str], unseen: Sequence[int]) -> str:
    """The table of the classes, best first; absent ones at the end."""
    values = {name: -math.inf if iou[name] is None else float(iou[name] or 0) for name in names}
    order = sorted(range(len(names)), key=lambda k: -values[names[k]])
    colours = word_palette(names)
    rows: list[tuple[str, ...]] = []
    for k in order:
        length = max(0.0, values[names[k]])
        bar = f"width:min({3 * length:.0f}px, {length / 2.5:.0f}vw)"
        rows.append(
            (
                f'<i class="swatch" style="background:{css(colours[k])}"></i>{text(names[k])}',
                "unseen" if k in unseen else "seen",
                _percent(iou[names[k]]),
                f'<span class="bar" style="{bar}"></span>',
            )
        )
    kinds = ["unseen" if k in unseen else "seen" for k in order]
    body = table(("class", "group", "IoU", ""), rows, kinds)
    return body.replace("<td>unseen</td>", '<td class="group">unseen</td>')


def _confusions(
    examples: Sequence[Example], names: Sequence[str], unseen: Sequence[int]
) -> list[str]:
    found = largest_confusions(examples, len(names))
    parts = [f'<p class="note">Over the first {len(examples)} images.</p>']
    for each in found:
        words = (
            f"{names[each.label]} taken for {names[each.prediction]}: {100 * each.share:.1f}% of "
            f"its pixels ({each.pixels:,})"
        )
        panel = prediction_panel(*_columns([examples[each.example]]), names, unseen)
        parts.append(picture(panel, words, 900))
    return parts if found else [*parts, "<p>No pixel has another class than its label.</p>"]


def _teacher(
    model: CLIPTeacher, dataset: SegmentationDataset, scale: tuple[int, int] | None
) -> list[str]:
    """Attention and clusters of the images with the most seen and unseen classes."""
    clip, device = model.clip, next(model.segmenter.parameters()).device
    lookup = ClassSplit(dataset.class_names, dataset.unseen).seen_lookup()
    note = (
        "Image; attention of the CLS token over the features of the student; groups of tokens that "
        "the PLM finds where no seen class is labelled, in grey the rest."
    )
    parts = [f'<p class="note">{note}</p>']
    for index in most_varied(dataset, IMAGES, TEACHER_IMAGES):
        image, labels = cut_to_patches(*dataset[index], clip.patch_size, scale)
        pixels = image[None].to(device).float() / 255
        dense = eval_view(model.segmenter)(pixels)
        teacher = model.encode(pixels)
        tokens = teacher.dense if model.config.tokens == "projected" else teacher.final
        seen = lookup[labels.long()][None].to(device)
        groups = model.plm.group_tokens(tokens, seen)[0][0]
        weights = attention_weights(dense.float(), teacher.cls.float(), model.config.glm_query)[0]
        maps = [
            cluster_map(image, torch.zeros(1, 1, dtype=torch.long), alpha=0.0),
            heat_map(image, weights),
            cluster_map(image, groups),
        ]
        count = len(set(groups[groups >= 0].tolist()))
        parts.append(picture(_beside(maps), f"{dataset.image_name(index)}: {count} groups", 900))
    return parts


def _beside(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    width = sum(each.width for each in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(each.height for each in pictures)), (255, 255, 255))
    left = 0
    for each in pictures:
        canvas.paste(each, (left, 0))
        left += each.width + gap
    return canvas


def _origin(environment: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    commit = environment.get("commit") or "unknown"
    devices = [f"{d.get('device')} ({d.get('name')}, {d.get('threads')} threads)"
               for d in environment.get("devices", [])]  # fmt: skip
    rows = [
        ("date", environment.get("date")),
        ("commit", f"{commit}, with changes" if environment.get("dirty") else commit),
        ("machine", f"{environment.get('platform')}; {', '.join(devices)}"),
        *((name, environment.get(name)) for name in ("python", "torch", "cuda", "processes")),
    ]
    facts = table(("", ""), [(text(name), text(value)) for name, value in rows])
    fields = table(("", ""), [(text(key), text(value)) for key, value in config.items()])
    return (
        f"<pre>{text(environment.get('command'))}</pre>{facts}"
        f"<details><summary>configuration</summary>{fields}</details>"
    )


def _columns(examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return (
        [e.image for e in examples],
        [e.label for e in examples],
        [e.prediction for e in examples],
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
