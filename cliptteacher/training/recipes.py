"""Named recipes: the fields in which a run differs from the literal defaults of the paper.

A recipe is a function that returns a flat dictionary of fields of ``TrainConfig`` and
``CLIPTeacherConfig``. Its docstring says what it reproduces and what it costs.
"""

from __future__ import annotations

from typing import Any

from .config import unknown_key


def miniworld() -> dict[str, Any]:
    """The first run: miniworld on two CPU cores in minutes."""
    return {
        "data": "miniworld",
        "clip": "miniworld",
        "segmenter": "segformer_nano",
        "iterations": 1200,
        "batch_size": 16,
        "crop": 128,
        "resize": (128, 128),
        "ratio": (0.75, 1.5),
        "photometric": False,
        "learning_rate": 1e-3,
        "head_multiplier": 1.0,
        "warmup": 50,
        "checkpoint_interval": 200,
        "eval_interval": 400,
        "test_split": "test",
        "log_interval": 20,
    }


def folder() -> dict[str, Any]:
    """Your own photographs with index-map labels, on a CPU."""
    return {
        "data": "folder",
        "segmenter": "segformer_nano",
        "iterations": 1500,
        "batch_size": 16,
        "crop": 160,
        "resize": (512, 213),
        "learning_rate": 1e-3,
        "head_multiplier": 1.0,
        "warmup": 50,
        "checkpoint_interval": 200,
        "eval_interval": 500,
        "log_interval": 20,
    }


def paper() -> dict[str, Any]:
    """Every default as the paper has it; give --data, --root and --clip."""
    return {}


_RECIPES = {recipe.__name__: recipe for recipe in (miniworld, folder, paper)}


def list_recipes() -> list[str]:
    """Names of all recipes."""
    return list(_RECIPES)


def get_recipe(name: str) -> dict[str, Any]:
    """Look a recipe up by its name.

    Raises:
        ValueError: there is no such recipe; the nearest is named.
    """
    if name not in _RECIPES:
        raise ValueError(unknown_key(name, list_recipes()))
    return _RECIPES[name]()
