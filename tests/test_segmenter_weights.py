"""Published weights: three naming schemes, two file formats, hashes, licences and reports."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_files import write_safetensors
from torch import Tensor

from cliptteacher.segmenters import build_segmenter, weights
from cliptteacher.segmenters.segformer import Segformer

OPTIONS = {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "heads": (1, 2, 3, 4), "mlp_ratio": 2}
DIMS, DEPTHS, REDUCTIONS = (8, 16, 24, 32), (1, 2, 1, 1), (8, 4, 2, 1)


def build(path: Path | None = None, channels: int = 6, **options: object) -> Segformer:
    model = build_segmenter("segformer_b0", channels, path, **OPTIONS, **options)
    assert isinstance(model, Segformer)
    return model.eval()


def official_shapes(head: int | None) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the authors' files, for the small model of this test."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for stage, (dim, depth, reduction) in enumerate(zip(DIMS, DEPTHS, REDUCTIONS, strict=True), 1):
        inputs, kernel = (3, 7) if stage == 1 else (DIMS[stage - 2], 3)
        layer(f"patch_embed{stage}.proj", dim, inputs, kernel, kernel)
        layer(f"patch_embed{stage}.norm", dim)
        for block in (f"block{stage}.{index}" for index in range(depth)):
            layer(f"{block}.norm1", dim)
            layer(f"{block}.attn.q", dim, dim)
            layer(f"{block}.attn.kv", 2 * dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            if reduction > 1:
                layer(f"{block}.attn.sr", dim, dim, reduction, reduction)
                layer(f"{block}.attn.norm", dim)
            layer(f"{block}.norm2", dim)
            layer(f"{block}.mlp.fc1", 2 * dim, dim)
            layer(f"{block}.mlp.dwconv.dwconv", 2 * dim, 1, 3, 3)
            layer(f"{block}.mlp.fc2", dim, 2 * dim)
        layer(f"norm{stage}", dim)
        if head:
            layer(f"decode_head.linear_c{stage}.proj", head, dim)
    layer("head", 1000, DIMS[-1])
    if head:
        shapes["decode_head.linear_fuse.conv.weight"] = (head, 4 * head, 1, 1)
        layer("decode_head.linear_fuse.bn", head)
        shapes["decode_head.linear_fuse.bn.running_mean"] = (head,)
        shapes["decode_head.linear_fuse.bn.running_var"] = (head,)
        shapes["decode_head.linear_fuse.bn.num_batches_tracked"] = ()
        layer("decode_head.linear_pred", 6, head, 1, 1)
        layer("decode_head.conv_seg", 150, head, 1, 1)
    return shapes


def official_state(head: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).abs() for name, shape in official_shapes(head).items()}


def to_toolbox(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the authors' tensors under the toolbox's names and shapes."""
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        kind, _, rest = name.partition(".")
        stage = int(kind[-1]) - 1 if kind[-1].isdigit() else -1
        if kind.startswith("patch_embed"):
            state[f"layers.{stage}.0.{rest.replace('proj', 'projection')}"] = value
        elif kind.startswith("norm"):
            state[f"layers.{stage}.2.{rest}"] = value
        elif kind.startswith("block"):
            if ".attn.kv." in name:
                continue
            if ".attn.q." in name:
                value = torch.cat((value, official[name.replace(".q.", ".kv.")]))
                rest = rest.replace("attn.q.", "attn.attn.in_proj_")
            rest = rest.replace(".attn.proj.", ".attn.attn.out_proj.")
            rest = rest.replace("mlp.fc1", "ffn.layers.0").replace("mlp.fc2", "ffn.layers.4")
            rest = rest.replace("mlp.dwconv.dwconv", "ffn.layers.1")
            if rest.endswith(("layers.0.weight", "layers.4.weight")):
                value = value[:, :, None, None]
            state[f"layers.{stage}.1.{rest}"] = value
    return state


def to_hugging_face(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the authors' tensors under the names of the `nvidia/mit-b*` files."""
    state: dict[str, Tensor] = {}
    for name, value in official.items():
        kind, _, rest = name.partition(".")
        if kind == "head":
            state[f"classifier.{rest}"] = value
            continue
        stage = int(kind[-1]) - 1
        if kind.startswith("patch_embed"):
            rest = rest.replace("norm", "layer_norm")
            state[f"segformer.encoder.patch_embeddings.{stage}.{rest}"] = value
        elif kind.startswith("norm"):
            state[f"segformer.encoder.layer_norm.{stage}.{rest}"] = value
        elif ".attn.kv." in name:
            key, val = value.chunk(2)
            prefix = f"segformer.encoder.block.{stage}." + rest.split("attn.kv.")[0]
            state[f"{prefix}attention.self.key.{name.split('.')[-1]}"] = key.clone()
            state[f"{prefix}attention.self.value.{name.split('.')[-1]}"] = val.clone()
        else:
            for old, new in (
                ("attn.q.", "attention.self.query."),
                ("attn.proj.", "attention.output.dense."),
                ("attn.sr.", "attention.self.sr."),
                ("attn.norm.", "attention.self.layer_norm."),
                ("norm1", "layer_norm_1"),
                ("norm2", "layer_norm_2"),
                ("mlp.fc", "mlp.dense"),
            ):
                rest = rest.replace(old, new)
            state[f"segformer.encoder.block.{stage}.{rest}"] = value
    return state


def identity(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


@pytest.mark.parametrize("naming", [identity, to_toolbox, to_hugging_face])
def test_three_namings_fill_the_same_backbone(
    naming: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    official = official_state()
    torch.save({"state_dict": naming(official), "meta": "x"}, tmp_path / "mit.pth")
    model = build(tmp_path / "mit.pth")
    loaded = model.backbone.state_dict()
    assert len(loaded) == len(official) - 2  # all but the ImageNet classifier
    for ours, theirs in (
        ("stages.0.patch_embed.proj.weight", "patch_embed1.proj.weight"),
        ("stages.1.patch_embed.norm.bias", "patch_embed2.norm.bias"),
        ("stages.1.blocks.1.norm1.weight", "block2.1.norm1.weight"),
        ("stages.1.blocks.1.norm2.weight", "block2.1.norm2.weight"),
        ("stages.1.blocks.1.attn.q.weight", "block2.1.attn.q.weight"),
        ("stages.1.blocks.1.attn.kv.weight", "block2.1.attn.kv.weight"),
        ("stages.1.blocks.1.attn.kv.bias", "block2.1.attn.kv.bias"),
        ("stages.3.blocks.0.attn.proj.bias", "block4.0.attn.proj.bias"),
        ("stages.2.blocks.0.attn.sr.weight", "block3.0.attn.sr.weight"),
        ("stages.2.blocks.0.attn.norm.weight", "block3.0.attn.norm.weight"),
        ("stages.0.blocks.0.mlp.fc1.weight", "block1.0.mlp.fc1.weight"),
        ("stages.0.blocks.0.mlp.dwconv.weight", "block1.0.mlp.dwconv.dwconv.weight"),
        ("stages.0.blocks.0.mlp.fc2.weight", "block1.0.mlp.fc2.weight"),
        ("stages.3.norm.weight", "norm4.weight"),
    ):
        torch.testing.assert_close(loaded[ours], official[theirs], rtol=0, atol=0)
    converted = weights.convert_segformer_keys(naming(official))
    assert converted.keys() == {f"backbone.{key}" for key in loaded}


def test_official_head_loads_and_sets_its_width(tmp_path: Path) -> None:
    official = official_state(head=20)
    torch.save(official, tmp_path / "segformer.pth")
    model = build(tmp_path / "segformer.pth")
    assert model.config.decoder_channels == 20
    assert (
        model.build_arguments is not None
        and model.build_arguments["options"]["decoder_channels"] == 20
    )
    head = model.head
    fuse = official["decode_head.linear_fuse.conv.weight"]
    torch.testing.assert_close(head.fuse.weight, fuse.flatten(1), rtol=0, atol=0)
    for ours, theirs in (
        (head.linears[2].weight, "linear_c3.proj.weight"),
        (head.norm.running_var, "linear_fuse.bn.running_var"),
        (head.classifier.bias, "linear_pred.bias"),
    ):
        torch.testing.assert_close(ours, official[f"decode_head.{theirs}"], rtol=0, atol=0)


def test_a_classifier_of_other_classes_stays_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(official_state(head=20), tmp_path / "segformer.pth")
    with caplog.at_level(logging.INFO):
        torch.manual_seed(3)
        model = build(tmp_path / "segformer.pth", channels=9)
    torch.manual_seed(3)
    fresh = build(channels=9, decoder_channels=20, head_norms=False)
    torch.testing.assert_close(model.head.classifier.weight, fresh.head.classifier.weight)
    assert "left as initialised: head.classifier.bias, head.classifier.weight" in caplog.text


def test_own_state_dict_round_trip(tmp_path: Path) -> None:
    source = build()
    torch.save({"format": 1, "segmenter": source.state_dict()}, tmp_path / "last.pt")
    write_safetensors(source.state_dict(), tmp_path / "model.safetensors")
    for name in ("last.pt", "model.safetensors"):
        loaded = build(tmp_path / name).state_dict()
        for key, value in source.state_dict().items():
            torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_students_that_were_wrapped(prefix: str, tmp_path: Path) -> None:
    source = build().state_dict()
    torch.save({prefix + key: value for key, value in source.items()}, tmp_path / "a.pt")
    loaded = build(tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items())


@pytest.mark.parametrize("change", ["missing", "unknown", "of another shape"])
def test_a_tensor_that_does_not_fit_is_named(change: str, tmp_path: Path) -> None:
    state = official_state()
    if change == "missing":
        del state["block2.1.attn.kv.weight"]
    elif change == "unknown":
        state["block2.1.attn.kv.scale"] = torch.ones(1)
    else:
        state["block2.1.attn.kv.weight"] = torch.ones(3, 16)
    torch.save(state, tmp_path / "mit.pth")
    match = rf"got 1 {change} \(backbone.stages.1.blocks.1.attn.kv.*\); check the name"
    with pytest.raises(ValueError, match=match):
        build(tmp_path / "mit.pth")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    torch.save(official_state(), tmp_path / "mit.pth")
    with pytest.raises(ValueError, match=r"of another shape .* check the name of the segmenter"):
        build_segmenter("segformer_nano", 6, tmp_path / "mit.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="missing"):
        build(tmp_path / "empty.pth")


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'imagenet', None or an existing file"):
        build_segmenter("segformer_b0", 6, "imagnet")
    torch.save({"a": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="must hold a state dict, tensors by name"):
        weights.read_state_dict(tmp_path / "a.pth")
    torch.save({"a": Path("x")}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth must be an undamaged file of plain tensors"):
        weights.read_state_dict(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(b"not a file of torch")
    with pytest.raises(
        ValueError, match=r"c\.pth must hold weights \(TorchScript, torch\.save or saf"
    ):
        weights.read_state_dict(tmp_path / "c.pth")


def test_imagenet_weights_are_downloaded_checked_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source.pth"
    torch.save(official_state(), source)
    name = f"mit_b0-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(weights.SEGFORMER_IMAGENET, "segformer_b0", name)
    monkeypatch.setattr(weights, "_SEGFORMER_HOST", f"{tmp_path.as_uri()}/host/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights.announce.cache_clear()
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / name).write_bytes(source.read_bytes())
    for _ in range(2):
        model = build_segmenter("segformer_b0", 6, "imagenet", **OPTIONS)
        (tmp_path / "host" / name).unlink(missing_ok=True)  # the second time it is cached
    expected = official_state()["block1.0.mlp.fc1.weight"]
    loaded = model.backbone.stages[0].blocks[0].mlp.fc1.weight
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    assert caplog.text.count("research and evaluation only") == 1
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == [name]

    cached = tmp_path / "hub" / "checkpoints" / name
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(FileNotFoundError, match=rf"{name} is damaged and could not be"):
        build_segmenter("segformer_b0", 6, "imagenet", **OPTIONS)


def test_a_wrong_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net-00000000.pth").write_bytes(b"something else")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"SHA256 of .* must start with 00000000, got .*discarded"):
        weights.fetch(f"{tmp_path.as_uri()}/net-00000000.pth")
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_offline_error_says_where_to_put_the_file() -> None:
    match = (
        r"checkpoints/mit_b4_.*\.pth is missing .* get https://.*mit_b4_.*\.pth and put it there"
    )
    with pytest.raises(FileNotFoundError, match=match):
        build_segmenter("segformer_b4", 6, "imagenet")


def test_nothing_is_published_for_nano() -> None:
    with pytest.raises(ValueError, match=r"exists for segformer_b0, .* not for 'segformer_nano'"):
        build_segmenter("segformer_nano", 6, "imagenet")


@pytest.mark.parametrize("damage", ["scalar", "vector", "empty", "integers", "nan"])
@pytest.mark.parametrize("naming", [identity, to_toolbox, to_hugging_face])
def test_any_damaged_tensor_is_named_with_its_file(
    damage: str, naming: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    state = naming(official_state(head=20 if naming is identity else None))
    dropped = ("head.", "classifier.", "decode_head.conv_seg.")  # not used
    for name in [n for n in state if not n.startswith(dropped) and not n.endswith("tracked")][::7]:
        tensor = {
            "scalar": torch.tensor(1.0),
            "vector": torch.ones(3),
            "empty": torch.ones(0),
            "integers": state[name].long(),
            "nan": state[name] * torch.nan,
        }[damage]
        torch.save({**state, name: tensor}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth does not fit segformer_b0: the weights must"):
            build(tmp_path / "a.pth")
    if naming is identity:  # sizes the head, and the last layer, which may have another number
        for name in ("decode_head.linear_fuse.conv.weight", "decode_head.linear_pred.bias"):
            torch.save({**state, name: torch.tensor(1.0)}, tmp_path / "a.pth")
            with pytest.raises(ValueError, match=r"a\.pth does not fit segformer_b0"):
                build(tmp_path / "a.pth")
