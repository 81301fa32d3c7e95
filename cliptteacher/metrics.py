"""Scores of generalised zero-shot segmentation: section 4.1, Eq. (13).

All scores follow from one int64 confusion matrix, the sum over images, shards and processes::

    matrix[l, p] = number of pixels labelled l and predicted p       ignored pixels dropped
    IoU_c        = matrix[c, c] / (row sum + column sum - matrix[c, c])
    mIoU(S), mIoU(U) = means of IoU over the seen and the unseen classes, absent ones skipped
    hIoU         = 2 mIoU(S) mIoU(U) / (mIoU(S) + mIoU(U))           Eq. (13)
    pAcc         = diagonal / all

Cost: one bincount per image, in 32 bits. The range check synchronises with the device.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

Scores = TypedDict(
    "Scores", {"pAcc": float, "mIoU(S)": float, "mIoU(U)": float, "hIoU": float, "IoU": Tensor}
)


def confusion_matrix(
    pred: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Count the pixels of every (label, prediction) combination.

    Args:
        pred: integer predictions of any shape, 0 .. num_classes-1; anything where ignored.
        label: integer labels of the same shape, 0 .. num_classes-1 or `ignore_index`.
        num_classes: A, the number of seen and unseen classes.
        ignore_index: label of the pixels to drop.

    Returns:
        (A, A) int64, rows are labels, columns predictions.

    Raises:
        ValueError: the shapes differ or a value lies outside its range.
        TypeError: a tensor is not integer.

    >>> confusion_matrix(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    _check_maps(pred, label)
    drop = label == ignore_index
    _check_range("pred", pred, drop, num_classes)
    _check_range("label", label, drop, num_classes)
    # Dropped pixels go to a bin of their own: taking the others out would cost more than the rest.
    pairs = torch.where(drop, num_classes**2, (label.int() * num_classes).add_(pred.int()))
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Compute the intersection over union of each class from a confusion matrix.

    Args:
        matrix: (A, A) confusion matrix, rows are labels.

    Returns:
        (A,) float64 fractions, NaN for an absent class: one that is neither labelled nor
        predicted anywhere. A class that is predicted but never labelled has IoU 0.

    >>> class_iou(torch.tensor([[1, 1, 0], [0, 2, 0], [0, 0, 0]])).tolist()
    [0.5, 0.6666666666666666, nan]
    """
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(dim=0) + matrix.sum(dim=1) - hits)


def harmonic_iou(seen: float, unseen: float) -> float:
    """Compute the harmonic mean of mIoU(S) and mIoU(U).

    hIoU = 2 mIoU_S mIoU_U / (mIoU_S + mIoU_U), Eq. (13), arXiv:2310.02296v1.

    Args:
        seen: mIoU(S), fraction.
        unseen: mIoU(U), fraction.

    Returns:
        The fraction hIoU: 0 when either is 0, NaN when either is NaN.

    >>> harmonic_iou(0.25, 0.75)
    0.375
    """
    product = 2 * seen * unseen
    return product if product == 0 else product / (seen + unseen)


class SegmentationMetrics:
    """Accumulate the four scores of the paper over a data set.

    Args:
        num_classes: A, the number of seen and unseen classes.
        unseen: indices of the unseen classes; all others are seen.
        ignore_index: label of the pixels to drop.

    Raises:
        ValueError: an unseen index is out of range or named twice.

    >>> metrics = SegmentationMetrics(2, unseen=[1])
    >>> metrics.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]))
    >>> scores = metrics.compute()
    >>> [round(scores[name], 3) for name in ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")]
    [0.667, 0.5, 0.5, 0.5]
    """

    def __init__(
        self, num_classes: int, unseen: Sequence[int] = (), ignore_index: int = 255
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"`num_classes` must be at least 1, got {num_classes}; count them all")
        if len(set(unseen)) != len(unseen) or not set(unseen) <= set(range(num_classes)):
            raise ValueError(
                f"`unseen` must hold distinct class indices from 0 to {num_classes - 1}, "
                f"got {list(unseen)}; give positions in the list of all classes"
            )
        self.num_classes = num_classes
        self.unseen = sorted(unseen)
        self.seen = [index for index in range(num_classes) if index not in set(unseen)]
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.matrix = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self._reduced = False

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count one image or batch.

        Args:
            pred: integer predictions of any shape, on any device.
            label: integer labels of the same shape, on the same device.

        Raises:
            ValueError: the shapes differ or a value lies outside its range.
            TypeError: a tensor is not integer.
            RuntimeError: after `reduce`, when the matrix already is the sum of all processes.
        """
        self._check_unreduced()
        self.matrix += confusion_matrix(pred, label, self.num_classes, self.ignore_index).cpu()

    def reduce(self) -> None:
        """Sum the matrices of all processes, on each of them.

        Call it once, on every process, after the last `update`. Without torch.distributed it does
        nothing.

        Raises:
            RuntimeError: the matrix already is the sum of all processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        self._check_unreduced()
        # NCCL moves GPU memory only; every other backend takes the matrix where it is.
        total = self.matrix.to("cuda") if dist.get_backend() == "nccl" else self.matrix
        dist.all_reduce(total)
        self.matrix = total.cpu()
        self._reduced = True

    def compute(self) -> Scores:
        """Compute the scores of all images counted so far.

        Returns:
            Fractions ``pAcc`` (correct over labelled pixels of all classes), ``mIoU(S)``,
            ``mIoU(U)`` and ``hIoU`` (Eq. (13), arXiv:2310.02296v1, of the unrounded means), and
            ``IoU``, the (A,) float64 `class_iou`. A mean over no present class is NaN, and so is
            hIoU with it.
        """
        iou = class_iou(self.matrix)
        seen, unseen = (iou[indices].nanmean().item() for indices in (self.seen, self.unseen))
        return {
            "pAcc": (self.matrix.diagonal().sum().double() / self.matrix.sum()).item(),
            "mIoU(S)": seen,
            "mIoU(U)": unseen,
            "hIoU": harmonic_iou(seen, unseen),
            "IoU": iou,
        }

    def _check_unreduced(self) -> None:
        if self._reduced:
            raise RuntimeError(
                "the matrix must not change once it is the sum of all processes, "
                "got a call after `reduce`; use `reset` first"
            )


def _check_maps(pred: Tensor, label: Tensor) -> None:
    if pred.shape != label.shape:
        raise ValueError(
            f"`pred` and `label` must have one shape, got {tuple(pred.shape)} and "
            f"{tuple(label.shape)}; predict at the original size of the label"
        )
    for name, values in (("pred", pred), ("label", label)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(
                f"`{name}` must hold integer classes, got {values.dtype}; take the argmax of logits"
            )


def _check_range(name: str, values: Tensor, drop: Tensor, num_classes: int) -> None:
    if values.numel() == 0:
        return
    low, high = torch.stack(torch.where(drop, 0, values).aminmax()).tolist()
    if low < 0 or high >= num_classes:
        low, high = torch.stack(values[~drop].aminmax()).tolist()
        raise ValueError(
            f"`{name}` must lie in 0 .. {num_classes - 1} where it is not ignored, "
            f"got values from {low} to {high}; check the class list and `ignore_index`"
        )
