"""CLIPTeacher: a frozen CLIP teaches any per-pixel network to segment unseen classes.

A pure-PyTorch reference implementation of "CLIP Is Also a Good Teacher" (arXiv:2310.02296v1).
Public names are resolved on first use (PEP 562), so importing one leaf stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "CLIP": "clip",
    "load_clip": "clip",
    "save_clip": "clip",
    "tokenize": "clip",
    "class_text_features": "clip",
    "build_segmenter": "segmenters",
    "adapt_segmenter": "segmenters",
    "list_segmenters": "segmenters",
    "CLIPTeacher": "framework",
    "CLIPTeacherConfig": "framework",
    "Predictor": "inference",
    "load_segmenter": "inference",
    "evaluate": "evaluation",
    "GlobalLearningModule": "glm",
    "PixelLearningModule": "plm",
}
_MODULES = {
    *("clip", "data", "evaluation", "framework", "fusion", "glm", "inference", "kmeans"),
    *("losses", "metrics", "plm", "segmenters", "training", "visualize", "vla"),
}

__all__ = sorted([*_ROOMS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
