r"""Draw what a trained student and its teacher see: Figures 5, 6 and 7 of arXiv:2310.02296v1.

    python examples/visualize.py --checkpoint runs/miniworld --output figures
    python examples/visualize.py --checkpoint runs/photos --clip runs/clip/clip.pt --images 6 \
        --output figures

figure5.png   attention of the GLM, Eq. (1): where the CLS token looks among the student's features
figure5.json  the same in figures, over the first images of the split
figure6.png   K-Means of CLIP's dense tokens without annotation: centres, and what fusion makes
figure7.png   predictions, with the unseen classes alone in the last column

Images with the most classes of both kinds come first. Seen labels go in, as in training; the
unseen ones are only shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cliptteacher import IGNORE_INDEX
from cliptteacher.clip import CLIP, ImageFeatures
from cliptteacher.command_line import add_clip_flags, clip_settings, number, one_sentence_errors
from cliptteacher.data import SegmentationDataset, open_dataset
from cliptteacher.data.splits import ClassSplit, most_varied
from cliptteacher.data.transforms import cut_to_patches
from cliptteacher.files import write_json
from cliptteacher.glm import attention_weights
from cliptteacher.inference import TrainedSegmenter, load_segmenter
from cliptteacher.plm import PixelLearningModule, PLMConfig
from cliptteacher.training.config import resolve_config
from cliptteacher.visualize import cluster_map, heat_map, overlay, prediction_panel, write_png

GAP, MARGIN, TITLE = 10, 14, 30
PAPER, INK, SOFT = (255, 255, 255), (40, 40, 40), (110, 116, 124)
CENTERS = 4  # of Figure 6: the largest one of each of the largest groups
MEASURED = 64  # images whose attention is measured
KINDS = ("seen", "unseen", "no label")
OVERLAY_MARGIN = 12  # of the pictures of `overlay`


class Sample(NamedTuple):
    """One image as the teacher takes it, with all labels and with those of training."""

    name: str
    image: Tensor  # (3, H, W) uint8
    labels: Tensor  # (H, W) all classes
    seen: Tensor  # (H, W) seen classes as in training, 255


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with one_sentence_errors("visualize.py"):
        draw(args)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a file, or the directory of a run")
    add("--data", help="default: that of training")
    add("--root", help="folder of the data set; default: that of training")
    add("--split", default="val")
    add_clip_flags(parser, "the teacher; default: that of training")
    add("--images", type=number(int, 1), default=6, help="rows of each figure")
    add("--output", type=Path, required=True, help="folder of the figures")
    return parser.parse_args(argv)


@torch.inference_mode()
def draw(args: argparse.Namespace) -> None:
    """Write the three figures."""
    trained = load_segmenter(args.checkpoint)
    config = trained.checkpoint["config"]
    data, root = args.data or config["data"], args.root or config["root"]
    dataset = open_dataset(data, root, args.split)
    if tuple(dataset.class_names) != trained.class_names:
        raise ValueError(
            f"the data set must have the classes of training, {', '.join(trained.class_names)}, "
            f"got {', '.join(dataset.class_names)}; give the --data and --root of training"
        )
    clip = trained.load_teacher(args.clip, **clip_settings(args))
    samples = choose_samples(dataset, args.images, clip.patch_size, trained.settings["resize"])
    pictures = {
        "figure5": attention_figure(samples, trained, clip, dataset.unseen),
        "figure6": cluster_figure(samples, config, clip, dataset),
        "figure7": prediction_figure(samples, trained, dataset),
    }
    for name, picture in pictures.items():
        write_png(picture, args.output / f"{name}.png")
        print(f"{args.output / name}.png")
    measured = measure_attention(dataset, trained, clip)
    write_json(measured, args.output / "figure5.json")
    print(
        f"attention over {measured['images']} images: as if spread evenly over "
        f"{measured['effective_share']:.1%} of the positions, largest weight "
        f"{measured['peak']:.2f} x the mean, share over area "
        + ", ".join(f"{name} {lift:.2f}" for name, lift in measured["lift"].items())
    )


def choose_samples(
    dataset: SegmentationDataset, count: int, patch: int, scale: tuple[int, int] | None
) -> list[Sample]:
    """Take the images with the most seen and unseen classes, whichever are fewer."""
    lookup = ClassSplit(dataset.class_names, dataset.unseen).seen_lookup()
    samples: list[Sample] = []
    for index in most_varied(dataset, len(dataset), count):
        image, labels = cut_to_patches(*dataset[index], patch, scale)
        samples.append(Sample(dataset.image_name(index), image, labels, lookup[labels.long()]))
    return samples


def encode(clip: CLIP, sample: Sample) -> ImageFeatures:
    return clip.encode_image(sample.image[None].float() / 255)


def attention_figure(
    samples: Sequence[Sample], trained: TrainedSegmenter, clip: CLIP, unseen: Sequence[int]
) -> Image.Image:
    """Figure 5: image, labels, attention of the CLS token; below, how much of it lies where."""
    rows: list[list[Image.Image]] = []
    captions: list[str] = []
    for sample in samples:
        weights = attention_of(sample, trained, clip)
        pictures = [
            plain(sample.image),
            heat_map(sample.image, weights),
            labelled(sample.image, sample.labels, trained.class_names, unseen),
        ]
        rows.append(pictures)
        captions.append(attention_caption(weights, sample, unseen))
    return grid(rows, ["image", "attention of the GLM", "labels"], captions)


def measure_attention(
    dataset: SegmentationDataset, trained: TrainedSegmenter, clip: CLIP
) -> dict[str, Any]:
    """Measure how far the attention of Eq. (1) is from the plain mean, over some images.

    ``effective_share`` is exp(entropy) over the number of positions: 1 for a plain mean. ``lift``
    is the attention on a kind of pixels over their area, 1 for a plain mean too.
    """
    lookup = ClassSplit(dataset.class_names, dataset.unseen).seen_lookup()
    count = min(MEASURED, len(dataset))
    spread, peak = 0.0, 0.0
    sums = {name: [0.0, 0.0] for name in KINDS}
    for index in range(count):
        image, labels = cut_to_patches(*dataset[index], clip.patch_size, trained.settings["resize"])
        sample = Sample(dataset.image_name(index), image, labels, lookup[labels.long()])
        weights = attention_of(sample, trained, clip)
        spread += float(torch.special.entr(weights).sum().exp()) / weights.numel() / count
        peak += float(weights.max() / weights.mean()) / count
        for name, (share, area) in attention_shares(weights, sample, dataset.unseen).items():
            sums[name][0] += share
            sums[name][1] += area
    lift = {name: share / area for name, (share, area) in sums.items() if area > 0}
    return {"images": count, "effective_share": spread, "peak": peak, "lift": lift}


def attention_of(sample: Sample, trained: TrainedSegmenter, clip: CLIP) -> Tensor:
    """W of Eq. (1), (h, w), with the student's features and the teacher's CLS token."""
    features = trained.segmenter(sample.image[None].float() / 255)
    query = trained.checkpoint.get("config", {}).get("glm_query", "raw")
    return attention_weights(features, encode(clip, sample).cls, query)[0]


def attention_shares(
    weights: Tensor, sample: Sample, unseen: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """Shares of attention and area of the seen, unseen and unlabelled pixels, if there are any."""
    size = (sample.labels.shape[0], sample.labels.shape[1])
    large = torch.nn.functional.interpolate(weights[None, None], size, mode="nearest-exact")[0, 0]
    large = large / large.sum()
    is_unseen = torch.isin(sample.labels.long(), torch.tensor(list(unseen)))
    none = sample.labels == IGNORE_INDEX
    masks = dict(zip(KINDS, (~is_unseen & ~none, is_unseen, none), strict=True))
    return {
        name: (float(large[mask].sum()), float(mask.float().mean()))
        for name, mask in masks.items()
        if mask.any()
    }


def attention_caption(weights: Tensor, sample: Sample, unseen: Sequence[int]) -> str:
    """Say how attention and area are divided among seen, unseen and unlabelled pixels."""
    shares = attention_shares(weights, sample, unseen)
    parts = [f"{name} {share:.0%} / {area:.0%}" for name, (share, area) in shares.items()]
    peak = float(weights.max() / weights.mean())
    return f"{sample.name}: attention / area: {', '.join(parts)}; peak {peak:.1f} x the mean"


def cluster_figure(
    samples: Sequence[Sample], config: dict[str, Any], clip: CLIP, dataset: SegmentationDataset
) -> Image.Image:
    """Figure 6: image, hidden labels, all clusters, fused groups, and some centres alone."""
    names = {name: config[name] for name in PLMConfig.__dataclass_fields__ if name in config}
    (method,) = resolve_config((PLMConfig,), ({**names, "adapter": "identity"},))
    fused = PixelLearningModule(clip.embed_dim, method)
    # No cosine passes a threshold of 2: nothing is fused.
    single = PixelLearningModule(clip.embed_dim, replace(method, fusion_threshold=2.0))
    rows: list[list[Image.Image]] = []
    captions: list[str] = []
    for sample in samples:
        features = encode(clip, sample)
        tokens = features.dense if method.tokens == "projected" else features.final
        groups = fused.group_tokens(tokens, sample.seen[None])[0][0]
        clusters = single.group_tokens(tokens, sample.seen[None])[0][0]
        maps = [clusters, groups, *centers_alone(clusters, groups)]
        hidden = sample.labels.where(sample.seen == IGNORE_INDEX, IGNORE_INDEX)
        rows.append(
            [
                plain(sample.image),
                labelled(sample.image, hidden, dataset.class_names, dataset.unseen),
                *(cluster_map(sample.image, each) for each in maps),
            ]
        )
        found = [len(each[each >= 0].unique()) for each in maps[:2]]
        captions.append(f"{sample.name}: {found[0]} clusters, {found[1]} groups")
    centers = [f"centre {k + 1}" for k in range(CENTERS)]
    return grid(rows, ["image", "hidden labels", "clusters", "fused groups", *centers], captions)


def centers_alone(clusters: Tensor, groups: Tensor) -> list[Tensor]:
    """Masks (0, elsewhere -1) of the largest centre of each of the largest groups."""
    masks: list[Tensor] = []
    ids, counts = groups[groups >= 0].unique(return_counts=True)
    for group in ids[counts.argsort(descending=True, stable=True)][:CENTERS]:
        own, sizes = clusters[groups == group].unique(return_counts=True)
        masks.append(torch.where(clusters == own[sizes.argmax()], 0, -1))
    return masks + [torch.full_like(clusters, -1)] * (CENTERS - len(masks))


def prediction_figure(
    samples: Sequence[Sample], trained: TrainedSegmenter, dataset: SegmentationDataset
) -> Image.Image:
    """Figure 7: image, labels, prediction, and the unseen classes alone."""
    predict = trained.predictor()
    return prediction_panel(
        [sample.image for sample in samples],
        [sample.labels for sample in samples],
        [predict(sample.image) for sample in samples],
        trained.class_names,
        dataset.unseen,
    )


def labelled(
    image: Tensor, labels: Tensor, names: Sequence[str], unseen: Sequence[int]
) -> Image.Image:
    """Labels in colour with a legend, without the margin that a picture of its own has."""
    picture = overlay(image, labels, names, alpha=0.65, unseen=unseen, annotate=False)
    side = (picture.width - plain(image).width) // 2
    return picture.crop((min(side, OVERLAY_MARGIN), OVERLAY_MARGIN, picture.width, picture.height))


def plain(image: Tensor) -> Image.Image:
    """The image as large as the maps beside it."""
    return cluster_map(image, torch.zeros(1, 1, dtype=torch.long), alpha=0.0)


def grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], captions: Sequence[str]
) -> Image.Image:
    """Set pictures in rows, with a title over every column and a caption under every row."""
    widths = [max(row[column].width for row in rows) for column in range(len(titles))]
    heights = [max(picture.height for picture in row) + TITLE for row in rows]
    size = (2 * MARGIN + sum(widths) + GAP * (len(widths) - 1), MARGIN + TITLE + sum(heights))
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    left = MARGIN
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        middle = left + width / 2
        pen.text((middle, MARGIN), title, INK, ImageFont.load_default(16), anchor="ma")
        top = MARGIN + TITLE
        for row, height in zip(rows, heights, strict=True):
            canvas.paste(row[column], (left + (width - row[column].width) // 2, top))
            top += height
        left += width + GAP
    top = MARGIN + TITLE
    for caption, height in zip(captions, heights, strict=True):
        pen.text((MARGIN, top + height - TITLE + 5), caption, SOFT, ImageFont.load_default(14))
        top += height
    return canvas


if __name__ == "__main__":
    main()
