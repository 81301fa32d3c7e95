"""Weights of the teacher and of students, checkpoints, and files that want to run something."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import clip_files
import torch
from judge import Case, Draw, damaged
from torch import Tensor, nn

from cliptteacher.checkpoint import student_content
from cliptteacher.clip import CLIP, load_clip
from cliptteacher.inference import load_segmenter
from cliptteacher.segmenters import build_segmenter

State = dict[str, Tensor]
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@cache
def clip() -> CLIP:
    return clip_files.small_clip()


@cache
def dense() -> Tensor:
    return clip().encode_image(IMAGE).dense


@cache
def student() -> nn.Module:
    torch.manual_seed(0)
    return build_segmenter("fpn_small", 8).eval()


def changed(draw: Draw, state: State) -> tuple[State, bool]:
    """Change one thing about tensors by name; returns whether they mean the same still."""
    name = draw.one(*sorted(state))
    tensor, rest = state[name], {k: v for k, v in state.items() if k != name}
    match draw.one(
        *(
            "same",
            "prefix",
            "double",
            "drop",
            "rename",
            "twice",
            "shape",
            "kind",
            "nan",
            "extra",
            "meta",
            "stride",
            "sparse",
            "empty",
        )
    ):
        case "same":
            return state, True
        case "prefix":
            wrap = draw.one("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
            return {wrap + k: v for k, v in state.items()}, True
        case "double":
            return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}, True
        case "drop":
            return rest, False
        case "rename":
            return {**rest, name[:-1] + "x": tensor}, False
        case "twice":
            return {**state, f"module.{name}": tensor}, False
        case "shape":
            return {
                **rest,
                name: draw.one(
                    tensor[None], tensor.flatten()[:1], tensor.reshape(-1)[None, None, None]
                ),
            }, False
        case "kind":
            return {
                **rest,
                name: draw.one(tensor.long(), tensor.bool(), tensor.to(torch.complex64)),
            }, False
        case "nan":
            return {**rest, name: tensor * draw.one(float("nan"), float("inf"))}, False
        case "extra":
            return {**state, "other.weight": tensor}, False
        case "meta":
            return {**rest, name: tensor.to("meta")}, False
        case "stride":
            return {**rest, name: torch.zeros(1).expand(2 ** draw.whole(1, 40))}, False
        case "sparse":
            return {
                **rest,
                name: torch.sparse_coo_tensor([[0]], [1.0], (2**30,))
                if draw.one(True, False)
                else tensor.to_sparse(),
            }, False
        case _:
            return {**rest, name: tensor[:0] if tensor.ndim else tensor.new_empty(0)}, False


def teachers(draw: Draw, folder: Path) -> Case:
    """A CLIP in a format of the field, with a change, a damage, or rubbish beside it."""
    state = dict(clip().state_dict())
    state, same = changed(draw, state)
    layout = draw.one("torch", "torch", "wrapped", "hugging face", "safetensors", "shards")
    plain = all(
        t.layout == torch.strided
        and t.device.type == "cpu"
        and t.dtype in (torch.float32, torch.float16, torch.int64)
        for t in state.values()
    )
    small = plain and sum(t.numel() for t in state.values()) < 10**7
    path: Path = folder / "clip.bin"
    if (
        layout == "hugging face"
        and same
        and small
        and not any(k.startswith(("module", "_orig")) for k in state)
    ):
        path = folder / "pytorch_model.bin"
        torch.save(clip_files.to_hugging_face(state), path)
    elif layout in ("safetensors", "shards") and small:
        names = sorted(state)
        files = [names[:9], names[9:]] if layout == "shards" else [names]
        for k, part in enumerate(files):
            clip_files.write_safetensors({n: state[n] for n in part}, folder / f"{k}.safetensors")
        path = folder / "0.safetensors"
        if layout == "shards":
            path = folder / "model.safetensors.index.json"
            path.write_text(
                json.dumps(
                    {
                        "weight_map": {
                            n: f"{k}.safetensors" for k, part in enumerate(files) for n in part
                        }
                    }
                )
            )
    else:
        torch.save({"epoch": 1, "state_dict": state} if layout == "wrapped" else state, path)
    if draw.one(False, False, True):  # of the header alone: safetensors has no checksum
        same = False
        content = path.read_bytes()
        header = (
            damaged(draw, content[:600]) if "safetensors" in path.name else damaged(draw, content)
        )
        path.write_bytes(header + content[600:] if "safetensors" in path.name else header)
    beside = draw.one(None, None, "config.json", "open_clip_config.json")
    if beside:
        settings = {
            "model_type": "clip",
            "vision_config": {"hidden_size": 128},
            "text_config": {"hidden_size": 64},
        }
        settings[draw.one(*settings)] = draw.junk()  # type: ignore[assignment]
        (folder / beside).write_text(json.dumps(settings, default=str))
        same = same and beside != "config.json" and False
    must_pass = same and beside is None

    def act() -> None:
        found = (
            load_clip(path, activation="quick_gelu", heads=(2, 1)) if must_pass else load_clip(path)
        )
        features = found.encode_image(IMAGE).dense
        assert features.isfinite().all()
        if must_pass:
            torch.testing.assert_close(features, dense())

    return Case(act, folder.name, "pass" if must_pass else "either")


def student_weights(draw: Draw, folder: Path) -> Case:
    """A checkpoint of a student whose weights were changed, or the file damaged."""
    state, same = changed(draw, dict(student().state_dict()))
    content = description()
    content["segmenter"] = state
    path = folder / "s.pt"
    torch.save(content, path)
    if draw.one(False, False, True):
        same = False
        path.write_bytes(damaged(draw, path.read_bytes()))

    def act() -> None:
        found = load_segmenter(path)(IMAGE[0])
        assert found.shape == (32, 32)
        expected = load_segmenter(saved(folder / "right.pt", description()))(IMAGE[0])
        assert torch.equal(found, expected), "other labels than those of the weights"

    return Case(act, path.name, "pass" if same else "either")


def description() -> dict[str, Any]:
    text = nn.functional.normalize(torch.eye(3, 8) + 0.1, dim=1)
    content = student_content(
        student(), names=("sky", "grass", "cow"), unseen=[2], text_features=text, clip="miniworld"
    )
    return {"format": "cliptteacher-checkpoint-2", "step": 3, **content}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def checkpoints(draw: Draw, folder: Path) -> Case:
    """A checkpoint with an entry missing, or with anything in its place."""
    content, key = description(), draw.one(*description())
    same = draw.one(False, False, False, True)
    value = draw.junk()
    if not same:
        nested = content[key]
        if isinstance(nested, (list, dict)) and nested and draw.one(True, False):
            at = draw.one(*(nested if isinstance(nested, dict) else range(len(nested))))
            nested[at] = value
        elif isinstance(nested, Tensor) and draw.one(True, False):
            content[key] = draw.one(
                nested.double(),
                nested.long(),
                nested * float("nan"),
                nested[:2],
                nested[0],
                nested[:, :3],
                nested.to("meta"),
                0 * nested,
            )
        elif draw.one(True, False):
            del content[key]
        else:
            content[key] = value
    path = saved(folder / "s.pt", content)

    def act() -> None:
        trained = load_segmenter(path)
        labels = trained(IMAGE[0])
        assert labels.shape == (32, 32) and int(labels.max()) < len(trained.class_names)
        assert all(isinstance(name, str) for name in trained.class_names)
        other = trained.with_words([trained.class_names[1]])
        assert other.text_features.isfinite().all()

    return Case(act, path.name, "pass" if same else "either")


class Payload:
    """Pickles as a call that leaves a mark."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def hostile_pickles(draw: Draw, folder: Path) -> Case:
    """A pickle that calls something, anywhere in a file that may hold weights."""
    import os

    mark, path = folder / "mark", folder / "w.pt"
    command = f"open({str(mark)!r}, 'w')"
    payload = draw.one(
        Payload(os.system, f"touch {mark}"), Payload(eval, command), Payload(exec, command),
        Payload(open, str(mark), "w"), Payload(Path.touch, mark),
    )  # fmt: skip
    content: Any = draw.one(description(), dict(clip().state_dict()), {"state_dict": {}}, [], {})
    where = draw.one("alone", "value", "key", "nested")
    if where == "alone":
        content = payload
    elif isinstance(content, dict):
        key = draw.one("format", "segmenter", "config", "x", "state_dict", "extra")
        content[key] = {"a": [payload]} if where == "nested" else payload
    else:
        content.append(payload)
    raw = pickle.dumps(content, protocol=draw.one(2, 3, 4))
    if draw.one(True, False):
        path.write_bytes(raw)
    else:
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("archive/data.pkl", raw)
            packed.writestr("archive/version", "3")
    reader = draw.one(
        load_clip,
        load_segmenter,
        lambda p: build_segmenter("fpn_small", 8, weights=p),
        lambda p: build_segmenter("segformer_nano", 8, weights=p),
    )

    def act() -> None:
        try:
            reader(path)
        finally:
            assert not mark.exists(), "the payload ran"

    return Case(act, path.name if reader in (load_clip, load_segmenter) else "", "fail")


WEIGHTS = (teachers, student_weights, checkpoints, hostile_pickles)
