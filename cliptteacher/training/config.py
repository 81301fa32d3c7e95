"""Configuration: frozen dataclasses whose fields are the command line, the JSON file and the table.

Values come from four places, later ones win: the defaults of the fields, a recipe, a JSON file
(``--config``), the command line. Every field of every class is a flag of its own name
(``--batch-size 16``), and an unknown or mistyped key is an error that names the nearest one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..files import read_text
from ..options import check_fields, check_value, field_types, without_none


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run is, apart from the method's own options."""

    data: Literal["miniworld", "folder", "voc", "coco_stuff", "pascal_context"] = "miniworld"
    root: str | None = None  # folder of the data set
    clip: str = "ViT-B/16"  # teacher: a name or a path for load_clip
    clip_activation: Literal["quick_gelu", "gelu"] | None = None  # where no file beside it says so
    clip_heads: tuple[int, ...] | None = None  # likewise: of vision, or of vision and text
    segmenter: str = "segformer_b0"  # student, see list_segmenters()
    segmenter_weights: str | None = None  # "imagenet", a path, or none
    iterations: int = 20_000
    batch_size: int = 16  # over all processes
    crop: int = 512  # side of the training crops, a multiple of CLIP's patch
    seed: int = 0
    output: str | None = None  # run directory; default runs/<recipe>-<date>
    resume: bool = False  # go on from the newest checkpoint in the run directory
    checkpoint_interval: int = 2_000  # iterations
    eval_interval: int = 2_000  # iterations; 0 evaluates at the end only
    test_split: str = "val"  # evaluated at the end; on the way it is always val
    eval_resize: tuple[int, int] | None = None  # (long, short) sides to fit images into
    eval_size_divisor: int = 1  # mirror images to a multiple of this, the coarsest stride
    log_interval: int = 50  # iterations
    tensorboard: bool = False  # write TensorBoard events too; needs that package
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    workers: int = 0  # data loading processes per training process
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"  # tf32: 19-bit products on CUDA
    compile: bool = False  # torch.compile of teacher and student
    sync_batch_norm: bool = False  # one BatchNorm over all processes; CUDA only
    accumulate: int = 1  # parts, one after another, of each process's share of the batch
    channels_last: bool = False  # memory layout of the student; faster convolutions
    # optimisation, Section 4.2: the default schedule of the toolbox
    learning_rate: float = 6e-5
    head_multiplier: float = 10.0  # learning rate of the head and the adapter over the backbone's
    weight_decay: float = 0.01
    warmup: int = 1_500  # iterations of linear warm-up
    clip_gradient: float = 0.0  # largest gradient norm; 0 does not clip
    # augmentation
    resize: tuple[int, int] = (2048, 512)  # (long, short) sides that images are first fitted into
    ratio: tuple[float, float] = (0.5, 2.0)  # times this random factor
    photometric: bool = True  # random brightness, contrast, saturation and hue
    # protocol
    gamma: float = 1.5  # bonus of the unseen classes at inference, in logit units
    # of unseen classes training knows nothing; their names; their labels, which is no zero-shot
    setting: Literal["inductive", "transductive", "closed_set"] = "inductive"
    dry_run: bool = False  # print the resolved plan and stop

    def __post_init__(self) -> None:
        check_fields(self)
        positive = ("iterations", "batch_size", "crop", "log_interval", "checkpoint_interval")
        for name in (*positive, "accumulate", "eval_size_divisor"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        not_negative = ("seed", "eval_interval", "workers", "learning_rate", "head_multiplier")
        for name in (*not_negative, "weight_decay", "warmup", "clip_gradient"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        for name in ("resize", "eval_resize", "ratio"):
            if min(getattr(self, name) or (1,)) <= 0:
                raise ValueError(f"`{name}` must hold numbers above 0, got {getattr(self, name)}")
        if self.data != "miniworld" and self.root is None:
            raise ValueError(
                f"`root` must name the folder of the data set for data={self.data}, got none"
            )


def resolve_config(
    classes: Sequence[type],
    overrides: Sequence[Mapping[str, Any]] = (),
) -> tuple[Any, ...]:
    """Build one instance per class from flat dictionaries of values, later ones win.

    Args:
        classes: dataclasses with disjoint field names.
        overrides: dictionaries from field name to value; lists serve as tuples.

    Raises:
        ValueError: a key is no field of any class (the nearest is named), or a value has another
            type than its field.
    """
    hints = _all_types(classes)
    values: dict[str, Any] = {}
    for layer in overrides:
        for key, value in layer.items():
            name, checked = _check_item(key, value, hints)
            values[name] = checked
    return tuple(
        cls(**{name: values[name] for name in field_types(cls) if name in values})
        for cls in classes
    )


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key is unknown, and name the nearest; dashes and underscores are alike."""
    names = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(key), list(names), n=1, cutoff=0.4)
    hint = f"; did you mean {names[near[0]]!r}?" if near else ""
    return f"unknown option {key!r}{hint}"


def parse_arguments(
    parser: argparse.ArgumentParser, classes: Sequence[type], argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Add a flag per field, parse, and split what was given into namespace and overrides.

    Args:
        parser: a parser that may already have arguments of its own.
        classes: dataclasses with disjoint field names.
        argv: command line; default that of the process.

    Returns:
        The namespace of the parser's own arguments, and the fields named on the command line only.
    """
    parser.allow_abbrev = False  # a flag cut short is a mistyped one
    names: list[str] = []
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        for name, hint in field_types(cls).items():
            flag = "--" + name.replace("_", "-")
            options = _flag_options(hint)
            options["help"] = f"default: {show_value(defaults[name])}".replace("%", "%%")
            group.add_argument(flag, dest=name, default=argparse.SUPPRESS, **options)
            names.append(name)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_describe_unknown(unknown[0], parser))
    given = {name: value for name, value in vars(namespace).items() if name in names}
    return namespace, {key: None if value == [None] else value for key, value in given.items()}


def read_json(path: str | Path, classes: Sequence[type], own: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file, flat or with objects that group its fields under any names.

    Args:
        path: of the file.
        classes: dataclasses with disjoint field names.
        own: further keys that the file may hold, with words as values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON object, a key is unknown (the nearest is named) or stands
            twice, or a value has another type than its field. The file is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the configuration file {path} does not exist; check --config")
    hints = {**dict.fromkeys(own, str), **_all_types(classes)}
    flat: dict[str, Any] = {}
    text = read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=_Pairs)
        if not isinstance(data, _Pairs):
            raise ValueError(f"must hold a JSON object, got {type(data).__name__}")
        for key, value in _leaves(data, hints):
            name, checked = _check_item(key, value, hints)
            if name in flat:
                raise ValueError(f"`{name}` is given twice; keep one of them")
            flat[name] = checked
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, but {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return flat


def changed_fields(*configs: Any) -> dict[str, tuple[Any, Any]]:
    """List the fields that differ from their defaults, each with its value and its default."""
    return {
        field.name: (getattr(config, field.name), field.default)
        for config in configs
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }


def show_flag(name: str, value: Any) -> str:
    """Write a field and its value as the command line takes them."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {show_value(value)}"


def show_value(value: Any) -> str:
    """Write a value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def config_as_dict(*configs: Any) -> dict[str, Any]:
    """Join the fields of configurations into one flat, JSON-ready dictionary."""
    return {name: value for config in configs for name, value in dataclasses.asdict(config).items()}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the file: a key that stands twice is there twice."""


def _leaves(pairs: _Pairs, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walk through the values of an object and of those inside it that group fields."""
    for key, value in pairs:
        if isinstance(value, _Pairs) and _plain(key) not in known:
            yield from _leaves(value, known)
        else:
            yield key, dict(value) if isinstance(value, _Pairs) else value


def _check_item(key: str, value: Any, hints: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the field that a key names, and the value in the type of that field."""
    name = _plain(key)
    if name not in hints:
        raise ValueError(unknown_key(key, list(hints)))
    return name, check_value(name, value, hints[name])


def _describe_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with a word of the command line that no argument takes."""
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; every option has a name, see --help"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return unknown_key(word.split("=")[0], flags)


def _plain(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def _all_types(classes: Sequence[type]) -> dict[str, Any]:
    return {name: hint for cls in classes for name, hint in field_types(cls).items()}


def _flag_options(hint: Any) -> dict[str, Any]:
    """The argparse options of a field's type; "none" clears an optional field."""
    kind = without_none(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    is_tuple = get_origin(kind) is tuple
    item = get_args(kind)[0] if is_tuple else kind
    return {
        "type": item if kind is hint else _or_none(item),
        **({"nargs": "+"} if is_tuple else {}),
    }


def _or_none(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse
