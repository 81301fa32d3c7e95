"""Loading CLIP from every format, saving it, and refusing everything else."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torchvision
from clip_files import (
    CONFIG,
    WRITERS,
    assert_same,
    half,
    save_open_clip,
    save_own,
    small_clip,
    to_hugging_face,
    write_torchscript,
)

from cliptteacher.checkpoint import load_checkpoint, save_checkpoint
from cliptteacher.clip import CLIP, CLIPConfig, class_text_features, load_clip, save_clip
from cliptteacher.clip import weights as module
from cliptteacher.clip.convert import to_openai_names
from cliptteacher.clip.settings import Settings


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_model(
    clip: CLIP, tmp_path: Path, write: Callable[[CLIP, Path], Path]
) -> None:
    assert_same(load_clip(write(clip, tmp_path)), clip)


def test_loaded_model_is_frozen_and_draws_no_random_number(clip: CLIP, tmp_path: Path) -> None:
    path = save_own(clip, tmp_path)
    before = torch.get_rng_state()
    loaded = load_clip(str(path), device=torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("cpu", torch.float32)}
    assert loaded.config == CONFIG


def test_bundled_model() -> None:
    assert module.BUNDLED.stat().st_size <= 8_000_000
    clip = load_clip()
    features = class_text_features(clip, ["grass", "star"])
    assert features.shape == (2, clip.embed_dim)
    assert features.isfinite().all()


# --- our own format ---


def test_saved_twice_is_the_same(clip: CLIP, tmp_path: Path) -> None:
    once = load_clip(save_own(clip, tmp_path))
    save_clip(once, tmp_path / "again.pt")
    assert_same(load_clip(tmp_path / "again.pt"), once)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pt", "own.pt"]


def test_zero_rows_take_no_space(tmp_path: Path) -> None:
    config = CLIPConfig(
        embed_dim=8, image_size=16, vision_width=64, vision_layers=1, text_width=64, text_layers=1,
        context_length=8,
    )  # fmt: skip
    clip = CLIP(config)
    with torch.no_grad():
        clip.token_embedding.weight[:320] = 0
        clip.token_embedding.weight[321:49406] = 0
    save_clip(clip, tmp_path / "clip.pt")
    assert (tmp_path / "clip.pt").stat().st_size < 400_000  # the full table alone takes 6.3 MB
    table = load_clip(tmp_path / "clip.pt").token_embedding.weight
    assert torch.equal(table, clip.token_embedding.weight.half().float())
    assert table.any(dim=1).nonzero().flatten().tolist() == [320, 49406, 49407]


def test_a_table_of_zeros_survives(clip: CLIP, tmp_path: Path) -> None:
    state = {**clip.state_dict(), "token_embedding.weight": torch.zeros(300, 64)}
    empty = CLIP(CONFIG)
    empty.load_state_dict(state)
    save_clip(empty, tmp_path / "clip.pt")
    assert_same(load_clip(tmp_path / "clip.pt"), empty)


def test_extra_is_kept(clip: CLIP, tmp_path: Path) -> None:
    extra = {"command": "pretrain_clip.py --seed 3", "seed": 3, "scores": {"top1": [0.5, 0.75]}}
    save_clip(clip, tmp_path / "clip.pt", extra)
    assert torch.load(tmp_path / "clip.pt", weights_only=True)["extra"] == extra


def test_extra_must_be_plain(clip: CLIP, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`extra` must hold what JSON can hold"):
        save_clip(clip, tmp_path / "clip.pt", {"score": torch.tensor(1.0)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [70_000.0, float("nan"), float("inf")])
def test_numbers_outside_float16_are_refused(tmp_path: Path, value: float) -> None:
    clip = CLIP(CONFIG)
    with torch.no_grad():
        clip.visual.proj[0, 0] = value
    with pytest.raises(ValueError, match="'visual.proj' must be finite in float16"):
        save_clip(clip, tmp_path / "clip.pt")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(
    clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_own(clip, tmp_path)
    before = (tmp_path / "own.pt").read_bytes()

    def stop(content: object, file: BinaryIO) -> None:
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(OSError, match="disk full"):
        save_own(clip, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["own.pt"]
    assert (tmp_path / "own.pt").read_bytes() == before


def test_activation(clip: CLIP, tmp_path: Path) -> None:
    other = CLIP(CLIPConfig(**{**vars(CONFIG), "activation": "gelu"}))
    save_clip(other, tmp_path / "gelu.pt")
    assert load_clip(tmp_path / "gelu.pt").config.activation == "gelu"
    assert load_clip(tmp_path / "gelu.pt", activation="quick_gelu").config == clip.config
    path = save_open_clip(clip, tmp_path)
    assert load_clip(path).config.activation == "quick_gelu"
    assert load_clip(path, activation="gelu").config.activation == "gelu"


def test_rows_outside_the_table_are_refused(clip: CLIP, tmp_path: Path) -> None:
    for part, value, count, size in (
        ("ids", torch.arange(1, 301), 300, "300 x 64"),
        ("ids", torch.arange(-1, 299), 300, "300 x 64"),
        ("ids", torch.arange(300)[None], 300, "300 x 64"),
        ("ids", torch.arange(299), 299, "300 x 64"),
        ("rows", torch.ones(300, 63), 300, "300 x 64"),
        ("shape", torch.tensor([299, 64]), 300, "299 x 64"),
        ("shape", torch.tensor([-1, 64]), 300, "-1 x 64"),
        ("shape", torch.tensor(300), 300, "-1 x -1"),
        ("shape", torch.tensor([1 << 40, 64]), 300, "1099511627776 x 64"),
        ("shape", torch.tensor([300.0, 64.0]), 300, "300.0 x 64.0"),
        ("ids", torch.arange(300.0), 300, "300 x 64"),
    ):
        content = torch.load(save_own(clip, tmp_path), weights_only=True)
        content["state_dict"][f"token_embedding.{part}"] = value
        torch.save(content, tmp_path / "bad.pt")
        message = f"its {count} rows of token_embedding do not fit into {size}"
        with pytest.raises(ValueError, match=message):
            load_clip(tmp_path / "bad.pt")


# --- files that are something else ---


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_truncated_files(
    clip: CLIP, tmp_path: Path, write: Callable[[CLIP, Path], Path], share: float
) -> None:
    path = write(clip, tmp_path)
    file = module._find(path, None)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"truncated or damaged|must be an undamaged"):
        load_clip(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\noid"],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold weights .*but it begins with b'"):
        load_clip(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"a": 1}, {"state_dict": {"a": "b"}}, {1: torch.ones(2)}, 3.0]
)
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold a state dict, tensors by name"):
        load_clip(tmp_path / "a.pt")


def test_another_network(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(
        ValueError, match=r"resnet.pth does not fit: .*vision transformer must hold"
    ):
        load_clip(tmp_path / "resnet.pth")


def test_clip_with_a_resnet(tmp_path: Path) -> None:
    state = {"visual.conv1.weight": torch.ones(2), "visual.layer1.0.conv1.weight": torch.ones(2)}
    write_torchscript(half(state), tmp_path / "RN50.pt")
    with pytest.raises(ValueError, match=r"RN50.pt does not fit: .* got a CLIP with a ResNet"):
        load_clip(tmp_path / "RN50.pt")


def test_names_and_shapes_are_strict(clip: CLIP, tmp_path: Path) -> None:
    state = {**clip.state_dict(), "visual.extra": torch.ones(1)}
    del state["visual.ln_post.bias"]
    state["visual.proj"] = torch.ones(24, 128)
    state["logit_scale"] = torch.tensor(4)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError) as caught:
        load_clip(tmp_path / "a.pt")
    message = str(caught.value)
    assert "4 of its names or shapes are not those of a CLIP" in message
    assert "'visual.ln_post.bias' is missing" in message
    assert "'visual.extra' is unexpected" in message
    assert "'visual.proj' has shape (24, 128) instead of (128, 24)" in message
    assert "'logit_scale' holds torch.int64 instead of real numbers" in message


def test_many_problems_are_cut_short(clip: CLIP, tmp_path: Path) -> None:
    state = {name: t for name, t in clip.state_dict().items() if ".ln_" not in name}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"2\d of its names.*, \.\.\.$"):
        load_clip(tmp_path / "a.pt")


def test_hugging_face_without_a_key_projection(clip: CLIP) -> None:
    state = to_hugging_face(clip.state_dict())
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    missing = r"must hold 'transformer.resblocks.1.attn.k_proj.bias', which is missing"
    with pytest.raises(ValueError, match=missing):
        to_openai_names(state)


def test_a_student_is_not_a_teacher(tmp_path: Path) -> None:
    """A checkpoint of a training run, given as the CLIP, and the other way round."""
    student = {"backbone.weight": torch.ones(2)}
    path = save_checkpoint({"step": 1, "segmenter": student, "text_features": student}, tmp_path)
    with pytest.raises(
        ValueError, match=r"step_00000001.pt must hold a state dict, tensors by name"
    ):
        load_clip(path)
    torch.save(student, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=r"student.pt does not fit: .*vision transformer must"):
        load_clip(tmp_path / "student.pt")
    save_clip(small_clip(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip.pt must be a checkpoint of the format"):
        load_checkpoint(tmp_path / "clip.pt")


@pytest.mark.parametrize("tower", ["vision_model.", "text_model."])
def test_half_a_hugging_face_model(clip: CLIP, tmp_path: Path, tower: str) -> None:
    state = to_hugging_face(clip.state_dict())
    half_of_it = {name: tensor for name, tensor in state.items() if name.startswith(tower)}
    torch.save(half_of_it, tmp_path / "half.bin")
    with pytest.raises(ValueError, match=r"half.bin does not fit: .*must hold '"):
        load_clip(tmp_path / "half.bin")


def test_two_models_mixed_up(clip: CLIP, tmp_path: Path) -> None:
    hugging_face = to_hugging_face(clip.state_dict())
    vision = {name: tensor for name, tensor in hugging_face.items() if "vision" in name}
    wide = CLIP(CLIPConfig(**{**vars(CONFIG), "vision_width": 192})).state_dict()
    norms = {name: tensor for name, tensor in wide.items() if name.startswith("visual.ln_")}
    for extra, message in (
        (vision, "must be either OpenAI's or Hugging Face's, got '.*' beside 'vision_model"),
        (norms, r"'visual.ln_pre.weight' has shape \(192,\) instead of \(128,\)"),
        ({"visual.transformer.resblocks.5.ln_1.bias": torch.ones(128)}, "'visual.*is missing"),
    ):
        torch.save({**clip.state_dict(), **extra}, tmp_path / "mixed.bin")
        with pytest.raises(ValueError, match=f"mixed.bin does not fit: .*{message}"):
            load_clip(tmp_path / "mixed.bin")


OPENAI_TEXT = ("transformer.", "token_embedding.", "positional_", "ln_final.", "text_projection")


@pytest.mark.parametrize("theirs", ["vision", "text", "text_projection", "visual_projection"])
def test_two_namings_in_one_file(clip: CLIP, theirs: str) -> None:
    """Each weight is there once, so only the names can tell that something is wrong."""
    openai, hugging_face = clip.state_dict(), to_hugging_face(clip.state_dict())
    mixed = {name: tensor for name, tensor in hugging_face.items() if name.startswith(theirs)}
    for name, tensor in openai.items():
        part = "text" if name.startswith(OPENAI_TEXT) else "vision"
        if not theirs.startswith(part) and name not in ("text_projection", "visual.proj"):
            mixed[name] = tensor
    for name, other in (("text_projection", "text"), ("visual.proj", "vis")):
        if not theirs.startswith(other):
            mixed[name] = openai[name]
    with pytest.raises(ValueError, match=f"either OpenAI's or Hugging Face's.* beside '{theirs}"):
        to_openai_names(mixed)


def test_a_projection_is_turned_by_its_own_name_only(clip: CLIP) -> None:
    """Square, so that no shape betrays it; the name alone tells how it lies."""
    square = CLIP(CLIPConfig(**{**vars(CONFIG), "embed_dim": 64}))
    expected = square.state_dict()["text_projection"]
    assert torch.equal(to_openai_names(square.state_dict())["text_projection"], expected)
    state = to_hugging_face(square.state_dict())
    assert torch.equal(to_openai_names(state)["text_projection"], expected)
    state["text_projection"] = state.pop("text_projection.weight")
    with pytest.raises(ValueError, match="got 'text_projection' beside '"):
        to_openai_names(state)


def test_two_names_for_one_weight(clip: CLIP) -> None:
    state = to_hugging_face(clip.state_dict())
    block = "text_model.encoder.layers.2"
    twin = {f"{block}.mlp.c_fc.bias": torch.ones(256)}
    with pytest.raises(ValueError, match=r"one name, got '.*fc1.bias' and '.*c_fc.bias' for "):
        to_openai_names({**state, **twin})
    whole = {f"{block}.self_attn.in_proj_bias": torch.ones(192)}
    with pytest.raises(
        ValueError, match=r"'transformer.*in_proj_bias' must come whole or in three parts"
    ):
        to_openai_names({**whole, **state})


@pytest.mark.parametrize("letter", "qkv")
def test_a_hugging_face_block_without_a_part(clip: CLIP, letter: str) -> None:
    state = to_hugging_face(clip.state_dict())
    state[f"vision_model.encoder.layers.0.self_attn.{letter}_proj.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"three parts of '.*in_proj_bias' must have one shape"):
        to_openai_names(state)
    # Joined with real numbers, whole ones would pass for real.
    state[f"vision_model.encoder.layers.0.self_attn.{letter}_proj.bias"] = torch.arange(128)
    with pytest.raises(ValueError, match=r"one shape and dtype, got .*\(128,\) torch.int64"):
        to_openai_names(state)
    del state[f"vision_model.encoder.layers.0.self_attn.{letter}_proj.bias"]
    with pytest.raises(ValueError, match=rf"hold 'visual.*attn.{letter}_proj.bias', which is miss"):
        to_openai_names(state)


ONE_LAYER = {"vision_layers": 1, "text_layers": 1, "vision_width": 64, "vocab_size": 20}


@pytest.mark.parametrize("theirs", [False, True], ids=["openai", "hugging_face"])
def test_any_weight_damaged_renamed_or_missing_is_one_sentence(
    theirs: bool, tmp_path: Path
) -> None:
    state = CLIP(CLIPConfig(**{**vars(CONFIG), **ONE_LAYER})).state_dict()
    state = to_hugging_face(state) if theirs else state
    for name, tensor in state.items():
        if name.endswith("position_ids"):  # nobody reads them
            continue
        rest = {other: t for other, t in state.items() if other != name}
        damages = [rest, {**rest, name: tensor.long()}, {**rest, name: tensor[None, None]}]
        damages += [{**rest, name: tensor * torch.nan}, {**rest, name: tensor.double() + 1e300}]
        if any(part in name for part in THOROUGH):
            damages += [{**rest, f"old.{name}": tensor}]
            damages += [{**rest, name: torch.ones(shape)} for shape in wrong_shapes(name, tensor)]
        for damaged in damages:
            with pytest.raises(ValueError, match=r"must (hold|have|be)|not those of a CLIP"):
                module._build(module._Weights(damaged, Settings("gelu")), Settings(), tmp_path)


# Where sizes are read from, what is turned and what is joined; every other weight is only compared.
THOROUGH = ("embedding", "projection", "visual.proj", "conv1", "ln_final.w", "q_proj.w", "logit")


def wrong_shapes(name: str, tensor: torch.Tensor) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 0)]
    if tensor.ndim:
        shapes.append((*tensor.shape[:-1], 0))
    words = ("token_embedding.weight", "text_model.embeddings.position_embedding.weight")
    if not name.endswith(words) and name != "positional_embedding":  # these may be any number
        shapes.append((2 * len(tensor) + 1 if tensor.ndim else 2, *tensor.shape[1:]))
    return [shape for shape in shapes if shape != tuple(tensor.shape)]


def test_a_width_that_its_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"`text_width` must be a multiple of its 3 .* got 200"):
        CLIPConfig(text_width=200)


def test_names_behind_a_foreign_prefix(clip: CLIP, tmp_path: Path) -> None:
    renamed = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save(renamed, tmp_path / "renamed.bin")
    with pytest.raises(ValueError, match=r"renamed.bin does not fit: .*must hold '.*other names"):
        load_clip(tmp_path / "renamed.bin")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CLIP weights at .*nothing.*one of miniworld"):
        load_clip(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no CLIP weights at ViT-B/17"):
        load_clip("ViT-B/17")
    with pytest.raises(FileNotFoundError, match="must hold one of model.safetensors.*got none"):
        load_clip(tmp_path)
