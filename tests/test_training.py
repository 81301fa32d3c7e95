"""What every loop needs: schedule, parameter groups, checkpoints, processes."""

import itertools
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tiny import tiny_clip
from torch import nn

from cliptteacher import checkpoint as checkpoint_file
from cliptteacher.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    student_content,
)
from cliptteacher.distributed import (
    gather_from_processes,
    mean_over_processes,
    start_process,
    stop_process,
)
from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.segmenters import build_segmenter, list_segmenters
from cliptteacher.training.config import TrainConfig, changed_fields, resolve_config
from cliptteacher.training.optimizer import (
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)
from cliptteacher.training.recipes import get_recipe, list_recipes

# --- schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1e-6),  # 1,500 iterations of linear warm-up from 1e-6 of the learning rate
        (1, 1e-6 + (1 - 1e-6) / 1500),
        (750, 0.5000005),
        (1500, 1.0),
        (10_750, 0.5),  # then a straight line to 0 at 20,000
        (19_999, 1 / 18_500),
    ],
)
def test_the_default_schedule(step: int, factor: float) -> None:
    config = TrainConfig()
    value = learning_rate_factor(step, config.iterations, config.warmup)
    assert value == pytest.approx(factor, rel=1e-9)


def test_no_warm_up() -> None:
    assert learning_rate_factor(0, 100, warmup=0) == 1.0


def test_the_schedule_rises_then_falls_and_stays_positive() -> None:
    factors = [learning_rate_factor(s, 300, warmup=40) for s in range(300)]
    assert all(a < b for a, b in itertools.pairwise(factors[:41]))
    assert all(a > b for a, b in itertools.pairwise(factors[40:]))
    assert min(factors) > 0 and max(factors) == 1.0


def test_the_defaults_are_those_of_the_toolbox() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.weight_decay, config.head_multiplier) == (6e-5, 0.01, 10)
    assert config.warmup == 1500
    assert (config.batch_size, config.crop, config.iterations) == (16, 512, 20_000)
    assert (config.resize, config.ratio) == ((2048, 512), (0.5, 2.0))
    assert (config.photometric, config.gamma) == (True, 1.5)


# --- optimiser --------------------------------------------------------------------------------


def rates_by_name(model: nn.Module, **options: Any) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, 6e-5, 0.01, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def teach(segmenter: nn.Module) -> CLIPTeacher:
    return CLIPTeacher(tiny_clip(), segmenter, ("cat", "dog"))


EXPECTED = {
    "segmenter.backbone.stages.0.patch_embed.proj.weight": (6e-5, 0.01),
    "segmenter.backbone.stages.0.patch_embed.proj.bias": (6e-5, 0.01),
    "segmenter.backbone.stages.0.patch_embed.norm.weight": (6e-5, 0.0),
    "segmenter.backbone.stages.1.blocks.0.norm1.bias": (6e-5, 0.0),
    "segmenter.backbone.stages.1.blocks.0.attn.kv.weight": (6e-5, 0.01),
    "segmenter.backbone.stages.1.blocks.0.attn.norm.weight": (6e-5, 0.0),
    "segmenter.backbone.stages.3.blocks.1.mlp.dwconv.weight": (6e-5, 0.01),
    "segmenter.backbone.stages.3.norm.weight": (6e-5, 0.0),
    "segmenter.head.linears.0.weight": (6e-4, 0.01),
    "segmenter.head.fuse.weight": (6e-4, 0.01),
    "segmenter.head.norm.weight": (6e-4, 0.0),
    "segmenter.head.classifier.bias": (6e-4, 0.01),
    "plm.adapter.norm_self.weight": (6e-4, 0.0),
    "plm.adapter.attend_cross.key_value.weight": (6e-4, 0.01),
    "plm.adapter.mlp.0.bias": (6e-4, 0.01),
}


def test_rate_and_decay_of_a_segformer_by_name() -> None:
    model = teach(build_segmenter("segformer_b0", 16))
    rates = rates_by_name(model)
    for name, expected in EXPECTED.items():
        assert rates[name] == pytest.approx(expected), name
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in rates.items():
        head = name.startswith(("segmenter.head.", "plm.adapter."))
        assert rate == pytest.approx(6e-4 if head else 6e-5), name
        assert decay == (0.0 if ".norm" in name else 0.01), name


OTHER_STUDENTS = {
    "fpn_small": {
        "segmenter.stem.0.weight": (6e-5, 0.01),
        "segmenter.stem.1.weight": (6e-5, 0.0),
        "segmenter.stages.0.0.first.0.weight": (6e-5, 0.01),
        "segmenter.stages.3.1.second.1.bias": (6e-5, 0.0),
        "plm.adapter.norm_mlp.bias": (6e-4, 0.0),
        "plm.adapter.attend_self.query.weight": (6e-4, 0.01),
    },
    "segnext_nano": {
        "segmenter.backbone.stages.0.patch_embed.proj.0.weight": (6e-5, 0.01),
        "segmenter.backbone.stages.0.patch_embed.proj.1.weight": (6e-5, 0.0),
        "segmenter.backbone.stages.0.blocks.0.layer_scale_1": (6e-5, 0.01),
        "segmenter.backbone.stages.0.norm.bias": (6e-5, 0.0),
        "segmenter.head.squeeze.gn.weight": (6e-4, 0.0),
    },
    "swin_nano": {
        "segmenter.backbone.features.0.0.weight": (6e-5, 0.01),
        "segmenter.backbone.features.0.2.weight": (6e-5, 0.0),
        "segmenter.backbone.features.1.0.attn.relative_position_bias_table": (6e-5, 0.0),
        "segmenter.backbone.features.1.0.attn.qkv.weight": (6e-5, 0.01),
        "segmenter.head.pooled.0.1.weight": (6e-4, 0.0),
    },
}


@pytest.mark.parametrize("name", OTHER_STUDENTS)
def test_rate_and_decay_of_other_students_by_name(name: str) -> None:
    rates = rates_by_name(teach(build_segmenter(name, 16)))
    for path, expected in OTHER_STUDENTS[name].items():
        assert rates[path] == pytest.approx(expected), path


NORMS = ("LayerNorm", "LayerNorm2d", "BatchNorm2d", "GroupNorm")
NO_NORMS = ("Linear", "Conv2d")
SCALES = dict.fromkeys(("layer_scale_1", "layer_scale_2", "layer_scale"), 0.01)
LOOSE = {"relative_position_bias_table": 0.0, **SCALES}


@pytest.mark.parametrize("multiplier", [10.0, 1.0])  # 1 is the toolbox's for Swin
@pytest.mark.parametrize("name", list_segmenters())
def test_rate_and_decay_of_every_parameter_by_its_owner(name: str, multiplier: float) -> None:
    """Norms and position tables bare, the head ten times as fast; said again, type by type."""
    with torch.device("meta"):
        segmenter = build_segmenter(name, 16)
    model = teach(segmenter)
    rates = rates_by_name(model, head_multiplier=multiplier)
    owners = dict(model.named_modules())
    new = getattr(segmenter, "head_names", ())  # of a foreign network, whose head lies inside it
    heads = ("head.", "projection.", *(f"network.{name}." for name in new))
    fast = ("plm.adapter.", *(f"segmenter.{head}" for head in heads))
    for path, _ in model.named_parameters():
        above, _, leaf = path.rpartition(".")
        owner = type(owners[above]).__name__
        assert owner in (*NORMS, *NO_NORMS) or leaf in LOOSE, path  # a new kind needs a decision
        decay = 0.0 if owner in NORMS else LOOSE.get(leaf, 0.01)
        rate = 6e-5 * (multiplier if path.startswith(fast) else 1)
        assert rates[path] == pytest.approx((rate, decay)), path


# The table of the toolbox's default schedule: a head ten times as fast, but for Swin with UPerNet.
PAPER_STUDENTS = {
    "coco_stuff_segformer_b4": 6e-4,
    "ablation_full": 6e-4,
    "coco_stuff_segnext_b": 6e-4,
    "coco_stuff_swin_b": 6e-5,
}


@pytest.mark.parametrize("recipe", PAPER_STUDENTS)
def test_rates_of_the_paper_s_students_come_from_their_recipes(recipe: str) -> None:
    config, _ = resolve_config((TrainConfig, CLIPTeacherConfig), (get_recipe(recipe),))
    with torch.device("meta"):
        segmenter = build_segmenter(config.segmenter, 16)
    groups = parameter_groups(
        teach(segmenter),
        config.learning_rate,
        config.weight_decay,
        head_multiplier=config.head_multiplier,
    )
    head = pytest.approx(PAPER_STUDENTS[recipe])
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "backbone": (6e-5, 0.01),
        "backbone, no decay": (6e-5, 0.0),
        "head": (head, 0.01),
        "head, no decay": (head, 0.0),
    }
    factor = learning_rate_factor(750, config.iterations, config.warmup)
    assert factor == pytest.approx(1e-6 + (1 - 1e-6) / 2)  # half-way up its 1,500 steps


def test_the_auxiliary_head_learns_as_the_head_does() -> None:
    segmenter = build_segmenter("swin_nano", 16, auxiliary=True)
    config = CLIPTeacherConfig(auxiliary_weight=0.4)
    rates = rates_by_name(CLIPTeacher(tiny_clip(), segmenter, ("cat", "dog"), config))
    auxiliary = [rate for name, (rate, _) in rates.items() if ".auxiliary." in name]
    assert len(auxiliary) >= 4 and auxiliary == pytest.approx([6e-4] * len(auxiliary))


def test_every_parameter_is_in_one_group() -> None:
    model = teach(build_segmenter("segformer_nano", 16))
    groups = parameter_groups(model, 6e-5, 0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert not set(grouped) & {id(p) for p in model.clip.parameters()}
    assert [group["name"] for group in groups] == [
        *("backbone, no decay", "backbone", "head, no decay", "head")
    ]


def test_head_multiplier_one_gives_one_rate() -> None:
    rates = rates_by_name(teach(build_segmenter("segformer_nano", 16)), head_multiplier=1.0)
    assert {rate for rate, _ in rates.values()} == {6e-5}


class Odd(nn.Module):
    """Parameters whose names or owners decide their decay."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(1))
        self.positional_embedding = nn.Parameter(torch.zeros(1))
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1))
        self.decomposition = nn.Linear(2, 2)
        self.groups = nn.GroupNorm(1, 2)
        self.sync = nn.SyncBatchNorm(2)
        self.header = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.header.weight


def test_positional_tables_and_norms_do_not_decay() -> None:
    rates = rates_by_name(Odd(), head_prefixes=("head",))
    bare = {name for name, (_, decay) in rates.items() if decay == 0}
    assert bare == {
        *("pos_embed", "relative_position_bias_table", "positional_embedding"),
        *("absolute_pos_embed", "groups.weight", "groups.bias", "sync.weight", "sync.bias"),
    }


def test_a_head_is_a_whole_name_and_frozen_parameters_stay_out() -> None:
    rates = rates_by_name(Odd(), head_prefixes=("head",))
    fast = {name for name, (rate, _) in rates.items() if rate > 1e-4}
    assert fast == {"head.weight", "head.bias"}
    assert not any(name.startswith("frozen") for name in rates)


def test_a_tied_parameter_is_grouped_once() -> None:
    groups = parameter_groups(Odd(), 6e-5, 0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))


def test_the_rate_of_an_optimiser() -> None:
    model = teach(build_segmenter("segformer_nano", 16))
    optimizer = torch.optim.AdamW(parameter_groups(model, 6e-5, 0.01))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)  # of the base rate, not of the last one
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1.5e-5, 1.5e-5, 1.5e-4, 1.5e-4])


# --- checkpoints ------------------------------------------------------------------------------


def content(step: int) -> dict[str, Any]:
    """What a checkpoint must hold; the weight tells which step it is."""
    student = student_content(nn.Identity(), names=["cat"], text_features=torch.ones(1, 2))
    weights = {"w": torch.full((3,), float(step))}
    training = {"rng": [torch.get_rng_state()]}
    return {**student, "step": step, "segmenter": weights, "training": training}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_back_without_running_code(tmp_path: Path) -> None:
    path = save_checkpoint(content(7), tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "step_00000007.pt"
    for source in (path, tmp_path, tmp_path / "checkpoints" / "last.pt", str(path)):
        loaded = load_checkpoint(source)
        assert loaded["step"] == 7 and loaded["format"] == checkpoint_file.FORMAT
        assert torch.equal(loaded["segmenter"]["w"], torch.full((3,), 7.0))
    assert torch.load(path, weights_only=True)["step"] == 7


def test_the_newest_stay_and_last_is_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(content(step), tmp_path)
        assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step
    assert names(tmp_path) == ["SHA256SUMS", "last.pt", "step_00000030.pt", "step_00000040.pt"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names(tmp_path)[2:]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(content(5), tmp_path)
    second = {**content(5), "segmenter": {"w": torch.zeros(1)}}
    save_checkpoint(second, tmp_path)
    assert names(tmp_path) == ["SHA256SUMS", "last.pt", "step_00000005.pt"]
    for name in names(tmp_path)[1:]:
        assert torch.load(tmp_path / name, weights_only=True)["segmenter"]["w"].numel() == 1


def test_last_is_a_copy_where_links_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = save_checkpoint(content(3), tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == path.read_bytes()
    assert names(tmp_path) == ["SHA256SUMS", "last.pt", "step_00000003.pt"]


def test_a_failure_while_writing_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(content(1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_a_file(_: object, file: Any) -> None:
        file.write(b"PK half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_a_file)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(content(step), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(content(1), tmp_path)
    for name in ("step_1.pt", "step_00000002.pt.bak", "best.pt"):
        (tmp_path / name).write_bytes(b"mine")
    for step in (3, 4):
        save_checkpoint(content(step), tmp_path)
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == ["step_00000003.pt", "step_00000004.pt"]
    assert {"step_1.pt", "step_00000002.pt.bak", "best.pt"} < set(names(tmp_path))


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist; examples/train\.py"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"checkpoints.last.pt does not exist"):
        load_checkpoint(tmp_path)


class Trap:
    """Touch a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    with (tmp_path / "pickle.pt").open("wb") as file:
        pickle.dump({"format": checkpoint_file.FORMAT, "trap": Trap(sprung)}, file)
    torch.save({"format": checkpoint_file.FORMAT, "trap": Trap(sprung)}, tmp_path / "zip.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("pickle.pt", "zip.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} must be a checkpoint") as refused:
            load_checkpoint(tmp_path / name)
        # torch's own advice is to read the file with code execution allowed
        assert "weights_only" not in str(refused.value)
        assert len(str(refused.value)) < 300 + len(str(tmp_path))
    assert not sprung.exists()


@pytest.mark.parametrize("value", [{"step": 3}, {"format": "other"}, torch.zeros(2), [1, 2]])
def test_another_format_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt must be a checkpoint of the format"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("entry", "value"),
    [("step", "3"), ("segmenter", None), ("class_names", "cat"), ("text_features", [1.0])],
)
@pytest.mark.parametrize("missing", [False, True])
def test_entries_are_checked_once_and_named(
    tmp_path: Path, entry: str, value: object, missing: bool
) -> None:
    wrong = {"format": checkpoint_file.FORMAT, **content(1), entry: value}
    if missing:
        del wrong[entry]
    torch.save(wrong, tmp_path / "wrong.pt")
    message = f"the entry '{entry}' of .*wrong.pt is missing or of the wrong type"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "wrong.pt")


# --- processes --------------------------------------------------------------------------------


def test_alone_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    process = start_process("cpu")
    assert (process.rank, process.local_rank, process.world_size) == (0, 0, 1)
    assert process.is_main and process.device == torch.device("cpu")
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(mean_over_processes(values), values)
    assert torch.equal(gather_from_processes(values, process.device)[0], values)
    stop_process()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"process 1 needs a CUDA device.*--device cpu"):
        start_process("cuda")


def join(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start_process("cpu")
    values = torch.tensor([1.0, 5.0]) * (rank + 1)
    result = {
        "mean": mean_over_processes(values),
        "kept": values,
        "gathered": gather_from_processes(
            torch.tensor([rank, 7], dtype=torch.uint8), process.device
        ),
        "process": [process.rank, process.local_rank, process.world_size, int(process.is_main)],
    }
    torch.save(result, f"{folder}/{rank}.pt")
    stop_process()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(join, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["mean"].tolist() == [1.5, 7.5]
        assert result["kept"].tolist() == [1.0 * (rank + 1), 5.0 * (rank + 1)]
        assert [item.tolist() for item in result["gathered"]] == [[0, 7], [1, 7]]
        assert result["process"] == [rank, rank, 2, int(rank == 0)]


# --- recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_resolve_and_name_a_known_student(name: str) -> None:
    root = {"root": "photos"} if name.startswith("folder") else {}
    config, method = resolve_config((TrainConfig, CLIPTeacherConfig), (get_recipe(name), root))
    assert config.segmenter in list_segmenters()
    assert config.warmup < config.iterations
    assert isinstance(method, CLIPTeacherConfig)
    assert config.crop % 16 == 0


def test_the_paper_is_the_defaults() -> None:
    """The recipe adds what is no constant of the method: weights, precision, processes."""
    config, method = resolve_config((TrainConfig, CLIPTeacherConfig), (get_recipe("paper"),))
    assert method == CLIPTeacherConfig()
    assert set(changed_fields(config)) == {
        *("segmenter_weights", "precision", "sync_batch_norm", "workers", "eval_resize")
    }
    method = CLIPTeacherConfig()
    assert (method.bank_size, method.temperature, method.fusion_threshold) == (24, 0.07, 0.8)
    assert (method.scales, method.focal_weight, method.dice_weight) == ((3, 7), 100.0, 1.0)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option 'miniwrld'; did you mean 'miniworld'"):
        get_recipe("miniwrld")


def test_a_recipe_may_be_changed_without_changing_the_next() -> None:
    get_recipe("miniworld")["crop"] = 1
    assert get_recipe("miniworld")["crop"] == 128
