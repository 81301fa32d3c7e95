"""The Vision-Language Adapter against a decoder layer written out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from cliptteacher.vla import (
    Attention,
    DecoderAdapter,
    IdentityAdapter,
    MLPAdapter,
    build_adapter,
)

KINDS = ["decoder", "mlp", "identity"]
C, HEADS = 8, 2


def random_sets(seed: int = 0, L: int = 7, B: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(L, C, generator=generator, dtype=torch.float64)
    cls = torch.randn(B, C, generator=generator, dtype=torch.float64)
    present = torch.ones(L, dtype=torch.bool)
    present[[1, 4]] = False
    return prototypes, cls, present


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    adapter = build_adapter(kind, C, HEADS).double()
    with torch.no_grad():
        for parameter in adapter.parameters():  # norms and biases leave their ones and zeros
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def attend(queries: list[Tensor], memory: list[Tensor], attention: Attention) -> list[Tensor]:
    width = C // attention.heads
    W, b = attention.key_value.weight, attention.key_value.bias
    out = []
    for row in queries:
        q = attention.query.weight @ row + attention.query.bias
        pieces = []
        for head in range(attention.heads):
            part = slice(head * width, (head + 1) * width)
            keys = [(W[:C] @ m + b[:C])[part] for m in memory]
            values = [(W[C:] @ m + b[C:])[part] for m in memory]
            exponents = [torch.exp(q[part] @ k / math.sqrt(width)) for k in keys]
            total = sum(exponents)
            pieces.append(sum(e / total * v for e, v in zip(exponents, values, strict=True)))
        out.append(attention.out.weight @ torch.cat(pieces) + attention.out.bias)
    return out


def literal_decoder(
    layer: DecoderAdapter, prototypes: Tensor, cls: Tensor, present: Tensor
) -> Tensor:
    """Pre-norm decoder: self-attention, cross-attention, MLP, one row and one head at a time."""
    x = list(prototypes)
    normed = [layer_norm(row, layer.norm_self) for row in x]
    visible = [row for row, keep in zip(normed, present, strict=True) if keep]
    x = [a + b for a, b in zip(x, attend(normed, visible, layer.attend_self), strict=True)]
    normed = [layer_norm(row, layer.norm_cross) for row in x]
    x = [a + b for a, b in zip(x, attend(normed, list(cls), layer.attend_cross), strict=True)]
    rows = []
    for row in x:
        first, last = layer.mlp[0], layer.mlp[2]
        hidden = first.weight @ layer_norm(row, layer.norm_mlp) + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        rows.append(row + last.weight @ hidden + last.bias)
    return torch.stack(rows)


def test_the_decoder_equals_a_literal_layer() -> None:
    layer = build("decoder")
    sets = random_sets()
    torch.testing.assert_close(layer(*sets), literal_decoder(layer, *sets), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_the_decoder_equals_pytorch_s_own_layer(seed: int) -> None:
    layer = build("decoder")
    peer = nn.TransformerDecoderLayer(
        C, HEADS, 4 * C, dropout=0.0, activation="gelu", norm_first=True, dtype=torch.float64
    )
    state = {}
    for name, own in (("self_attn", layer.attend_self), ("multihead_attn", layer.attend_cross)):
        for kind in ("weight", "bias"):
            parts = [getattr(own.query, kind), getattr(own.key_value, kind)]
            state[f"{name}.in_proj_{kind}"] = torch.cat(parts)
            state[f"{name}.out_proj.{kind}"] = getattr(own.out, kind)
    for name, own in (
        *(("norm1", layer.norm_self), ("norm2", layer.norm_cross), ("norm3", layer.norm_mlp)),
        *(("linear1", layer.mlp[0]), ("linear2", layer.mlp[2])),
    ):
        state |= {f"{name}.weight": own.weight, f"{name}.bias": own.bias}
    peer.load_state_dict(state)
    prototypes, cls, present = random_sets(seed)
    expected = peer(
        prototypes[:, None], cls[:, None], tgt_key_padding_mask=~present[None]
    )  # rows first, a batch of one
    torch.testing.assert_close(
        layer(prototypes, cls, present), expected[:, 0], rtol=1e-12, atol=1e-12
    )


def test_without_a_present_row_every_row_is_attended() -> None:
    """Attention to nothing is NaN in some versions of PyTorch and zero in others."""
    layer = build("decoder")
    prototypes, cls, present = random_sets()
    expected = literal_decoder(layer, prototypes, cls, torch.ones_like(present))
    found = layer(prototypes, cls, torch.zeros_like(present))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_sizes_are_those_of_one_decoder_layer() -> None:
    shapes = {name: tuple(p.shape) for name, p in DecoderAdapter(16).named_parameters()}
    expected = {f"norm_{part}.{kind}": (16,) for part in ("self", "cross", "mlp")
                for kind in ("weight", "bias")}  # fmt: skip
    for part in ("self", "cross"):
        for layer, rows in (("query", 16), ("key_value", 32), ("out", 16)):
            expected[f"attend_{part}.{layer}.weight"] = (rows, 16)
            expected[f"attend_{part}.{layer}.bias"] = (rows,)
    expected |= {"mlp.0.weight": (64, 16), "mlp.0.bias": (64,)}  # 4C
    expected |= {"mlp.2.weight": (16, 64), "mlp.2.bias": (16,)}
    assert shapes == expected
    shapes = {name: tuple(p.shape) for name, p in MLPAdapter(16).named_parameters()}
    assert shapes == {
        **{"mlp.0.weight": (16, 16), "mlp.0.bias": (16,)},
        **{"mlp.2.weight": (16, 16), "mlp.2.bias": (16,)},
    }


def test_the_mlp_is_linear_relu_linear_of_each_row() -> None:
    adapter = build("mlp")
    prototypes, cls, present = random_sets()
    first, last = adapter.mlp[0], adapter.mlp[2]
    for row, out in zip(prototypes, adapter(prototypes, cls, present), strict=True):
        hidden = (first.weight @ row + first.bias).clamp(min=0)
        torch.testing.assert_close(out, last.weight @ hidden + last.bias)


def test_the_identity_gives_the_prototypes_back() -> None:
    prototypes, cls, present = random_sets()
    adapter = build("identity")
    assert torch.equal(adapter(prototypes, cls, present), prototypes)
    assert not list(adapter.parameters())


def test_the_three_kinds() -> None:
    assert isinstance(build("decoder"), DecoderAdapter)
    assert isinstance(build("mlp"), MLPAdapter)
    assert isinstance(build("identity"), IdentityAdapter)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_rows_never_influence_present_ones(kind: str) -> None:
    adapter = build(kind)
    prototypes, cls, present = random_sets()
    changed = torch.where(present[:, None], prototypes, 1e4 * torch.rand_like(prototypes))
    assert torch.equal(
        adapter(changed, cls, present)[present], adapter(prototypes, cls, present)[present]
    )


def test_present_rows_do_influence_each_other_in_the_decoder() -> None:
    adapter = build("decoder")
    prototypes, cls, present = random_sets()
    changed = prototypes.clone()
    changed[0] = changed[0].flip(0)  # a constant would vanish in the norm
    difference = adapter(changed, cls, present) - adapter(prototypes, cls, present)
    assert (difference.abs().amax(dim=1) > 1e-6).all()


def test_the_decoder_reads_the_cls_tokens() -> None:
    adapter = build("decoder")
    prototypes, cls, present = random_sets()
    difference = adapter(prototypes, cls + 1, present) - adapter(prototypes, cls, present)
    assert (difference.abs().amax(dim=1) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_prototypes_give_permuted_outputs(kind: str) -> None:
    adapter = build(kind)
    prototypes, cls, present = random_sets()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(
        adapter(prototypes[order], cls, present[order]), adapter(prototypes, cls, present)[order]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_cls_tokens_are_an_unordered_set(kind: str) -> None:
    adapter = build(kind)
    prototypes, cls, present = random_sets()
    torch.testing.assert_close(
        adapter(prototypes, cls.flip(0), present), adapter(prototypes, cls, present)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_prototype_at_all_stays_finite(kind: str) -> None:
    adapter = build(kind)
    _, cls, present = random_sets()
    prototypes = torch.zeros(7, C, dtype=torch.float64, requires_grad=True)
    out = adapter(prototypes, cls, torch.zeros_like(present))
    out.sum().backward()
    assert out.isfinite().all() and prototypes.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    adapter = build(kind)
    prototypes, cls, present = random_sets()
    adapter(prototypes, cls, present)[present].square().sum().backward()
    for name, parameter in adapter.named_parameters():
        moved = parameter.grad[C:] if name.endswith("key_value.bias") else parameter.grad
        # softmax does not feel what is added to every key, so the keys' bias has no gradient
        assert moved.abs().max() > 1e-6, name


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_gradcheck(kind: str) -> None:
    adapter = build(kind)
    prototypes, cls, present = random_sets(L=5, B=2)
    prototypes.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adapter(x, cls, present), prototypes)


def test_heads_that_do_not_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="must divide the 8 channels, got 3"):
        build_adapter("decoder", 8, heads=3)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="\"identity\", got 'transformer'"):
        build_adapter("transformer", 8)
