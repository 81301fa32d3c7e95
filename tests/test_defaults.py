"""Every default of every room is the paper's, or the reading of it that is written down.

A wrong default changes a run as much as a wrong formula, and no comparison that passes its own
numbers can notice it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from cliptteacher import (
    IGNORE_INDEX,
    fusion,
    glm,
    inference,
    kmeans,
    logits,
    losses,
    metrics,
    plm,
    vla,
)
from cliptteacher.clip import prompts, tokenizer
from cliptteacher.clip.model import CLIPConfig
from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.training import optimizer

ROOMS = [
    # Section 3.3 and 4.2: two scales of centres, ten Lloyd iterations, lambda = 0.8
    (kmeans.multiscale_centers, {"scales": (3, 7), "seeding": "grid"}),
    (kmeans.masked_kmeans, {"iterations": 10}),
    (fusion.fuse_clusters, {"threshold": 0.8}),
    # Section 3.2: attention, 24 iterations of CLS tokens, tau = 0.07
    (glm.attention_weights, {"query": "raw"}),
    (glm.pool_features, {"pooling": "attention", "query": "raw"}),
    (glm.CLSBank, {"size": 24}),
    (
        glm.GlobalLearningModule,
        {"pooling": "attention", "bank_size": 24, "temperature": 0.07, "query": "raw"},
    ),
    (losses.info_nce, {"temperature": 0.07, "target_rows": None, "bank_valid": None}),
    # Eq. (12), as in ZegCLIP: alpha 0.25, gamma 2, weights 100 and 1
    (losses.count_pairs, {"ignore_index": 255}),
    (
        losses.sigmoid_focal_loss,
        {"alpha": 0.25, "gamma": 2.0, "ignore_index": 255, "pair_count": None},
    ),
    (losses.dice_loss, {"ignore_index": 255, "pair_count": None}),
    (
        losses.nel,
        {
            "focal_weight": 100.0,
            "dice_weight": 1.0,
            "alpha": 0.25,
            "gamma": 2.0,
            "ignore_index": 255,
            "pair_count": None,
        },
    ),
    (vla.build_adapter, {"heads": 8}),
    (vla.DecoderAdapter, {"heads": 8}),
    (plm.class_prototypes, {"among": None}),
    (plm.unannotated_share, {"ignore_index": 255}),
    (plm.merge_labels, {"ignore_index": 255}),
    (plm.generate_loss, {"kind": "mse"}),
    (logits.pixel_logits, {"scale": 1.0, "similarity": "dot", "present": None}),
    (plm.pixel_cross_entropy, {"seen_competition": True, "over_processes": False}),
    (plm.PixelLearningModule, {"config": None}),
    (
        plm.PLMConfig,
        {
            "tokens": "projected",
            "scales": (3, 7),
            "seeding": "grid",
            "kmeans_iterations": 10,
            "fusion_threshold": 0.8,
            "potential_slots": None,
            "potential_scope": "batch",
            "pseudo_similarity": "dot",
            "pseudo_scale": 1.0,
            "detach_prototypes": False,
            "seen_competition": True,
            "loss_size": "labels",
            "over_processes": False,
            "adapter": "decoder",
            "generate_loss": "mse",
        },
    ),
    # Section 3.4 and the evaluation of the benchmarks
    (
        inference.Predictor,
        {
            "unseen": (),
            "gamma": 1.5,
            "logit_scale": 1.0,
            "similarity": "dot",
            "mode": "whole",
            "window": 512,
            "stride": 426,
            "window_batch": 4,
            "resize": None,
            "size_divisor": 1,
        },
    ),
    (metrics.confusion_matrix, {"ignore_index": 255}),
    (metrics.SegmentationMetrics, {"unseen": (), "ignore_index": 255}),
    # CLIP
    (tokenizer.tokenize, {"context_length": 77, "truncate": False}),
    (prompts.class_prompts, {"templates": "single"}),
    (prompts.class_text_features, {"templates": "single"}),
    (
        CLIPConfig.from_state_dict,
        {"activation": "quick_gelu", "vision_heads": None, "text_heads": None},
    ),
    (
        CLIPConfig,  # ViT-B/16
        {
            "embed_dim": 512,
            "image_size": 224,
            "patch_size": 16,
            "vision_width": 768,
            "vision_layers": 12,
            "context_length": 77,
            "vocab_size": 49408,
            "text_width": 512,
            "text_layers": 12,
            "activation": "quick_gelu",
            "vision_heads": None,
            "text_heads": None,
        },
    ),
    # The default schedule of the toolbox that the paper names
    (
        optimizer.parameter_groups,
        {
            "head_multiplier": 10.0,
            "head_prefixes": ("segmenter.head", "segmenter.auxiliary", "plm.adapter"),
        },
    ),
    (
        CLIPTeacherConfig,
        {
            "templates": "single",
            "similarity": "dot",
            "logit_scale": 1.0,
            "glm_pooling": "attention",
            "glm_query": "raw",
            "glm_windows": (1,),
            "bank_size": 24,
            "temperature": 0.07,
            "ce": "all",
            "tokens": "projected",
            "scales": (3, 7),
            "seeding": "grid",
            "kmeans_iterations": 10,
            "fusion_threshold": 0.8,
            "potential_slots": None,
            "potential_scope": "batch",
            "pseudo_similarity": "dot",
            "pseudo_scale": 1.0,
            "detach_prototypes": False,
            "seen_competition": True,
            "loss_size": "labels",
            "over_processes": False,
            "adapter": "decoder",
            "generate_loss": "mse",
            "global_weight": 1.0,
            "ce_weight": 1.0,
            "focal_weight": 100.0,
            "dice_weight": 1.0,
            "generate_weight": 1.0,
            "auxiliary_weight": 0.0,
            "distill_weight": 0.0,
        },
    ),
]


@pytest.mark.parametrize(
    ("room", "expected"), ROOMS, ids=lambda item: getattr(item, "__name__", "")
)
def test_defaults(room: Callable[..., Any], expected: dict[str, object]) -> None:
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(room).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert found == expected


def test_constants() -> None:
    """What has no option, for no row of the paper changes it."""
    assert IGNORE_INDEX == 255
    assert plm.IGNORED_SHARE == 0.5  # more than half of the pixels of a token have no label
    decoder = plm.PixelLearningModule(64).adapter
    assert decoder.attend_self.heads == decoder.attend_cross.heads == 8


def test_the_default_schedule_of_the_toolbox() -> None:
    """Linear warm-up from 1e-6, then linear to 0: "poly" of power 1."""
    factors = [optimizer.learning_rate_factor(step, 300, warmup=100) for step in (0, 50, 100, 200)]
    assert factors == pytest.approx([1e-6, 1e-6 + (1 - 1e-6) / 2, 1.0, 0.5], rel=1e-12)
    assert optimizer.learning_rate_factor(299, 300, warmup=0) == pytest.approx(1 / 300, rel=1e-12)
