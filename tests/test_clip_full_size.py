"""ViT-B/32, ViT-B/16 and ViT-L/14 at their full size against two published implementations.

One set of random weights, every tensor perturbed, lives in open_clip's model; Hugging Face's model
gets it through `clip_files.to_hugging_face`, which shares no code with our loader. Each peer's own
state dict then goes through ours. Images are compared at the native size, at 512 x 512 (504 x 504
where the patch is 14) and at a size that is not square, CLS and dense tokens alike.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from clip_files import to_hugging_face
from test_clip_model import MEAN, STD, assert_close, reference_positions
from torch import Tensor, nn

from cliptteacher.clip import CLIP, CLIPConfig, load_clip
from cliptteacher.clip.convert import to_openai_names
from cliptteacher.clip.model import ImageFeatures

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

State = dict[str, Tensor]


class Size(NamedTuple):
    """A published model, and in what precision and at which sizes it is compared."""

    name: str
    dtype: torch.dtype
    images: tuple[tuple[int, int], ...]
    parameters: int  # as published, logit_scale included


SIZES = (
    Size("ViT-B-32", torch.float64, ((224, 224), (512, 512), (320, 192)), 151_277_313),
    Size("ViT-B-16", torch.float32, ((224, 224), (512, 512), (208, 336)), 149_620_737),
    # 504 is what 512 is to a patch of 14; all 24 layers, in float32, because it costs most of all.
    Size("ViT-L-14", torch.float32, ((224, 224), (504, 504), (168, 308)), 427_616_513),
)


def sizes_of(name: str, layers: int | None) -> dict[str, Any]:
    """The published sizes, with fewer layers on request."""
    config = open_clip.get_model_config(f"{name}-quickgelu")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] = {**config[tower], "layers": layers or config[tower]["layers"]}
    return config  # type: ignore[no-any-return]


def build_open_clip(name: str, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """Build the published architecture with weights that resemble no initial values."""
    config = sizes_of(name, layers)
    config["vision_cfg"]["output_tokens"] = True
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def build_hugging_face(
    state: State, name: str, dtype: torch.dtype, layers: int | None = None
) -> nn.Module:
    """Build the same architecture over there, with the same numbers."""
    config = sizes_of(name, layers)
    vision, text = config["vision_cfg"], config["text_cfg"]
    with torch.device("meta"):
        model = transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config={
                    "hidden_size": vision["width"],
                    "intermediate_size": 4 * vision["width"],
                    "num_hidden_layers": vision["layers"],
                    "num_attention_heads": vision["width"] // 64,
                    "patch_size": vision["patch_size"],
                    "image_size": vision["image_size"],
                },
                text_config={
                    "hidden_size": text["width"],
                    "intermediate_size": 4 * text["width"],
                    "num_hidden_layers": text["layers"],
                    "num_attention_heads": text["heads"],
                    "eos_token_id": 2,  # here the largest id ends a text, as it does at OpenAI
                },
                projection_dim=config["embed_dim"],
            )
        )
    renamed = to_hugging_face(state)
    known = {key: renamed[key] for key in model.state_dict()}
    model.load_state_dict(known, assign=True)
    for tower, length in (("vision_model", positions_of(state)), ("text_model", 77)):
        embeddings = getattr(model, tower).embeddings
        embeddings.position_ids = torch.arange(length)[None]  # a buffer that the meta device lost
    return model.to(dtype).eval()


def positions_of(state: State) -> int:
    return len(state["visual.positional_embedding"])


def load(state: State, dtype: torch.dtype) -> CLIP:
    """Our loader, without a file between: names converted, sizes read from the weights."""
    weights = to_openai_names(state)
    with torch.device("meta"):
        clip = CLIP(CLIPConfig.from_state_dict(weights))
    clip.load_state_dict(weights, assign=True)
    clip.image_mean, clip.image_std = MEAN.to(dtype), STD.to(dtype)
    return clip.eval()


def open_clip_image(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode at any size: open_clip knows one only, so its table is resized from outside."""
    visual: Any = model.visual
    native, patch = visual.positional_embedding, visual.conv1.kernel_size[0]
    h, w = pixels.shape[2] // patch, pixels.shape[3] // patch
    try:
        if h * w + 1 != len(native) or h != w:
            table = reference_positions(native, h, w)
            visual.positional_embedding = nn.Parameter(table, requires_grad=False)
        cls, tokens = visual(pixels)
    finally:
        visual.positional_embedding = native
    return cls, tokens @ visual.proj


def hugging_face_image(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    joint = model.visual_projection(model.vision_model.post_layernorm(hidden))
    return joint[:, 0], joint[:, 1:]


def images_of(size: Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 3, *side, dtype=size.dtype, generator=generator) for side in size.images]


def assert_same_features(
    ours: list[ImageFeatures], peer: Callable[[Tensor], tuple[Tensor, Tensor]], size: Size
) -> None:
    """Compare the CLS token and every dense token at every size."""
    mean, std = MEAN.to(size.dtype), STD.to(size.dtype)
    for features, images in zip(ours, images_of(size), strict=True):
        cls, dense = peer((images - mean) / std)
        assert_close(features.cls, cls)
        assert_close(features.dense.flatten(2).transpose(1, 2), dense)


def texts() -> Tensor:
    ids = torch.randint(1, 49406, (3, 77), generator=torch.Generator().manual_seed(2))
    for row, end in zip(ids, (2, 20, 76), strict=True):
        row[0], row[end], row[end + 1 :] = 49406, 49407, 0
    return ids


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@torch.no_grad()
def test_equals_open_clip_and_transformers(size: Size) -> None:
    first: Any = build_open_clip(size.name, size.dtype)
    clip = load(first.state_dict(), size.dtype)
    assert sum(p.numel() for p in clip.parameters()) == size.parameters
    ours = [clip.encode_image(images) for images in images_of(size)]
    our_texts = clip.encode_text(texts())
    assert_same_features(ours, partial(open_clip_image, first), size)
    assert_close(our_texts, first.encode_text(texts()))
    second: Any = build_hugging_face(first.state_dict(), size.name, size.dtype)
    # Its own state dict gives bit for bit the same model of ours, so nothing is computed again.
    again = load(second.state_dict(), size.dtype).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in clip.state_dict().items())
    assert_same_features(ours, partial(hugging_face_image, second), size)
    pooled = second.text_model(texts()).pooler_output
    assert_close(our_texts, second.text_projection(pooled))


@torch.no_grad()
def test_the_published_formats_of_vit_b_32_are_one_model(tmp_path: Path) -> None:
    """open_clip's and Hugging Face's own files, through `load_clip`; full width, two layers."""
    reference: Any = build_open_clip("ViT-B-32", torch.float32, layers=2)
    torch.save(reference.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    first = load_clip(tmp_path / "open_clip_pytorch_model.bin")
    other = build_hugging_face(reference.state_dict(), "ViT-B-32", torch.float32, layers=2)
    other.save_pretrained(tmp_path)  # model.safetensors, which a folder prefers
    second = load_clip(tmp_path)
    assert first.config == second.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert torch.equal(tensor, reference.state_dict()[name]), name
