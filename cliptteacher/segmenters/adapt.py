"""Turn a foreign network into a student: any network from images to class scores or features.

    1. run the network once on noise, in eval mode, to learn the shape of its output map
    2. take the layer that the caller names as the head; without a name, find the convolution
       whose result is the output map: if noise replaces the result, the map must be that noise
    3. replace it by a layer with `channels` outputs; if none is found, append a 1x1 convolution
    4. freeze the parameters that the map does not depend on (an auxiliary classifier, say)

Section 3.1 of arXiv:2310.02296v1 leaves the student open: every network that returns dense
features (B, C, h, w) will do. The networks of torchvision upsample their output to the size of the
image; with C in the hundreds that is most of the memory, so backbone and classifier are run
without it. The cost is a few forward passes and one backward pass on one small image.
"""

import difflib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .student import IMAGENET_MEAN, IMAGENET_STD, BuildArguments, evaluating

logger = logging.getLogger(__name__)

_STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_MAP_KEYS = ("out", "logits")
_LISTED = 8  # layers that a message lists

_Head = nn.Conv2d | nn.Linear


class AdaptedSegmenter(nn.Module):
    """Run a foreign network on images in [0, 1]; built by `adapt_segmenter`.

    Args:
        network: The network, its last layers already replaced.
        head_names: Dotted paths of the new layers inside `network`.
        projection: A 1x1 convolution of the output, or None.
        channels: C, the width of the features.
        stride: Image pixels per feature, rounded.
        normalize: Which statistics to apply, see `adapt_segmenter`.
    """

    mean: Tensor
    std: Tensor
    build_arguments: BuildArguments | None = None  # set by `build_segmenter`

    def __init__(
        self,
        network: nn.Module,
        head_names: tuple[str, ...],
        projection: nn.Conv2d | None,
        channels: int,
        stride: int,
        normalize: str,
    ) -> None:
        super().__init__()
        self.network = network
        self.head_names = head_names
        self.projection = projection
        self.channels = channels
        self.stride = stride
        mean, std = _STATISTICS[normalize]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def head(self) -> nn.ModuleList:
        """The new layers, whose weights are random."""
        layers = [self.network.get_submodule(name) for name in self.head_names]
        return nn.ModuleList(layers if self.projection is None else [*layers, self.projection])

    def forward(self, images: Tensor) -> Tensor:
        images = self._reach_one_feature((images - self.mean) / self.std)
        features = _as_map(self.network(images))
        return features if self.projection is None else self.projection(features)

    def _reach_one_feature(self, images: Tensor) -> Tensor:
        """Pad images smaller than one feature with mean colour, on the right and below."""
        H, W = images.shape[2:]
        if H >= self.stride and W >= self.stride:
            return images
        return F.pad(images, (0, max(0, self.stride - W), 0, max(0, self.stride - H)))


def adapt_segmenter(
    module: nn.Module,
    channels: int,
    *,
    head: str | None = None,
    image_size: int = 64,
    normalize: Literal["imagenet", "none"] = "imagenet",
) -> AdaptedSegmenter:
    """Wrap a foreign per-pixel network as a student; the network is modified in place.

    Args:
        module: Any network from images (B, 3, H, W) to a map (B, n, h, w), or to a dictionary
            with the map at `"out"` or `"logits"`.
        channels: C, the width of the joint space.
        head: Dotted path of the convolution or linear layer that computes the scores, such as
            `"classifier.4"`: it is replaced by one with `channels` outputs. None searches for it.
        image_size: Side in pixels of the square image of the dry run; the network must accept it.
        normalize: `"imagenet"` if the network expects ImageNet statistics, `"none"` if it expects
            [0, 1].

    Returns:
        The student, with attributes `head` (the new layers), `stride` and `channels`.

    Raises:
        TypeError: If the network returns neither a tensor nor a dictionary with a known key.
        ValueError: If its output is not a 4-D map, an argument is out of range, or `head` is not
            the layer that computes the output; the network is then left as it was.
        RuntimeError: If the network does not run on an image of `image_size`.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
    >>> adapt_segmenter(backbone, channels=32)(torch.rand(1, 3, 32, 32)).shape
    torch.Size([1, 32, 16, 16])
    """
    if channels < 1:
        raise ValueError(f"`channels` must be the width of the joint space, got {channels}")
    if normalize not in _STATISTICS:
        raise ValueError(f"`normalize` must be 'imagenet' or 'none', got {normalize!r}")
    network, known_heads = _unwrap_torchvision(module)
    images = _noise_like(network, (1, 3, image_size, image_size))
    with evaluating(network):
        output = _dry_run(network, images)
        if head is not None:
            _replace_named(network, head, channels, images, output)
            head_names: tuple[str, ...] = (head,)
        else:
            head_names = known_heads or _find_head(network, images, output)
            for name in head_names:
                _replace(network, name, channels)
        projection = None if head_names else nn.Conv2d(output.shape[1], channels, kernel_size=1)
        stride = max(1, round(image_size / output.shape[2]))
        adapted = AdaptedSegmenter(network, head_names, projection, channels, stride, normalize)
        adapted.to(images)
        _freeze_unused(adapted, images)
    return adapted


class _TorchvisionSegmenter(nn.Module):
    """Run backbone and classifier of a torchvision segmenter, without the final upsampling."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module, key: str | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.key = key

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        output: Tensor = self.classifier(features if self.key is None else features[self.key])
        return output


def _unwrap_torchvision(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network to run, and the paths of its last layers where they are known."""
    from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3  # slow to import

    if isinstance(module, FCN | DeepLabV3):
        return _TorchvisionSegmenter(module.backbone, module.classifier, key="out"), ()
    if isinstance(module, LRASPP):
        # Its output is the sum of two convolutions.
        heads = ("classifier.low_classifier", "classifier.high_classifier")
        return _TorchvisionSegmenter(module.backbone, module.classifier, key=None), heads
    return module, ()


def _as_map(output: object) -> Tensor:
    """Return the map (B, n, h, w) in the output of a network."""
    if isinstance(output, Mapping):
        key = next((key for key in _MAP_KEYS if key in output), None)
        if key is None:
            raise TypeError(
                f"a network that returns a dictionary must have its map at one of {_MAP_KEYS}, "
                f"got {list(output)}; wrap it in a module that returns the map"
            )
        output = output[key]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network must return a tensor (B, n, h, w), got {type(output).__name__}; "
            "wrap it in a module that returns one map"
        )
    if output.ndim != 4:
        raise ValueError(
            f"the network must return a map (B, n, h, w), got shape {tuple(output.shape)}; "
            "pass the part of it that returns dense features"
        )
    return output


def _noise_like(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Draw noise on the network's device and in its dtype, with a generator of its own."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter = next(network.parameters(), noise)
    return noise.to(parameter.device, parameter.dtype)


def _dry_run(network: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            output = network(images)
    except Exception as error:
        raise RuntimeError(
            f"the network must accept images of shape {tuple(images.shape)}, got "
            f"{type(error).__name__}: {error}; pass an `image_size` that it accepts"
        ) from error
    return _as_map(output)


def _find_head(network: nn.Module, images: Tensor, output: Tensor) -> tuple[str, ...]:
    """Find the convolution whose result is the output map, up to an interpolation."""
    calls = _record_convolutions(network, images)
    names = [name for name, _ in calls]
    for name, shape in reversed(calls):
        layer = network.get_submodule(name)
        is_candidate = name and names.count(name) == 1 and shape[1] == output.shape[1]
        if not is_candidate or not isinstance(layer, nn.Conv2d) or layer.groups > 1:
            continue
        noise = _noise_like(network, shape)
        followed = _run_with_result(network, images, layer, noise)
        if followed.shape == shape and torch.equal(followed, noise):
            return (name,)
        if followed.shape != shape and _is_resized(noise, followed):
            sizes = f"{tuple(shape[2:])} to {tuple(followed.shape[2:])}"
            logger.warning(
                "%s resizes its output from %s; return it as it was to save memory",
                type(network).__name__,
                sizes,
            )
            return (name,)
    return ()


def _run_with_result(
    network: nn.Module, images: Tensor, layer: nn.Module, result: Tensor
) -> Tensor:
    """Run the network as if `layer` had computed `result`."""
    hook = layer.register_forward_hook(lambda *_: result.clone())  # later layers may overwrite it
    try:
        return _dry_run(network, images)
    finally:
        hook.remove()


def _record_convolutions(network: nn.Module, images: Tensor) -> list[tuple[str, torch.Size]]:
    """List the convolutions in the order in which they run, with the shapes of their results."""
    calls: list[tuple[str, torch.Size]] = []
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_hook(
                    lambda _, __, result, name=name: calls.append((name, result.shape))
                )
                stack.callback(hook.remove)
        _dry_run(network, images)
    return calls


def _is_resized(small: Tensor, large: Tensor) -> bool:
    """Return whether `large` is an interpolation of `small`, up to rounding."""
    if small.shape[:2] != large.shape[:2]:
        return False
    size = large.shape[2:]
    candidates = (
        F.interpolate(small, size, mode="bilinear"),
        F.interpolate(small, size, mode="bilinear", align_corners=True),
        F.interpolate(small, size, mode="bicubic"),
        F.interpolate(small, size, mode="nearest"),
    )
    return any(torch.allclose(large, candidate, rtol=0, atol=2e-6) for candidate in candidates)


def _replace(network: nn.Module, name: str, channels: int) -> None:
    """Replace a layer by one with `channels` outputs and otherwise the same arguments."""
    old = network.get_submodule(name)
    if isinstance(old, nn.Linear):
        network.set_submodule(name, nn.Linear(old.in_features, channels, old.bias is not None))
        return
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(
        old.in_channels,
        channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    network.set_submodule(name, new)


def _replace_named(
    network: nn.Module, name: str, channels: int, images: Tensor, output: Tensor
) -> None:
    """Replace the layer that the caller names as the head, and check that the output follows."""
    layers = dict(network.named_modules())
    old = layers.get(name)
    if not name or not _is_head_layer(old):
        kind = "no such layer" if old is None else f"a {type(old).__name__}"
        raise ValueError(
            f"`head` must name a Conv2d (groups=1) or Linear layer of the network, got {name!r}, "
            f"{kind}; {_list_candidates(layers, name, output.shape[1])}"
        )
    _replace(network, name, channels)
    network.get_submodule(name).to(images)
    try:
        found = tuple(_dry_run(network, images).shape)
    except (RuntimeError, TypeError, ValueError):
        found = None  # what follows the layer does not take its new width
    if found != (1, channels, *output.shape[2:]):
        network.set_submodule(name, old)
        raise ValueError(
            f"`head` must name the one layer that computes the output map, got {name!r}: with "
            f"{channels} outputs of that layer the network "
            f"{'fails' if found is None else f'returns shape {found}'}; "
            f"{_list_candidates(layers, '', output.shape[1])}"
        )


def _is_head_layer(layer: nn.Module | None) -> TypeGuard[_Head]:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1
    return isinstance(layer, nn.Linear)


def _list_candidates(layers: Mapping[str, nn.Module], name: str, outputs: int) -> str:
    """List the layers with as many outputs as the network, the last of the network first."""
    names = [key for key, layer in layers.items() if key and _is_head_layer(layer)]
    fitting = [key for key in names if outputs in _num_outputs(layers[key])]
    near = difflib.get_close_matches(name, names, n=2) if name else []
    listed = list(dict.fromkeys([*near, *reversed(fitting or names)]))[:_LISTED]
    return f"candidates: {', '.join(listed)}" if listed else "the network has no such layer"


def _num_outputs(layer: nn.Module) -> tuple[int, ...]:
    return (getattr(layer, "out_channels", 0), getattr(layer, "out_features", 0))


def _freeze_unused(adapted: AdaptedSegmenter, images: Tensor) -> None:
    """Freeze parameters that the features do not depend on; DDP waits for their gradients."""
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    total = adapted(images).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    for name in unused:
        trained[name].requires_grad_(False)
    if unused:
        logger.warning("frozen, since the features do not depend on them: %s", ", ".join(unused))
