"""Named recipes: the fields in which a run differs from the literal defaults of the paper.

A recipe is a flat dictionary of fields of ``TrainConfig`` and ``CLIPTeacherConfig``: here those
that run on a laptop, in ``paper_recipes.py`` the rows of the paper's tables. Every recipe has a
twin ``<recipe>_transductive``, in which training knows the names of the unseen classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import unknown_key
from .paper_recipes import PAPER, PAPER_ROWS, row_of_table_1

# Potential classes compete within their image, by cosine, for the unannotated pixels only, and
# prototypes carry no gradient. Cheap; over three seeds each (benchmarks/readings.md): against no
# pseudo labels a gain on photographs and none on miniworld, where the literal reading trades 7
# points of the seen classes for 6 of the unseen ones. Short runs speak for the batch as scope, and
# with focal at a fifth of its weight the literal reading is far better on photographs.
_GENTLE_PSEUDO_LABELS: dict[str, Any] = {
    "potential_scope": "image",
    "potential_slots": 16,
    "pseudo_similarity": "cosine",
    "pseudo_scale": 10.0,
    "detach_prototypes": True,
    "seen_competition": False,
}

# A small network from random weights: a larger learning rate, no slower backbone, and more dice,
# the only term in which a small object weighs as much as a large one.
_FROM_SCRATCH: dict[str, Any] = {
    "segmenter": "fpn_small",
    "channels_last": True,
    "batch_size": 16,
    "crop": 128,
    "learning_rate": 2e-3,
    "head_multiplier": 1.0,
    "warmup": 50,
    "dice_weight": 5.0,
    "glm_query": "unit",
    "loss_size": "features",  # a step takes four fifths of the time on a CPU
    "checkpoint_interval": 200,
    "log_interval": 20,
}


def miniworld() -> dict[str, Any]:
    """The first run: miniworld on two CPU cores, without a download, in minutes."""
    return {
        **_FROM_SCRATCH,
        **_GENTLE_PSEUDO_LABELS,
        "data": "miniworld",
        "clip": "miniworld",
        "iterations": 1800,
        "resize": (128, 128),
        "ratio": (0.75, 1.5),
        "photometric": False,
        "eval_interval": 600,
        "test_split": "test",
        "gamma": 0.5,
    }


def miniworld_tuned() -> dict[str, Any]:
    """Miniworld beyond the paper: windows of 64 and 32 pixels have CLS tokens of their own."""
    return {**miniworld(), "glm_windows": (2, 4)}


def folder() -> dict[str, Any]:
    """Your own photographs with index-map labels and a CLIP of pretrain_clip.py, on a CPU."""
    return {
        **_FROM_SCRATCH,
        **_GENTLE_PSEUDO_LABELS,
        "data": "folder",
        "iterations": 3500,
        "crop": 96,
        "resize": (160, 107),
        "ratio": (0.75, 1.75),
        "eval_resize": (160, 107),
        "eval_size_divisor": 32,  # 107 is no multiple of the student's coarsest stride
        "eval_interval": 1000,
        "gamma": 0.0,
    }


def folder_tuned() -> dict[str, Any]:
    """Photographs with the paper's own pseudo labels, and focal at a fifth of the usual weight."""
    literal = {name: it for name, it in folder().items() if name not in _GENTLE_PSEUDO_LABELS}
    return {**literal, "potential_slots": 16, "focal_weight": 20.0, "dice_weight": 1.0}


def paper() -> dict[str, Any]:
    """The settings of the paper's rows, for other data than the paper's; give --data, --root."""
    return dict(PAPER)


# What the second version of the paper (CLIP-ZSS) changes. Assumption: alpha is as in the first
# version, beta as in the laptop recipes; their values were not at hand.
V2: dict[str, Any] = {
    "generate_loss": "bce",  # sigmoid(P_seen . T^T) against the identity, in place of Eq. (8)
    "logit_scale": 1.0,  # alpha, of R . T_seen in Eq. (9)
    "pseudo_similarity": "cosine",  # cos(R, P_u) in Eq. (9) in place of the product
    "pseudo_scale": 10.0,  # beta, its factor
}


def v2() -> dict[str, Any]:
    """The settings of the paper's rows with the second version's changes; give --data, --root."""
    return {**PAPER, **V2}


# Unseen classes train like seen ones as soon as groups have names; a bonus would favour them.
_TRANSDUCTIVE: dict[str, Any] = {"setting": "transductive", "gamma": 0.0}
_SUFFIX = "_transductive"

_LAPTOP = (miniworld, miniworld_tuned, folder, folder_tuned)
_RECIPES = {recipe.__name__: recipe for recipe in (*_LAPTOP, paper, v2)}


def list_recipes() -> list[str]:
    """Names of all recipes."""
    names = [*_RECIPES, *PAPER_ROWS]
    return [*names, *(name + _SUFFIX for name in names)]


def default_recipe(asked: Mapping[str, Any]) -> str:
    """Name the recipe for the data, and on a benchmark for the student, that is asked for.

    Args:
        asked: fields of the configuration that were given.
    """
    data = asked.get("data", "miniworld")
    return row_of_table_1(data, asked.get("segmenter")) or data


def get_recipe(name: str) -> dict[str, Any]:
    """Look a recipe up by its name.

    Raises:
        ValueError: there is no such recipe; the nearest is named.
    """
    if name.endswith(_SUFFIX):
        return {**get_recipe(name.removesuffix(_SUFFIX)), **_TRANSDUCTIVE}
    if name in PAPER_ROWS:
        return dict(PAPER_ROWS[name].overrides)
    if name not in _RECIPES:
        raise ValueError(unknown_key(name, list_recipes()))
    return _RECIPES[name]()
