"""Options of scale: they change what a step costs, and what they may change of its result."""

import copy
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import NoisyStudent, final, make_space, options, program, rows
from tiny import tiny_clip, tiny_student
from torch import Tensor, nn

from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.inference import load_segmenter
from cliptteacher.segmenters import build_segmenter
from cliptteacher.training.average import WeightAverage
from cliptteacher.training.config import TrainConfig
from cliptteacher.training.distributed import Process
from cliptteacher.training.optimizer import build_optimizer, parameter_groups
from cliptteacher.training.prefetch import move_batches
from cliptteacher.training.recompute import checkpoint_activations

ALONE = Process(0, 0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {"scales": (1, 2), "adapter_heads": 2, "kmeans_iterations": 2}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_space(tmp_path_factory.mktemp("scale"))


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    program(monkeypatch)
    import learning

    return learning


def make_model(student: nn.Module | None = None, **changes: Any) -> CLIPTeacher:
    method = CLIPTeacherConfig(**SMALL, **changes)
    return CLIPTeacher(tiny_clip(), student or tiny_student(), ("cat", "dog"), method)


def make_learner(learning: Any, model: CLIPTeacher, **changes: Any) -> tuple[Any, TrainConfig]:
    config = TrainConfig(batch_size=4, learning_rate=1e-3, **changes)
    groups = parameter_groups(model, config.learning_rate, config.weight_decay)
    return learning.prepare_learner(model, build_optimizer(groups), config, ALONE), config


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (4, 32, 32), generator=generator)
    labels[:, :16] = 255
    return images, labels


# --- gradient accumulation ----------------------------------------------------------------------


def test_accumulated_gradients_are_the_mean_of_the_parts(learning: Any) -> None:
    model = make_model()
    reference = copy.deepcopy(model)
    learner, config = make_learner(learning, model, accumulate=2)
    images, labels = batch()
    losses = learning.train_step(learner, images, labels, 0, config)
    parts = [reference(images[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    ((parts[0]["total"] + parts[1]["total"]) / 2).backward()
    for (name, found), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)
    for name, value in losses.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]).detach() / 2)


def test_the_bank_spans_as_many_iterations(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "run", "--accumulate", "2"))
    (bank,) = final(tmp_path / "run")["training"]["bank"]
    assert [tuple(part.shape) for part in bank] == [(2, 32)] * 4  # 2 iterations of 2 parts


def test_processes_average_in_the_last_part_only(learning: Any) -> None:
    seen: list[str] = []

    @contextmanager
    def no_sync() -> Any:
        seen.append("alone")
        yield

    for last in (False, True):
        with learning.averaging_gradients(SimpleNamespace(no_sync=no_sync), last=last):
            seen.append("backward")
    with learning.averaging_gradients(nn.Identity(), last=False):
        pass
    assert seen == ["alone", "backward", "backward"]


def test_parts_must_be_even(learning: Any) -> None:
    with pytest.raises(SystemExit, match="`accumulate` must divide the 4 images .* got 3"):
        make_learner(learning, make_model(), accumulate=3)


# --- average of the weights ---------------------------------------------------------------------


def test_the_average_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = WeightAverage(module, 0.9)
    for value in (2.0, 3.0):
        module.weight.data.fill_(value)
        average.update()
    expected = 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3
    assert average.state_dict()["weight"].item() == pytest.approx(expected)
    with average.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 3.0
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert module.weight.item() == 3.0
    other = WeightAverage(nn.Linear(1, 1, bias=False), 0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.state_dict()["weight"], average.state_dict()["weight"])
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\), got 1.0"):
        WeightAverage(module, 1.0)


def test_the_average_is_evaluated_and_shipped(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = program(monkeypatch)
    train.main(options(space, tmp_path / "plain"))
    train.main(options(space, tmp_path / "run", "--ema-decay", "0.5"))
    plain, content = final(tmp_path / "plain"), final(tmp_path / "run")
    raw, shipped = content["training"]["segmenter"], content["segmenter"]
    assert list(raw) == list(shipped) == list(plain["segmenter"])
    for name, value in plain["segmenter"].items():  # training itself is as without it
        assert torch.equal(raw[name], value), name
    assert not torch.equal(raw["head.weight"], shipped["head.weight"])
    assert torch.equal(raw["backbone.1.running_mean"], shipped["backbone.1.running_mean"])
    loaded = load_segmenter(tmp_path / "run", segmenter=NoisyStudent())
    assert torch.equal(loaded.segmenter.head.weight, shipped["head.weight"])
    scores = [[row for row in rows(tmp_path / run) if "split" in row] for run in ("plain", "run")]
    assert scores[0] != scores[1]


# --- activation checkpointing -------------------------------------------------------------------

STUDENTS = ("fpn_small", "segformer_nano", "segnext_nano", "swin_nano", "tiny", "resnet")


def make_student(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "tiny":
        return NoisyStudent(16)
    if name == "resnet":
        return nn.ModuleDict({"layer1": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
    return build_segmenter(name, 16)


@pytest.mark.parametrize("name", STUDENTS[:-1])
def test_recomputed_activations_change_no_bit(name: str) -> None:
    """Losses, gradients, statistics of BatchNorm and the random numbers that follow."""
    results = []
    for recompute in (False, True):
        student = make_student(name).train()
        if recompute:
            assert checkpoint_activations(student)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = student(batch()[0]).square().mean()
        held = sum(saved.values())
        loss.backward()
        gradients = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
        state = {k: v.clone() for k, v in student.state_dict().items()}
        results.append((loss.detach(), gradients, state, torch.rand(3), held))
    (loss, gradients, state, following, held), (again, *others, less) = results
    assert torch.equal(loss, again) and torch.equal(following, others[2])
    for one, other in ((gradients, others[0]), (state, others[1])):
        assert list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert less < held


def test_stages_by_the_names_of_their_containers() -> None:
    assert checkpoint_activations(make_student("segformer_nano")) == [
        f"backbone.stages.{i}" for i in range(4)
    ]
    assert checkpoint_activations(make_student("resnet")) == ["layer1.0", "layer1.1"]
    assert checkpoint_activations(make_student("tiny")) == [""]  # none: the network as a whole


def test_nothing_is_recomputed_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("fpn_small").eval()
    expected = student(batch()[0])
    checkpoint_activations(student)
    monkeypatch.setattr("cliptteacher.training.recompute.checkpoint", None)
    assert torch.equal(student(batch()[0]), expected)


# --- precision ----------------------------------------------------------------------------------


def test_the_loss_scale_follows_overflows(learning: Any) -> None:
    """fp16: a gradient that overflows halves the scale, moves nothing, and is no fault."""
    learner, config = make_learner(learning, make_model(), precision="fp16")
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    assert learner.scaler.get_scale() == 2.0**16
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 2.0**40})
    learning.train_step(learner, *batch(), 0, config)
    assert learner.guard.check() is None
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(v, before[k]) for k, v in learner.model.state_dict().items())
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 1.0})
    learning.train_step(learner, *batch(), 1, config)
    assert not all(torch.equal(v, before[k]) for k, v in learner.model.state_dict().items())


def test_half_precision_learns_nearly_the_same(learning: Any) -> None:
    """The scale is taken off again before clipping and the update."""
    gradients = []
    for precision in ("fp32", "fp16"):
        learner, config = make_learner(
            learning, make_model(), precision=precision, clip_gradient=1e-3
        )
        learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 4.0}
                                       if precision == "fp16" else {})  # fmt: skip
        learning.train_step(learner, *batch(), 0, config)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]))
    assert gradients[0].norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert gradients[1].norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_tf32_is_switched_on_when_asked_for(learning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    allowed = torch.backends.cudnn.allow_tf32
    try:
        make_learner(learning, make_model())
        assert asked == [] and torch.backends.cudnn.allow_tf32 == allowed
        torch.backends.cudnn.allow_tf32 = False
        make_learner(learning, make_model(), tf32=True)
        assert asked == ["high"] and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


# --- student, teacher, device -------------------------------------------------------------------


def test_synchronised_batch_norm_where_there_is_cuda(learning: Any) -> None:
    config = TrainConfig(sync_batch_norm=True)
    student = make_student("fpn_small")
    names = list(student.state_dict())
    two = Process(0, 0, 2, torch.device("cpu"))
    with pytest.warns(UserWarning, match="`sync_batch_norm` needs CUDA"):
        same = learning.prepare_student(student, config, two)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in same.modules())
    cuda = Process(0, 0, 2, torch.device("cuda", 0))
    converted = learning.prepare_student(student, config, cuda)
    kinds = {type(m) for m in converted.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {nn.SyncBatchNorm} and list(converted.state_dict()) == names


def test_the_teacher_is_frozen_and_apart(learning: Any) -> None:
    model = make_model()
    learner, _ = make_learner(learning, model)
    teacher = {id(p) for p in model.clip.parameters()}
    assert teacher and not any(p.requires_grad for p in model.clip.parameters())
    assert not teacher & {id(p) for p in learner.wrapped.parameters()}
    assert not teacher & {id(p) for g in learner.optimizer.param_groups for p in g["params"]}
    assert not model.clip.training and learner.wrapped.training
    modes: list[bool] = []
    model.clip.visual.register_forward_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    model(*batch())["total"].backward()
    assert modes == [True]


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_results(learning: Any) -> None:
    plain, compiled = make_model(), make_model()
    learner, config = make_learner(learning, compiled, compile=True)
    reference, _ = make_learner(learning, plain)
    assert compiled.segmenter._compiled_call_impl is not None
    assert compiled.clip.visual._compiled_call_impl is not None
    for step in range(2):
        found = learning.train_step(learner, *batch(step), step, config)
        expected = learning.train_step(reference, *batch(step), step, config)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert list(learner.student_weights()) == list(plain.segmenter.state_dict())


def test_batches_on_the_cpu_in_the_layout_of_the_student() -> None:
    images = torch.rand(2, 3, 4, 4)
    moved = list(move_batches(iter([(images, torch.ones(2, 4, 4))] * 2), torch.device("cpu"),
                              torch.channels_last))  # fmt: skip
    assert len(moved) == 2
    assert moved[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved[0][0], images) and moved[1][1].shape == (2, 4, 4)
