"""The losses as pure functions: InfoNCE, sigmoid focal, dice, and the two together as NEL.

Sections 3.2 and 3.4 of arXiv:2310.02296v1, Eq. (3) and the focal and dice terms of Eq. (12):

    info_nce  -log softmax of cos(predicted, target) / tau against the other rows of the bank
    focal     -alpha_t (1 - p_t)^gamma log(p_t), mean over the pixels
    dice      1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), sums over the pixels

For focal and dice every (image, seen class) pair has one binary mask t (B, S, H, W), t = 1 where
the pixel has the label of the class, and p = sigmoid(logit); p_t is p where t = 1, else 1 - p, and
alpha_t likewise. Focal sums over all pairs, dice over those whose class is in the image; both are
divided by the number of the latter. The masks are never built, see `_sum_focal`.

Cost: elementwise in the logits; in memory their gradient and about six tensors of 16 MiB. All in
float32 (float64 for float64 inputs); nothing waits for the device. CUDA sums dice in any order.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**22  # logits for which focal and dice compute elementwise values at once


class NELoss(NamedTuple):
    """The weighted terms of `nel`, two scalars."""

    focal: Tensor
    dice: Tensor


def info_nce(
    predicted: Tensor,
    target: Tensor,
    bank: Tensor,
    temperature: float = 0.07,
    *,
    target_rows: Tensor | None = None,
    bank_valid: Tensor | None = None,
) -> Tensor:
    """Contrast each predicted CLS token with the true one against those of other images.

    L = mean_i -log( exp(s_i·p_i / tau) / (exp(s_i·p_i / tau) + sum_{j != i} exp(s_j·p_i / tau)) )
    with unit vectors s (target, bank) and p (predicted), Eq. (3), arXiv:2310.02296v1.

    Args:
        predicted: (B, C) CLS tokens s_hat rebuilt from the student's features, of any length.
        target: (B, C) CLS tokens s of the same images, of any length.
        bank: (M, C) CLS tokens that serve as negatives; M may be 0.
        temperature: tau in Eq. (3), positive.
        target_rows: (B,) int64, the row of the bank that holds target i itself, which is no
            negative of image i. With the current batch at rows o to o + B - 1 (under DDP, o depends
            on the rank) it is ``o + arange(B)``. Without it every row is a negative.
        bank_valid: (M,) bool, True where the row holds a token. Without it every row counts.

    Returns:
        Scalar loss, 0 where no negative is left.

    Raises:
        ValueError: a shape does not fit, or the temperature is not positive.

    Deviation: the printed Eq. (3) lacks the -log, sums over the batch and does not divide the
    negatives by tau; this is InfoNCE, averaged over the batch.
    Assumption: the vectors are normalised here; tau = 0.07 only makes sense for unit vectors.

    >>> s = torch.eye(2)
    >>> print(f"{info_nce(s, s, s, 1.0, target_rows=torch.arange(2)):.4f}")  # log(1 + e^-1)
    0.3133
    """
    _check_contrast(predicted, target, bank, temperature, target_rows, bank_valid)
    with torch.autocast(predicted.device.type, enabled=False):
        predicted, target, bank = (_unit_rows(rows) for rows in (predicted, target, bank))
        positives = (predicted * target).sum(dim=1, keepdim=True) / temperature  # (B, 1)
        negatives = predicted @ bank.mT / temperature  # (B, M)
    if target_rows is not None:
        negatives = negatives.scatter(1, target_rows.unsqueeze(1), -torch.inf)
    if bank_valid is not None:
        negatives = negatives.masked_fill(~bank_valid, -torch.inf)
    everything = torch.cat([positives, negatives], dim=1)  # (B, 1 + M)
    return (everything.logsumexp(dim=1) - positives.squeeze(1)).mean()


def count_pairs(labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count the (image, present class) pairs of a batch, which normalise focal and dice.

    Args:
        labels: (B, H, W) integer labels, 0 .. num_classes-1 or `ignore_index`.
        num_classes: S, the number of seen classes.
        ignore_index: label of the pixels without annotation.

    Returns:
        Float32 scalar, so that DDP callers can all-reduce it, divide it by the number of ranks
        and pass it as `pair_count`; not clamped, 0 when every pixel is ignored.

    Raises:
        ValueError: the labels have another number of dimensions.
        TypeError: the labels are not integer.

    >>> count_pairs(torch.tensor([[[0, 1]], [[1, 255]]]), num_classes=3)
    tensor(3.)
    """
    _check_labels(labels)
    classes, labelled = _locate_labels(labels, ignore_index)
    return _count_present(_count_pixels(classes, labelled, num_classes))


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    pair_count: Tensor | float | None = None,
) -> Tensor:
    """Compute the focal loss of every (image, seen class) pair as a binary mask.

    FL = -alpha_t (1 - p_t)^gamma log(p_t), p = sigmoid(logit); mean over the pixels, sum over all
    B*S pairs, divided by the number of present pairs: L_focal of Eq. (12), arXiv:2310.02296v1.

    Args:
        logits: (B, S, H, W) raw scores of the seen classes.
        labels: (B, H, W) integer labels, 0 .. S-1 or `ignore_index`; an ignored pixel is a
            negative of every class.
        alpha: weight of the positives, 1 - alpha that of the negatives.
        gamma: focusing exponent, at least 0.
        ignore_index: label of the pixels without annotation.
        pair_count: number of pairs to divide by, at least 1 is used; default `count_pairs`.

    Returns:
        Scalar loss, not weighted.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the logits are not floating point, or the labels not integer.

    Assumption: the paper says "the same as in ZegCLIP", whose public code sums and normalises in
    this way and also treats ignored pixels as negatives.

    >>> loss = sigmoid_focal_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, 255]]]))
    >>> print(f"{loss:.4f}")  # log(2) / 4 * (0.25 + 0.75) / 2 pixels
    0.0866
    """
    batch = _prepare_pixels(logits, labels, ignore_index, gamma)
    return _sum_focal(batch, alpha, gamma) / _divisor(batch, pair_count)


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    pair_count: Tensor | float | None = None,
) -> Tensor:
    """Compute the dice loss of the (image, seen class) pairs whose class is in the image.

    1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over all pixels of the image, p = sigmoid(logit)
    and t the binary mask of the class: L_dice of Eq. (12), arXiv:2310.02296v1.

    Args:
        logits: (B, S, H, W) raw scores of the seen classes.
        labels: (B, H, W) integer labels, 0 .. S-1 or `ignore_index`; an ignored pixel has t = 0.
        ignore_index: as for `sigmoid_focal_loss`, and `pair_count` likewise.

    Returns:
        Scalar loss, not weighted; 0 when every pixel is ignored.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the logits are not floating point, or the labels not integer.

    >>> loss = dice_loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]))
    >>> print(f"{loss:.4f}")  # 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    0.3333
    """
    batch = _prepare_pixels(logits, labels, ignore_index, gamma=0.0)
    return _sum_dice(batch) / _divisor(batch, pair_count)


def nel(
    logits: Tensor,
    labels: Tensor,
    *,
    focal_weight: float = 100.0,
    dice_weight: float = 1.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    pair_count: Tensor | float | None = None,
) -> NELoss:
    """Compute the weighted focal and dice losses of the seen classes.

    focal_weight * `sigmoid_focal_loss` and dice_weight * `dice_loss`: Eq. (12), arXiv:2310.02296v1.

    Args:
        logits: (B, S, H, W) raw scores of the seen classes.
        labels: (B, H, W) integer labels, 0 .. S-1 or `ignore_index`.
        focal_weight: weight of the focal term.
        dice_weight: weight of the dice term.
        alpha: as for `sigmoid_focal_loss`, and `gamma`, `ignore_index` and `pair_count` likewise.

    Returns:
        The two weighted terms, to be added.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the logits are not floating point, or the labels not integer.

    >>> terms = nel(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, 255]]]))
    >>> print(f"{terms.focal:.3f} {terms.dice:.3f}")
    8.664 0.333
    """
    batch = _prepare_pixels(logits, labels, ignore_index, gamma)
    pairs = _divisor(batch, pair_count)
    focal = focal_weight * _sum_focal(batch, alpha, gamma) / pairs
    return NELoss(focal, dice_weight * _sum_dice(batch) / pairs)


class _Pixels(NamedTuple):
    """What focal and dice need of a batch, with N = H*W pixels of label y."""

    classes: Tensor  # (B, N) int64 y, 0 where ignored
    labelled: Tensor  # (B, N) bool
    counts: Tensor  # (B, S) int64 pixels of each class, the sum of its mask t
    own: Tensor  # (B, N) logit of class y, in float32 or float64 as the two below
    predicted: Tensor  # (B, S) sum of p over the pixels
    negative: Tensor  # scalar, sum of -p^gamma log(1 - p) over pixels and classes


def _prepare_pixels(logits: Tensor, labels: Tensor, ignore_index: int, gamma: float) -> _Pixels:
    _check_masks(logits, labels)
    classes, labelled = _locate_labels(labels, ignore_index)
    counts = _count_pixels(classes, labelled, logits.shape[1])
    values = full_precision(logits).flatten(2)
    return _Pixels(classes, labelled, counts, *_PixelSums.apply(values, classes, gamma))


class _PixelSums(torch.autograd.Function):
    """Reduce logits (B, S, N) to the last three fields of `_Pixels`.

    Autograd would keep nine tensors of this size for the backward pass; this keeps the logits and
    computes p again, some pixels at a time. softplus(x) = -log(1 - p), which is x beyond 40.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, classes)
        ctx.gamma = gamma
        own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
        predicted = logits.new_zeros(logits.shape[:2])
        negative = torch.zeros_like(predicted)
        for x in _split_pixels(logits):
            p = x.sigmoid()
            predicted += p.sum(dim=2)
            negative += p.pow_(gamma).mul_(F.softplus(x, threshold=40)).sum(dim=2)
        return own, predicted, negative.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, own: Tensor, predicted: Tensor, negative: Tensor
    ) -> tuple[Tensor, None, None]:
        """D p = p (1 - p);  d p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p)."""
        logits, classes = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for x, part in zip(_split_pixels(logits), _split_pixels(gradient), strict=True):
            p = x.sigmoid()
            rest = 1 - p
            slope = F.softplus(x, threshold=40).mul_(rest).mul_(ctx.gamma).add_(p)
            slope.mul_(p.pow(ctx.gamma)).mul_(negative)
            torch.addcmul(slope, p.mul_(rest), predicted.unsqueeze(2), out=part)
        return gradient.scatter_add_(1, classes.unsqueeze(1), own.unsqueeze(1)), None, None


def _split_pixels(logits: Tensor) -> tuple[Tensor, ...]:
    # Not by class: the product of features and text stores the classes of a pixel together.
    return logits.tensor_split(1 + logits.numel() // _CHUNK, dim=2)


def _sum_focal(batch: _Pixels, alpha: float, gamma: float) -> Tensor:
    """Sum FL over all (image, class) pairs, each the mean over its pixels.

    At most one mask is 1 at a pixel, that of its label y. With FL+ for t = 1 and FL- for t = 0,

        sum_s FL(x_s) = sum_s FL-(x_s) + FL+(x_y) - FL-(x_y)

    without the last two where the pixel is ignored: no mask of shape (B, S, N) is needed.
    """
    # (1 - p)^gamma as exp(gamma log(1 - p)): its gradient stays finite where 1 - p underflows.
    log_p, log_rest = F.logsigmoid(batch.own), F.logsigmoid(-batch.own)
    positive = alpha * (gamma * log_rest).exp() * log_p
    change = (1 - alpha) * (gamma * log_p).exp() * log_rest - positive
    total = (1 - alpha) * batch.negative + change.masked_fill(~batch.labelled, 0.0).sum()
    return total / batch.own.shape[1]


def _sum_dice(batch: _Pixels) -> Tensor:
    """Sum the dice losses of the present pairs; sum(p t) adds p of class y of each pixel to y."""
    own = batch.own.sigmoid().masked_fill(~batch.labelled, 0.0)
    overlap = torch.zeros_like(batch.predicted).scatter_add(1, batch.classes, own)
    ratio = (2 * overlap + 1) / (batch.predicted + batch.counts + 1)
    return (1 - ratio).masked_fill(batch.counts == 0, 0.0).sum()


def _divisor(batch: _Pixels, pair_count: Tensor | float | None) -> Tensor | float:
    if pair_count is None:
        pair_count = _count_present(batch.counts)
    return pair_count.clamp(min=1) if isinstance(pair_count, Tensor) else max(pair_count, 1.0)


def _locate_labels(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the class of each pixel (0 where ignored) and where it is labelled, both (B, N)."""
    flat = labels.flatten(1).long()
    labelled = flat != ignore_index
    return flat.masked_fill(~labelled, 0), labelled


def _count_pixels(classes: Tensor, labelled: Tensor, num_classes: int) -> Tensor:
    """Count the labelled pixels of each class: (B, N) -> (B, S) int64."""
    zeros = classes.new_zeros(classes.shape[0], num_classes)
    return zeros.scatter_add(1, classes, labelled.long())


def _count_present(counts: Tensor) -> Tensor:
    return (counts > 0).sum().float()


def full_precision(values: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays float64."""
    return values if values.dtype == torch.float64 else values.float()


def _unit_rows(rows: Tensor) -> Tensor:
    return F.normalize(full_precision(rows), dim=1)


def _check_contrast(
    predicted: Tensor,
    target: Tensor,
    bank: Tensor,
    temperature: float,
    target_rows: Tensor | None,
    bank_valid: Tensor | None,
) -> None:
    if predicted.ndim != 2 or predicted.shape != target.shape:
        raise ValueError(
            "`predicted` and `target` must have one shape (B, C), "
            f"got {tuple(predicted.shape)} and {tuple(target.shape)}; give one row per image"
        )
    B, C = predicted.shape
    if bank.ndim != 2 or bank.shape[1] != C:
        raise ValueError(
            f"`bank` must have shape (M, C) with C = {C}, got {tuple(bank.shape)}; "
            "flatten its iterations into rows"
        )
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}; the paper has 0.07")
    if target_rows is not None and target_rows.shape != (B,):
        raise ValueError(
            f"`target_rows` must have shape (B,) = ({B},), got {tuple(target_rows.shape)}; "
            "give each target's row of the bank"
        )
    if bank_valid is not None and bank_valid.shape != bank.shape[:1]:
        raise ValueError(
            f"`bank_valid` must have shape (M,) = ({bank.shape[0]},), "
            f"got {tuple(bank_valid.shape)}; give one value per row of the bank"
        )


def _check_masks(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 4:
        raise ValueError(
            f"`logits` must have shape (B, S, H, W), got {tuple(logits.shape)}; "
            "add the batch dimension for a single image"
        )
    B, _, H, W = logits.shape
    if labels.shape != (B, H, W):
        raise ValueError(
            f"`labels` must have shape (B, H, W) = ({B}, {H}, {W}), got {tuple(labels.shape)}; "
            "bring both to one resolution first"
        )
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating point, got {logits.dtype}; use .float()")
    _check_labels(labels)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 3:
        raise ValueError(
            f"`labels` must have shape (B, H, W), got {tuple(labels.shape)}; "
            "add the batch dimension for a single image"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integer class indices, got {labels.dtype}; use .long()")
