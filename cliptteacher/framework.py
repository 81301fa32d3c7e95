"""CLIPTeacher: the whole training step, from images and seen labels to a dictionary of losses.

Figure 2 and Section 3.4 of arXiv:2310.02296v1:

    s, D = frozen CLIP(images)          CLS tokens and dense tokens, no gradient
    R    = student(images)              dense features in CLIP's joint space
    GLM(R, s)               -> L_global
    PLM(R, D, s, labels)    -> L_CE, L_generate
    NEL(R . T_seen, labels) -> L_focal, L_dice
    L = L_global + L_CE + L_focal + L_dice + L_generate                Eq. (11)-(12)

The student is the only part that remains after training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import IGNORE_INDEX, PADDING_INDEX
from .clip import CLIP, ImageFeatures, class_text_features
from .clip.settings import architecture_name
from .distributed import mean_over_processes
from .glm import GlobalLearningModule, Pooling, Query, split_windows
from .logits import Similarity, class_chunks, pixel_logits, upsample, upsampled_logsumexp
from .losses import NELoss, count_pairs, full_precision, nel
from .options import holds
from .plm import PixelLearningModule, PLMConfig, mean_over_labelled, resize_nearest
from .transductive import name_groups


@dataclass(frozen=True, kw_only=True)
class CLIPTeacherConfig(PLMConfig):
    """Every option of the method; the defaults are the literal reading of the paper."""

    templates: Literal["single", "ensemble"] = "single"  # prompts of the class names
    similarity: Similarity = "dot"  # student features against text, in training and at inference
    logit_scale: float = 1.0  # factor of the seen logits
    glm_pooling: Pooling = "attention"  # Table 4: attention, mean, max
    glm_query: Query = "raw"  # s of Eq. (1): as it is, or at unit length
    glm_windows: tuple[int, ...] = (1,)  # each of n x n windows has its CLS token; (1,): the image
    bank_size: int = 24  # iterations of CLS tokens that serve as negatives
    temperature: float = 0.07  # tau of Eq. (3)
    ce: Literal["all", "seen", "none"] = "all"  # pseudo and seen labels; seen only; no CE
    # weights of Eq. (11)-(12); 0 switches a term off
    global_weight: float = 1.0
    ce_weight: float = 1.0
    focal_weight: float = 100.0
    dice_weight: float = 1.0
    generate_weight: float = 1.0
    auxiliary_weight: float = 0.0  # of the student's auxiliary head; 0.4 for Swin with UPerNet
    distill_weight: float = 0.0  # not in the paper: the student copies CLIP's dense tokens


class CLIPTeacher(nn.Module):
    """Train a student with a frozen CLIP; ``model(images, labels)`` returns the losses.

    The parameters of this module are the student's (``segmenter``) and the adapter's
    (``plm.adapter``); ``state_dict()`` holds them and the CLS bank: with the state of the optimiser
    enough to resume. CLIP moves with the module to another device but is no submodule: it is
    neither in ``parameters()`` nor in ``state_dict()``, and DDP does not see it. The seen names are
    encoded at construction, on the device that CLIP is on.

    Args:
        clip: the teacher; frozen here.
        segmenter: the student, images in [0, 1] -> (B, C, h, w) with C = ``clip.embed_dim``.
        seen_names: names of the seen classes, in label order; never of unseen ones.
        config: options; default the literal reading of the paper.
        unseen_names: for the transductive setting, in which the groups of the unannotated area get
            these names and train like seen classes, see ``transductive.py``.

    Raises:
        ValueError: ``seen_names`` is empty or too long, ``unseen_names`` overlaps with it or makes
            it too long, ``config.glm_windows`` is empty, or the student has an auxiliary head and
            ``config.auxiliary_weight`` is 0, or the reverse.
    """

    seen_text: Tensor
    unseen_text: Tensor

    def __init__(
        self,
        clip: CLIP,
        segmenter: nn.Module,
        seen_names: Sequence[str],
        config: CLIPTeacherConfig | None = None,
        unseen_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(seen_names, str) or not 0 < len(seen_names) <= PADDING_INDEX:
            raise ValueError(
                f"`seen_names` must be a list of 1 to {PADDING_INDEX} class names, got "
                f"{len(seen_names) if len(seen_names) > PADDING_INDEX else repr(seen_names)}"
            )
        both = set(seen_names) & set(unseen_names)
        if (
            isinstance(unseen_names, str)
            or both
            or len(seen_names) + len(unseen_names) > PADDING_INDEX
        ):
            raise ValueError(
                f"`unseen_names` must be a list of names that are not in `seen_names`, at most "
                f"{PADDING_INDEX} with them, got {unseen_names!r:.200}"
            )
        self.config = config = config or CLIPTeacherConfig()
        if not config.glm_windows or min(config.glm_windows) < 1:
            raise ValueError(
                f"`glm_windows` must hold numbers from 1 on, got {config.glm_windows}; "
                "(1,) is the whole image"
            )
        has_auxiliary = getattr(segmenter, "auxiliary", None) is not None
        if has_auxiliary != (config.auxiliary_weight > 0):
            raise ValueError(  # DDP waits for the gradient of every parameter
                f"`auxiliary_weight` must be positive with an auxiliary head and 0 without, got "
                f"{config.auxiliary_weight} {'with' if has_auxiliary else 'without'} one; build "
                f"the student with auxiliary={not has_auxiliary}, or change the weight"
            )
        self._clip = (clip.eval().requires_grad_(False),)  # in a tuple: not a submodule
        self.segmenter = segmenter
        self.seen_names, self.unseen_names = tuple(seen_names), tuple(unseen_names)
        names = (*self.seen_names, *self.unseen_names)
        text = class_text_features(clip, names, config.templates)
        self.register_buffer("seen_text", text[: len(seen_names)], persistent=False)
        self.register_buffer("unseen_text", text[len(seen_names) :], persistent=False)
        self.glm = nn.ModuleList(  # a bank for every size of window
            GlobalLearningModule(
                config.glm_pooling, config.bank_size, config.temperature, config.glm_query
            )
            for _ in config.glm_windows
        )
        # An adapter that no term uses would get no gradient, and DDP waits for all gradients.
        plm_config = config if self.uses_adapter else replace(config, adapter="identity")
        self.plm = PixelLearningModule(clip.embed_dim, plm_config)

    def __repr__(self) -> str:
        """Name teacher, student and number of classes; the layers are those of ``segmenter``."""
        sizes, built = self.clip.config, getattr(self.segmenter, "build_arguments", None) or {}
        teacher = architecture_name(sizes.vision_width, sizes.patch_size)
        student = built.get("name", type(self.segmenter).__name__)
        return f"CLIPTeacher({teacher} -> {student}, {len(self.seen_names)} seen classes)"

    @property
    def clip(self) -> CLIP:
        """The frozen teacher."""
        return self._clip[0]

    @property
    def uses_adapter(self) -> bool:
        """Whether a loss term depends on the adapter."""
        config = self.config
        return (config.ce == "all" and config.ce_weight > 0) or config.generate_weight > 0

    def forward(self, images: Tensor, labels: Tensor, parts: int = 1) -> dict[str, Tensor]:
        """Compute every loss term of Eq. (11)-(12), arXiv:2310.02296v1, already weighted.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1]; sides are multiples of CLIP's patch.
            labels: (B, H, W) integers: [0, S) in the order of ``seen_names``, 255 without label,
                254 for padding, which makes no pseudo labels.
            parts: calls that make one iteration (gradient accumulation); the CLS bank spans
                iterations.

        Returns:
            Scalars ``global``, ``ce``, ``focal``, ``dice``, ``generate``, with an auxiliary head
            ``auxiliary``, with ``distill_weight`` ``distill``, and the sum of all, ``total``.

        Raises:
            ValueError: images and labels differ in size, images are not in [0, 1], a label is no
                seen class, or the student's width is not C. On CUDA, where the host does not wait
                for values, a wrong one stops the device with the same sentence.
        """
        self._check_labels(images, labels)
        config = self.config
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        auxiliary: Tensor | None = None
        if config.auxiliary_weight > 0:
            features, auxiliary = self.segmenter.forward_with_auxiliary(pixels)  # type: ignore[operator]
        else:
            features = self.segmenter(pixels)  # (B, C, h, w)
        if features.ndim != 4 or features.shape[1] != self.clip.embed_dim:
            raise ValueError(
                f"the student must give features (B, {self.clip.embed_dim}, h, w), got "
                f"{tuple(features.shape)}; build it with channels=clip.embed_dim"
            )
        teacher = self.encode(pixels)
        cls, tokens = teacher.cls, self._tokens_to_cluster(teacher)
        text = self.seen_text
        if self.unseen_names:
            labels = self._name_groups(features, tokens, cls, labels)
            text = torch.cat((text, self.unseen_text))
        seen_logits, near_labels = self._score(features, labels, text)
        zero = features.new_zeros((), dtype=torch.float32)
        losses = {"global": zero, "ce": zero, "focal": zero, "dice": zero, "generate": zero}
        if config.global_weight > 0:
            losses["global"] = config.global_weight * self._global(features, pixels, cls, parts)
        if self.uses_adapter:
            pixel = self.plm(features, seen_logits, tokens, cls, labels, text)
            losses["generate"] = config.generate_weight * pixel.generate
            if config.ce == "all":
                losses["ce"] = config.ce_weight * pixel.ce
        if config.ce == "seen":
            losses["ce"] = config.ce_weight * seen_cross_entropy(
                seen_logits, near_labels, config.over_processes
            )
        if config.focal_weight > 0 or config.dice_weight > 0:
            losses["focal"], losses["dice"] = self._nel(seen_logits, near_labels)
        if auxiliary is not None:
            logits, near_labels = self._score(auxiliary, labels, text)
            terms = [*self._nel(logits, near_labels)]
            if config.ce != "none":
                ce = seen_cross_entropy(logits, near_labels, config.over_processes)
                terms.append(config.ce_weight * ce)
            losses["auxiliary"] = config.auxiliary_weight * torch.stack(terms).sum()
        if config.distill_weight > 0:
            losses["distill"] = config.distill_weight * distill_loss(features, teacher.dense)
        losses["total"] = torch.stack(tuple(losses.values())).sum()
        return losses

    def _check_labels(self, images: Tensor, labels: Tensor) -> None:
        """Refuse what would train in silence: labels of no class, images that are not in [0, 1]."""
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}")
        if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
            raise ValueError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"`images` must be uint8, or float in [0, 1], got {images.dtype}")
        if labels.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(
                f"`labels` (B, H, W) must fit `images` (B, 3, H, W), got {tuple(labels.shape)} for "
                f"{tuple(images.shape)}; crop both alike"
            )
        S = len(self.seen_names)
        need = (
            f"`labels` must hold integers 0..{S - 1}, {IGNORE_INDEX} for no label, or "
            f"{PADDING_INDEX} for padding"
        )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"{need}, got {labels.dtype}")
        known = (labels >= 0) & (labels < S)
        known = known | (labels == IGNORE_INDEX) | (labels == PADDING_INDEX)
        if not holds(known.all(), need):
            wrong = torch.unique(labels[~known])[:8].tolist()
            raise ValueError(f"{need}, got {wrong}; data.SeenOnly makes such labels")
        if images.dtype != torch.uint8:
            low, high = images.detach().aminmax()
            # Augmentation may overshoot a little. NaN compares as false.
            need = "float `images` must lie in [0, 1]"
            if not holds((low > -1) & (high < 2), need):
                raise ValueError(
                    f"{need}, got {float(low):g} to {float(high):g}; divide by 255, and leave "
                    "normalisation to the networks"
                )

    def _global(self, features: Tensor, pixels: Tensor, cls: Tensor, parts: int) -> Tensor:
        """L_global, the mean over the sizes of windows; ``cls`` are the tokens of the images."""
        terms = []
        for n, module in zip(self.config.glm_windows, self.glm, strict=True):
            tokens = cls if n == 1 else self.encode(split_windows(pixels, n)).cls
            terms.append(module(split_windows(features, n), tokens, parts))
        return torch.stack(terms).mean()

    def _name_groups(self, features: Tensor, tokens: Tensor, cls: Tensor, labels: Tensor) -> Tensor:
        """Label the unannotated pixels of groups with unseen classes: S to S + U - 1."""
        groups, count = self.plm.group_tokens(tokens, labels)
        scores, _ = self._score(features, labels, self.unseen_text)
        prior = (
            self.clip.logit_scale.exp() * nn.functional.normalize(cls, dim=1) @ self.unseen_text.T
        )
        names = name_groups(groups, count, scores, labels, prior)
        return torch.where(names >= 0, names + len(self.seen_names), labels.long())

    def _score(self, features: Tensor, labels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, S, h, w) of features; labels at the size of the losses, padding 255."""
        config = self.config
        logits = pixel_logits(features, text, config.logit_scale, config.similarity)
        if config.loss_size == "features":
            labels = resize_nearest(labels, (features.shape[2], features.shape[3]))
        return logits, labels.masked_fill(labels == PADDING_INDEX, IGNORE_INDEX)

    def _nel(self, seen_logits: Tensor, near_labels: Tensor) -> NELoss:
        """Focal and dice, divided by the mean number of pairs of all processes."""
        pairs = mean_over_processes(count_pairs(near_labels, seen_logits.shape[1], IGNORE_INDEX))

        def of_classes(logits: Tensor, first: int) -> NELoss:
            own = near_labels.long() - first
            own = own.masked_fill((own < 0) | (own >= logits.shape[1]), IGNORE_INDEX)
            return nel(
                upsample(logits, near_labels.shape[1:]),
                own,
                focal_weight=self.config.focal_weight,
                dice_weight=self.config.dice_weight,
                pair_count=pairs,
            )

        chunks = class_chunks(seen_logits, near_labels.shape[1:])
        if len(chunks) == 1:
            return of_classes(seen_logits, 0)
        # Some classes at a time, upsampled again in the backward pass: a pixel of another class is
        # to focal and dice what one without a label is.
        parts = [
            checkpoint(of_classes, seen_logits[:, part], part.start, use_reentrant=False)
            for part in chunks
        ]
        focal, dice = zip(*parts, strict=True)
        return NELoss(torch.stack(focal).sum(), torch.stack(dice).sum())

    def encode(self, pixels: Tensor) -> ImageFeatures:
        """Compute the teacher's CLS tokens (B, C) and dense tokens (B, C, h, w), no gradient."""
        with torch.inference_mode():
            teacher = self.clip.encode_image(pixels)
        # Autograd cannot save inference tensors for the backward pass; a clone is an ordinary one.
        dense = teacher.dense.clone() if self.config.distill_weight > 0 else teacher.dense
        return teacher._replace(cls=teacher.cls.clone(), dense=dense)

    def _tokens_to_cluster(self, teacher: ImageFeatures) -> Tensor:
        """The dense tokens (B, C', h, w) that the Pixel Learning Module groups."""
        return teacher.dense if self.config.tokens == "projected" else teacher.final

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLIPTeacher:
        # .to(), .float() and the like reach the teacher too
        self.clip._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


def seen_cross_entropy(seen_logits: Tensor, labels: Tensor, over_processes: bool = False) -> Tensor:
    """Cross entropy of the seen pixels among the seen classes alone: no pseudo labels.

    Args:
        seen_logits: (B, S, h, w).
        labels: (B, H, W) integers in [0, S), 255 without label; logits are brought to this size.
        over_processes: see ``plm.pixel_cross_entropy``.

    Returns:
        scalar, the mean over the labelled pixels; 0 without one.
    """
    total, own = upsampled_logsumexp(seen_logits, labels.long())
    return mean_over_labelled(total - own, labels != IGNORE_INDEX, over_processes)


def distill_loss(features: Tensor, dense: Tensor) -> Tensor:
    """Distill CLIP's dense tokens into the student: mean over the tokens of 1 - cos(R, D).

    Not in the paper: a baseline for GLM and PLM that needs neither labels nor CLS tokens.

    Args:
        features: R (B, C, h, w), averaged over the pixels of each token.
        dense: D (B, C, h', w').

    Returns:
        scalar in [0, 2].
    """
    h, w = dense.shape[2:]
    pooled = nn.functional.adaptive_avg_pool2d(full_precision(features), (h, w))
    return (1 - nn.functional.cosine_similarity(pooled, full_precision(dense), dim=1)).mean()
