"""Swin + UPerNet: parity with three implementations and a literal head, sizes, gradients, files."""

import copy
import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from cliptteacher.segmenters import weights
from cliptteacher.segmenters.swin import (
    SWIN_CONFIGS,
    Swin,
    SwinConfig,
    UPerNetHead,
    pool_to_grid,
)
from cliptteacher.segmenters.swin_attention import WindowAttention
from cliptteacher.segmenters.swin_weights import (
    SWIN_IMAGENET,
    convert_swin_keys,
    load_swin_weights,
    read_swin_weights,
)
from cliptteacher.training.optimizer import parameter_groups

TINY = SwinConfig(
    dim=8, depths=(2, 1, 1, 2), heads=(1, 2, 2, 4), window=2, mlp_ratio=2.0, head_channels=8
)
# Relative to the largest value: some 30 layers of float32 (eps 1.2e-7), summed in other orders.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def perturb(model: nn.Module) -> None:
    """Move every tensor away from its initial value, so that no mistake hides behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.1 * (noise.abs() if "running_var" in name else noise))


def perturbed(config: SwinConfig = TINY, channels: int = 6) -> Swin:
    torch.manual_seed(0)
    model = Swin(config, channels)
    perturb(model)
    return model.eval()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)


@pytest.mark.parametrize("size", [(64, 64), (36, 100), (33, 47)])
def test_backbone_equals_torchvision_with_the_weights_of_a_file(
    size: tuple[int, int], tmp_path: Path
) -> None:
    config = replace(SWIN_CONFIGS["swin_t"], head_channels=8)
    reference = torchvision.models.swin_t().eval()
    perturb(reference)
    torch.save(reference.state_dict(), tmp_path / "swin_t.pth")
    ours = Swin(config, 6).eval()
    load_swin_weights(ours, read_swin_weights("swin_t", tmp_path / "swin_t.pth"))
    images = normalise(torch.rand(2, 3, *size))
    padded = F.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
    with torch.no_grad():
        maps = ours.backbone(images)
        logits = reference.head(maps[3].mean(dim=(2, 3)))
        torch.testing.assert_close(logits, reference(padded), **FLOAT32)
        grid = padded
        for index, layer in enumerate(reference.features):
            grid = layer(grid)
            if index % 2:  # the blocks of a stage; its norm has just been made: ones and zeros
                norm = reference.norm.weight, reference.norm.bias
                affine = norm if index == 7 else (None, None)
                expected = F.layer_norm(grid, grid.shape[3:], *affine).permute(0, 3, 1, 2)
                torch.testing.assert_close(maps[index // 2], expected, rtol=0, atol=0)


def to_timm(key: str) -> str | None:
    """Give a tensor of torchvision's Swin its name in timm's `features_only` Swin."""
    if key.startswith(("norm.", "head.")) or "relative_position_index" in key:
        return None
    key = key.replace("features.0.0.", "patch_embed.proj.")
    key = key.replace("features.0.2.", "patch_embed.norm.")
    key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")

    def layer(found: re.Match[str]) -> str:
        index = int(found[1])
        return f"layers_{index // 2}." + ("blocks." if index % 2 else "downsample.")

    return re.sub(r"^features\.(\d)\.", layer, key)


def test_backbone_equals_timm() -> None:
    timm = pytest.importorskip("timm")
    reference = timm.create_model("swin_tiny_patch4_window7_224", features_only=True).eval()
    ours = perturbed(replace(SWIN_CONFIGS["swin_t"], head_channels=8))
    state = {
        name: value
        for key, value in ours.backbone.state_dict().items()
        if not key.startswith("norms.") and (name := to_timm(key))
    }
    absent, unknown = reference.load_state_dict(state, strict=False)
    assert not unknown
    assert all("relative_position_index" in key or "attn_mask" in key for key in absent)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        maps = ours.backbone(normalise(images))
        for actual, theirs, norm in zip(
            maps, reference(normalise(images)), ours.backbone.norms, strict=True
        ):
            torch.testing.assert_close(actual, norm(theirs).permute(0, 3, 1, 2), **FLOAT32)


def hugging_face(config: SwinConfig, channels: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(
        embed_dim=config.dim,
        depths=list(config.depths),
        num_heads=list(config.heads),
        window_size=config.window,
        mlp_ratio=config.mlp_ratio,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    settings = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=config.head_channels,
        auxiliary_in_channels=config.dims[2],
        auxiliary_channels=config.head_channels // 2,
        num_labels=channels,
    )
    return transformers.UperNetForSemanticSegmentation(settings).eval()


def test_heads_equal_hugging_face() -> None:
    reference = hugging_face(TINY, 6)
    perturb(reference)
    ours = perturbed(replace(TINY, auxiliary=True))
    theirs = reference.decode_head
    for part, source in (
        (ours.head.pooled, theirs.psp_modules),
        (ours.head.bottleneck, theirs.bottleneck),
        (ours.head.laterals, theirs.lateral_convs),
        (ours.head.smooth, theirs.fpn_convs),
        (ours.head.fuse, theirs.fpn_bottleneck),
        (ours.head.classifier, theirs.classifier),
        (ours.auxiliary, reference.auxiliary_head),
    ):
        values = source.state_dict().values()  # the same layers in the same order
        part.load_state_dict(dict(zip(part.state_dict(), values, strict=True)))
    sizes = ((17, 12), (9, 6), (5, 3), (3, 2))
    maps = [torch.randn(2, dim, *size) for dim, size in zip(TINY.dims, sizes, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(ours.head(maps), theirs(maps), **FLOAT32)
        expected = reference.auxiliary_head(maps)
        torch.testing.assert_close(ours.auxiliary(maps[2]), expected, **FLOAT32)


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [
        ("swin_t", torchvision.models.Swin_T_Weights, 60),
        ("swin_s", torchvision.models.Swin_S_Weights, 81),
        ("swin_b", torchvision.models.Swin_B_Weights, 121),
    ],
)
def test_sizes_are_the_published_ones(name: str, published: type, millions: int) -> None:
    config = replace(SWIN_CONFIGS[name], auxiliary=True)
    widest = config.dims[3]
    with torch.device("meta"):
        ours = Swin(config, 150)
        theirs = hugging_face(config, 150)
        # Of Hugging Face's, the backbone's own last norm is never run, and half of 512 is 256.
        assert count(ours) == count(theirs) - 2 * widest
    classifier = 1000 * widest + 1000
    new_norms = 2 * sum(config.dims[:3])
    imagenet = published.IMAGENET1K_V1.meta["num_params"]
    assert count(ours.backbone) == imagenet - classifier + new_norms
    assert round(count(ours) / 1e6) == millions  # as the authors print it, with 150 classes


def test_nano_is_small() -> None:
    assert 0.3e6 < count(Swin(SWIN_CONFIGS["swin_nano"], 64)) < 0.6e6


def slow_convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Sum over the window, pixel by pixel."""
    reach = layer.kernel_size[0] // 2
    B, _, H, W = x.shape
    padded = F.pad(x, (reach,) * 4)
    rows = [
        torch.einsum(
            "bcij,ocij->bo",
            padded[:, :, h : h + 2 * reach + 1, w : w + 2 * reach + 1],
            layer.weight,
        )
        for h in range(H)
        for w in range(W)
    ]
    y = torch.stack(rows, dim=2).view(B, layer.out_channels, H, W)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def slow_block(x: Tensor, block: nn.Sequential) -> Tensor:
    convolution, norm, _ = block
    y = slow_convolution(x, convolution)
    mean, variance, weight, bias = (
        t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return ((y - mean) / (variance + norm.eps).sqrt() * weight + bias).clamp(min=0)


def slow_pool(x: Tensor, size: int) -> Tensor:
    """Average over bin i = [floor(i n / size), ceil((i + 1) n / size)) of each side."""
    H, W = x.shape[2:]
    bins = [[(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in (H, W)]
    rows = [
        torch.stack([x[:, :, t:b, le:r].mean(dim=(2, 3)) for le, r in bins[1]], dim=2)
        for t, b in bins[0]
    ]
    return torch.stack(rows, dim=2)


def slow_resize(x: Tensor, size: torch.Size) -> Tensor:
    """Interpolate along one side, then along the other; pixel centres lie at i + 0.5."""
    for axis, length in ((2, size[0]), (3, size[1])):
        old = x.shape[axis]
        lines = []
        for i in range(length):
            where = max((i + 0.5) * old / length - 0.5, 0.0)
            low = int(where)
            high = min(low + 1, old - 1)
            share = where - low
            lines.append(x.select(axis, low) * (1 - share) + x.select(axis, high) * share)
        x = torch.stack(lines, dim=axis)
    return x


def slow_head(head: UPerNetHead, maps: list[Tensor]) -> Tensor:
    top = maps[3]
    pyramid = [top] + [
        slow_resize(slow_block(slow_pool(top, size), layer), top.shape[2:])
        for size, layer in zip((1, 2, 3, 6), head.pooled, strict=True)
    ]
    y4 = slow_block(torch.cat(pyramid, dim=1), head.bottleneck)
    y3 = slow_block(maps[2], head.laterals[2]) + slow_resize(y4, maps[2].shape[2:])
    y2 = slow_block(maps[1], head.laterals[1]) + slow_resize(y3, maps[1].shape[2:])
    y1 = slow_block(maps[0], head.laterals[0]) + slow_resize(y2, maps[0].shape[2:])
    finest = maps[0].shape[2:]
    levels = [
        slow_block(y1, head.smooth[0]),
        slow_resize(slow_block(y2, head.smooth[1]), finest),
        slow_resize(slow_block(y3, head.smooth[2]), finest),
        slow_resize(y4, finest),
    ]
    return slow_convolution(slow_block(torch.cat(levels, dim=1), head.fuse), head.classifier)


@pytest.mark.parametrize(
    "sizes", [[(8, 8), (4, 4), (2, 2), (1, 1)], [(13, 6), (7, 3), (4, 2), (2, 1)]]
)
def test_head_equals_the_literal_one_and_its_gradients(sizes: list[tuple[int, int]]) -> None:
    head = perturbed().head.double()
    maps = [
        torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
        for dim, size in zip(TINY.dims, sizes, strict=True)
    ]
    inputs = [*maps, *head.parameters()]
    fast, slow = head(maps), slow_head(head, maps)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)  # float64, eps 2e-16
    seed = torch.randn_like(slow)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, seed),
        torch.autograd.grad(slow, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "size", [(64, 64), (33, 47), (128, 32), (57, 121), (13, 13), (4, 4), (1, 1), (3, 90)]
)
def test_any_size_gives_a_quarter_rounded_up(size: tuple[int, int]) -> None:
    model = perturbed(SWIN_CONFIGS["swin_nano"])
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        features = model(images)
        maps = model.backbone(normalise(images))
    assert features.shape == (1, 6, -(-size[0] // 4), -(-size[1] // 4))
    assert features.isfinite().all()
    for level, x in enumerate(maps):
        stride = 4 * 2**level
        assert x.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


def test_padding_is_mean_colour_on_the_right_and_below() -> None:
    model = perturbed()
    images = torch.rand(1, 3, 33, 47)
    mean = model.mean.expand(1, 3, 36, 48).clone()
    mean[:, :, :33, :47] = images
    with torch.no_grad():
        # The normalised mean is 0 up to one rounding.
        torch.testing.assert_close(model(images), model(mean), rtol=1e-5, atol=1e-5)


def test_one_image_equals_its_row_of_a_batch() -> None:
    model = perturbed()
    images = torch.rand(3, 3, 48, 40)
    with torch.no_grad():
        batch = model(images)
        for i in range(3):
            torch.testing.assert_close(batch[i : i + 1], model(images[i : i + 1]), **FLOAT32)


def test_normalisation_is_inside_and_not_in_the_state_dict() -> None:
    model = perturbed()
    images = torch.rand(1, 3, 32, 32)
    shifted = copy.deepcopy(model)
    shifted.mean.zero_()
    shifted.std.fill_(1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), shifted(normalise(images)), **FLOAT32)
    assert not {"mean", "std"} & set(model.state_dict())


@pytest.mark.parametrize("auxiliary", [False, True])
def test_every_parameter_gets_a_gradient(auxiliary: bool) -> None:
    torch.manual_seed(0)
    # Without drop path, which at times skips a branch for both images.
    config = replace(SWIN_CONFIGS["swin_nano"], auxiliary=auxiliary, drop_path=0.0)
    model = Swin(config, 16).train()
    images = torch.rand(2, 3, 128, 128)
    outputs = model.forward_with_auxiliary(images) if auxiliary else (model(images),)
    torch.stack([x.square().mean() for x in outputs]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    tables = [p for n, p in model.named_parameters() if "bias_table" in n]
    assert len(tables) == 7
    assert all((p.grad != 0).all() for p in tables)


def test_auxiliary_features() -> None:
    model = perturbed(replace(TINY, auxiliary=True))
    images = torch.rand(2, 3, 72, 50)
    with torch.no_grad():
        features, auxiliary = model.forward_with_auxiliary(images)
        torch.testing.assert_close(features, model(images), rtol=0, atol=0)
        expected = model.auxiliary(model.backbone(normalise(images))[2])
        torch.testing.assert_close(auxiliary, expected, **FLOAT32)
    assert auxiliary.shape == (2, 6, 5, 4)
    with pytest.raises(RuntimeError, match=r"must have an auxiliary head, .* auxiliary=True"):
        perturbed().forward_with_auxiliary(images)


def test_a_student_trained_with_an_auxiliary_head_loads_without() -> None:
    trained = perturbed(replace(TINY, auxiliary=True))
    state = trained.state_dict()
    plain = nn.ModuleDict({"segmenter": Swin(TINY, 6)}).eval()
    plain.load_state_dict({f"segmenter.{key}": value for key, value in state.items()})
    assert any(key.startswith("auxiliary.") for key in state)  # the caller's stays whole
    images = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(plain["segmenter"](images), trained(images), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*auxiliary"):
        trained.load_state_dict(plain["segmenter"].state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*auxiliar\."):
        plain["segmenter"].load_state_dict({**state, "auxiliar.x": torch.ones(1)})


def test_channels_last_and_deepcopy_change_nothing() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(copy.deepcopy(model)(images), expected, rtol=0, atol=0)
        moved = model.to(memory_format=torch.channels_last)
        actual = moved(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, **FLOAT32)


def test_autocast_stays_close() -> None:
    model = perturbed(replace(TINY, auxiliary=True))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_with_auxiliary(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.forward_with_auxiliary(images)
    for actual, exact in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        error = (actual.float() - exact).norm() / exact.norm()
        assert error < 0.02  # a few times the bfloat16 eps of 0.008
    torch.stack([x.float().square().mean() for x in outputs]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 40, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), **FLOAT32)
    compiled(images).sum().backward()
    model.train()
    assert torch.compile(model, backend="eager", fullgraph=True)(images).isfinite().all()


@pytest.mark.slow
def test_exports_for_any_batch_of_one_size() -> None:
    model = perturbed()
    program = torch.export.export(
        model, (torch.rand(2, 3, 45, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for batch in (2, 5):
        images = torch.rand(batch, 3, 45, 64)
        torch.testing.assert_close(program.module()(images), model(images), **FLOAT32)


def test_a_single_image_in_training_is_refused() -> None:
    model = perturbed().train()
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"at least 2 images per process, got 1; .*\.eval\(\)"):
        model(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # frozen statistics have no such limit
    assert model(images).isfinite().all()
    assert model.train()(torch.rand(2, 3, 4, 4)).isfinite().all()


def test_drop_path_rises_linearly() -> None:
    model = Swin(replace(TINY, drop_path=0.5), 4)
    rates = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    published = [SWIN_CONFIGS[name].drop_path for name in SWIN_IMAGENET]
    assert published == [0.3, 0.3, 0.3]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = Swin(replace(SWIN_CONFIGS["swin_t"], head_channels=64, auxiliary=True), 96)
    block = model.backbone.features[7][1]
    for layer in (block.mlp[0], block.attn.qkv):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.05)
    for head, layer in ((model.head, model.head.fuse[0]), (model.auxiliary, None)):
        assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
        layer = layer or head.convolution[0]
        fan_out = 9 * layer.out_channels
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()


def test_norms_and_position_tables_do_not_decay() -> None:
    model = Swin(replace(TINY, auxiliary=True), 6)
    groups = parameter_groups(
        model, 6e-5, 0.01, head_multiplier=1.0, head_prefixes=("head", "auxiliary")
    )
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    decaying = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)]
    expected = {id(p) for norm in norms for p in norm.parameters()}
    expected |= {id(p) for n, p in model.named_parameters() if n.endswith("bias_table")}
    assert free == expected
    assert free | decaying == {id(p) for p in model.parameters()}


def test_parts_partition_the_parameters() -> None:
    model = Swin(replace(TINY, auxiliary=True), 8)
    parts = [model.backbone, model.head, model.auxiliary]
    assert sum(count(part) for part in parts) == count(model)
    assert (model.stride, model.channels) == (4, 8)
    assert Swin(TINY, 8).auxiliary is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 2)}, "`depths` must have 4 positive entries"),
        ({"depths": (2, 2, 0, 2)}, "`depths` must have 4 positive entries"),
        ({"heads": (1, 2, 2)}, "`heads` must have 4 positive entries"),
        ({"heads": (3, 2, 2, 4)}, "`heads` must divide the channels stage by stage"),
        ({"window": 1}, "`window` must be at least 2 tokens, got 1"),
        ({"head_channels": 1}, "`head_channels` must be at least 2, got 1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`channels` must be the width"):
        Swin(TINY, 0)
    model = perturbed()
    with pytest.raises(
        ValueError, match=r"`images` must have shape \(B, 3, H, W\), got \(3, 8, 8\)"
    ):
        model(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="divide by 255"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


# Files.


def torchvision_state(config: SwinConfig = TINY) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = torchvision.models.SwinTransformer(
        [4, 4], config.dim, list(config.depths), list(config.heads), [config.window] * 2,
        mlp_ratio=config.mlp_ratio, num_classes=10,
    )  # fmt: skip
    perturb(model)
    return model.state_dict()


def test_a_file_of_torchvision_fills_the_backbone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torchvision_state()
    torch.save(state, tmp_path / "swin.pth")
    model = perturbed(replace(TINY, auxiliary=True))
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO):
        load_swin_weights(model, read_swin_weights("swin_t", tmp_path / "swin.pth"))
    after = model.state_dict()
    for key, value in after.items():
        source = key.removeprefix("backbone.").replace("norms.3.", "norm.")
        is_new = key.startswith(("head.", "auxiliary.", "backbone.norms.0")) or source not in state
        torch.testing.assert_close(value, before[key] if is_new else state[source], rtol=0, atol=0)
    used = {k.removeprefix("backbone.").replace("norms.3.", "norm.") for k in after} & set(state)
    assert used == {key for key in state if key not in ("head.weight", "head.bias")}
    assert "left as initialised: auxiliary.classifier, auxiliary.convolution.0" in caplog.text
    assert "backbone.norms.3" not in caplog.text


def test_own_state_dict_round_trip(tmp_path: Path) -> None:
    source = perturbed(replace(TINY, auxiliary=True))
    torch.save({"format": 1, "segmenter": source.state_dict()}, tmp_path / "last.pt")
    state = read_swin_weights("swin_t", tmp_path / "last.pt")
    for config in (TINY, replace(TINY, auxiliary=True)):
        model = Swin(config, 6)
        load_swin_weights(model, state)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, source.state_dict()[key], rtol=0, atol=0)


def test_a_classifier_of_other_channels_stays_random(caplog: pytest.LogCaptureFixture) -> None:
    state = perturbed(channels=6).state_dict()
    model = Swin(TINY, 9)
    before = model.head.classifier.weight.clone()
    with caplog.at_level(logging.INFO):
        load_swin_weights(model, convert_swin_keys(state))
    torch.testing.assert_close(model.head.classifier.weight, before, rtol=0, atol=0)
    torch.testing.assert_close(model.head.fuse[0].weight, state["head.fuse.0.weight"])
    assert caplog.messages == ["left as initialised: head.classifier"]


@pytest.mark.parametrize("change", ["missing", "unknown", "of another shape"])
def test_a_tensor_that_does_not_fit_is_named(change: str) -> None:
    state = torchvision_state()
    if change == "missing":
        del state["features.1.0.attn.qkv.weight"]
    elif change == "unknown":
        state["features.1.0.attn.qkv.scale"] = torch.ones(1)
    else:
        state["features.1.0.attn.qkv.weight"] = torch.ones(3, 16)
    match = rf"got 1 {change} \(backbone.features.1.0.attn.qkv.*\); check the name"
    with pytest.raises(ValueError, match=match):
        load_swin_weights(Swin(TINY, 6), convert_swin_keys(state))


@pytest.mark.parametrize("part", ["norm.", "head.fuse.0", "backbone.norms.1.bias"])
def test_an_incomplete_file_is_refused(part: str) -> None:
    state = torchvision_state() if part == "norm." else perturbed().state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(part)}
    with pytest.raises(ValueError, match=r"got \d+ missing \("):
        load_swin_weights(Swin(TINY, 6), convert_swin_keys(kept))
    with pytest.raises(ValueError, match="missing"):
        load_swin_weights(Swin(TINY, 6), {})


def test_weights_of_another_size_are_refused() -> None:
    state = convert_swin_keys(torchvision_state())
    for options in ({"window": 4}, {"dim": 16}, {"depths": (2, 2, 2, 2)}, {"heads": (2, 2, 2, 4)}):
        with pytest.raises(ValueError, match="check the name of the segmenter"):
            load_swin_weights(Swin(replace(TINY, **options), 6), state)


def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a small file where torchvision's enumeration says that Swin-T lies."""
    source = tmp_path / "source.pth"
    torch.save(torchvision_state(), source)
    name = f"swin_t-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth"
    source.rename(tmp_path / name)
    url = f"{tmp_path.as_uri()}/{name}"
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: SimpleNamespace(url=url))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights.announce.cache_clear()
    return name


def test_imagenet_weights_are_downloaded_checked_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = publish(tmp_path, monkeypatch)
    for _ in range(2):
        state = read_swin_weights("swin_t", "imagenet")
        (tmp_path / name).unlink(missing_ok=True)  # the second time it is cached
    load_swin_weights(Swin(TINY, 6), state)
    torch.testing.assert_close(state["backbone.norms.3.bias"], torchvision_state()["norm.bias"])
    assert caplog.text.count("BSD 3-Clause licence") == 1
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(FileNotFoundError, match=rf"{name} is damaged and could not be"):
        read_swin_weights("swin_t", "imagenet")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "file"),
    [("swin_t", "swin_t-704ceda3"), ("swin_s", "swin_s-5e29d889"), ("swin_b", "swin_b-68c6b09e")],
)
def test_offline_error_says_where_to_put_the_file(name: str, file: str) -> None:
    match = (
        rf"checkpoints/{file}\.pth is missing .* "
        rf"get https://download\.pytorch\.org/models/{file}\.pth and put it there"
    )
    with pytest.raises(FileNotFoundError, match=match):
        read_swin_weights(name, "imagenet")


def test_files_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"exists for swin_t, .* not for 'swin_nano'"):
        read_swin_weights("swin_nano", "imagenet")
    with pytest.raises(FileNotFoundError, match="'imagenet', None or an existing file"):
        read_swin_weights("swin_t", "imagnet")


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (6, 6), (7, 13), (32, 16)])
def test_pooling_is_adaptive_average_pooling(size: int, height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    ours, theirs = pool_to_grid(x, size), F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(ours, theirs)
    (mine,) = torch.autograd.grad(ours.square().sum(), x)
    (reference,) = torch.autograd.grad(theirs.square().sum(), x)
    torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("shift", [0, 2, 3])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (4, 4), (7, 7), (7, 9), (9, 3), (14, 21), (15, 8)]
)
def test_attention_and_its_gradients_are_those_of_torchvision(
    shift: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    theirs = ShiftedWindowAttention(12, [7, 7], [shift, shift], num_heads=3).double()
    nn.init.normal_(theirs.relative_position_bias_table)
    ours = WindowAttention(12, [7, 7], [shift, shift], num_heads=3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, height, width, 12, dtype=torch.float64)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_attention_between_tokens_apart_is_no_denormal_number() -> None:
    """exp(-100) is one; a CPU is ten times slower with them, forward and backward."""
    layer = WindowAttention(8, [7, 7], [3, 3], num_heads=2)
    weights: list[Tensor] = []
    softmax = Tensor.softmax

    def listen(self: Tensor, *args: int, **kwargs: int) -> Tensor:
        weights.append(softmax(self, *args, **kwargs))
        return weights[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "softmax", listen)
        layer(torch.randn(1, 14, 14, 8))
    (attention,) = weights
    assert (attention == 0).any() and attention[attention > 0].min() > 1e-30
