"""What is asked of every student, whichever its family: sizes, memory formats, types, the framework
with and without an auxiliary head, data parallelism. What is particular stands in the file of each.
"""

import copy
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import TinyStudent, tiny_clip, tiny_student
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliptteacher.framework import CLIPTeacher, CLIPTeacherConfig
from cliptteacher.inference import Predictor, load_segmenter, save_segmenter
from cliptteacher.segmenters import adapt_segmenter, build_segmenter, list_segmenters
from cliptteacher.segmenters.segformer import EfficientAttention

CHANNELS = 16
NAMES = ("cat", "grass", "boat")
TERMS = ("global", "ce", "focal", "dice", "generate")
LRASPP = "torchvision/lraspp_mobilenet_v3_large"
SMALL = ("fpn_small", "segformer_nano", "segnext_nano", "swin_nano", LRASPP)
STUDENTS = [
    pytest.param(name, marks=() if name in SMALL else pytest.mark.slow)
    for name in list_segmenters()
]


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_segmenter(name, CHANNELS, **options)


def grid(name: str, stride: int, size: tuple[int, int]) -> tuple[int, ...]:
    """Side by side a feature for every stride begun; ConvNeXt, which pads nothing, drops a rest."""
    if name == "torchvision/convnext_tiny":
        return tuple(max(1, side // stride) for side in size)
    return tuple(math.ceil(side / stride) for side in size)


def teach(student: nn.Module, **options: Any) -> CLIPTeacher:
    small = {"scales": (1, 2), "kmeans_iterations": 2}
    return CLIPTeacher(tiny_clip(), student, NAMES, CLIPTeacherConfig(**{**small, **options}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_nano", {"auxiliary": True, "drop_path": 0.2, "depths": (2, 2, 1, 1)}),
        ("segformer_nano", {"drop_path": 0.2, "decoder_channels": 48}),
        ("segnext_nano", {"stride": 4}),
        ("fpn_small", {"widths": (16, 32), "depth": 1}),
        (LRASPP, {}),
    ],
)
def test_a_student_with_options_round_trips(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    student = build(name, **options)
    arguments = student.build_arguments
    as_json = json.loads(json.dumps(options))
    assert arguments == {"name": name, "channels": CHANNELS, "options": as_json}
    assert json.loads(json.dumps(arguments)) == arguments
    text, image = torch.randn(len(NAMES), CHANNELS), torch.rand(3, 64, 48)
    save_segmenter(tmp_path / "student.pt", student, names=NAMES, text_features=text)
    loaded = load_segmenter(tmp_path / "student.pt")
    assert loaded.segmenter.build_arguments == arguments
    expected = Predictor(student, text).logits(image)
    assert torch.equal(loaded.predictor().logits(image), expected)
    assert loaded.segmenter.state_dict().keys() == student.state_dict().keys()


def test_what_cannot_be_built_again_names_the_way_out(tmp_path: Path) -> None:
    text, path = torch.randn(len(NAMES), CHANNELS), tmp_path / "student.pt"
    foreign = adapt_segmenter(nn.Conv2d(3, 8, 3), CHANNELS)
    save_segmenter(path, foreign, names=NAMES, text_features=text)
    message = r"student\.pt was not built by build_segmenter; .* load_segmenter\(path, segmenter="
    with pytest.raises(ValueError, match=message):
        load_segmenter(path)
    again = adapt_segmenter(nn.Conv2d(3, 8, 3), CHANNELS)
    assert load_segmenter(path, segmenter=again).segmenter is again
    assert torch.equal(again.head[0].weight, foreign.head[0].weight)
    student = build("fpn_small")
    student.build_arguments = {"name": "fpn_small", "channels": CHANNELS, "options": {"deep": 1}}
    save_segmenter(path, student, names=NAMES, text_features=text)
    with pytest.raises(ValueError, match=r"cannot be built again: fpn_small has no option 'deep'"):
        load_segmenter(path)


def batch(B: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(B, 3, 64, 48, generator=g)
    labels = torch.randint(len(NAMES), (B, 64, 48), generator=g)
    labels[:, :24, 8:] = 255
    return images, labels


def assert_same_to_rounding(actual: Tensor, expected: Tensor) -> None:
    """Sums in another order: float32 eps of 1.2e-7 a layer, a hundred layers, ten to spare."""
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=STUDENTS)
def built(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Every student in turn, in eval mode; built once for all tests, which change copies only."""
    return request.param, build(request.param).eval()


def test_one_image_of_any_size_is_its_row_of_a_batch(built: tuple[str, nn.Module]) -> None:
    name, model = built
    for size in ((64, 64), (61, 35), (96, 33), (1, 1)):
        images = torch.rand(3, 3, *size)
        with torch.no_grad():
            features, single = model(images), model(images[1:2])
        assert features.shape == (3, CHANNELS, *grid(name, model.stride, size))
        assert features.isfinite().all()
        assert_same_to_rounding(single[0], features[1])


def test_a_copy_is_equal_and_channels_last_changes_nothing(built: tuple[str, nn.Module]) -> None:
    _, model = built
    images = torch.rand(2, 3, 61, 40)
    with torch.no_grad():
        expected = model(images)
        clone = copy.deepcopy(model)
        torch.testing.assert_close(clone(images), expected, rtol=0, atol=0)
        moved = clone.to(memory_format=torch.channels_last)
        actual = moved(images.to(memory_format=torch.channels_last))
    assert_same_to_rounding(actual, expected)
    assert not {p.data_ptr() for p in clone.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


def test_autocast_stays_close(built: tuple[str, nn.Module]) -> None:
    model = copy.deepcopy(built[1])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(images)
    assert features.dtype == torch.bfloat16
    error = (features.float() - expected).norm() / expected.norm()
    assert error < 0.03  # tens of layers that each round to 8 bits, 2^-9 a rounding
    features.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("process_group")
def test_every_parameter_learns_in_the_framework(built: tuple[str, nn.Module]) -> None:
    """Under data parallelism, where the second step fails if the first left a gradient out."""
    model = teach(copy.deepcopy(built[1])).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(2):
        losses = wrapped(*batch(seed=step))
        assert tuple(losses) == (*TERMS, "total") and losses["total"].isfinite()
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


# The auxiliary head.


class AuxiliaryStudent(TinyStudent):
    """A student whose auxiliary features are a parameter: one row of two pixels."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.auxiliary = nn.Parameter(features)

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self(images), self.auxiliary


def test_the_auxiliary_loss_joins_the_dictionary_and_the_total() -> None:
    model = teach(build("swin_nano", auxiliary=True), auxiliary_weight=0.4).train()
    losses = model(*batch())
    assert tuple(losses) == (*TERMS, "auxiliary", "total")
    expected = sum(losses[term].item() for term in (*TERMS, "auxiliary"))
    assert losses["total"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["auxiliary"] > 0
    losses["total"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_auxiliary_weight_scales_its_loss_alone() -> None:
    student = build("swin_nano", auxiliary=True, drop_path=0.0, dropout=0.0)
    losses = [teach(student, auxiliary_weight=weight)(*batch()) for weight in (0.4, 0.8)]
    torch.testing.assert_close(losses[1]["auxiliary"], 2 * losses[0]["auxiliary"])


@pytest.mark.parametrize("ce_weight", [1.0, 3.0])
@pytest.mark.parametrize("ce", ["all", "seen", "none"])
def test_auxiliary_loss_by_hand(ce: str, ce_weight: float) -> None:
    # Two pixels of classes 0 and 1. Sigmoids: 3/4, 1/2, 1/2 of the first, 1/2, 1/4, 1/2 of the
    # second. The third class is absent; channels beyond the third meet zeros in the text.
    logits = torch.full((CHANNELS, 2), 7.0)
    logits[:3] = torch.tensor([[math.log(3), 0], [0, -math.log(3)], [0, 0]])
    student = AuxiliaryStudent(logits.view(1, CHANNELS, 1, 2))
    model = teach(student, auxiliary_weight=0.4, ce=ce, ce_weight=ce_weight, loss_size="features")
    model.seen_text = torch.eye(3, CHANNELS)
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1

    positives = 1 / 4 * ((1 / 4) ** 2 * math.log(4 / 3) + (3 / 4) ** 2 * math.log(4))
    negatives = 4 * 3 / 4 * (1 / 2) ** 2 * math.log(2)
    focal = (positives + negatives) / 2 / 2  # pixels, pairs
    dice = ((1 - 2.5 / 3.25) + (1 - 1.5 / 2.75)) / 2
    cross_entropy = (math.log(5 / 3) + math.log(7)) / 2 if ce != "none" else 0.0
    expected = 0.4 * (100 * focal + dice + ce_weight * cross_entropy)
    loss = model(torch.rand(1, 3, 32, 32), labels)["auxiliary"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32 sums of a dozen terms


def test_unlabelled_pixels_are_no_part_of_the_auxiliary_cross_entropy() -> None:
    student = AuxiliaryStudent(torch.randn(1, CHANNELS, 1, 2))
    model = teach(
        student, auxiliary_weight=1.0, focal_weight=0.0, dice_weight=0.0, loss_size="features"
    )
    labels = torch.full((1, 32, 32), 255)
    labels[:, :, :16] = 2
    loss = model(torch.rand(1, 3, 32, 32), labels)["auxiliary"]
    loss.backward()
    assert student.auxiliary.grad[..., 0].abs().sum() > 0
    assert (student.auxiliary.grad[..., 1] == 0).all()


def test_a_weight_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 without, got 0\.4 without one; .*auxiliary=True"):
        teach(tiny_student(), auxiliary_weight=0.4)


def test_a_head_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positive with .*, got 0\.0 with one; .*auxiliary=False"):
        teach(AuxiliaryStudent(torch.zeros(1, CHANNELS, 1, 2)))


# Data parallelism; no parameter may be left out, for nobody looks for unused ones.


class Idle(TinyStudent):
    """A student with a parameter that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(1))


def step_twice(model: CLIPTeacher, seed: int = 0) -> None:
    """The second step fails if the first left a gradient out."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(2):
        wrapped(*batch(seed=seed + step))["total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("process_group")
def test_data_parallelism_with_the_auxiliary_head() -> None:
    student = build("swin_nano", auxiliary=True)
    step_twice(teach(student, auxiliary_weight=0.4).train())


@pytest.mark.usefixtures("process_group")
def test_data_parallelism_refuses_an_unused_parameter() -> None:
    with pytest.raises(RuntimeError, match="not used in producing loss"):
        step_twice(teach(Idle()).train())


def train_small_students(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradients: dict[str, Tensor] = {}
    for name in SMALL:
        options: dict[str, Any] = {"auxiliary": True} if name == "swin_nano" else {}
        model = teach(build(name, **options), auxiliary_weight=0.4 if options else 0.0).train()
        step_twice(model, seed=10 * rank)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients(tmp_path: Path) -> None:
    mp.spawn(train_small_students, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in SMALL:
        assert first[name].norm() > 0
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


# The table of the students.


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("students")


def test_the_table_counts_attention_too(table: ModuleType) -> None:
    model = EfficientAttention(dim=32, heads=2, reduction=2, eps=1e-6)
    tokens, reduced = 16 * 16, 8 * 8
    linear = 2 * tokens * 32 * 32 + 2 * reduced * 32 * 32  # query, output; keys and values
    expected = linear + reduced * (2 * 2 * 32) * 32 + 2 * tokens * reduced * 32
    assert 1e9 * table.count_multiply_adds(model, 1, 16, 16, 32) == pytest.approx(expected)


@pytest.mark.parametrize("clock", [(), ("--cpu-time",)])
def test_the_table_is_printed_with_times_where_asked(
    table: ModuleType, capsys: pytest.CaptureFixture[str], clock: tuple[str, ...]
) -> None:
    size = ("--size", "32", "--repetitions", "1")
    table.main(["--students", "segnext_nano", "--time", *size, *clock])
    head, _, row, last = capsys.readouterr().out.splitlines()
    printed = json.loads(last)
    (figures,) = printed["rows"]
    assert printed["options"]["threads"] == torch.get_num_threads()
    assert printed["options"]["cpu_time"] == bool(clock)
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(figures)
    assert row == f"| {' | '.join(map(str, figures.values()))} |"
    model = build_segmenter("segnext_nano", 512)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert (figures["student"], figures["stride"]) == ("`segnext_nano`", 4)
    assert figures["parameters, M"] == round(millions, 2)
    assert figures["train step, ms"] > 0 and figures["inference, ms"] > 0


@pytest.mark.slow
def test_the_table_agrees_with_the_published_counts(table: ModuleType) -> None:
    for name, published in table.PUBLISHED.items():
        decimals = 0 if name.startswith("swin") else 1 if name.startswith("segnext") else 2
        assert round(table.count_as_published(name), decimals) == published, name
