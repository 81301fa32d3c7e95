"""SegFormer: parity with two orders and one other implementation, sizes, gradients, compilers."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.segmenters.segformer import (
    SEGFORMER_CONFIGS,
    DropPath,
    EfficientAttention,
    Segformer,
    SegformerConfig,
    SegformerHead,
)
from cliptteacher.segmenters.weights import (
    convert_segformer_keys,
    load_segformer_weights,
    read_state_dict,
)

TINY = SegformerConfig(
    dims=(16, 16, 24, 32), depths=(2, 1, 1, 1), heads=(1, 2, 3, 4), decoder_channels=20
)
PUBLISHED = replace(TINY, head_norms=False)  # the head of the original release
ENCODER_PARAMETERS = {  # as published, in millions
    "segformer_b0": 3.32,
    "segformer_b1": 13.15,
    "segformer_b2": 24.20,
    "segformer_b3": 44.07,
    "segformer_b4": 60.84,
    "segformer_b5": 81.44,
}


def perturb(model: nn.Module) -> None:
    """Move every tensor away from its initial value, so that no mistake hides behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.1 * (noise.abs() if "running_var" in name else noise))


def perturbed(config: SegformerConfig = TINY, channels: int = 12) -> Segformer:
    torch.manual_seed(0)
    model = Segformer(config, channels)
    perturb(model)
    return model.eval()


def hugging_face(config: SegformerConfig, channels: int, classes: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, classes)(
        transformers.SegformerConfig(
            hidden_sizes=list(config.dims),
            depths=list(config.depths),
            num_attention_heads=list(config.heads),
            sr_ratios=list(config.reductions),
            mlp_ratios=[config.mlp_ratio] * 4,
            decoder_hidden_size=config.decoder_channels,
            num_labels=channels,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
    perturb(model)
    return model.eval()


def published_names(model: nn.Module) -> dict[str, Tensor]:
    """The names under which Hugging Face publishes, whatever its classes call them today."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_state_dict(Path(folder, "model.safetensors"))


def assert_same_maps(found: Tensor, expected: Tensor) -> None:
    """Compare in float64: sums in another order, of some thousand terms through all layers."""
    assert found.dtype == expected.dtype == torch.float64
    atol = 1000 * torch.finfo(torch.float64).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def plain_head(head: SegformerHead, maps: list[Tensor]) -> Tensor:
    """The published order: linear (norm, ReLU), upsample, concatenate, fuse."""
    levels = [
        linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for linear, x in zip(head.linears, maps, strict=True)
    ]
    if head.norms:
        levels = [norm(level).relu() for norm, level in zip(head.norms, levels, strict=True)]
    upsampled = [
        F.interpolate(x, size=maps[0].shape[2:], mode="bilinear", align_corners=False)
        for x in levels
    ]
    fused = F.conv2d(torch.cat(upsampled[::-1], dim=1), head.fuse.weight[:, :, None, None])
    fused = head.norm(fused).relu()
    return F.conv2d(fused, head.classifier.weight[:, :, None, None], head.classifier.bias)


@pytest.mark.parametrize(
    "sizes", [[(8, 8), (4, 4), (2, 2), (1, 1)], [(7, 5), (4, 3), (2, 2), (1, 1)]]
)
@pytest.mark.parametrize("config", [TINY, PUBLISHED], ids=["toolbox", "published"])
def test_head_equals_the_published_order_and_its_gradients(
    config: SegformerConfig, sizes: list[tuple[int, int]]
) -> None:
    head = perturbed(config).head.double()
    assert len(head.norms) == (4 if config is TINY else 0)
    maps = [
        torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
        for dim, size in zip(TINY.dims, sizes, strict=True)
    ]
    inputs = [*maps, *head.parameters()]
    fast, plain = head(maps), plain_head(head, maps)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, seed),
        torch.autograd.grad(plain, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (65, 70), (57, 121)])
def test_matches_hugging_face_with_head(size: tuple[int, int]) -> None:
    reference = hugging_face(TINY, 12, "SegformerForSemanticSegmentation")
    ours = perturbed(PUBLISHED)
    load_segformer_weights(ours, convert_segformer_keys(published_names(reference)))
    reference, ours = reference.double(), ours.double()
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference((images - ours.mean) / ours.std).logits
        assert_same_maps(ours(images), expected)


def test_encoder_alone_matches_hugging_face() -> None:
    reference = hugging_face(TINY, 12, "SegformerModel")
    ours = perturbed()
    head = copy.deepcopy(ours.head.state_dict())
    load_segformer_weights(ours, convert_segformer_keys(published_names(reference)))
    for key, value in ours.head.state_dict().items():
        torch.testing.assert_close(value, head[key], rtol=0, atol=0)
    reference, ours = reference.double(), ours.double()
    images = torch.rand(2, 3, 70, 45, dtype=torch.float64)
    with torch.no_grad():
        expected = reference((images - ours.mean) / ours.std).last_hidden_state
        assert_same_maps(ours.backbone((images - ours.mean) / ours.std)[-1], expected)


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["segformer_b0", "segformer_b2"])
def test_published_sizes_match_hugging_face(name: str, extension: str, tmp_path: Path) -> None:
    """Encoder and decode head, every tensor perturbed; one size is no multiple of 32."""
    config = replace(SEGFORMER_CONFIGS[name], head_norms=False)
    reference = hugging_face(config, 19, "SegformerForSemanticSegmentation")
    names = published_names(reference)
    if extension == "bin":
        torch.save(names, tmp_path / "pytorch_model.bin")
        names = read_state_dict(tmp_path / "pytorch_model.bin")
    ours = Segformer(config, 19).eval()
    load_segformer_weights(ours, convert_segformer_keys(names))
    reference, ours = reference.double(), ours.double()
    images = torch.rand(1, 3, *((75, 94) if extension == "bin" else (64, 128)), dtype=torch.float64)
    with torch.no_grad():
        normalised = (images - ours.mean) / ours.std
        expected = reference(normalised, output_hidden_states=True)
        for ours_map, theirs in zip(ours.backbone(normalised), expected.hidden_states, strict=True):
            assert_same_maps(ours_map, theirs)
        assert_same_maps(ours(images), expected.logits)


@pytest.mark.parametrize("name", ENCODER_PARAMETERS)
def test_encoder_sizes_are_the_published_ones(name: str) -> None:
    config = SEGFORMER_CONFIGS[name]
    with torch.device("meta"):
        ours = Segformer(config, 8)
        count = sum(p.numel() for p in ours.backbone.parameters())
        transformers = pytest.importorskip("transformers")
        reference = transformers.SegformerModel(
            transformers.SegformerConfig(hidden_sizes=list(config.dims), depths=list(config.depths))
        )
    assert count == sum(p.numel() for p in reference.parameters())
    assert round(count / 1e6, 2) == ENCODER_PARAMETERS[name]


@pytest.mark.parametrize("size", [(64, 64), (61, 35), (128, 32), (33, 33), (4, 4), (1, 1), (5, 90)])
def test_any_size_gives_a_quarter_rounded_up(size: tuple[int, int]) -> None:
    model = perturbed()
    with torch.no_grad():
        features = model(torch.rand(1, 3, *size))
    assert features.shape == (1, 12, -(-size[0] // 4), -(-size[1] // 4))
    assert features.isfinite().all()


def test_attention_equals_softmax_over_the_reduced_grid() -> None:
    torch.manual_seed(0)
    layer = EfficientAttention(dim=8, heads=2, reduction=2, eps=1e-6).double()
    grid = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    reduced = F.conv2d(grid.permute(0, 3, 1, 2), layer.sr.weight, layer.sr.bias, stride=2)
    tokens = layer.norm(reduced.flatten(2).transpose(1, 2))
    keys, values = layer.kv(tokens).split(8, dim=-1)
    expected = []
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        scores = layer.q(grid).flatten(1, 2)[..., columns] @ keys[..., columns].transpose(1, 2)
        expected.append((scores / 2).softmax(dim=-1) @ values[..., columns])
    torch.testing.assert_close(
        layer(grid), layer.proj(torch.cat(expected, dim=-1)).view(2, 5, 4, 8)
    )


def test_normalisation_is_inside_and_not_in_the_state_dict() -> None:
    model = perturbed()
    images = torch.rand(1, 3, 32, 32)
    shifted = copy.deepcopy(model)
    shifted.mean.zero_()
    shifted.std.fill_(1)
    torch.testing.assert_close(
        model(images), shifted((images - model.mean) / model.std), rtol=1e-5, atol=1e-5
    )
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} | {
        f"head.{norm}.{buffer}"
        for norm in ("norm", *(f"norms.{level}" for level in range(4)))
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("name", ["segformer_nano", "segformer_b0"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = build_segmenter(name, channels=16)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_image_equals_its_row_of_a_batch() -> None:
    model = perturbed()
    images = torch.rand(3, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


def test_channels_last_and_deepcopy_change_nothing() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(copy.deepcopy(model)(images), expected, rtol=0, atol=0)
        moved = model.to(memory_format=torch.channels_last)
        actual = moved(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_autocast_stays_close() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(images)
    assert features.dtype == torch.bfloat16
    error = (features.float() - expected).norm() / expected.norm()
    assert error < 0.02
    features.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    compiled(images).sum().backward()
    model.train()
    assert torch.compile(model, backend="eager", fullgraph=True)(images).isfinite().all()


@pytest.mark.slow
def test_exports_with_a_dynamic_size() -> None:
    model = perturbed()
    height, width = torch.export.Dim("height", min=64), torch.export.Dim("width", min=64)
    program = torch.export.export(
        model,
        (torch.rand(2, 3, 96, 128),),
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: height, 3: width},),
    )
    for shape in ((2, 3, 96, 128), (3, 3, 71, 90)):
        images = torch.rand(shape)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)


def test_drop_path_rises_linearly_and_keeps_the_mean() -> None:
    model = Segformer(TINY, 4)
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    torch.manual_seed(0)
    ones = torch.ones(4000, 2, 2, 3)
    branch = DropPath(0.25)(ones)
    rows = branch.flatten(1)
    assert (rows == rows[:, :1]).all()  # whole images
    assert sorted(rows[:, 0].unique().tolist()) == pytest.approx([0, 4 / 3])
    assert rows.mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(DropPath(0.25).eval()(ones), ones, rtol=0, atol=0)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = Segformer(SEGFORMER_CONFIGS["segformer_b0"], 64)
    stage = model.backbone.stages[3]
    assert stage.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    fan_out = 9 * 256
    assert stage.patch_embed.proj.weight.std().item() == pytest.approx(
        (2 / fan_out) ** 0.5, rel=0.05
    )
    assert stage.blocks[0].mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_nano_is_far_cheaper_than_b0() -> None:
    flops = {}
    for name in ("segformer_nano", "segformer_b0"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            build_segmenter(name, channels=512).eval()(torch.rand(1, 3, 128, 128))
        flops[name] = counter.get_total_flops()
    assert flops["segformer_nano"] * 3 < flops["segformer_b0"]


def test_head_and_backbone_partition_the_parameters() -> None:
    model = build_segmenter("segformer_nano", channels=8)
    parts = [*model.backbone.parameters(), *model.head.parameters()]
    assert {id(p) for p in parts} == {id(p) for p in model.parameters()}
    assert (model.stride, model.channels) == (4, 8)


def test_names_and_options() -> None:
    assert list_segmenters()[:3] == ["fpn_small", "segformer_nano", "segformer_b0"]
    model = build_segmenter("segformer_nano", 8, drop_path=0.0, decoder_channels=32)
    assert model.config.drop_path == 0
    assert model.head.fuse.weight.shape == (32, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "segformer-b0", "channels": 8}, "did you mean 'segformer_b0'"),
        (
            {"name": "segformer_b0", "channels": 8, "droppath": 0.1},
            "no option 'droppath'; did you mean 'drop_path'",
        ),
        ({"name": "segformer_b0", "channels": 0}, "`channels` must be the width"),
        ({"name": "segformer_b0", "channels": 8, "dims": (32, 64)}, "`dims` must have 4 entries"),
        ({"name": "segformer_b0", "channels": 8, "heads": (1, 2, 7, 8)}, "`heads` must divide"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmenter(**arguments)


def test_wrong_images() -> None:
    model = perturbed()
    with pytest.raises(
        ValueError, match=r"`images` must have shape \(B, 3, H, W\), got \(3, 8, 8\)"
    ):
        model(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="divide by 255"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
