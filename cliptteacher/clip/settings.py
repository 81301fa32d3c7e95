"""Read what the weights of a CLIP do not hold: its activation and its attention heads.

Weights give every size, but neither the activation between the two layers of an MLP nor the number
of heads: any number that divides the width fits. Both stand in a JSON file beside the weights:

| file                    | written by   | activation            | heads: vision, text           |
|-------------------------|--------------|-----------------------|-------------------------------|
| `config.json`           | transformers | `hidden_act`          | `num_attention_heads`         |
| `open_clip_config.json` | open_clip    | `quick_gelu` or `act` | width / `head_width`, `heads` |

What such a file leaves out has the default of the package that wrote it. A file that describes
another model, or arithmetic that `model.py` does not have, is refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import read_json

_Section = Mapping[str, Any]


class Settings(NamedTuple):
    """What must be known beside the weights; None where nobody says it."""

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None


def architecture_name(vision_width: int, patch_size: int) -> str:
    """Name a vision transformer by its width, as its authors did; by its width where they did not.

    >>> architecture_name(768, 16), architecture_name(96, 8)
    ('ViT-B/16', 'ViT-96/8')
    """
    letter = {384: "S", 768: "B", 1024: "L", 1280: "H"}.get(vision_width, str(vision_width))
    return f"ViT-{letter}/{patch_size}"


def read_settings(folder: Path, weights: Mapping[str, Tensor], *, hugging_face: bool) -> Settings:
    """Read the settings of a model from the files that stand beside its weights.

    Args:
        folder: where the weights lie.
        weights: with OpenAI's names, for a comparison of the widths.
        hugging_face: the weights came with Hugging Face's names, so their file counts first.

    Returns:
        All settings; none of them if no file describes a CLIP.

    Raises:
        ValueError: a file is damaged, describes a CLIP of other widths, or arithmetic that this
            package does not have.
    """
    names = ("config.json", "open_clip_config.json")
    for name in names if hugging_face else names[::-1]:
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = _READERS[name](read_json(file, megabytes=10), weights)
        except ValueError as error:
            advice = "" if str(file) in str(error) else f"{file} must describe this model, but "
            raise ValueError(
                f"{advice}{error}; put the file of the model there, or remove this one and pass "
                "`activation` and `heads`"
            ) from error
        if found is not None:
            return found
    return Settings()


def _read_transformers(content: object, weights: Mapping[str, Tensor]) -> Settings | None:
    """Read the configuration of transformers' `CLIPModel`."""
    if not isinstance(content, dict) or content.get("model_type", "clip") != "clip":
        return None
    if "model_type" not in content and "vision_config" not in content:
        return None  # of something else, such as a training run
    vision, text = (_section(content, f"{tower}_config") for tower in ("vision", "text"))
    _compare_widths(_count(vision, "hidden_size", 768), _count(text, "hidden_size", 512), weights)
    for section in (vision, text):
        _refuse(section, "layer_norm_eps", 1e-5)
    activations = [section.get("hidden_act", "quick_gelu") for section in (vision, text)]
    return Settings(
        activation=" and ".join(dict.fromkeys(map(str, activations))),
        vision_heads=_count(vision, "num_attention_heads", 12),
        text_heads=_count(text, "num_attention_heads", 8),
    )


def _read_open_clip(content: object, weights: Mapping[str, Tensor]) -> Settings | None:
    """Read the configuration of an open_clip model; its defaults are those of `open_clip.model`."""
    if not isinstance(content, dict):
        return None
    model = content.get("model_cfg", content)
    if not isinstance(model, dict) or "vision_cfg" not in model:
        return None
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    width = _count(vision, "width", 768)
    _compare_widths(width, _count(text, "width", 512), weights)
    for section, pooled in ((vision, "tok"), (text, "argmax")):
        for key, ours in (("pool_type", pooled), ("norm_kwargs", {}), ("act_kwargs", {})):
            _refuse(section, key, ours)
        for key in ("final_ln_after_pool", "no_causal_mask", "embed_cls", "attentional_pool"):
            _refuse(section, key, False)
    quick = model.get("quick_gelu", False)
    if not isinstance(quick, bool):
        raise ValueError(f"`quick_gelu` must be true or false, got {quick!r}")
    return Settings(
        activation=str(model.get("act") or ("quick_gelu" if quick else "gelu")),
        vision_heads=max(1, width // _count(vision, "head_width", 64)),
        text_heads=_count(text, "heads", 8),
    )


_READERS: dict[str, Callable[[object, Mapping[str, Tensor]], Settings | None]] = {
    "config.json": _read_transformers,
    "open_clip_config.json": _read_open_clip,
}


def _section(content: _Section, name: str) -> _Section:
    section = content.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"`{name}` must be an object, got {section!r:.60}")
    return section


def _count(section: _Section, name: str, default: int) -> int:
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number, got {value!r:.60}")
    return value


def _refuse(section: _Section, name: str, ours: object) -> None:
    """Refuse arithmetic that `model.py` does not have."""
    if section.get(name) not in (None, ours):
        raise ValueError(f"`{name}` must be {ours!r} to be a teacher, got {section[name]!r:.60}")


def _compare_widths(vision: int, text: int, weights: Mapping[str, Tensor]) -> None:
    """Refuse the file of another model: its heads would fit by chance."""
    for name, described in (("visual.class_embedding", vision), ("ln_final.weight", text)):
        shape = tuple(weights[name].shape) if name in weights else (described,)
        if shape != (described,):
            raise ValueError(f"it gives {described} channels to {name!r}, which has shape {shape}")
