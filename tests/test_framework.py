"""The whole training step: its terms, its frozen teacher, and every parameter it moves."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import TinyStudent, tiny_clip, tiny_student
from torch import Tensor

from cliptteacher.clip import class_text_features
from cliptteacher.framework import (
    CLIPTeacher,
    CLIPTeacherConfig,
    distill_loss,
    seen_cross_entropy,
)
from cliptteacher.glm import GlobalLearningModule
from cliptteacher.losses import nel
from cliptteacher.plm import PixelLearningModule, PLMConfig, resize_nearest
from cliptteacher.vla import MLPAdapter

NAMES = ("cat", "grass", "boat")
TERMS = ("global", "ce", "focal", "dice", "generate")
KEYS = (*TERMS, "total")
SMALL = {"scales": (1, 2), "kmeans_iterations": 2, "loss_size": "features"}


def build(**options: Any) -> CLIPTeacher:
    teacher, student = tiny_clip(), tiny_student()
    torch.manual_seed(2)
    return CLIPTeacher(teacher, student, NAMES, CLIPTeacherConfig(**{**SMALL, **options}))


def batch(B: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (B, 3, 32, 32), generator=g, dtype=torch.uint8)
    labels = torch.randint(len(NAMES), (B, 32, 32), generator=g).to(torch.uint8)
    labels[:, :16, 8:] = 255
    return images, labels


def test_the_dictionary_and_its_total() -> None:
    losses = build()(*batch())
    assert tuple(losses) == KEYS
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in losses.values())
    assert losses["total"].item() == pytest.approx(sum(losses[t].item() for t in TERMS), rel=1e-6)


def test_every_term_is_what_its_room_computes() -> None:
    images, labels = batch()
    model = build()
    losses = model(images, labels)
    pixels = images.float() / 255
    features = model.segmenter(pixels)
    teacher = tiny_clip().eval().encode_image(pixels)
    text = class_text_features(tiny_clip(), NAMES)
    seen_logits = torch.einsum("bchw,kc->bkhw", features, text)
    near = resize_nearest(labels, (8, 8))
    pixel = model.plm(features, seen_logits, teacher.dense, teacher.cls, labels, text)
    terms = nel(seen_logits, near)
    torch.testing.assert_close(losses["global"], GlobalLearningModule()(features, teacher.cls))
    torch.testing.assert_close(losses["ce"], pixel.ce)
    torch.testing.assert_close(losses["generate"], pixel.generate)
    torch.testing.assert_close(losses["focal"], terms.focal)
    torch.testing.assert_close(losses["dice"], terms.dice)


def test_terms_of_a_wide_image_with_options_and_an_object_that_vanishes() -> None:
    """Height and width differ, and one class has a single pixel, which a quarter size skips."""
    g = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 32, 56, generator=g)
    labels = torch.randint(2, (2, 32, 56), generator=g)
    labels[:, :16, 8:] = 255
    labels[1, 0, 0] = 2
    model = build(logit_scale=7.0, global_weight=2.0, pseudo_scale=3.0)
    losses = model(images, labels)
    features = model.segmenter(images)
    teacher = model.clip.encode_image(images)
    seen_logits = 7 * torch.einsum("bchw,kc->bkhw", features, model.seen_text)
    near = labels[:, 2::4, 2::4]  # the centre of 4 x 4 pixels, rounded up
    assert 2 in labels and 2 not in near
    pixel = model.plm(features, seen_logits, teacher.dense, teacher.cls, labels, model.seen_text)
    terms = nel(seen_logits, near)
    expected = GlobalLearningModule()(features, teacher.cls)
    torch.testing.assert_close(losses["global"], 2 * expected)
    torch.testing.assert_close(losses["ce"], pixel.ce)
    torch.testing.assert_close(losses["focal"], terms.focal)
    torch.testing.assert_close(losses["dice"], terms.dice)


def test_cross_entropy_of_seen_pixels_is_weighted() -> None:
    images, labels = batch()
    model = build(ce="seen", ce_weight=3.0, logit_scale=2.0)
    features = model.segmenter(images.float() / 255)
    logits = 2 * torch.einsum("bchw,kc->bkhw", features, model.seen_text)
    expected = 3 * seen_cross_entropy(logits, resize_nearest(labels, (8, 8)))
    torch.testing.assert_close(model(images, labels)["ce"], expected)


def test_cosine_similarity_scores_features_of_unit_length() -> None:
    images, labels = batch()
    model = build(similarity="cosine", logit_scale=7.0)
    features = model.segmenter(images.float() / 255)
    unit = features / features.norm(dim=1, keepdim=True)
    terms = nel(7 * torch.einsum("bchw,kc->bkhw", unit, model.seen_text), labels[:, 2::4, 2::4])
    losses = model(images, labels)
    torch.testing.assert_close(losses["focal"], terms.focal)
    torch.testing.assert_close(losses["dice"], terms.dice)


@pytest.mark.parametrize("at_once", [1, 2 * 2 * 32 * 32, 10**9])  # one class, two, all together
def test_losses_at_the_size_of_the_labels(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cliptteacher.logits._VALUES_AT_ONCE", at_once)
    images, labels = batch()
    labels[:, 24:] = 254  # padding: negatives of every class, as pixels without a label are
    ignored = labels.masked_fill(labels == 254, 255)
    for ce in ("seen", "all"):
        model = build(loss_size="labels", ce=ce)
        losses = model(images, labels)
        features = model.segmenter(images.float() / 255)
        logits = torch.einsum("bchw,kc->bkhw", features, model.seen_text)
        large = torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear")
        terms = nel(large, ignored)
        torch.testing.assert_close(losses["focal"], terms.focal)
        torch.testing.assert_close(losses["dice"], terms.dice)
        if ce == "seen":
            expected = torch.nn.functional.cross_entropy(large, ignored.long(), ignore_index=255)
            torch.testing.assert_close(losses["ce"], expected)
        parameters = list(model.segmenter.parameters())
        found = torch.autograd.grad(losses["focal"] + losses["dice"], parameters)
        for ours, true in zip(found, torch.autograd.grad(sum(terms), parameters), strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


def test_padding_makes_no_pseudo_labels() -> None:
    """With nothing but padding and seen labels, cross entropy has seen pixels alone."""
    images, labels = batch()
    labels[labels == 255] = 254
    losses = build()(images, labels)
    torch.testing.assert_close(losses["ce"], build(ce="seen")(images, labels)["ce"])


def test_windows_have_cls_tokens_and_banks_of_their_own() -> None:
    """Cut by hand, window by window; L_global is the mean over the sizes of windows."""
    images, labels = batch()
    model = build(glm_windows=(1, 2), global_weight=3.0)
    pixels = images.float() / 255
    features, expected = model.segmenter(pixels), []
    for n in (1, 2):
        maps, tokens = [], []
        for image, row, column in itertools.product(range(len(images)), range(n), range(n)):
            window, part = cut(pixels[image], n, row, column), cut(features[image], n, row, column)
            tokens.append(model.clip.encode_image(window[None]).cls[0])
            maps.append(part)
        expected.append(GlobalLearningModule()(torch.stack(maps), torch.stack(tokens)))
    found = model(images, labels)["global"]
    torch.testing.assert_close(found, 3 * (expected[0] + expected[1]) / 2)
    assert [int(module.bank.filled) for module in model.glm] == [len(images), 4 * len(images)]


def cut(maps: Tensor, n: int, row: int, column: int) -> Tensor:
    h, w = maps.shape[1] // n, maps.shape[2] // n
    return maps[:, row * h : row * h + h, column * w : column * w + w]


def test_windows_must_be_there_and_fit() -> None:
    with pytest.raises(ValueError, match=r"`glm_windows` must hold numbers from 1 on, got \(\)"):
        build(glm_windows=())
    with pytest.raises(ValueError, match=r"got \(0, 2\); \(1,\) is the whole image"):
        build(glm_windows=(0, 2))
    with pytest.raises(ValueError, match=r"3 x 3 windows must divide maps of .* evenly; choose"):
        build(glm_windows=(3,))(*batch())


def test_every_option_reaches_its_room() -> None:
    options: dict[str, Any] = {
        "glm_pooling": "mean",
        "glm_query": "unit",
        "loss_size": "features",
        "bank_size": 5,
        "temperature": 0.3,
        "tokens": "final",
        "scales": (2, 4),
        "seeding": "sliding",
        "kmeans_iterations": 3,
        "fusion_threshold": 0.65,
        "potential_slots": 6,
        "potential_scope": "image",
        "pseudo_similarity": "cosine",
        "pseudo_scale": 4.0,
        "detach_prototypes": True,
        "seen_competition": False,
        "over_processes": True,
        "adapter": "mlp",
        "generate_loss": "bce",
    }
    names = {field.name for field in dataclasses.fields(PLMConfig)}
    assert names <= set(options)
    model = build(**options)
    glm = model.glm[0]
    assert (glm.pooling, glm.query, glm.bank.size, glm.temperature) == ("mean", "unit", 5, 0.3)
    assert {name: getattr(model.plm.config, name) for name in names} == {
        name: options[name] for name in names
    }
    assert type(model.plm.adapter) is MLPAdapter


def test_the_teacher_records_no_gradient_even_for_images_that_do() -> None:
    model = build()
    found = model.encode(torch.rand(1, 3, 32, 32, requires_grad=True))
    assert not any(tensor.requires_grad for tensor in found)


@pytest.mark.parametrize("term", TERMS)
def test_weights_scale_a_term_and_zero_switches_it_off(term: str) -> None:
    name = f"{term}_weight"
    default = getattr(CLIPTeacherConfig(), name)
    full = build()(*batch())
    doubled = build(**{name: 2 * default})(*batch())
    off = build(**{name: 0.0})(*batch())
    assert doubled[term].item() == pytest.approx(2 * full[term].item(), rel=1e-6)
    assert off[term].item() == 0
    for other in set(TERMS) - {term}:
        torch.testing.assert_close(off[other], full[other])
        torch.testing.assert_close(doubled[other], full[other])


@pytest.mark.parametrize("tokens", ["projected", "final"])
def test_distillation_compares_with_the_projected_tokens_and_can_stand_alone(tokens: str) -> None:
    images, labels = batch()
    off = {f"{term}_weight": 0.0 for term in TERMS}
    model = build(**off, ce="none", distill_weight=3.0, tokens=tokens)
    losses = model(images, labels)
    features = model.segmenter(images.float() / 255)
    dense = tiny_clip().eval().encode_image(images.float() / 255).dense  # (2, 16, 4, 4)
    angles = []
    for b, y, x in itertools.product(range(2), range(4), range(4)):
        pixels = features[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]  # two pixels a token
        angles.append(1 - torch.cosine_similarity(pixels.mean((1, 2)), dense[b, :, y, x], dim=0))
    torch.testing.assert_close(losses["distill"], 3 * torch.stack(angles).mean())
    torch.testing.assert_close(losses["total"], losses["distill"])
    assert tuple(losses) == (*TERMS, "distill", "total")
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.segmenter.parameters())


def test_distillation_is_zero_for_a_copy_of_any_length_and_two_for_its_opposite() -> None:
    dense = torch.randn(2, 5, 3, 4)
    copy = 7 * dense.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert distill_loss(copy, dense).item() == pytest.approx(0, abs=1e-6)
    assert distill_loss(-copy, dense).item() == pytest.approx(2, abs=1e-6)


def test_uint8_and_float_images_are_the_same() -> None:
    images, labels = batch()
    first, second = build()(images, labels), build()(images.float() / 255, labels)
    assert all(torch.equal(first[key], second[key]) for key in KEYS)


def test_label_types_do_not_matter() -> None:
    images, labels = batch()
    first, second = build()(images, labels), build()(images, labels.long())
    assert all(torch.equal(first[key], second[key]) for key in KEYS)


def test_the_teacher_is_no_part_of_the_module() -> None:
    model = build()
    teacher = {id(p) for p in model.clip.parameters()} | {id(b) for b in model.clip.buffers()}
    assert not teacher & {id(p) for p in model.parameters()}
    assert not teacher & {id(b) for b in model.buffers()}
    assert not {id(m) for m in model.clip.modules()} & {id(m) for m in model.modules()}
    assert {name.split(".")[0] for name in model.state_dict()} == {"segmenter", "plm", "glm"}


def test_the_teacher_stays_frozen_and_in_eval_mode() -> None:
    model = build()
    before = copy.deepcopy(model.clip.state_dict())
    model.train()
    assert model.segmenter.training and not any(m.training for m in model.clip.modules())
    assert not any(p.requires_grad for p in model.clip.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*batch())["total"].backward()
    optimizer.step()
    assert all(p.grad is None for p in model.clip.parameters())
    after = model.clip.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_teacher_moves_with_the_module() -> None:
    model = build().to(torch.float64)
    moved = (*model.clip.parameters(), *model.clip.buffers(), *model.parameters())
    assert {tensor.dtype for tensor in moved if tensor.is_floating_point()} == {torch.float64}
    assert model.seen_text.dtype == torch.float64
    found = model.encode(batch()[0].double() / 255)
    assert {tensor.dtype for tensor in found} == {torch.float64}
    model.to("meta")
    assert {tensor.device.type for tensor in model.clip.parameters()} == {"meta"}


def test_the_names_are_encoded_on_the_device_of_the_teacher() -> None:
    """A device without numbers: a tensor of the host would meet one of the device and raise."""
    model = CLIPTeacher(tiny_clip().to("meta"), tiny_student(), NAMES, CLIPTeacherConfig(**SMALL))
    assert model.seen_text.device.type == "meta"
    assert {p.device.type for p in model.parameters()} == {"cpu"}  # until model.to(device)


def test_the_state_dict_is_enough_to_go_on(tmp_path: Path) -> None:
    """Student, adapter and CLS banks: a fresh module continues with equal losses, bit for bit."""
    options = {"glm_windows": (1, 2), "bank_size": 3}
    model = build(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(module: CLIPTeacher, seed: int) -> dict[str, Tensor]:
        module.zero_grad()
        losses = module(*batch(seed=seed))
        losses["total"].backward()
        return losses

    for seed in range(5):
        step(model, seed)
        optimizer.step()
    state = model.state_dict()
    banks = {key: value.shape for key, value in state.items() if key.endswith("bank.tokens")}
    assert banks == {"glm.0.bank.tokens": (6, 16), "glm.1.bank.tokens": (24, 16)}
    torch.save(state, tmp_path / "run.pt")
    torch.manual_seed(9)
    fresh = CLIPTeacher(
        tiny_clip(), TinyStudent(), NAMES, CLIPTeacherConfig(**{**SMALL, **options})
    )
    assert not torch.equal(step(fresh, 4)["total"], step(model, 4)["total"])
    model.load_state_dict(state := torch.load(tmp_path / "run.pt", weights_only=True))
    fresh.load_state_dict(state)
    second = torch.optim.SGD(fresh.parameters(), lr=0.01)
    for seed in range(5, 8):
        expected, found = step(model, seed), step(fresh, seed)
        optimizer.step()
        second.step()
        assert all(torch.equal(found[key], expected[key]) for key in KEYS)


def test_without_the_bank_the_next_loss_is_another() -> None:
    """Else the test above would show nothing of the bank."""
    model, fresh = build(), build()
    for seed in range(2):
        model(*batch(seed=seed))
    state = {name: value for name, value in model.state_dict().items() if "bank" not in name}
    missing = fresh.load_state_dict(state, strict=False).missing_keys
    assert missing == ["glm.0.bank.tokens", "glm.0.bank.filled"]
    found, expected = fresh(*batch(seed=2)), model(*batch(seed=2))
    assert found["global"] != expected["global"]
    assert all(torch.equal(found[term], expected[term]) for term in set(TERMS) - {"global"})


@pytest.mark.parametrize("size", [2, 9])
def test_the_state_dict_of_another_bank_size_loads(size: int) -> None:
    """The losses are those of a model that had this size from the start."""
    model, other, same = build(bank_size=5), build(bank_size=size), build(bank_size=size)
    for seed in range(3):
        model(*batch(seed=seed))
        same(*batch(seed=seed))
    other.load_state_dict(model.state_dict())
    for seed in range(3, 6):
        found, expected = other(*batch(seed=seed)), same(*batch(seed=seed))
        assert all(torch.equal(found[key], expected[key]) for key in KEYS)


def test_two_forward_passes_before_one_backward_pass() -> None:
    """No tensor that autograd saved is overwritten, and the gradients add up."""
    model, twin = build(bank_size=2), build(bank_size=2)
    for seed in range(3):  # a full bank, written in place from here on
        model(*batch(seed=seed))
        twin(*batch(seed=seed))
    (model(*batch(seed=3))["total"] + model(*batch(seed=4))["total"]).backward()
    for seed in (3, 4):
        twin(*batch(seed=seed))["total"].backward()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_parts_reach_every_bank() -> None:
    model = build(glm_windows=(1, 2), bank_size=3)
    images, labels = batch(B=4)
    for part in (slice(0, 2), slice(2, 4)):
        model(images[part], labels[part], parts=2)
    assert [module.bank.tokens.shape[0] for module in model.glm] == [12, 48]
    assert [int(module.bank.filled) for module in model.glm] == [4, 16]


def test_the_text_features_are_those_of_the_seen_names() -> None:
    model = build(templates="ensemble")
    expected = class_text_features(tiny_clip(), NAMES, "ensemble")
    torch.testing.assert_close(model.seen_text, expected)
    torch.testing.assert_close(model.seen_text.norm(dim=1), torch.ones(3))
    assert not model.seen_text.requires_grad


COMBINATIONS = list(
    itertools.product(
        ("all", "seen", "none"), (0.0, 1.0), (0.0, 1.0), ("decoder", "mlp", "identity")
    )
)


@pytest.mark.parametrize(("ce", "ce_weight", "generate_weight", "adapter"), COMBINATIONS)
def test_every_trainable_parameter_gets_a_gradient(
    ce: str, ce_weight: float, generate_weight: float, adapter: str
) -> None:
    # DistributedDataParallel refuses a parameter that takes no part in the loss.
    model = build(ce=ce, ce_weight=ce_weight, generate_weight=generate_weight, adapter=adapter)
    model(*batch())["total"].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    trained = bool(list(model.plm.adapter.parameters()))
    used = generate_weight > 0 or (ce == "all" and ce_weight > 0)
    assert trained == (adapter != "identity" and used)


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("ce", ["all", "seen", "none"])
def test_extreme_labels_stay_finite_and_use_every_parameter(ce: str, fill: int) -> None:
    images, labels = batch()
    model = build(ce=ce)
    losses = model(images, torch.full_like(labels, fill))
    losses["total"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


OPTIONS = [
    {"tokens": "final"},
    {"potential_scope": "image", "potential_slots": 3},
    {
        "similarity": "cosine",
        "logit_scale": 10.0,
        "pseudo_similarity": "cosine",
        "pseudo_scale": 10.0,
    },
    {"detach_prototypes": True, "seen_competition": False},
    {"generate_loss": "bce"},
    {"glm_pooling": "max", "bank_size": 0},
    {"seeding": "window"},
    {"seeding": "sliding"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_every_option_changes_the_loss_and_trains(options: dict[str, Any]) -> None:
    model, default = build(**options), build()
    for seed in range(2):  # the bank shows from the second step on
        losses, usual = model(*batch(seed=seed)), default(*batch(seed=seed))
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if options == {"detach_prototypes": True, "seen_competition": False}:
        assert losses["ce"] < usual["ce"]
    else:
        assert losses["total"] != usual["total"]


def test_seen_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 5.0], [0.0, 1.0, -5.0]]).view(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, 255]]])
    expected = (torch.tensor(2.0).log() + (1 + torch.tensor(1.0).exp()).log()) / 2
    torch.testing.assert_close(seen_cross_entropy(logits, labels), expected)
    assert seen_cross_entropy(logits, torch.full_like(labels, 255)) == 0


def test_bfloat16_autocast_stays_close() -> None:
    exact = build()(*batch())
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*batch())
    rounded["total"].backward()
    for key in KEYS:
        assert rounded[key].dtype == torch.float32
        assert rounded[key].item() == pytest.approx(exact[key].item(), rel=0.05), key
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_twenty_steps_lower_the_loss() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(20):
        losses = model(*batch())
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append({key: value.item() for key, value in losses.items()})
    assert totals[-1]["total"] < 0.8 * totals[0]["total"]
    assert totals[-1]["generate"] < totals[0]["generate"]


def test_no_seen_name() -> None:
    with pytest.raises(ValueError, match=r"a list of 1 to 254 class names, got \[\]"):
        CLIPTeacher(tiny_clip(), tiny_student(), [])


def test_too_many_seen_names() -> None:
    with pytest.raises(ValueError, match="a list of 1 to 254 class names, got 255"):
        CLIPTeacher(tiny_clip(), tiny_student(), ["cat"] * 255)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, torch.int64), (len(NAMES), torch.uint8), (200, torch.uint8), (256, torch.int32)],
)
@pytest.mark.parametrize("ce", ["all", "seen"])
def test_a_label_of_no_class_is_refused(value: int, dtype: torch.dtype, ce: str) -> None:
    """With focal and dice off it would be taken for a pseudo label, or be ignored."""
    images, labels = batch()
    labels = labels.to(dtype)
    labels[1, 3, 4] = value
    model = build(ce=ce, focal_weight=0, dice_weight=0)
    message = (
        rf"integers 0\.\.{len(NAMES) - 1}, 255 for no label, or 254 for padding, got \[{value}\]"
    )
    with pytest.raises(ValueError, match=message):
        model(images, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype: torch.dtype) -> None:
    images, labels = batch()
    with pytest.raises(ValueError, match=f"`labels` must hold integers .* got {dtype}"):
        build()(images, labels.to(dtype))


def test_labels_that_do_not_fit_the_images() -> None:
    images, labels = batch()
    with pytest.raises(ValueError, match=r"must fit `images`.*got \(2, 16, 32\).*crop both alike"):
        build()(images, labels[:, :16])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_student_of_another_width(weight: float) -> None:
    config = CLIPTeacherConfig(**SMALL, global_weight=weight)
    model = CLIPTeacher(tiny_clip(), tiny_student(channels=10), NAMES, config)
    with pytest.raises(ValueError, match=r"10.*channels=clip\.embed_dim"):
        model(*batch())


def test_a_width_that_the_heads_of_the_adapter_do_not_divide() -> None:
    with pytest.raises(ValueError, match="must divide the 12 channels, got 8"):
        PixelLearningModule(12)


def rank_batch(rank: int) -> tuple[Tensor, Tensor]:
    images, labels = batch(seed=10 + rank)
    labels = torch.where(labels == 255, labels, 0 if rank == 0 else labels)  # 2 pairs against 6
    return images, labels


def lose_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    losses = build()(*rank_batch(rank))
    torch.save({key: value.detach() for key, value in losses.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_divide_by_the_mean_pair_count(tmp_path: Path) -> None:
    mp.spawn(lose_on_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    alone = [build()(*rank_batch(r)) for r in range(2)]
    for rank, (pairs, losses) in enumerate(zip((2, 6), alone, strict=True)):
        for term in ("focal", "dice"):  # 4 pairs a rank on average
            torch.testing.assert_close(ranks[rank][term], (losses[term] * pairs / 4).detach())
        for term in ("ce", "generate"):
            torch.testing.assert_close(ranks[rank][term], losses[term].detach())
    images = torch.cat([rank_batch(r)[0] for r in range(2)])
    labels = torch.cat([rank_batch(r)[1] for r in range(2)])
    joined = build()(images, labels)
    for term in ("global", "focal", "dice"):  # these equal one process with the double batch
        mean = (ranks[0][term] + ranks[1][term]) / 2
        torch.testing.assert_close(mean, joined[term].detach())
