"""The frozen teacher: CLIP's model, tokenizer, prompts and weights."""

from .model import CLIP, CLIPConfig, ImageFeatures
from .prompts import class_text_features
from .tokenizer import tokenize
from .weights import load_clip, save_clip

__all__ = [
    "CLIP",
    "CLIPConfig",
    "ImageFeatures",
    "class_text_features",
    "load_clip",
    "save_clip",
    "tokenize",
]
