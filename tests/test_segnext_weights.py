"""Published weights of SegNeXt: two namings, the head, hashes, licence and reports."""

import hashlib
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliptteacher.segmenters import segnext_weights, weights
from cliptteacher.segmenters.segnext import SegNeXt, SegNeXtConfig
from cliptteacher.segmenters.segnext_weights import (
    convert_segnext_keys,
    load_segnext_weights,
    read_segnext_weights,
)

DIMS, DEPTHS, RATIOS = (8, 16, 24, 32), (1, 2, 1, 1), (4, 3, 2, 2)
TINY = SegNeXtConfig(dims=DIMS, depths=DEPTHS, mlp_ratios=RATIOS, decoder_channels=64, rank=4)


def published_shapes(head: int | None, authors: bool = False) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the toolbox's files, or the authors', for the model of this test."""
    shapes: dict[str, tuple[int, ...]] = {}
    backbone = "backbone." if head else ""

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def batch_norm(name: str, width: int) -> None:
        layer(name, width)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for stage, (dim, depth, ratio) in enumerate(zip(DIMS, DEPTHS, RATIOS, strict=True), 1):
        embedding = f"{backbone}patch_embed{stage}"
        if stage == 1:
            layer(f"{embedding}.proj.0", dim // 2, 3, 3, 3)
            batch_norm(f"{embedding}.proj.1", dim // 2)
            layer(f"{embedding}.proj.3", dim, dim // 2, 3, 3)
            batch_norm(f"{embedding}.proj.4", dim)
        else:
            layer(f"{embedding}.proj", dim, DIMS[stage - 2], 3, 3)
            batch_norm(f"{embedding}.norm", dim)
        for block in (f"{backbone}block{stage}.{index}" for index in range(depth)):
            shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (dim,)
            batch_norm(f"{block}.norm1", dim)
            layer(f"{block}.attn.proj_1", dim, dim, 1, 1)
            unit = f"{block}.attn.spatial_gating_unit"
            layer(f"{unit}.conv0", dim, 1, 5, 5)
            for i, k in enumerate((7, 11, 21)):
                layer(f"{unit}.conv{i}_1", dim, 1, 1, k)
                layer(f"{unit}.conv{i}_2", dim, 1, k, 1)
            layer(f"{unit}.conv3", dim, dim, 1, 1)
            layer(f"{block}.attn.proj_2", dim, dim, 1, 1)
            batch_norm(f"{block}.norm2", dim)
            layer(f"{block}.mlp.fc1", ratio * dim, dim, 1, 1)
            depthwise = "mlp.dwconv.dwconv" if authors else "mlp.dwconv"
            layer(f"{block}.{depthwise}", ratio * dim, 1, 3, 3)
            layer(f"{block}.mlp.fc2", dim, ratio * dim, 1, 1)
        layer(f"{backbone}norm{stage}", dim)
    if head:
        shapes["decode_head.squeeze.conv.weight"] = (head, sum(DIMS[1:]), 1, 1)
        layer("decode_head.squeeze.gn", head)
        layer("decode_head.hamburger.ham_in.conv", head, head, 1, 1)
        shapes["decode_head.hamburger.ham_out.conv.weight"] = (head, head, 1, 1)
        layer("decode_head.hamburger.ham_out.gn", head)
        shapes["decode_head.align.conv.weight"] = (head, head, 1, 1)
        layer("decode_head.align.gn", head)
        layer("decode_head.conv_seg", 6, head, 1, 1)
    else:
        layer("head", 1000, DIMS[-1])
    return shapes


def published_state(head: int | None = None, authors: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = published_shapes(head, authors)
    # Small, because every gate squares what it is given.
    return {name: 0.1 * torch.rand(shape) for name, shape in shapes.items()}


def load(path: Path, channels: int = 6) -> SegNeXt:
    model = SegNeXt(TINY, channels)
    load_segnext_weights(model, read_segnext_weights("segnext_t", path))
    return model.eval()


@pytest.mark.parametrize("authors", [False, True])
def test_both_namings_fill_the_backbone(authors: bool, tmp_path: Path) -> None:
    state = published_state(authors=authors)
    torch.save({"state_dict": state, "meta": "x"}, tmp_path / "mscan.pth")
    model = load(tmp_path / "mscan.pth")
    loaded = model.backbone.state_dict()
    assert len(loaded) == len(state) - 2  # all but the ImageNet classifier
    pattern = re.compile(r"stages\.(\d)\.(patch_embed|block|norm)(s?)\.")
    for name, value in loaded.items():
        published = pattern.sub(lambda m: f"{m[2]}{int(m[1]) + 1}.", name)
        if authors:
            published = published.replace("mlp.dwconv", "mlp.dwconv.dwconv")
        torch.testing.assert_close(value, state[published].to(value.dtype), rtol=0, atol=0)
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()


def test_head_of_the_toolbox_loads(tmp_path: Path) -> None:
    state = published_state(head=64)
    torch.save(state, tmp_path / "segnext.pth")
    head = load(tmp_path / "segnext.pth").head.state_dict()
    assert len(head) == sum(name.startswith("decode_head.") for name in state)
    for ours, theirs in (
        ("squeeze.conv.weight", "squeeze.conv.weight"),
        ("squeeze.gn.bias", "squeeze.gn.bias"),
        ("hamburger.ham_in.weight", "hamburger.ham_in.conv.weight"),
        ("hamburger.ham_in.bias", "hamburger.ham_in.conv.bias"),
        ("hamburger.ham_out.gn.weight", "hamburger.ham_out.gn.weight"),
        ("align.conv.weight", "align.conv.weight"),
        ("classifier.weight", "conv_seg.weight"),
    ):
        torch.testing.assert_close(head[ours], state[f"decode_head.{theirs}"], rtol=0, atol=0)


def test_a_classifier_of_other_classes_stays_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(published_state(head=64), tmp_path / "segnext.pth")
    with caplog.at_level(logging.INFO):
        model = load(tmp_path / "segnext.pth", channels=9)
    assert model.head.classifier.weight.shape == (9, 64, 1, 1)
    assert "left as initialised: head.classifier.bias, head.classifier.weight" in caplog.text


def test_own_state_dict_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = SegNeXt(TINY, 6)
    torch.save({"format": 1, "segmenter": source.state_dict()}, tmp_path / "last.pt")
    loaded = load(tmp_path / "last.pt").state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "unknown", "of another shape"])
def test_a_tensor_that_does_not_fit_is_named(change: str) -> None:
    state = published_state()
    if change == "missing":
        del state["block2.1.attn.proj_1.weight"]
    elif change == "unknown":
        state["block2.1.attn.proj_1.scale"] = torch.ones(1)
    else:
        state["block2.1.attn.proj_1.weight"] = torch.ones(3, 16, 1, 1)
    match = rf"got 1 {change} \(backbone.stages.1.blocks.1.attn.proj_1.*\); check the name"
    with pytest.raises(ValueError, match=match):
        load_segnext_weights(SegNeXt(TINY, 6), convert_segnext_keys(state))


def test_imagenet_weights_are_downloaded_checked_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source.pth"
    torch.save(published_state(), source)
    name = f"mscan_t-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(segnext_weights.SEGNEXT_IMAGENET, "segnext_t", name)
    monkeypatch.setattr(segnext_weights, "_HOST", f"{tmp_path.as_uri()}/host/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights.announce.cache_clear()
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / name).write_bytes(source.read_bytes())
    for _ in range(2):
        model = SegNeXt(TINY, 6)
        load_segnext_weights(model, read_segnext_weights("segnext_t", "imagenet"))
        (tmp_path / "host" / name).unlink(missing_ok=True)  # the second time it is cached
    expected = published_state()["block1.0.mlp.fc1.weight"]
    loaded = model.backbone.stages[0].blocks[0].mlp.fc1.weight
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    assert caplog.text.count("licensed under Apache-2.0") == 1

    cached = tmp_path / "hub" / "checkpoints" / name
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(FileNotFoundError, match=rf"{name} is damaged and could not be"):
        read_segnext_weights("segnext_t", "imagenet")


@pytest.mark.usefixtures("offline")
def test_wrong_sources() -> None:
    match = r"get https://.*/pretrain/segnext/mscan_b_20230227-3ab7d230\.pth and put it there"
    with pytest.raises(FileNotFoundError, match=match):
        read_segnext_weights("segnext_b", "imagenet")
    with pytest.raises(ValueError, match=r"exists for segnext_t, .* not for 'segnext_nano'"):
        read_segnext_weights("segnext_nano", "imagenet")
    with pytest.raises(FileNotFoundError, match="'imagenet', None or an existing file"):
        read_segnext_weights("segnext_b", "imagnet")
