r"""How good are the pseudo labels? Groups of the PLM against the labels that training never sees.

    python benchmarks/pseudo_labels.py --output runs/pseudo_labels                 # miniworld
    python benchmarks/pseudo_labels.py --data folder --root DIR --clip runs/clip/clip.pt \
        --output runs/pseudo_labels

Analysis only: nothing here goes into training. Scenes of the train split are grouped exactly as
in training (`PixelLearningModule.group_tokens`, seen labels given, unseen ones hidden), then the
groups are compared, pixel by pixel, with the hidden labels. Pixels that have no label at all, in
truth, count for "strict" and boundaries only. Means over images, except where said otherwise:

    purity      share of pixels whose group has their class as its majority
    strict      the same if all pixels without any label, in truth, were one more class
    pieces      groups that a class of an image is cut into: exp(entropy), 1 = one group
    rivals      the same over a batch of training, where every group of every image is a class
                of its own: with --potential-scope batch they compete for one hidden class
    mixed       share of pixels in groups where a second class holds over 5 % of the labelled pixels
    boundary    share of true boundary pixels with a boundary of groups within 2 px of 128
    ARI         adjusted Rand index, images with at least two hidden classes
    covered     share of pixels (all images) of hidden classes that got a group at all
    clusters    K-Means clusters that hold a token;   groups: what fusion leaves of them

Two references: every token a group of its own (the best that token resolution allows), and the
whole unannotated area as one group. Writes pseudo_labels.md and pseudo_labels.json; the last line
printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ablation_rows import TABLES
from torch import Tensor

from cliptteacher import IGNORE_INDEX
from cliptteacher.clip import CLIP, load_clip
from cliptteacher.data import open_dataset
from cliptteacher.data.splits import ClassSplit, SegmentationDataset
from cliptteacher.data.transforms import cut_to_patches
from cliptteacher.files import write_json, write_text
from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.plm import PixelLearningModule, resize_nearest, unannotated_share
from cliptteacher.training.config import TrainConfig, resolve_config
from cliptteacher.training.recipes import get_recipe

MIXED_SHARE = 0.05
TOLERANCE = 2 / 128  # of the longer side
CLUSTERING = {"seeding", "tokens", "fusion_threshold", "scales", "kmeans_iterations"}
COLUMNS = (
    "purity",
    "strict",
    "pieces",
    "rivals",
    "mixed",
    "boundary",
    "ARI",
    "covered",
    "groups",
    "clusters",
)
IN_PERCENT = {"purity", "strict", "mixed", "boundary", "covered"}


class Batch(NamedTuple):
    """Images of one size: what training sees of them, and what it does not."""

    tokens: dict[str, Tensor]  # "projected" and "final", (B, C', h, w)
    seen: Tensor  # (B, H, W) labels of training: seen classes, 255
    hidden: Tensor  # (B, H, W) unseen classes as label values, -1 everywhere else


# tokens and seen labels -> groups (B, h, w) and clusters alive (B,), if there are clusters
Grouping = Callable[[Batch], tuple[Tensor, Tensor | None]]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("data", "root", "clip") if getattr(args, name)}
    recipe = get_recipe(args.data)
    config, base = resolve_config((TrainConfig, CLIPTeacherConfig), (recipe, given))
    clip = load_clip(config.clip, activation=config.clip_activation, heads=config.clip_heads)
    dataset = open_dataset(config.data, config.root, args.split)
    with torch.inference_mode():
        batches = list(
            read_batches(dataset, clip, config.eval_resize, args.scenes, args.batch_size)
        )
        results: dict[str, dict[str, float | None]] = {}
        for name, grouping in groupings(base, clip.embed_dim).items():
            began = time.monotonic()
            results[name] = {**measure(batches, grouping), "seconds": time.monotonic() - began}
            print(f"{name:<28} {' '.join(cells(results[name]))}", flush=True)
    images = sum(len(batch.seen) for batch in batches)
    settings = {**vars(args), "images": images, "clip": config.clip}
    del settings["output"]
    text = markdown(results, settings)
    write_text(text, args.output / "pseudo_labels.md")
    write_json({"settings": settings, "results": results}, args.output / "pseudo_labels.json")
    print(text)
    print(json.dumps(results))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("miniworld", "folder"), default="miniworld")
    add("--root", help="folder of the data set")
    add("--clip", help="name or path of the teacher; default: that of the recipe")
    add("--split", default="train")
    add("--scenes", type=int, default=384, help="the first so many images")
    add("--batch-size", type=int, default=16, help="that of training, for the rivals")
    add("--threads", type=int, default=1)
    add("--output", type=Path, required=True)
    return parser.parse_args(argv)


def read_batches(
    dataset: SegmentationDataset,
    clip: CLIP,
    scale: tuple[int, int] | None,
    scenes: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Encode the first scenes at the size that the recipe works at, those of one size together."""
    split = ClassSplit(dataset.class_names, dataset.unseen)
    unseen = torch.full((256,), -1)
    unseen[list(split.unseen)] = torch.tensor(split.unseen)
    waiting: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for index in range(min(scenes, len(dataset))):
        pair = cut_to_patches(*dataset[index], clip.patch_size, scale)
        waiting.setdefault(tuple(pair[1].shape), []).append(pair)
    for pairs in waiting.values():
        for first in range(0, len(pairs), batch_size):
            images, labels = map(torch.stack, zip(*pairs[first : first + batch_size], strict=True))
            features = clip.encode_image(images.float() / 255)
            tokens = {"projected": features.dense, "final": features.final}
            yield Batch(tokens, split.seen_lookup()[labels.long()], unseen[labels.long()])


def groupings(base: CLIPTeacherConfig, channels: int) -> dict[str, Grouping]:
    """The base, every reading that changes the clusters in one field, and the two references."""
    readings = {
        row.title: row.overrides
        for row in TABLES["readings"]
        if row.overrides and row.overrides.keys() <= CLUSTERING
    }
    readings = {"base": {}, **readings, "no fusion": {"fusion_threshold": 1.0}}
    found: dict[str, Grouping] = {}
    for name, overrides in readings.items():
        same = all(getattr(base, field) == value for field, value in overrides.items())
        if name == "base" or not same:
            found[name] = clusters_of(base, channels, overrides)
    return {**found, "one group a token": single_tokens, "one group an image": whole_area}


def clusters_of(base: CLIPTeacherConfig, channels: int, overrides: Mapping[str, Any]) -> Grouping:
    """Group as the Pixel Learning Module does; without fusion, every cluster is a group."""
    config = replace(base, **overrides, adapter="identity")
    fused = PixelLearningModule(channels, config)
    single = PixelLearningModule(
        channels, replace(config, fusion_threshold=2.0)
    )  # above any cosine

    def group(batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = batch.tokens[config.tokens]
        clusters, _ = single.group_tokens(tokens, batch.seen)
        alive = torch.tensor([len(image[image >= 0].unique()) for image in clusters])
        if config.fusion_threshold >= 1:
            return clusters, alive
        return fused.group_tokens(tokens, batch.seen)[0], alive

    return group


def single_tokens(batch: Batch) -> tuple[Tensor, None]:
    B, _, h, w = batch.tokens["projected"].shape
    ids = torch.arange(h * w).reshape(1, h, w).expand(B, h, w)
    return ids.where(unannotated_share(batch.seen, (h, w)) > 0.5, -1), None


def whole_area(batch: Batch) -> tuple[Tensor, None]:
    return single_tokens(batch)[0].clamp(max=0), None


def measure(batches: Sequence[Batch], grouping: Grouping) -> dict[str, float | None]:
    """Compare the groups of all images with their hidden labels."""
    rows: list[dict[str, float]] = []
    for batch in batches:
        groups, alive = grouping(batch)
        size = (batch.seen.shape[1], batch.seen.shape[2])
        large = resize_nearest(groups, size)
        large = large.where(batch.seen == IGNORE_INDEX, -1)  # a seen pixel keeps its label
        rows.append(rivals(large, batch.hidden))
        for b in range(len(large)):
            row = compare(large[b], batch.hidden[b], batch.seen[b] == IGNORE_INDEX)
            clusters = {} if alive is None else {"clusters": float(alive[b])}
            rows.append(
                {**row, "groups": float(len(groups[b][groups[b] >= 0].unique())), **clusters}
            )
    return summarise(rows)


def compare(groups: Tensor, hidden: Tensor, free: Tensor) -> dict[str, float]:
    """Measure one image; what is not defined there is left out.

    Args:
        groups: (H, W) group ids, -1 none.
        hidden: (H, W) hidden labels, -1 none.
        free: (H, W) bool, pixels without annotation: boundaries among them count.
    """
    both = (groups >= 0) & (hidden >= 0)
    row = {"hidden": float((hidden >= 0).sum()), "found": float(both.sum())}
    edges = boundaries(hidden, free)
    if edges.any():
        tolerance = max(1, round(TOLERANCE * max(hidden.shape)))
        near = F.max_pool2d(
            boundaries(groups, free)[None].float(), 2 * tolerance + 1, 1, tolerance
        )[0]
        row["boundary"] = float(near[edges].mean())
    if (groups >= 0).any():
        row["strict"] = purity(contingency(groups[groups >= 0], hidden[groups >= 0]))
    if both.any():
        table = contingency(groups[both], hidden[both])
        row |= {"purity": purity(table), "mixed": mixed(table), "pieces": pieces(table)}
        if table.shape[1] > 1:
            row["ARI"] = adjusted_rand(table)
    return row


def contingency(groups: Tensor, labels: Tensor) -> Tensor:
    """Count the pixels of every group and class that occur: (G, A) float64."""
    _, g = groups.unique(return_inverse=True)
    _, a = labels.unique(return_inverse=True)
    G, A = int(g.max()) + 1, int(a.max()) + 1
    return torch.bincount(g * A + a, minlength=G * A).reshape(G, A).double()


def purity(table: Tensor) -> float:
    return float(table.amax(dim=1).sum() / table.sum())


def mixed(table: Tensor) -> float:
    """Share of pixels in groups of which another than the largest class has over 5 %."""
    pixels = table.sum(dim=1)
    others = pixels - table.amax(dim=1)
    return float(pixels[others > MIXED_SHARE * pixels].sum() / pixels.sum())


def pieces(table: Tensor) -> float:
    """Mean over the classes of exp(entropy of how the class spreads over groups)."""
    shares = table / table.sum(dim=0)
    return float(torch.special.entr(shares).sum(dim=0).exp().mean())


def adjusted_rand(table: Tensor) -> float:
    """Adjusted Rand index of a contingency table; 1 for equal partitions, about 0 by chance."""

    def pairs(count: Tensor) -> float:
        return float((count * (count - 1) / 2).sum())

    together, total = pairs(table), pairs(table.sum()[None])
    rows, columns = pairs(table.sum(dim=1)), pairs(table.sum(dim=0))
    chance = rows * columns / total if total else 0.0
    largest = (rows + columns) / 2
    return 1.0 if largest == chance else (together - chance) / (largest - chance)


def boundaries(labels: Tensor, free: Tensor) -> Tensor:
    """Mark pixels whose right or lower neighbour has another value, where both are free."""
    edges = torch.zeros_like(free)
    edges[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & free[:, :-1] & free[:, 1:]
    edges[:-1] |= (labels[:-1] != labels[1:]) & free[:-1] & free[1:]
    return edges


def rivals(groups: Tensor, hidden: Tensor) -> dict[str, float]:
    """Count into how many groups of a whole batch (B, H, W) a hidden class is cut."""
    first = (groups.max() + 1) * torch.arange(len(groups))
    own = groups + first[:, None, None]
    both = (groups >= 0) & (hidden >= 0)
    return {"rivals": pieces(contingency(own[both], hidden[both]))} if both.any() else {}


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Average over the images that define a measure; None where none does."""
    result: dict[str, float | None] = {}
    for name in COLUMNS:
        values = [row[name] for row in rows if name in row]
        result[name] = sum(values) / len(values) if values else None
    hidden = sum(row.get("hidden", 0) for row in rows)
    result["covered"] = sum(row.get("found", 0) for row in rows) / hidden if hidden else None
    return result


def cells(result: Mapping[str, float | None]) -> list[str]:
    def cell(name: str) -> str:
        value = result[name]
        if value is None:
            return "-"
        return f"{100 * value:.1f}" if name in IN_PERCENT else f"{value:.2f}"

    return [cell(name) for name in COLUMNS]


def markdown(results: Mapping[str, Mapping[str, float | None]], settings: Mapping[str, Any]) -> str:
    heads = [f"{name} %" if name in IN_PERCENT else name for name in COLUMNS]
    place = settings["root"] or settings["data"]
    lines = [
        f"{settings['images']} images of {place}, split {settings['split']}, teacher "
        f"{settings['clip']}, {time.strftime('%Y-%m-%d')}",
        "",
        f"| reading | {' | '.join(heads)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| {name} | {' | '.join(cells(result))} |" for name, result in results.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
