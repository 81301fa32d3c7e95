"""Students of torchvision by name: weights as published, offline errors, the checkpoint's way back.

That they take any size, learn in the framework and survive DDP stands in `test_students.py`.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext_tiny, mobilenet_v3_large, resnet50

from cliptteacher.segmenters import build_segmenter, list_segmenters, weights
from cliptteacher.segmenters.adapt import AdaptedSegmenter
from cliptteacher.segmenters.zoo import TORCHVISION_NETWORKS

LRASPP = "torchvision/lraspp_mobilenet_v3_large"
FILES = {
    LRASPP: "mobilenet_v3_large-8738ca79",
    "torchvision/fcn_resnet50": "resnet50-0676ba61",
    "torchvision/deeplabv3_resnet50": "resnet50-0676ba61",
    "torchvision/convnext_tiny": "convnext_tiny-983f1562",
}


def build(name: str, source: str | Path | None = None, channels: int = 6) -> AdaptedSegmenter:
    model = build_segmenter(name, channels, source)
    assert isinstance(model, AdaptedSegmenter)
    return model.eval()


def published_like(make: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """Random tensors by the names of torchvision's file, scaled so that no layer overflows."""
    with torch.device("meta"):  # the network's own initialisation takes seconds
        shapes = make().state_dict()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for key, value in shapes.items():
        if not value.is_floating_point():
            state[key] = torch.zeros_like(value, device="cpu")
        elif value.ndim == 1:
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        else:
            deviation = (len(value) / value.numel()) ** 0.5
            state[key] = deviation * torch.randn(value.shape, generator=generator)
    return state


def test_the_names_are_listed() -> None:
    assert set(TORCHVISION_NETWORKS) == set(FILES) <= set(list_segmenters())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision/deeplabv3_resnet5", "torchvision/deeplabv3_resnet50"),
        ("lraspp_mobilenet_v3_large", LRASPP),
        ("torchvision/convnext_tinny", "torchvision/convnext_tiny"),
    ],
)
def test_a_near_miss_is_named(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{nearest}'"):
        build_segmenter(name, 6)


def test_options_are_refused() -> None:
    with pytest.raises(ValueError, match="has no option 'auxiliary'; it has no options"):
        build_segmenter(LRASPP, 6, auxiliary=True)


def test_a_default_device_is_kept() -> None:
    with torch.device("meta"):
        model = build(LRASPP)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def run_published(make: Callable[..., nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """Make the network of torchvision with the tensors of a file."""
    with torch.device("meta"):
        network = make()
    network.load_state_dict(state, assign=True)
    return network.eval()


def mobilenet_map(state: dict[str, Tensor]) -> nn.Module:
    return run_published(partial(mobilenet_v3_large, dilated=True), state).features


def resnet_map(state: dict[str, Tensor]) -> nn.Module:
    dilation = [False, True, True]
    network = run_published(partial(resnet50, replace_stride_with_dilation=dilation), state)
    children = network.named_children()
    return nn.Sequential(*(part for name, part in children if name not in ("avgpool", "fc")))


def convnext_map(state: dict[str, Tensor]) -> nn.Module:
    return run_published(convnext_tiny, state).features


@pytest.mark.parametrize(
    ("name", "make", "backbone", "key"),
    [
        (LRASPP, mobilenet_v3_large, mobilenet_map, "high"),
        ("torchvision/fcn_resnet50", resnet50, resnet_map, "out"),
        ("torchvision/convnext_tiny", convnext_tiny, convnext_map, None),
    ],
)
def test_a_published_file_fills_the_backbone(
    name: str, make: Any, backbone: Any, key: str | None, tmp_path: Path
) -> None:
    """The backbone computes what torchvision's own network computes with that file."""
    state = published_like(make)
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "published.pth")  # the oldest files have no such counters
    student = build(name, tmp_path / "published.pth")
    images = torch.rand(1, 3, 40, 64)
    with torch.no_grad():
        features = student.network(images) if key is None else student.network.backbone(images)[key]
        expected = backbone(state)(images)
    assert features.isfinite().all() and features.std() > 0
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    state = published_like(mobilenet_v3_large)
    del state["features.0.0.weight"]
    torch.save(state, tmp_path / "wrong.pth")
    match = r"got 1 missing \(network\.backbone\.0\.0\.weight\); check the name of the segmenter"
    with pytest.raises(ValueError, match=match):
        build(LRASPP, tmp_path / "wrong.pth")


def test_own_state_dict_round_trip(tmp_path: Path) -> None:
    model = build(LRASPP)
    torch.save({"segmenter": model.state_dict()}, tmp_path / "own.pt")
    again, images = build(LRASPP, tmp_path / "own.pt"), torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match="4 of another shape"):  # both classifiers
        build(LRASPP, tmp_path / "own.pt", channels=7)


def test_imagenet_weights_are_downloaded_checked_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, source = published_like(mobilenet_v3_large), tmp_path / "source.pth"
    torch.save(state, source)
    name = f"net-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.pth"
    source.rename(tmp_path / name)
    url = f"{tmp_path.as_uri()}/{name}"
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: SimpleNamespace(url=url))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights.announce.cache_clear()
    for _ in range(2):
        model = build(LRASPP, "imagenet")
        (tmp_path / name).unlink(missing_ok=True)  # the second time it is cached
    assert torch.equal(model.network.backbone["0"][0].weight, state["features.0.0.weight"])
    assert caplog.text.count("BSD 3-Clause licence") == 1
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(RuntimeError, match=rf"SHA-256 of .*{name} must start with .* delete"):
        build(LRASPP, "imagenet")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", FILES)
def test_offline_error_says_where_to_put_the_file(name: str) -> None:
    match = (
        rf"checkpoints/{FILES[name]}\.pth is missing .* "
        rf"get https://download\.pytorch\.org/models/{FILES[name]}\.pth and put it there"
    )
    with pytest.raises(FileNotFoundError, match=match):
        build(name, "imagenet")
