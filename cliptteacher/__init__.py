"""CLIPTeacher: a frozen CLIP teaches any per-pixel network to segment unseen classes.

A pure-PyTorch reference implementation of "CLIP Is Also a Good Teacher" (arXiv:2310.02296v1).
Public names are resolved on first use (PEP 562), so importing one leaf stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` imports them
    from . import checkpoint as checkpoint
    from . import clip as clip
    from . import data as data
    from . import distributed as distributed
    from . import drawing as drawing
    from . import evaluation as evaluation
    from . import export as export
    from . import files as files
    from . import framework as framework
    from . import fusion as fusion
    from . import glm as glm
    from . import inference as inference
    from . import kmeans as kmeans
    from . import logits as logits
    from . import losses as losses
    from . import metrics as metrics
    from . import pages as pages
    from . import palette as palette
    from . import plm as plm
    from . import report as report
    from . import segmenters as segmenters
    from . import synonyms as synonyms
    from . import training as training
    from . import visualize as visualize
    from . import vla as vla
    from .clip import CLIP as CLIP
    from .clip import class_text_features as class_text_features
    from .clip import load_clip as load_clip
    from .clip import save_clip as save_clip
    from .clip import tokenize as tokenize
    from .evaluation import evaluate as evaluate
    from .framework import CLIPTeacher as CLIPTeacher
    from .framework import CLIPTeacherConfig as CLIPTeacherConfig
    from .glm import GlobalLearningModule as GlobalLearningModule
    from .inference import Predictor as Predictor
    from .inference import load_segmenter as load_segmenter
    from .inference import save_segmenter as save_segmenter
    from .plm import PixelLearningModule as PixelLearningModule
    from .plm import PLMConfig as PLMConfig
    from .segmenters import adapt_segmenter as adapt_segmenter
    from .segmenters import build_segmenter as build_segmenter
    from .segmenters import list_segmenters as list_segmenters

__version__ = "0.2.0"
IGNORE_INDEX = 255  # the label of pixels without annotation
PADDING_INDEX = 254  # the label of pixels that a crop was padded with: no unannotated area

_HOME = {
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
    "save_segmenter": "inference",
    "evaluate": "evaluation",
    "GlobalLearningModule": "glm",
    "PixelLearningModule": "plm",
    "PLMConfig": "plm",
}
_ROOMS = {
    *("checkpoint", "clip", "data", "distributed", "drawing", "evaluation", "export", "files"),
    *("framework", "fusion", "glm", "inference", "kmeans", "logits", "losses", "metrics"),
    *(
        "pages",
        "palette",
        "plm",
        "report",
        "segmenters",
        "synonyms",
        "training",
        "visualize",
        "vla",
    ),
}

__all__ = sorted([*_HOME, *_ROOMS, "IGNORE_INDEX", "PADDING_INDEX"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
