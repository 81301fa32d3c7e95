"""The frozen teacher: CLIP's model, tokenizer, prompts and weights."""

from .dense import DenseTokens
from .model import CLIP, CLIPConfig, ImageFeatures
from .prompts import class_text_features
from .tokenizer import tokenize
from .weights import load_clip, save_clip

__all__ = [
    "CLIP",
    "CLIPConfig",
    "DenseTokens",
    "ImageFeatures",
    "class_text_features",
    "load_clip",
    "save_clip",
    "tokenize",
]
