"""SegNeXt: literal versions of its parts, published sizes, determinism, compilers."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cliptteacher.segmenters.segformer import DropPath
from cliptteacher.segmenters.segnext import (
    NMF,
    SEGNEXT_CONFIGS,
    Block,
    LightHamHead,
    MultiScaleGate,
    SegNeXt,
    SegNeXtConfig,
    factorize,
)

DIMS, DEPTHS, RATIOS = (8, 16, 24, 32), (1, 2, 1, 1), (4, 3, 2, 2)
TINY = SegNeXtConfig(dims=DIMS, depths=DEPTHS, mlp_ratios=RATIOS, decoder_channels=64, rank=4)
PUBLISHED = {  # with 150 classes: million parameters, and G multiply-adds at 512 x 512
    "segnext_t": (4.3, 6.6),
    "segnext_s": (13.9, 15.9),
    "segnext_b": (27.6, 34.9),
    "segnext_l": (48.9, 70.0),
}


def perturb(model: nn.Module) -> None:
    """Move every tensor away from its initial value, so that no mistake hides behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.1 * (noise.abs() if "running_var" in name else noise))


def perturbed(config: SegNeXtConfig = TINY, channels: int = 12) -> SegNeXt:
    torch.manual_seed(0)
    model = SegNeXt(config, channels)
    perturb(model)
    return model.eval()


# The parts, against literal versions.


def depthwise_by_hand(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Zero padding, one output value at a time."""
    C, H, W = x.shape
    rows, columns = layer.weight.shape[2:]
    result = torch.zeros_like(x)
    for c in range(C):
        for i in range(H):
            for j in range(W):
                total = layer.bias[c]
                for di in range(rows):
                    for dj in range(columns):
                        y, z = i + di - rows // 2, j + dj - columns // 2
                        if 0 <= y < H and 0 <= z < W:
                            total = total + layer.weight[c, 0, di, dj] * x[c, y, z]
                result[c, i, j] = total
    return result


@torch.no_grad()
def test_gate_equals_strips_by_hand() -> None:
    gate = MultiScaleGate(2).double()
    perturb(gate)
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    near = depthwise_by_hand(x, gate.conv0)
    around = near.clone()
    for first, second in (
        (gate.conv0_1, gate.conv0_2),
        (gate.conv1_1, gate.conv1_2),
        (gate.conv2_1, gate.conv2_2),
    ):
        around += depthwise_by_hand(depthwise_by_hand(near, first), second)
    mixed = torch.einsum("oc,chw->ohw", gate.conv3.weight[:, :, 0, 0], around)
    expected = (mixed + gate.conv3.bias[:, None, None]) * x
    torch.testing.assert_close(gate(x[None])[0], expected, rtol=1e-12, atol=1e-12)
    kernels = {tuple(m.kernel_size) for m in gate.modules() if isinstance(m, nn.Conv2d)}
    strips = {(1, 7), (7, 1), (1, 11), (11, 1), (1, 21), (21, 1)}
    assert kernels == strips | {(5, 5), (1, 1)}


@torch.no_grad()
def test_block_equals_its_formula() -> None:
    block = Block(4, mlp_ratio=3, drop_path=0.5).double().eval()
    perturb(block)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)

    def norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        shape = (1, 4, 1, 1)
        scaled = (x - layer.running_mean.view(shape)) / (
            layer.running_var.view(shape) + 1e-5
        ) ** 0.5
        return scaled * layer.weight.view(shape) + layer.bias.view(shape)

    def pointwise(x: Tensor, layer: nn.Conv2d) -> Tensor:
        return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias.view(
            -1, 1, 1
        )

    attn, mlp = block.attn, block.mlp
    normed = norm(x, block.norm1)
    gated = attn.spatial_gating_unit(F.gelu(pointwise(normed, attn.proj_1)))
    expected = x + block.layer_scale_1.view(4, 1, 1) * (pointwise(gated, attn.proj_2) + normed)
    hidden = pointwise(norm(expected, block.norm2), mlp.fc1)
    hidden = torch.stack([depthwise_by_hand(image, mlp.dwconv) for image in hidden])
    expected = expected + block.layer_scale_2.view(4, 1, 1) * pointwise(F.gelu(hidden), mlp.fc2)
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11)


def factorize_by_hand(x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix, one value at a time: bases, the codes before the last update, and after it."""
    (D, N), R = x.shape, bases.shape[1]

    def new_codes(codes: Tensor) -> Tensor:
        updated = torch.empty(N, R, dtype=x.dtype)
        for n in range(N):
            for r in range(R):
                above = sum(x[d, n] * bases[d, r] for d in range(D))
                below = sum(
                    codes[n, s] * bases[d, s] * bases[d, r] for s in range(R) for d in range(D)
                )
                updated[n, r] = codes[n, r] * above / (below + 1e-6)
        return updated

    def new_bases(codes: Tensor) -> Tensor:
        updated = torch.empty(D, R, dtype=x.dtype)
        for d in range(D):
            for r in range(R):
                above = sum(x[d, n] * codes[n, r] for n in range(N))
                below = sum(
                    bases[d, s] * codes[n, s] * codes[n, r] for s in range(R) for n in range(N)
                )
                updated[d, r] = bases[d, r] * above / (below + 1e-6)
        return updated

    codes = torch.stack([(x[:, n] @ bases).exp() for n in range(N)])
    codes = codes / codes.sum(dim=1, keepdim=True)
    for _ in range(steps):
        codes = new_codes(codes)
        bases = new_bases(codes)
    return bases, codes, new_codes(codes)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_factorization_and_its_gradient_equal_the_literal_version(steps: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 5, 7, dtype=torch.float64, requires_grad=True)
    start = torch.rand(2, 5, 3, dtype=torch.float64)
    product = factorize(x, start, steps)
    seed = torch.randn_like(product)
    (gradient,) = torch.autograd.grad(product, x, seed)
    for b in range(2):
        bases, before, codes = factorize_by_hand(x[b].detach(), start[b], steps)
        torch.testing.assert_close(product[b].detach(), bases @ codes.T, rtol=1e-12, atol=1e-12)
        # Only X in the last numerator varies: C = (before / below) * X^T D, product = D C^T.
        below = before @ (bases.T @ bases) + 1e-6
        expected = bases @ ((seed[b].T @ bases) * before / below).T
        torch.testing.assert_close(gradient[b], expected, rtol=1e-11, atol=1e-11)


def test_more_steps_never_fit_worse_and_rank_one_is_found() -> None:
    torch.manual_seed(0)
    x, start = torch.rand(3, 8, 20, dtype=torch.float64), torch.rand(3, 8, 4, dtype=torch.float64)
    errors = torch.stack(
        [(x - factorize(x, start, steps)).square().sum((1, 2)) for steps in range(12)]
    )
    # eps in the denominators pulls by a relative 1e-6 away from the exact updates.
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
    assert (errors[-1] < 0.8 * errors[0]).all()
    rank_one = torch.rand(3, 8, 1, dtype=torch.float64) * torch.rand(3, 1, 20, dtype=torch.float64)
    found = factorize(rank_one, start[:, :, :1], steps=2)
    torch.testing.assert_close(found, rank_one, rtol=1e-4, atol=1e-5)  # of the order of eps
    zeros = factorize(torch.zeros_like(x), start, steps=7)
    torch.testing.assert_close(zeros, torch.zeros_like(x), rtol=0, atol=0)


def test_nmf_steps_bases_and_dtypes() -> None:
    torch.manual_seed(0)
    layer = NMF(6, rank=3, train_steps=2, eval_steps=4).eval()
    x = torch.rand(2, 6, 3, 5)
    expected = factorize(x.flatten(2), layer.bases.expand(2, 6, 3), 4).view(2, 6, 3, 5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.bases.norm(dim=0), torch.ones(3))
    assert (layer.bases >= 0).all()
    assert layer.bases.unique().numel() == 18
    assert layer(x.double()).dtype == torch.float64
    half = layer(x.bfloat16() * 1e4)  # sums that half precision could not hold
    assert half.dtype == torch.bfloat16
    exact = layer(x.bfloat16().float() * 1e4)
    # The only rounding left is that of inputs and outputs: 8 bits of mantissa.
    assert (half.float() - exact).norm() / exact.norm() < 2**-8

    layer.train()
    torch.manual_seed(7)
    drawn = F.normalize(torch.rand(2, 6, 3), dim=1)
    torch.manual_seed(7)
    expected = factorize(x.flatten(2), drawn, 2).view(2, 6, 3, 5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    same = layer(x[:1].expand(2, 6, 3, 5))
    assert not torch.equal(same[0], same[1])  # every image draws its own


def test_head_joins_the_stages_from_its_stride_on() -> None:
    for stride, first in ((8, 1), (4, 0)):
        head = LightHamHead(replace(TINY, stride=stride), 5).double().eval()
        perturb(head)
        sizes = [(9, 7), (5, 4), (3, 2), (2, 1)]
        maps = [
            torch.randn(2, dim, *size, dtype=torch.float64)
            for dim, size in zip(DIMS, sizes, strict=True)
        ]

        def norm(x: Tensor, layer: nn.GroupNorm) -> Tensor:
            groups = x.unflatten(1, (32, 2))
            centred = groups - groups.mean((2, 3, 4), keepdim=True)
            scaled = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
            return scaled.flatten(1, 2) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

        joined = torch.cat(
            [
                F.interpolate(x, size=sizes[first], mode="bilinear", align_corners=False)
                for x in maps[first:]
            ],
            dim=1,
        )
        x = norm(F.conv2d(joined, head.squeeze.conv.weight), head.squeeze.gn).relu()
        burger = head.hamburger
        lower = F.conv2d(x, burger.ham_in.weight, burger.ham_in.bias).relu()
        context = factorize(lower.flatten(2), burger.ham.bases.expand(2, -1, -1), 7).view(x.shape)
        upper = norm(F.conv2d(context, burger.ham_out.conv.weight), burger.ham_out.gn)
        x = norm(F.conv2d((x + upper).relu(), head.align.conv.weight), head.align.gn).relu()
        expected = F.conv2d(x, head.classifier.weight, head.classifier.bias)
        torch.testing.assert_close(head(maps), expected, rtol=1e-10, atol=1e-10)


# The whole network.


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    parameters, multiply_adds = PUBLISHED[name]
    with torch.device("meta"):
        model = SegNeXt(SEGNEXT_CONFIGS[name], 150)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters

    # The published count is that of the authors' release, whose B and L have rank 64.
    rank = 64 if name in ("segnext_b", "segnext_l") else 16
    model = SegNeXt(replace(SEGNEXT_CONFIGS[name], rank=rank), 150).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 128, 128))
    counted = counter.get_total_flops() / 2 * 16 / 1e9
    assert counted == pytest.approx(multiply_adds, rel=0.03)  # theirs counts the norms too


def test_nano_fits_a_laptop() -> None:
    model = SegNeXt(SEGNEXT_CONFIGS["segnext_nano"], 64)
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 0.6e6
    assert model.stride == 4
    features = model.eval()(torch.rand(1, 3, 128, 128))
    assert features.shape == (1, 64, 32, 32)


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize(
    "size", [(64, 64), (33, 47), (128, 32), (7, 90), (8, 8), (4, 4), (1, 1), (2, 300)]
)
def test_any_size_is_divided_by_the_stride_and_rounded_up(
    stride: int, size: tuple[int, int]
) -> None:
    model = perturbed(replace(TINY, stride=stride))
    with torch.no_grad():
        features = model(torch.rand(1, 3, *size))
    assert features.shape == (1, 12, -(-size[0] // stride), -(-size[1] // stride))
    assert features.isfinite().all()
    assert (model.stride, model.channels) == (stride, 12)


def test_evaluation_is_deterministic() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 48, 40)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = model(images), model(images)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn

    torch.manual_seed(99)
    other = SegNeXt(TINY, 12)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), first, rtol=0, atol=0)
        model.train()
        model(images)
    torch.testing.assert_close(
        model.head.hamburger.ham.bases, other.head.hamburger.ham.bases, rtol=0, atol=0
    )


def test_building_the_bases_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    NMF(8, 4, 6, 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = perturbed()
    images = torch.rand(3, 3, 48, 40)
    with torch.no_grad():
        whole = model(images)
        single = torch.cat([model(image[None]) for image in images])
        shuffled = model(images[[2, 0, 1]])
    # Kernels sum in another order for another batch size; float32, a few hundred roundings.
    torch.testing.assert_close(single, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled, whole[[2, 0, 1]], rtol=1e-4, atol=1e-5)


def test_training_draws_bases_from_the_global_generator() -> None:
    model = perturbed(replace(TINY, dropout=0.0, drop_path=0.0)).train()
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["segnext_nano", "segnext_t"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = SegNeXt(SEGNEXT_CONFIGS[name], 16)
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_a_few_steps_fit_a_map() -> None:
    torch.manual_seed(0)
    model = SegNeXt(replace(TINY, dropout=0.0, drop_path=0.0), 4)
    images = torch.rand(4, 3, 32, 32)
    labels = (F.avg_pool2d(images, 8).mean(1) > 0.5).long()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_normalisation_is_inside_and_not_in_the_state_dict() -> None:
    model = perturbed()
    images = torch.rand(1, 3, 32, 32)
    shifted = copy.deepcopy(model)
    shifted.mean.zero_()
    shifted.std.fill_(1)
    torch.testing.assert_close(
        model(images), shifted((images - model.mean) / model.std), rtol=1e-5, atol=1e-5
    )
    stored = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(statistics) for name in stored)


def test_channels_last_and_deepcopy_change_nothing() -> None:
    model = perturbed()
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(copy.deepcopy(model)(images), expected, rtol=0, atol=0)
        moved = model.to(memory_format=torch.channels_last)
        actual = moved(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_stays_close(training: bool) -> None:
    model = perturbed(replace(TINY, dropout=0.0, drop_path=0.0)).train(training)
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(images)
    assert features.dtype == torch.bfloat16
    error = (features.float() - expected).norm() / expected.norm()
    assert error < 0.03  # about thirty layers that each round to 8 bits, 2^-9 a rounding
    features.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model = perturbed(replace(TINY, depths=(1, 1, 1, 1)))
    images = torch.rand(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    model.train()
    compiled(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


def test_drop_path_rises_linearly_over_the_blocks() -> None:
    model = SegNeXt(TINY, 4)
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    with torch.device("meta"):
        large = SegNeXt(SEGNEXT_CONFIGS["segnext_l"], 4)
    rates = [m.p for m in large.modules() if isinstance(m, DropPath)]
    assert (len(rates), rates[0], rates[-1]) == (38, 0, pytest.approx(0.3))


def test_drop_path_skips_both_branches() -> None:
    block = Block(4, mlp_ratio=2, drop_path=0.999999)
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(0)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = SegNeXt(SEGNEXT_CONFIGS["segnext_t"], 64)
    block = model.backbone.stages[3].blocks[0]
    for layer, fan_out in (
        (block.mlp.fc1, 1024),
        (block.mlp.dwconv, 9),
        (block.attn.spatial_gating_unit.conv2_1, 21),
        (model.backbone.stages[3].patch_embed.proj, 9 * 256),
        (model.head.squeeze.conv, 256),
        (model.head.hamburger.ham_in, 256),
    ):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert model.head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layer_scale" in name:
            assert (parameter == 0.01).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name


def test_head_and_backbone_partition_the_parameters() -> None:
    model = SegNeXt(TINY, 8)
    parts = [*model.backbone.parameters(), *model.head.parameters()]
    assert {id(p) for p in parts} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (32, 64)}, r"`dims` must have 4 entries, one a stage, got \(32, 64\)"),
        ({"depths": (1,)}, "`depths` must have 4 entries"),
        ({"mlp_ratios": (8, 8, 4, 4, 4)}, "`mlp_ratios` must have 4 entries"),
        ({"stride": 16}, "`stride` must be 8, as published, or 4, got 16"),
        ({"decoder_channels": 48}, "`decoder_channels` must be a multiple of 32, .* got 48"),
        ({"decoder_channels": 0}, "`decoder_channels` must be a multiple of 32, .* got 0"),
    ],
)
def test_wrong_options(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`channels` must be the width of the joint space, got 0"):
        SegNeXt(TINY, 0)
    model = perturbed()
    with pytest.raises(
        ValueError, match=r"`images` must have shape \(B, 3, H, W\), got \(3, 8, 8\)"
    ):
        model(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match="divide by 255"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
