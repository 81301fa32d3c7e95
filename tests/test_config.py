"""Configuration: which value wins, what is refused, and what a file or a flag may look like."""

import argparse
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from cliptteacher.framework import CLIPTeacherConfig
from cliptteacher.training.config import (
    TrainConfig,
    changed_fields,
    config_as_dict,
    parse_arguments,
    read_json,
    resolve_config,
    show_value,
    unknown_key,
)

CLASSES = (TrainConfig, CLIPTeacherConfig)


def hint_args(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()


@dataclass(frozen=True, kw_only=True)
class Toy:
    count: int = 3
    rate: float = 0.5
    name: str | None = None
    slots: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    size: tuple[int, int] = (4, 2)
    fit: tuple[int, int] | None = None
    scales: tuple[int, ...] = (3, 7)
    share: tuple[float, float] = (0.5, 2.0)
    flip: bool = True


def toy(*layers: dict[str, Any]) -> Toy:
    (config,) = resolve_config((Toy,), layers)
    return config


def parse(*argv: str) -> dict[str, Any]:
    _, given = parse_arguments(argparse.ArgumentParser(), (Toy,), argv)
    return given


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- precedence -------------------------------------------------------------------------------


def test_nothing_given_is_the_defaults() -> None:
    assert toy() == Toy()
    assert resolve_config(CLASSES) == (TrainConfig(), CLIPTeacherConfig())


def test_later_layers_win() -> None:
    recipe, file, line = (
        {"count": 1, "rate": 1.0, "mode": "slow"},
        {"count": 2, "rate": 2.0},
        {"count": 4},
    )
    config = toy(recipe, file, line)
    assert (config.count, config.rate, config.mode) == (4, 2.0, "slow")


def test_dashes_are_underscores() -> None:
    config, method = resolve_config(CLASSES, ({"batch-size": 8}, {"bank-size": 3}))
    assert config.batch_size == 8 and method.bank_size == 3


def test_each_class_takes_its_own_fields() -> None:
    config, method = resolve_config(CLASSES, ({"iterations": 5, "kmeans_iterations": 2},))
    assert (config.iterations, method.kmeans_iterations) == (5, 2)


def test_the_two_classes_share_no_field() -> None:
    assert not set(config_as_dict(TrainConfig())) & set(config_as_dict(CLIPTeacherConfig()))


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("batch-sise", "batch_size"),
        ("potential_scop", "potential_scope"),
        ("fusion_treshold", "fusion_threshold"),
        ("lerning-rate", "learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option '{key}'; did you mean '{nearest}'"):
        resolve_config(CLASSES, ({key: 1},))


def test_a_key_like_no_other_names_none() -> None:
    assert unknown_key("xyzzy", ["count", "rate"]) == "unknown option 'xyzzy'"


WRONG = [
    ({"count": "3"}, "`count` must be int, got '3'"),
    ({"count": 3.0}, "`count` must be int, got 3.0"),
    ({"count": True}, "`count` must be int, got True"),
    ({"count": None}, "`count` must be int, got None"),
    ({"rate": "fast"}, "`rate` must be float, got 'fast'"),
    ({"rate": True}, "`rate` must be float, got True"),
    ({"rate": float("nan")}, "`rate` must be a finite number, got nan"),
    ({"share": [1, float("inf")]}, "`share` must be a finite number, got inf"),
    ({"name": 5}, "`name` must be str, got 5"),
    ({"slots": 2.5}, "`slots` must be int, got 2.5"),
    ({"flip": 1}, "`flip` must be bool, got 1"),
    ({"flip": "no"}, "`flip` must be bool, got 'no'"),
    ({"mode": "medium"}, "`mode` must be one of fast, slow, got 'medium'"),
    ({"mode": ["fast"]}, r"`mode` must be one of fast, slow, got \['fast'\]"),
    ({"size": 4}, "`size` must be a list of 2 int, got 4"),
    ({"size": [4]}, r"`size` must be a list of 2 int, got \[4\]"),
    ({"size": [4, 2, 1]}, r"`size` must be a list of 2 int, got \[4, 2, 1\]"),
    ({"size": "42"}, "`size` must be a list of 2 int, got '42'"),
    ({"size": [4, "2"]}, "`size` must be int, got '2'"),
    ({"scales": 3}, "`scales` must be a list of int, got 3"),
    ({"scales": [3.5]}, "`scales` must be int, got 3.5"),
]


@pytest.mark.parametrize(("layer", "message"), WRONG)
def test_a_value_of_the_wrong_type(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(layer)


@pytest.mark.parametrize(
    "name",
    ["iterations", "batch_size", "crop", "log_interval", "checkpoint_interval", "accumulate"],
)
def test_counts_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", -1.0), ("weight_decay", -0.1), ("warmup", -1), ("workers", -1)),
        *(("clip_gradient", -1.0), ("resize", (0, 0)), ("eval_resize", (64, 0))),
        ("ratio", (0.0, 2.0)),
    ],
)
def test_numbers_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`{name}` must (be at least 0|hold numbers above 0), got"
    ):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ce", "al"), ("adapter", "none"), ("similarity", "cosin"), ("seeding", "grids")),
        *(("focal_weight", -1.0), ("ce_weight", float("nan")), ("logit_scale", float("inf"))),
        ("kmeans_iterations", -1),
    ],
)
def test_options_of_the_method_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be (one of|a finite number|at least 0)"):
        CLIPTeacherConfig(**{name: value})


def test_a_folder_needs_a_root() -> None:
    with pytest.raises(ValueError, match="`root` must name the folder"):
        TrainConfig(data="folder")
    assert TrainConfig(data="folder", root="photos").root == "photos"


# --- what is accepted -------------------------------------------------------------------------


def test_values_take_the_type_of_their_field() -> None:
    config = toy({"rate": 2, "size": [8, 6], "scales": [1], "share": [1, 2], "name": "a"})
    assert config == Toy(rate=2.0, size=(8, 6), scales=(1,), share=(1.0, 2.0), name="a")
    assert isinstance(config.rate, float) and isinstance(config.share[0], float)


def test_none_clears_an_optional_field() -> None:
    config = toy({"slots": 5, "name": "a"}, {"slots": None, "name": None})
    assert config.slots is None and config.name is None


def test_a_round_trip_through_json() -> None:
    config = TrainConfig(crop=64, ratio=(0.9, 1.1), root="photos", resume=True)
    method = CLIPTeacherConfig(scales=(2,), potential_slots=7, ce="seen", adapter="mlp")
    text = json.dumps(config_as_dict(config, method))
    assert resolve_config(CLASSES, (json.loads(text),)) == (config, method)


# --- every field of the program, by flag and by file -------------------------------------------

FIELDS = [
    (name, typing.get_type_hints(cls)[name], field.default)
    for cls in CLASSES
    for name, field in cls.__dataclass_fields__.items()
]
NAMES = [name for name, _, _ in FIELDS]
NEEDED = {"data": {"root": "photos"}}  # what a value of a field asks of others


def other_value(hint: Any, default: Any) -> Any:
    """A value that the type of a field allows and that is not its default."""
    kind = hint
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kind = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return next(choice for choice in args if choice != default)
    if typing.get_origin(kind) is tuple:
        count = 3 if args[-1] is Ellipsis else len(args)
        return tuple(other_value(args[0], item) for item in (default or (None,) * count)[:count])
    if kind is bool:
        return not default
    if kind in (int, float):
        return kind(2 * (default or 0) + 3)
    return f"other {default}"


@pytest.mark.parametrize(("name", "hint", "default"), FIELDS, ids=NAMES)
def test_every_field_by_flag_and_by_file(
    name: str, hint: Any, default: Any, tmp_path: Path
) -> None:
    value = other_value(hint, default)
    flag = "--" + name.replace("_", "-")
    words = [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    if isinstance(value, bool):
        words = [flag if value else f"--no-{flag[2:]}"]
    _, given = parse_arguments(argparse.ArgumentParser(), CLASSES, words)
    assert list(given) == [name]
    needed = NEEDED.get(name, {})
    configs = resolve_config(CLASSES, (needed, given))
    told = {**{key: (new, None) for key, new in needed.items()}, name: (value, default)}
    assert changed_fields(*configs) == told

    contents = (config_as_dict(*configs), {"any": {"name": {name: value}}, **needed})
    for number, content in enumerate(contents):  # flat as config.json, and in groups
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        assert resolve_config(CLASSES, (read_json(path, CLASSES),)) == configs


@pytest.mark.parametrize(
    "name", [name for name, hint, _ in FIELDS if type(None) in hint_args(hint)]
)
def test_every_optional_field_is_cleared_by_none(name: str) -> None:
    _, given = parse_arguments(
        argparse.ArgumentParser(), CLASSES, [f"--{name.replace('_', '-')}", "none"]
    )
    assert given == {name: None}


def test_changed_fields_as_the_command_line_takes_them() -> None:
    changed = changed_fields(TrainConfig(resize=(128, 96), crop=64))
    assert changed == {"crop": (64, 512), "resize": ((128, 96), (2048, 512))}
    assert [show_value(value) for value, _ in changed.values()] == ["64", "128 96"]
    assert changed_fields(TrainConfig(), CLIPTeacherConfig()) == {}


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"crop": 64, "scales": [2, 5], "bank_size": 4},
        {"train": {"crop": 64}, "method": {"scales": [2, 5], "bank_size": 4}},
        {"crop": 64, "plm": {"scales": [2, 5]}, "glm": {"bank_size": 4}},
    ],
    ids=["flat", "nested", "mixed"],
)
def test_json_may_be_flat_or_nested(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    flat = read_json(path, CLASSES)
    assert flat == {"crop": 64, "scales": (2, 5), "bank_size": 4}
    config, method = resolve_config(CLASSES, (flat,))
    assert (config.crop, method.scales, method.bank_size) == (64, (2, 5), 4)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist; check --config"):
        read_json(tmp_path / "nowhere.json", CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{crop: 64}", r"config\.json must be JSON, but"), ("[1]", r"config\.json: .*, got list")],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(path, CLASSES)


WRONG_FILES = [
    ('{"batchsize": 16}', "unknown option 'batchsize'; did you mean 'batch_size'?"),
    ('{"plm": {"fusion-treshold": 1}}', "unknown option 'fusion-treshold'; did you mean 'fusion_t"),
    ('{"crop": "64"}', "`crop` must be int, got '64'"),
    ('{"train": {"scales": 3}}', "`scales` must be a list of int, got 3"),
    ('{"crop": {"size": 64}}', "`crop` must be int, got {'size': 64}"),
    ('{"recipe": 5}', "`recipe` must be str, got 5"),
    ('{"crop": 64, "train": {"crop": 96}}', "`crop` is given twice"),
    ('{"crop": 64, "crop": 96}', "`crop` is given twice"),
    ('{"batch_size": 8, "batch-size": 8}', "`batch_size` is given twice"),
    ('{"gamma": NaN}', "`gamma` must be a finite number, got nan"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_what_is_wrong_in_a_file_is_said_with_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_json(path, CLASSES, ("recipe",))


def test_a_file_may_hold_keys_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"recipe": "miniworld", "train": {"batch-size": 8}, "empty": {}}')
    assert read_json(path, CLASSES, ("recipe",)) == {"recipe": "miniworld", "batch_size": 8}
    with pytest.raises(ValueError, match="unknown option 'recipe'"):
        read_json(path, CLASSES)


# --- flags ------------------------------------------------------------------------------------


def test_only_what_was_given_comes_back() -> None:
    assert parse() == {}
    assert parse("--count", "3") == {"count": 3}  # the default, but given: it beats a file


def test_flags_of_every_type() -> None:
    given = parse(
        *("--count", "5", "--rate", "1e-3", "--name", "x", "--slots", "4", "--mode", "slow"),
        *("--size", "8", "6", "--scales", "1", "2", "3", "--share", "1", "2.5", "--no-flip"),
    )
    expected = Toy(
        count=5, rate=1e-3, name="x", slots=4, mode="slow", size=(8, 6), scales=(1, 2, 3),
        share=(1.0, 2.5), flip=False,
    )  # fmt: skip
    assert toy(given) == expected
    assert parse("--flip") == {"flip": True}


def test_own_arguments_stay_apart() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    namespace, given = parse_arguments(parser, (Toy,), ["--recipe", "paper", "--count", "1"])
    assert namespace.recipe == "paper" and given == {"count": 1}


def test_every_field_of_the_programs_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    parse_arguments(parser, CLASSES, [])
    text = parser.format_help()
    for name in config_as_dict(TrainConfig(), CLIPTeacherConfig()):
        assert f"--{name.replace('_', '-')}" in text


def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse(capsys, "--cuont", "3")
    assert "unknown option '--cuont'; did you mean '--count'?" in message
    assert "unknown option '--cuont'; did you mean '--count'" in refuse(capsys, "--cuont=3")


def test_a_flag_cut_short_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "option '--coun'; did you mean '--count'?" in refuse(capsys, "--coun", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch_size", "3"), "unknown option '--batch_size'; did you mean '--batch-size'?"),
        (("-crop", "3"), "unknown option '-crop'; did you mean '--crop'?"),
        (("--no-photometrc",), "unknown option '--no-photometrc'; did you mean '--no-photometric'"),
        (("miniworld",), "unexpected argument 'miniworld'; every option has a name, see --help"),
        (("--photometric", "true"), "unexpected argument 'true'; every option has a name"),
    ],
)
def test_other_mistyped_words(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(argparse.ArgumentParser(), CLASSES, words)
    assert message in capsys.readouterr().err


def test_none_clears_a_flag_and_mixes_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    given = parse("--fit", "none", "--slots", "None", "--name", "none")
    assert given == {"fit": None, "slots": None, "name": None}
    with pytest.raises(ValueError, match="`fit` must be int, got None"):
        toy(parse("--fit", "none", "3"))
    assert "invalid int value: 'many'" in refuse(capsys, "--slots", "many")


def test_flags_with_values_of_the_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid int value: 'many'" in refuse(capsys, "--count", "many")
    assert "invalid choice: 'medium'" in refuse(capsys, "--mode", "medium")
