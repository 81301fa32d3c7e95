"""Options of scale: they change what a step costs, and what they may change of its result."""

import copy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_runs import final, make_space, options, program, rows
from tiny import tiny_clip, tiny_student
from torch import Tensor, nn

from cliptteacher.framework import CLIPTeacher
from cliptteacher.training.loading import move_batches

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCALER = torch.amp.GradScaler


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_space(tmp_path_factory.mktemp("scale"))


class Watched:
    """train.py with a student that draws no random numbers; keeps what its loop works on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.train: ModuleType = program(monkeypatch)
        self.before: CLIPTeacher
        self.calls: list[tuple[Tensor, Tensor, int]] = []
        self.gradients: list[list[Tensor]] = []  # before and after clipping
        watched, clip_gradients = self, nn.utils.clip_grad_norm_

        class Model(CLIPTeacher):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                watched.before = copy.deepcopy(self)

            def forward(self, images: Tensor, labels: Tensor, parts: int = 1) -> dict[str, Tensor]:
                watched.calls.append((images.clone(), labels.clone(), parts))
                return super().forward(images, labels, parts)

        def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
            self.gradients = [[p.grad.clone() for p in parameters]]
            norm = clip_gradients(parameters, limit)
            self.gradients.append([p.grad.clone() for p in parameters])
            return norm

        monkeypatch.setattr(self.train, "CLIPTeacher", Model)
        monkeypatch.setattr(self.train.nn.utils, "clip_grad_norm_", clip)
        monkeypatch.setattr(
            self.train, "build_segmenter", lambda _, channels, *__, **___: tiny_student(channels)
        )

    def run(self, space: Path, output: Path, *more: str) -> dict[str, Any]:
        """Train, for one iteration if ``more`` says nothing else, and return the checkpoint."""
        torch.manual_seed(0)
        self.train.main(options(space, output, "--iterations", "1", *more))
        return final(output)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


# --- gradient accumulation ----------------------------------------------------------------------


def test_accumulated_gradients_are_the_mean_of_the_parts(
    watched: Watched, space: Path, tmp_path: Path
) -> None:
    watched.run(space, tmp_path / "run", "--accumulate", "2")
    assert [parts for *_, parts in watched.calls] == [2, 2]
    model = watched.before.train()
    losses = [model(*call) for call in tuple(watched.calls)]
    ((losses[0]["total"] + losses[1]["total"]) / 2).backward()
    for (name, parameter), found in zip(
        model.named_parameters(), watched.gradients[0], strict=True
    ):
        torch.testing.assert_close(found, parameter.grad, msg=name)
    row = next(row for row in rows(tmp_path / "run") if "total" in row)
    for name in losses[0]:
        assert row[name] == pytest.approx((losses[0][name] + losses[1][name]).item() / 2, rel=1e-5)


def test_the_bank_spans_as_many_iterations(watched: Watched, space: Path, tmp_path: Path) -> None:
    more = ("--accumulate", "2", "--iterations", "3")
    bank = watched.run(space, tmp_path / "run", *more)["training"]["bank"]
    # two iterations of two parts of two images
    assert bank["glm.0.bank.tokens"].shape == (8, 32) and bank["glm.0.bank.filled"] == 8


def test_parts_must_be_even(watched: Watched, space: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="`accumulate` must divide the 4 images .* got 3"):
        watched.run(space, tmp_path / "run", "--accumulate", "3")


# --- precision ----------------------------------------------------------------------------------


def test_the_loss_scale_follows_overflows(
    watched: Watched, space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16: a gradient that overflows halves the scale, moves nothing, and is no fault."""
    moved = []
    for power, after in ((40, 39), (2, 2)):
        scaler = partial(SCALER, init_scale=2.0**power)
        monkeypatch.setattr(watched.train.torch.amp, "GradScaler", scaler)
        more = ("--precision", "fp16", "--warmup", "0")
        content = watched.run(space, tmp_path / str(power), *more)
        assert content["training"]["scaler"]["scale"] == 2.0**after
        before = watched.before.segmenter.state_dict()
        pairs = ((value, before[key]) for key, value in content["segmenter"].items())
        moved.append(not all(torch.equal(*pair) for pair in pairs))
    assert moved == [False, True]


def test_half_precision_learns_nearly_the_same(
    watched: Watched, space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is taken off again before clipping and the update."""
    monkeypatch.setattr(watched.train.torch.amp, "GradScaler", partial(SCALER, init_scale=4.0))
    gradients = []
    for precision in ("fp32", "fp16"):
        more = ("--precision", precision, "--clip-gradient", "1e-3")
        watched.run(space, tmp_path / precision, *more)
        whole, clipped = (torch.cat([g.flatten() for g in kept]) for kept in watched.gradients)
        assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)
        gradients.append(whole)
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.05)
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_tf32_is_on_when_asked_for_and_off_otherwise(
    watched: Watched, space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    watched.run(space, tmp_path / "plain")
    assert asked == ["highest"] and not torch.backends.cudnn.allow_tf32
    asked.clear()
    watched.run(space, tmp_path / "tf32", "--precision", "tf32")
    assert asked == ["high"] and torch.backends.cudnn.allow_tf32


# --- student, teacher, device -------------------------------------------------------------------


def test_the_teacher_is_frozen_and_apart() -> None:
    model = CLIPTeacher(tiny_clip(), tiny_student(), ("cat", "dog")).train()
    teacher = {id(p) for p in model.clip.parameters()}
    assert teacher and not any(p.requires_grad for p in model.clip.parameters())
    assert not teacher & {id(p) for p in model.parameters()} and not model.clip.training
    modes: list[bool] = []
    model.clip.visual.register_forward_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    labels = torch.randint(2, (2, 64, 64))
    labels[:, :32] = 255
    model(torch.rand(2, 3, 64, 64), labels)["total"].backward()
    assert modes == [True]


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_results(
    watched: Watched, space: Path, tmp_path: Path
) -> None:
    plain = watched.run(space, tmp_path / "plain", "--iterations", "2")
    compiled = watched.run(space, tmp_path / "compiled", "--iterations", "2", "--compile")
    assert list(compiled["segmenter"]) == list(plain["segmenter"])
    for name, value in plain["segmenter"].items():
        torch.testing.assert_close(compiled["segmenter"][name], value, **CLOSE)
    for found, row in zip(rows(tmp_path / "compiled"), rows(tmp_path / "plain"), strict=True):
        if "total" in row:
            assert found["total"] == pytest.approx(row["total"], rel=1e-4)


def test_batches_on_the_cpu_in_the_layout_of_the_student() -> None:
    images = torch.rand(2, 3, 4, 4)
    moved = list(move_batches(iter([(images, torch.ones(2, 4, 4))] * 2), torch.device("cpu"),
                              torch.channels_last))  # fmt: skip
    assert len(moved) == 2
    assert moved[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved[0][0], images) and moved[1][1].shape == (2, 4, 4)
