"""Write the weights of a small CLIP in every format, independently of the code that reads them."""

import json
import struct
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cliptteacher.clip import CLIP, CLIPConfig, save_clip

State = dict[str, Tensor]

CONFIG = CLIPConfig(
    embed_dim=24, image_size=32, vision_width=128, vision_layers=2,
    context_length=12, vocab_size=300, text_width=64, text_layers=3,
)  # fmt: skip


def small_clip() -> CLIP:
    """Make a small CLIP whose numbers are exact in float16."""
    torch.manual_seed(0)
    clip = CLIP(CONFIG)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.copy_((0.3 * torch.randn_like(parameter)).half().float())
    return clip.eval()


def assert_same(loaded: CLIP, original: CLIP) -> None:
    expected = original.state_dict()
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.float32
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(loaded.encode_image(images).dense, original.encode_image(images).dense)


def to_hugging_face(state: State) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        tower, text = ("vision_model", False) if name.startswith("visual") else ("text_model", True)
        part = name.removeprefix("visual.")
        if "resblocks" in part:
            _, _, layer, rest = part.split(".", 3)
            base = f"{tower}.encoder.layers.{layer}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{base}.self_attn.{letter}_proj.{kind}"] = third
                continue
            for old, new in (
                *(("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1")),
                *(("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")),
            ):
                rest = rest.replace(old, new)
            renamed[f"{base}.{rest}"] = tensor
        elif part in ("proj", "text_projection"):
            renamed["text_projection.weight" if text else "visual_projection.weight"] = tensor.T
        else:
            table = {
                "class_embedding": f"{tower}.embeddings.class_embedding",
                "conv1.weight": f"{tower}.embeddings.patch_embedding.weight",
                "positional_embedding": f"{tower}.embeddings.position_embedding.weight",
                "token_embedding.weight": f"{tower}.embeddings.token_embedding.weight",
                "logit_scale": "logit_scale",
            }
            for old, new in (
                *(("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")),
                *(("ln_final", "final_layer_norm"),),
            ):
                for kind in ("weight", "bias"):
                    table[f"{old}.{kind}"] = f"{tower}.{new}.{kind}"
            renamed[table[part]] = tensor
    for tower, length in (("vision_model", 5), ("text_model", 12)):
        renamed[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None]
    return renamed


def write_safetensors(state: State, path: Path) -> None:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in state.items():
        raw = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.dim() else (
            bytes(tensor.reshape(1).view(torch.uint8).tolist())
        )  # fmt: skip
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets,
        }  # fmt: skip
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Holder(nn.Module):
    """A module of any shape of names, because TorchScript saves what a module holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def hold(state: State, buffers: State) -> nn.Module:
    root = Holder()
    for name, tensor in {**state, **buffers}.items():
        *path, leaf = name.split(".")
        parent: nn.Module = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, Holder())
            parent = parent.get_submodule(part)
        if name in buffers:
            parent.register_buffer(leaf, tensor)
        else:
            parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def write_torchscript(state: State, path: Path, script: bool = False) -> State:
    sizes = {"input_resolution": 32, "context_length": 12, "vocab_size": 300}
    held = hold(state, {name: torch.tensor(size) for name, size in sizes.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; its archives are not
        if script:
            program = torch.jit.script(held)
        else:
            program = torch.jit.trace_module(held, {"forward": torch.zeros(2)})
        program.save(str(path))
        return dict(torch.jit.load(str(path)).state_dict())


def half(state: State) -> State:
    return {name: tensor.half() for name, tensor in state.items()}


def save_openai(clip: CLIP, folder: Path) -> Path:
    write_torchscript(half(clip.state_dict()), folder / "openai.pt")
    return folder / "openai.pt"


def save_scripted(clip: CLIP, folder: Path) -> Path:
    write_torchscript(clip.state_dict(), folder / "scripted.pt", script=True)
    return folder / "scripted.pt"


def save_open_clip(clip: CLIP, folder: Path) -> Path:
    state = {**clip.state_dict(), "attn_mask": torch.zeros(12, 12)}
    torch.save(state, folder / "open_clip.bin")
    return folder / "open_clip.bin"


def save_open_clip_training(clip: CLIP, folder: Path) -> Path:
    state = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
    return folder / "epoch_3.pt"


def save_legacy(clip: CLIP, folder: Path) -> Path:
    path = folder / "legacy.bin"
    torch.save(clip.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def save_open_clip_safetensors(clip: CLIP, folder: Path) -> Path:
    write_safetensors(half(clip.state_dict()), folder / "any.name")
    return folder / "any.name"


def save_hugging_face_bin(clip: CLIP, folder: Path) -> Path:
    torch.save(to_hugging_face(clip.state_dict()), folder / "pytorch_model.bin")
    return folder


def save_hugging_face_safetensors(clip: CLIP, folder: Path) -> Path:
    write_safetensors(to_hugging_face(clip.state_dict()), folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_text("not read, because safetensors come first")
    return folder


def save_own(clip: CLIP, folder: Path) -> Path:
    save_clip(clip, folder / "own.pt")
    return folder / "own.pt"


WRITERS = (
    *(save_openai, save_scripted, save_open_clip, save_open_clip_training, save_legacy),
    *(save_open_clip_safetensors, save_hugging_face_bin, save_hugging_face_safetensors, save_own),
)
