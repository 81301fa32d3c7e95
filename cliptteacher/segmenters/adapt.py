"""Make a student of a foreign network: any map of pixels to classes, or of pixels to features.

    1. run the network once on noise, in eval mode, and look at its output map
    2. find the convolution that produces that map: put noise in its place, the map must follow
    3. replace it by one with `channels` outputs, or, if there is none, add a 1x1 convolution
    4. freeze what the map does not depend on (an auxiliary classifier, say)

Section 3.1 of arXiv:2310.02296v1 leaves the student open: anything that gives dense features (B,
C, h, w) will do. The networks of torchvision upsample their output to the size of the image; with
C in the hundreds that is most of the memory, so their two parts are run without it. The cost is
a few forward passes and one backward pass on one small image.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .student import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

_STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_MAP_KEYS = ("out", "logits")


class AdaptedSegmenter(nn.Module):
    """Run a foreign network on images in [0, 1]; made by `adapt_segmenter`.

    Args:
        network: The network, its last layers already replaced.
        head_names: Paths of the new layers inside `network`.
        projection: A layer to run on the output, or None.
        channels: C, the width of the features.
        stride: Image pixels per feature, rounded.
        normalize: Which statistics to apply, see `adapt_segmenter`.
    """

    mean: Tensor
    std: Tensor

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
    image_size: int = 64,
    normalize: Literal["imagenet", "none"] = "imagenet",
) -> AdaptedSegmenter:
    """Wrap a foreign per-pixel network as a student; the network is modified in place.

    Args:
        module: Any network from images (B, 3, H, W) to a map (B, n, h, w), or to a dictionary
            with the map at `"out"` or `"logits"`.
        channels: C, the width of the joint space.
        image_size: Side in pixels of the square image of the dry run; the network must accept it.
        normalize: `"imagenet"` if the network expects ImageNet statistics, `"none"` if it expects
            [0, 1].

    Returns:
        The student, with attributes `head` (the new layers), `stride` and `channels`.

    Raises:
        TypeError: If the network returns neither a tensor nor a dictionary with a known key.
        ValueError: If its output is not a 4-D map, or an argument is out of range.
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
    with _evaluating(network):
        output = _dry_run(network, images)
        head_names = known_heads or _find_head(network, images, output)
        projection = None if head_names else nn.Conv2d(output.shape[1], channels, kernel_size=1)
        for name in head_names:
            _replace(network, name, channels)
        stride = max(1, round(image_size / output.shape[2]))
        adapted = AdaptedSegmenter(network, head_names, projection, channels, stride, normalize)
        adapted.to(images)
        _freeze_unused(adapted, images)
    return adapted


class _TorchvisionSegmenter(nn.Module):
    """Run backbone and classifier of a torchvision segmenter, without its final upsampling."""

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
    """Return the network to run, and the names of its last layers where they are known."""
    from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3  # slow to import

    if isinstance(module, FCN | DeepLabV3):
        return _TorchvisionSegmenter(module.backbone, module.classifier, key="out"), ()
    if isinstance(module, LRASPP):
        # Its output is the sum of two convolutions.
        heads = ("classifier.low_classifier", "classifier.high_classifier")
        return _TorchvisionSegmenter(module.backbone, module.classifier, key=None), heads
    return module, ()


def _as_map(output: object) -> Tensor:
    """Take the map (B, n, h, w) out of whatever a network returns."""
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
            "pass the part of it that keeps the pixels apart"
        )
    return output


def _noise_like(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Draw noise for the network's device and type, without touching the global generator."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter = next(network.parameters(), noise)
    return noise.to(parameter.device, parameter.dtype)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode and back, module by module; batch statistics stay as they are."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
    """Name the convolution whose result is the output map, up to an interpolation."""
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
    """Tell whether `large` is an interpolation of `small`, to rounding and nothing more."""
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
    """Put a convolution with `channels` outputs in the place of one with the same geometry."""
    old = network.get_submodule(name)
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


def _freeze_unused(adapted: AdaptedSegmenter, images: Tensor) -> None:
    """Freeze the parameters without influence on the features: data parallelism needs none."""
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    total = adapted(images).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    unused = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    for name in unused:
        trained[name].requires_grad_(False)
    if unused:
        logger.warning("frozen, for the features do not depend on them: %s", ", ".join(unused))
