"""Networks of torchvision as students, by name: what `adapt_segmenter` makes of them.

    torchvision/lraspp_mobilenet_v3_large, torchvision/deeplabv3_resnet50, torchvision/fcn_resnet50
    torchvision/convnext_tiny       the backbone alone, of stride 32, and a projection

With the ImageNet weights of their backbones, as every student of Section 4.2 of arXiv:2310.02296v1.
torchvision's weights of the whole segmenters are not offered: they were trained with the labels of
all 20 VOC classes, the unseen ones included. The cost is building the network and one small image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapt import AdaptedSegmenter, adapt_segmenter
from .weights import announce, check_fit, fetch, read_state_dict

_LICENCE = (
    "the ImageNet weights of {} are torchvision's, under its BSD 3-Clause licence; the terms of "
    "ImageNet, on which they were trained, may apply as well"
)


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A network of torchvision and the published file of its backbone."""

    build: Callable[[], nn.Module]
    weights: str  # of torchvision's enumerations
    published: str  # what the names of the backbone's tensors start with in that file
    ours: str  # and in the student


def _segmenter(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import segmentation  # slow to import

        module: nn.Module = getattr(segmentation, name)(weights=None, weights_backbone=None)
        return module

    return build


def _convnext_tiny() -> nn.Module:
    from torchvision.models import convnext_tiny

    features: nn.Module = convnext_tiny(weights=None).features
    return features


_RESNET = {"weights": "ResNet50_Weights", "published": "", "ours": "network.backbone."}
_MOBILENET = {"weights": "MobileNet_V3_Large_Weights", "published": "features."}
_CONVNEXT = {"weights": "ConvNeXt_Tiny_Weights", "published": "features.", "ours": "network."}
TORCHVISION_NETWORKS = {
    "torchvision/lraspp_mobilenet_v3_large": _Network(
        build=_segmenter("lraspp_mobilenet_v3_large"), **_MOBILENET, ours="network.backbone."
    ),
    "torchvision/fcn_resnet50": _Network(build=_segmenter("fcn_resnet50"), **_RESNET),
    "torchvision/deeplabv3_resnet50": _Network(build=_segmenter("deeplabv3_resnet50"), **_RESNET),
    "torchvision/convnext_tiny": _Network(build=_convnext_tiny, **_CONVNEXT),
}
_CLASSIFIERS = ("fc.", "classifier.")  # of ImageNet


def build_torchvision(name: str, channels: int, weights: str | Path | None) -> AdaptedSegmenter:
    """Build a network of torchvision and adapt it.

    Args:
        name: A key of `TORCHVISION_NETWORKS`.
        channels: C, the width of the joint space.
        weights: `"imagenet"` for the published backbone, downloaded once to the cache of
            `torch.hub`; a file of that form, or a state dict of the student; None for random ones.

    Returns:
        The student, on the default device.

    Raises:
        FileNotFoundError: If there is no such file, or the download is impossible.
        RuntimeError: If the SHA-256 of the downloaded file is not the published one.
        ValueError: If the weights do not fit.
    """
    network = TORCHVISION_NETWORKS[name]
    state = None if weights is None else _read(name, weights)
    with torch.device("cpu"):  # adapting compares values, and the meta device holds none
        model = adapt_segmenter(network.build(), channels)
    if state is not None:
        _load(model, state, network)
    return model.to(torch.get_default_device())


def _read(name: str, source: str | Path) -> dict[str, Tensor]:
    if source != "imagenet":
        return read_state_dict(Path(source))
    from torchvision.models import get_weight

    announce(_LICENCE.format(name))
    published = get_weight(f"{TORCHVISION_NETWORKS[name].weights}.IMAGENET1K_V1")
    return read_state_dict(fetch(published.url))


def _load(model: AdaptedSegmenter, state: Mapping[str, Tensor], network: _Network) -> None:
    """Load the whole student from its own state dict, or the backbone from torchvision's file."""
    current = model.state_dict()
    given, expected = dict(state), current
    if not any(key.startswith("network.") for key in state):
        given = {
            network.ours + key.removeprefix(network.published): value
            for key, value in state.items()
            if not key.startswith(_CLASSIFIERS)
        }
        expected = {key: value for key, value in current.items() if key.startswith(network.ours)}
    # Older files lack BatchNorm's counters, which are read with momentum=None only.
    counters = {key for key in expected.keys() - given.keys() if key.endswith("_batches_tracked")}
    check_fit(given, {key: value for key, value in expected.items() if key not in counters})
    model.load_state_dict({**current, **given})
