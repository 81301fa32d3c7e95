"""Load and save the weights of the teacher, CLIP (section 3.1 of arXiv:2310.02296v1).

Sketch of `load_clip`: find the file (bundled, published by OpenAI, or yours); recognise its format
by its content; read it as data, never as a program; give the weights OpenAI's names; find out the
activation and the heads (`settings.py`); compare names, shapes and numbers with the model; build
the model in float32, frozen.

| content                          | read by                              |
|----------------------------------|--------------------------------------|
| TorchScript archive (OpenAI)     | `archive.py`                         |
| safetensors, shards              | `tensors.py`                         |
| ``torch.save``                   | ``torch.load(weights_only=True)``    |
| `save_clip`, a case of the above | the same, then the rows are put back |

Cost: one pass over the file and one copy of the weights in memory.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from ..files import write_whole
from ..tensors import (
    is_safetensors,
    list_zip,
    read_torch,
    read_weights,
    take_tensors,
    without_prefixes,
)
from .archive import is_torchscript, read_torchscript
from .convert import to_openai_names
from .download import OPENAI_WEIGHTS, download_weights
from .model import CLIP, IMAGE_MEAN, IMAGE_STD, OPENAI_SIZES, Activation, CLIPConfig
from .settings import Settings, read_settings

_FORMAT = "cliptteacher-clip-1"
BUNDLED = Path(__file__).with_name("miniworld.pt")
_FILES_IN_A_FOLDER = (
    *("model.safetensors", "pytorch_model.bin"),  # Hugging Face
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),  # the same, in shards
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
_TOKENS = "token_embedding"
_MAX_TABLE = 1 << 28  # numbers of a token embedding; OpenAI's largest has 38 million

Heads = int | tuple[int, ...]


class _Weights(NamedTuple):
    """What a file holds; only our own files give the settings as well."""

    tensors: Mapping[str, Tensor]
    settings: Settings | None


def load_clip(
    source: str | os.PathLike[str] = "miniworld",
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    activation: Activation | None = None,
    heads: Heads | None = None,
) -> CLIP:
    """Load a frozen CLIP in float32, in evaluation mode.

    Args:
        source: ``"miniworld"`` (bundled); ``"ViT-B/16"``, ``"ViT-B/32"``, ``"ViT-L/14"`` or
            ``"ViT-L/14@336px"`` (OpenAI's, downloaded once); or a path to OpenAI's archive, to an
            open_clip or Hugging Face state dict (``torch.save`` or safetensors, whole or in
            shards), to a folder that holds one, or to a file of `save_clip`. The extension does
            not matter.
        device: where the model shall be.
        cache_dir: where downloads are kept, see `download_weights`.
        activation: ``"quick_gelu"`` or ``"gelu"``.
        heads: attention heads of the vision transformer, or of vision and text; with one number
            the text transformer has one head for every 64 channels, as all published ones have.

    Weights hold neither activation nor heads. What you do not give is taken from the file, if
    `save_clip` wrote it; from `config.json` or `open_clip_config.json` beside it, see
    `read_settings`; else it is QuickGELU and 64 channels a head, as in all models of OpenAI, with
    a warning where the sizes are not those of one of them.

    Returns:
        The model; no parameter requires a gradient.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: the file is damaged or does not hold a CLIP with a vision transformer, the
            heads do not divide the widths, or the activation is unknown.
    """
    asked = _check_settings(activation, heads)
    path = _find(source, cache_dir)
    weights = _read(path)
    try:
        clip = _build(weights, asked, path)
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    return clip.to(device)


def save_clip(
    clip: CLIP, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Save a CLIP in float16, without the rows of the token embedding that are zero.

    A small CLIP trained on a few hundred words never touches the other 49,000 rows; zeroed and
    left out, they cost nothing. The file appears under its name only when it is complete.

    Args:
        clip: the model.
        path: the file to write; `load_clip` reads it.
        extra: what you want to remember with it (command, seed, scores), as JSON can hold it;
            ``torch.load(path, weights_only=True)["extra"]`` gives it back.

    Raises:
        TypeError: if JSON cannot hold `extra`.
        ValueError: if a number is not finite in float16.
    """
    try:
        notes = json.loads(json.dumps(dict(extra or {})))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`extra` must hold what JSON can hold, but {error}") from error
    tensors = {name: _to_half(name, tensor) for name, tensor in clip.state_dict().items()}
    content = {
        "format": _FORMAT,
        "activation": clip.config.activation,
        "heads": list(clip.config.heads),
        "state_dict": _drop_zero_rows(tensors),
        "extra": notes,
    }
    with write_whole(path) as file:
        torch.save(content, file)


def _find(source: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Path:
    """Return the file that a source means."""
    if source == "miniworld":
        path = BUNDLED
    elif isinstance(source, str) and source in OPENAI_WEIGHTS:
        path = download_weights(OPENAI_WEIGHTS[source], cache_dir)
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in _FILES_IN_A_FOLDER if (path / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"the folder {path} must hold one of {', '.join(_FILES_IN_A_FOLDER)}, got none"
            )
        return found[0]
    if not path.exists():
        names = ", ".join(("miniworld", *OPENAI_WEIGHTS))
        raise FileNotFoundError(
            f"no CLIP weights at {path}; give the path of a file, or one of {names}"
        )
    return path


def _check_settings(activation: str | None, heads: Heads | None) -> Settings:
    """Turn the arguments of `load_clip` into settings, before anything is read."""
    if activation not in (None, *get_args(Activation)):
        raise ValueError(
            f"`activation` must be one of {', '.join(get_args(Activation))}, got {activation!r}"
        )
    numbers = heads if isinstance(heads, tuple) else (heads,)
    plain = [isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers]
    if heads is not None and (len(plain) > 2 or not plain or not all(plain)):
        raise ValueError(f"`heads` must be one or two positive whole numbers, got {heads!r}")
    return Settings(activation, *numbers)


def _read(path: Path) -> _Weights:
    """Read a file of any known format, recognised by its content."""
    if _is_zip(path) and is_torchscript(list_zip(path)):
        return _Weights(read_torchscript(path), None)
    if path.name.endswith(".index.json") or is_safetensors(path):
        return _Weights(read_weights(path), None)
    content = read_torch(path)
    settings = None
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        heads = content.get("heads", [None, None])  # older files: one for every 64 channels
        if not isinstance(content.get("activation"), str) or not isinstance(heads, list | tuple):
            raise ValueError(f"{path} must name its activation and its heads; save it again")
        settings = Settings(content["activation"], *heads[:2])
    return _Weights(take_tensors(content, path, ("state_dict", "model")), settings)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _build(weights: _Weights, asked: Settings, path: Path) -> CLIP:
    """Build the model that the weights describe, and compare every name and shape."""
    given = without_prefixes(_restore_zero_rows(weights.tensors))
    tensors = to_openai_names(given)
    found = weights.settings
    if found is None and (asked.activation is None or asked.vision_heads is None):
        theirs = "visual_projection.weight" in given
        found = read_settings(path.parent, tensors, hugging_face=theirs)
    config = _configure(tensors, asked, found or Settings())
    if weights.settings is None:
        _warn_of_guesses(config, asked, found or Settings(), path)
    # On the meta device nothing is drawn: loading leaves the random numbers of a run alone.
    with torch.device("meta"):
        clip = CLIP(config)
    _check_names_and_shapes(tensors, clip.state_dict())
    clip.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    clip.image_mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    clip.image_std = torch.tensor(IMAGE_STD).view(3, 1, 1)
    return clip.requires_grad_(False).eval()


def _configure(tensors: Mapping[str, Tensor], asked: Settings, found: Settings) -> CLIPConfig:
    """Join the sizes of the weights with the settings; those of the caller come first."""
    activation = asked.activation or found.activation or "quick_gelu"
    return CLIPConfig.from_state_dict(
        tensors,
        cast(Activation, activation),  # of a file perhaps; the configuration compares it
        found.vision_heads if asked.vision_heads is None else asked.vision_heads,
        found.text_heads if asked.text_heads is None else asked.text_heads,
    )


def _warn_of_guesses(config: CLIPConfig, asked: Settings, found: Settings, path: Path) -> None:
    """Warn of what neither the caller nor a file says, unless the sizes are those of OpenAI."""
    guessed = []
    if asked.activation is None and found.activation is None:
        guessed.append("QuickGELU")
    if asked.vision_heads is None and found.vision_heads is None:
        guessed.append("{} and {} heads (vision and text, 64 channels each)".format(*config.heads))
    if guessed and _sizes(config) not in [_sizes(known) for known in OPENAI_SIZES.values()]:
        warnings.warn(
            f"{path} has weights alone, of sizes that no CLIP of OpenAI has: assumed "
            f"{' and '.join(guessed)}; pass `activation` and `heads`, or put the config.json or "
            "open_clip_config.json of the model beside the file",
            stacklevel=4,
        )


def _sizes(config: CLIPConfig) -> dict[str, Any]:
    other = ("activation", "vision_heads", "text_heads")
    return {name: size for name, size in vars(config).items() if name not in other}


def _check_names_and_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"{name!r} is missing" for name in expected if name not in weights]
    problems += [f"{name!r} is unexpected" for name in weights if name not in expected]
    for name in sorted(weights.keys() & expected.keys()):
        shape, wanted = tuple(weights[name].shape), tuple(expected[name].shape)
        if shape != wanted:
            problems.append(f"{name!r} has shape {shape} instead of {wanted}")
        elif not weights[name].is_floating_point():
            problems.append(f"{name!r} holds {weights[name].dtype} instead of real numbers")
        elif not bool(weights[name].float().isfinite().all()):
            problems.append(f"{name!r} holds numbers that are not finite")
    if problems:
        listed = ", ".join(problems[:5]) + (", ..." if len(problems) > 5 else "")
        raise ValueError(
            f"{len(problems)} of its names or shapes are not those of a CLIP: {listed}"
        )


def _to_half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().to("cpu", torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(
            f"{name!r} must be finite in float16 (at most 65504), "
            f"got {tensor.abs().max().item():.4g}; train on, or scale it down"
        )
    return half


def _drop_zero_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the token embedding by its rows that are not zero, their ids and its shape."""
    sparse = dict(tensors)
    table = sparse.pop(f"{_TOKENS}.weight")
    ids = table.any(dim=1).nonzero().flatten()
    sparse[f"{_TOKENS}.ids"] = ids.to(torch.int32)
    sparse[f"{_TOKENS}.rows"] = table[ids]
    sparse[f"{_TOKENS}.shape"] = torch.tensor(table.shape)
    return sparse


def _restore_zero_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Undo `_drop_zero_rows`, if it was done."""
    parts = [f"{_TOKENS}.{part}" for part in ("ids", "rows", "shape")]
    if not all(part in tensors for part in parts):
        return tensors
    ids, rows, shape = (tensors[part] for part in parts)
    vocabulary, width = shape.tolist() if shape.shape == (2,) else (-1, -1)
    whole = not ids.is_floating_point() and not shape.is_floating_point()
    inside = ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary)
    # Zero rows take no bytes in the file, so its size is no bound for their number.
    flat = ids.ndim == 1 and 0 <= vocabulary * width <= _MAX_TABLE and vocabulary >= 0
    if not whole or not flat or tuple(rows.shape) != (ids.numel(), width) or not inside:
        raise ValueError(
            f"its {ids.numel()} rows of {_TOKENS} do not fit into {vocabulary} x {width}"
        )
    table = torch.zeros(vocabulary, width, dtype=rows.dtype)
    table[ids.long()] = rows
    dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return {**dense, f"{_TOKENS}.weight": table}
