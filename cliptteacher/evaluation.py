"""Score a predictor on a data set: pAcc, mIoU of seen and unseen classes, and their hIoU.

Section 4.1 and Eq. (13) of arXiv:2310.02296v1. Every process predicts its own share of the images
at their original size; the confusion matrices are added at the end, so the scores of R processes
are those of one:

    rank r takes images r, r + R, r + 2R, ...   every image once
    neighbours of equal size form a batch       an image of another size begins a new one
    one int64 confusion matrix per process  ->  all-reduce  ->  scores

Cost: one prediction per image.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data.splits import SegmentationDataset
from .inference import Predictor
from .metrics import Scores, SegmentationMetrics
from .visualize import prediction_panel, write_png

SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
PANEL_IMAGES = 6
Sample = tuple[int, Tensor, Tensor]  # index in the data set, image, labels


def evaluate(
    predictor: Callable[[Tensor], Tensor],
    dataset: SegmentationDataset,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 1,
    unseen: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_sample: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    panel: str | Path | None = None,
) -> Scores:
    """Predict every image of a data set and compute the zero-shot scores.

    Args:
        predictor: images uint8 (B, 3, H, W) -> labels (B, H, W), such as `Predictor`.
        dataset: images with the labels of all A classes.
        device: of prediction and counting.
        rank: this process, 0..world_size-1; with several, all of them must call this function.
        world_size: number of processes that share the images.
        workers: data loading processes.
        batch_size: most images predicted together, all of one size.
        unseen: label values that count as unseen; by default those of the data set.
        progress: called with (images done, images in total) of this rank after every batch.
        on_sample: called with (index, image, labels, prediction), all on the CPU, for each image.
        panel: PNG file to draw the first images of rank 0 into, with labels and predictions.

    Returns:
        "pAcc", "mIoU(S)", "mIoU(U)", "hIoU" as fractions and "IoU" of each class, over the images
        of all ranks; NaN where a class or group does not occur.

    Raises:
        ValueError: the data set is empty, or the batch size or rank is out of range.
    """
    _check(len(dataset), batch_size, rank, world_size)
    indices = range(rank, len(dataset), world_size)
    groups = dataset.unseen if unseen is None else unseen
    metrics = SegmentationMetrics(len(dataset.class_names), unseen=groups)
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    done = 0
    for batch in _read_batches(dataset, indices, workers, batch_size):
        images = torch.stack([image for _, image, _ in batch])
        labels = torch.stack([label for _, _, label in batch])
        predictions = predictor(images.to(device))
        metrics.update(predictions, labels.to(device))
        drawing = panel is not None and rank == 0 and len(shown) < PANEL_IMAGES
        if on_sample is not None or drawing:
            for (index, image, label), prediction in zip(batch, predictions.cpu(), strict=True):
                if on_sample is not None:
                    on_sample(index, image, label, prediction)
                if drawing:
                    shown.append((image, label, prediction))
        done += len(batch)
        if progress is not None:
            progress(done, len(indices))
    if panel is not None and rank == 0:
        _draw_panel(shown[:PANEL_IMAGES], dataset, Path(panel))
    if world_size > 1:  # a lone process must not wait for others, even inside a process group
        metrics.reduce()
    return metrics.compute()


def sweep_gamma(
    predictor: Predictor,
    dataset: SegmentationDataset,
    gammas: Sequence[float],
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 1,
    unseen: Sequence[int] | None = None,
) -> list[Scores]:
    """Compute the scores at several gammas from one prediction of every image.

    Section 3.4 of arXiv:2310.02296v1 has one gamma for all data; choose another on a validation
    split only, and report on a different one.

    Args:
        predictor: the student; its own gamma is ignored.
        dataset: images with the labels of all A classes.
        gammas: bonuses of the unseen classes, in logit units.
        device, rank, world_size, workers, batch_size, unseen: as for `evaluate`.

    Returns:
        What `evaluate` returns, for every gamma.
    """
    _check(len(dataset), batch_size, rank, world_size)
    groups = dataset.unseen if unseen is None else unseen
    metrics = [SegmentationMetrics(len(dataset.class_names), unseen=groups) for _ in gammas]
    indices = range(rank, len(dataset), world_size)
    for batch in _read_batches(dataset, indices, workers, batch_size):
        images = torch.stack([image for _, image, _ in batch])
        labels = torch.stack([label for _, _, label in batch]).to(device)
        predictions = predictor.sweep(images.to(device), gammas)
        for counted, prediction in zip(metrics, predictions, strict=True):
            counted.update(prediction, labels)
    if world_size > 1:
        for counted in metrics:
            counted.reduce()
    return [counted.compute() for counted in metrics]


def format_scores(
    result: Mapping[str, Any], class_names: Sequence[str], unseen: Sequence[int] = ()
) -> str:
    """Format scores as two tables: every class from best to worst, then the four of the paper.

    Args:
        result: what `evaluate` returns.
        class_names: names of all A classes.
        unseen: label values of the unseen classes.

    Returns:
        Lines of text, percent with one decimal; "-" where a class does not occur.
    """
    head = "".join(f"{name:>9}" for name in SCORES)
    line = "".join(f"{_cell(float(result[name])):>9}" for name in SCORES)
    values = [float(value) for value in result["IoU"]]
    order = sorted(range(len(values)), key=lambda k: (math.isnan(values[k]), -values[k], k))
    width = max(5, *(len(name) for name in class_names))
    rows = [f"  {'class':<{width}}  group   {'IoU':>5}"]
    for k in order:
        group = "unseen" if k in unseen else "seen"
        rows.append(f"  {class_names[k]:<{width}}  {group:<6}  {_cell(values[k]):>5}")
    return "\n".join([*rows, "", head, line])


def scores_as_percent(result: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Convert scores to percent, plain numbers for JSON; undefined ones are None.

    Args:
        result: what `evaluate` returns.
        class_names: names of all A classes.

    Returns:
        The four scores by name, and "IoU" as a dictionary by class name.
    """
    percent: dict[str, Any] = {name: _percent(float(result[name])) for name in SCORES}
    classes = zip(class_names, result["IoU"], strict=True)
    percent["IoU"] = {name: _percent(float(value)) for name, value in classes}
    return percent


def format_line(scores: Mapping[str, float | None]) -> str:
    """Format the four scores of `scores_as_percent` as one line."""
    cells = ((name, scores[name]) for name in SCORES)
    return "  ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in cells)


def _draw_panel(
    shown: Sequence[tuple[Tensor, Tensor, Tensor]], dataset: SegmentationDataset, path: Path
) -> None:
    images, labels, predictions = (list(column) for column in zip(*shown, strict=True))
    picture = prediction_panel(images, labels, predictions, dataset.class_names, dataset.unseen)
    write_png(picture, path)


class _Shard(Dataset[Sample]):
    """The images of one rank, each with its index in the data set."""

    def __init__(self, dataset: SegmentationDataset, indices: range) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        index = self.indices[position]
        image, label = self.dataset[index]
        return index, image, label


def _read_batches(
    dataset: SegmentationDataset, indices: range, workers: int, batch_size: int
) -> Iterator[list[Sample]]:
    """Read the images of one rank, neighbours of equal size together."""
    # A loader draws a seed. Drawn from the global generator it would change the dropout masks of
    # a training run that evaluates on the way.
    loader = DataLoader(
        _Shard(dataset, indices),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
    )
    return _equal_size_batches(loader, batch_size)


def _equal_size_batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Group neighbours of equal size, at most `batch_size` of them."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == batch_size or batch[0][1].shape != sample[1].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _check(num_images: int, batch_size: int, rank: int, world_size: int) -> None:
    if num_images == 0:
        raise ValueError("`dataset` must hold at least one image, got 0; check the split")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie in 0..world_size-1, got {rank} of {world_size}")


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * fraction


def _cell(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"
