"""The teacher against two published implementations, on random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliptteacher.clip import CLIP, CLIPConfig
from cliptteacher.clip.convert import to_openai_names
from cliptteacher.clip.model import resize_positions

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)

# Two layers, two heads per tower, a native grid of 3 x 3.
WIDTH, TEXT_WIDTH, PATCH, SIZE, CONTEXT, VOCABULARY, JOINT = 128, 128, 16, 48, 10, 60, 24
SIZES = [(48, 48), (96, 96), (64, 112), (32, 16), (48, 80)]


class Peer(NamedTuple):
    """Another implementation: its weights and what it computes from normalised pixels."""

    state_dict: dict[str, Tensor]
    image: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # cls, dense tokens, final tokens
    text: Callable[[Tensor], Tensor]


def perturb(module: nn.Module) -> None:
    """Give every tensor, biases and norms included, numbers of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.1 * noise)


def reference_positions(table: Tensor, h: int, w: int) -> Tensor:
    """Resize a positional table channel by channel."""
    n = round((len(table) - 1) ** 0.5)
    channels = [
        F.interpolate(column.reshape(1, 1, n, n), (h, w), mode="bicubic", align_corners=False)
        for column in table[1:].T
    ]
    return torch.cat([table[:1], torch.stack([c.flatten() for c in channels], dim=1)])


def open_clip_peer(dtype: torch.dtype) -> Peer:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.model.CLIP(
        embed_dim=JOINT,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=2, width=WIDTH, patch_size=PATCH, image_size=SIZE, output_tokens=True
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=CONTEXT, vocab_size=VOCABULARY, width=TEXT_WIDTH, heads=2, layers=2
        ),
        quick_gelu=True,
    )
    perturb(model)
    model = model.to(dtype).eval()
    return Peer(
        model.state_dict(), lambda pixels: open_clip_image(model, pixels), model.encode_text
    )


def open_clip_image(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode at any size: open_clip knows one size only, so its table is resized from outside."""
    native = model.visual.positional_embedding
    h, w = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    try:
        if (h, w) != (SIZE // PATCH, SIZE // PATCH):
            model.visual.positional_embedding = nn.Parameter(reference_positions(native, h, w))
        cls, final = model.visual(pixels)
    finally:
        model.visual.positional_embedding = native
    return cls, final @ model.visual.proj, final


def hugging_face_peer(dtype: torch.dtype) -> Peer:
    transformers = pytest.importorskip("transformers")
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": JOINT}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": SIZE}
    text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH}
    config = transformers.CLIPConfig(
        vision_config={**shared, **vision, "patch_size": PATCH},
        # 2 is the id for which this library takes the largest id as the end, as OpenAI does
        text_config={
            **(shared | text),
            "max_position_embeddings": CONTEXT,
            "vocab_size": VOCABULARY,
            "eos_token_id": 2,
        },
        projection_dim=JOINT,
    )
    model = transformers.CLIPModel(config)
    perturb(model)
    model = model.to(dtype).eval()

    def image(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = model.vision_model
        hidden = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        final = tower.post_layernorm(hidden)
        joint = model.visual_projection(final)
        return joint[:, 0], joint[:, 1:], final[:, 1:]

    def encode(ids: Tensor) -> Tensor:
        return model.text_projection(model.text_model(ids).pooler_output)  # type: ignore[no-any-return]

    return Peer(model.state_dict(), image, encode)


PEERS = {"open_clip": open_clip_peer, "transformers": hugging_face_peer}


def ours(peer: Peer, dtype: torch.dtype) -> CLIP:
    state = to_openai_names(peer.state_dict)
    clip = CLIP(CLIPConfig.from_state_dict(state))
    clip.load_state_dict(state)
    return clip.to(dtype).eval()


def tolerance(dtype: torch.dtype, expected: Tensor) -> float:
    """Rounding of a few thousand chained additions, relative to the largest number."""
    return 300 * torch.finfo(dtype).eps * float(expected.abs().max())


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance(expected.dtype, expected), check_stride=False
    )


def token_ids(n: int) -> Tensor:
    """Random texts of different lengths; the last id of the vocabulary ends each."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCABULARY - 1, (n, CONTEXT), generator=generator)
    for row, length in zip(ids, range(1, n + 1), strict=True):
        row[length % CONTEXT] = VOCABULARY - 1
        row[length % CONTEXT + 1 :] = 0
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_images_equal_the_peer_at_every_size(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    peer = PEERS[name](dtype)
    clip = ours(peer, dtype)
    for H, W in SIZES:
        images = torch.rand(2, 3, H, W, dtype=dtype)
        cls, dense, final = peer.image((images - MEAN.to(dtype)) / STD.to(dtype))
        features = clip.encode_image(images)
        assert features.dense.shape == (2, JOINT, H // PATCH, W // PATCH)
        assert features.final.shape == (2, WIDTH, H // PATCH, W // PATCH)
        assert_close(features.cls, cls)
        assert_close(features.dense.flatten(2).transpose(1, 2), dense)
        assert_close(features.final.flatten(2).transpose(1, 2), final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_texts_equal_the_peer(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    peer = PEERS[name](dtype)
    ids = token_ids(9)
    assert_close(ours(peer, dtype).encode_text(ids), peer.text(ids))


@torch.no_grad()
def test_gelu_equals_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=JOINT,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=PATCH, image_size=SIZE),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=CONTEXT, vocab_size=VOCABULARY, width=64, heads=1, layers=1
        ),
    ).eval()
    perturb(model)
    clip = CLIP(CLIPConfig.from_state_dict(model.state_dict(), activation="gelu"))
    clip.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, SIZE, SIZE)
    assert_close(clip.encode_image(images).cls, model.encode_image((images - MEAN) / STD))
    assert_close(clip.encode_text(token_ids(3)), model.encode_text(token_ids(3)))


# --- what holds without a peer ---


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(
        embed_dim=JOINT, image_size=SIZE, vision_width=64, vision_layers=2,
        context_length=CONTEXT, vocab_size=VOCABULARY, text_width=64, text_layers=2,
    )  # fmt: skip
    clip = CLIP(config).double().eval()
    perturb(clip)
    return clip


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (2, 7), (1, 1)])
def test_positions_are_resized_bicubically(grid: tuple[int, int]) -> None:
    table = torch.randn(10, 5, dtype=torch.float64)
    expected = reference_positions(table, *grid)
    torch.testing.assert_close(resize_positions(table, grid), expected, rtol=0, atol=1e-12)


def test_positions_of_the_native_grid_are_untouched() -> None:
    table = torch.randn(10, 5).half()
    assert torch.equal(resize_positions(table, (3, 3)), table)
    assert resize_positions(table, (4, 5)).dtype == torch.float16


def test_dense_tokens_are_laid_out_like_the_image(clip: CLIP) -> None:
    """A change in one patch moves that token most, so row and column are not swapped."""
    images = torch.rand(1, 3, 32, 64, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, 16:32, 32:48] = 1 - changed[:, :, 16:32, 32:48]
    moved = clip.encode_image(changed).final - clip.encode_image(images).final
    assert moved.shape == (1, 64, 2, 4)
    assert moved.norm(dim=1).flatten().argmax() == 1 * 4 + 2


def test_batch_equals_single_images(clip: CLIP) -> None:
    images = torch.rand(3, 3, 48, 64, dtype=torch.float64)
    together = clip.encode_image(images)
    for i in range(3):
        alone = clip.encode_image(images[i : i + 1])
        for found, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(found[0], expected[i], rtol=0, atol=1e-12)


def test_text_ignores_what_stands_behind_its_end(clip: CLIP) -> None:
    ids = token_ids(5)
    changed = ids.clone()
    for row in changed:
        row[int(row.argmax()) + 1 :] = 7
    torch.testing.assert_close(clip.encode_text(changed), clip.encode_text(ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        clip.encode_text(ids[:, :6]), clip.encode_text(ids), rtol=0, atol=1e-12
    )


@torch.no_grad()
def test_autocast_stays_close(clip: CLIP) -> None:
    single = CLIP(clip.config)
    single.load_state_dict(clip.state_dict())
    images, ids = torch.rand(2, 3, 64, 48), token_ids(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text = single.encode_image(images), single.encode_text(ids)
    for found, expected in (
        *zip(image, single.encode_image(images), strict=True),
        (text, single.encode_text(ids)),
    ):
        atol = 16 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=atol)


def test_gradients_reach_every_parameter(clip: CLIP) -> None:
    trained = CLIP(clip.config)
    image = trained.encode_image(torch.rand(1, 3, 64, 64))
    (image.cls.square().sum() + trained.encode_text(token_ids(2)).square().sum()).backward()
    without = [name for name, p in trained.named_parameters() if p.grad is None]
    assert without == ["logit_scale"]  # it belongs to the loss


@pytest.mark.parametrize(("H", "W"), [(47, 48), (48, 40), (8, 16), (0, 16)])
def test_sides_must_be_multiples_of_the_patch(clip: CLIP, H: int, W: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of the patch size 16, got {H} x {W}; resize"):
        clip.encode_image(torch.rand(1, 3, H, W, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 48, 48), (1, 1, 48, 48), (1, 48, 48, 3)])
def test_images_must_be_a_batch_of_colour_images(clip: CLIP, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`images` must have shape \(B, 3, H, W\), got"):
        clip.encode_image(torch.rand(shape, dtype=torch.float64))


def test_images_must_be_float(clip: CLIP) -> None:
    with pytest.raises(TypeError, match="`images` must be float in .*got torch.uint8; divide"):
        clip.encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


def test_ids_must_fit_the_context(clip: CLIP) -> None:
    with pytest.raises(ValueError, match=r"`ids` must have shape \(n, T\) with T at most 10"):
        clip.encode_text(torch.zeros(1, 11, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(10,\)"):
        clip.encode_text(torch.zeros(10, dtype=torch.int64))


def test_config_needs_every_name(clip: CLIP) -> None:
    state = dict(clip.state_dict())
    assert CLIPConfig.from_state_dict(state) == clip.config
    del state["text_projection"]
    with pytest.raises(ValueError, match="must hold 'text_projection'"):
        CLIPConfig.from_state_dict(state)


# --- the names and shapes that OpenAI published ---


def block_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width),
        f"{prefix}.attn.out_proj.bias": (width,),
        f"{prefix}.ln_1.weight": (width,),
        f"{prefix}.ln_1.bias": (width,),
        f"{prefix}.mlp.c_fc.weight": (4 * width, width),
        f"{prefix}.mlp.c_fc.bias": (4 * width,),
        f"{prefix}.mlp.c_proj.weight": (width, 4 * width),
        f"{prefix}.mlp.c_proj.bias": (width,),
        f"{prefix}.ln_2.weight": (width,),
        f"{prefix}.ln_2.bias": (width,),
    }


def openai_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ViT-B-16.pt, without its three sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
        "logit_scale": (),
        "token_embedding.weight": (49408, 512),
        "ln_final.weight": (512,),
        "ln_final.bias": (512,),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (197, 768),
        "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, 16, 16),
        "visual.ln_pre.weight": (768,),
        "visual.ln_pre.bias": (768,),
        "visual.ln_post.weight": (768,),
        "visual.ln_post.bias": (768,),
    }
    for layer in range(12):
        shapes |= block_shapes(f"visual.transformer.resblocks.{layer}", 768)
        shapes |= block_shapes(f"transformer.resblocks.{layer}", 512)
    return shapes


def test_names_and_shapes_of_vit_b_16_are_openai_s() -> None:
    with torch.device("meta"):
        clip = CLIP(CLIPConfig())
    found = {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()}
    assert found == openai_shapes()
    assert len(found) == 302
    assert sum(p.numel() for p in clip.parameters()) == 149_620_737
    assert CLIPConfig.from_state_dict(clip.state_dict()) == clip.config


def test_names_of_a_wrapped_model_are_openai_s() -> None:
    config = CLIPConfig(
        embed_dim=16, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
        text_width=64, text_layers=1,
    )  # fmt: skip
    state = CLIP(config).state_dict()
    wrapped = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    assert to_openai_names(wrapped).keys() == state.keys()
