"""What the students share: input checks, normalisation, stages, and the switch to eval mode."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import MethodType
from typing import TypedDict

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BuildArguments(TypedDict):
    """The arguments of the `build_segmenter` call that made a student: plain JSON values."""

    name: str
    channels: int
    options: dict[str, object]


class Student(nn.Module):
    """A network from images (B, 3, H, W) in [0, 1] to features (B, channels, h, w).

    Args:
        channels: C, the width of the joint space.

    Raises:
        ValueError: If `channels` is not positive.
    """

    mean: Tensor
    std: Tensor
    stride: int
    build_arguments: BuildArguments | None = None  # set by `build_segmenter`

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"`channels` must be the width of the joint space, got {channels}")
        self.channels = channels
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Check images (B, 3, H, W) in [0, 1] and normalise by ImageNet's mean and deviation.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the images do not have shape (B, 3, H, W).
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"`images` must be floating point in [0, 1], got {images.dtype}; divide by 255"
            )
        return (images - self.mean) / self.std


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Compute the stochastic depth rates, rising linearly with depth from 0 to `rate`.

    Args:
        rate: that of the last block.
        depths: blocks of each stage.

    Returns:
        The rates of the blocks of each stage.

    >>> drop_path_rates(0.5, (1, 2))
    [[0.0], [0.25, 0.5]]
    """
    num_blocks = sum(depths)
    rates = [rate * i / max(1, num_blocks - 1) for i in range(num_blocks)]
    ends = [sum(depths[: index + 1]) for index in range(len(depths))]
    return [rates[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


def run_stages(stages: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """Apply the stages in sequence and return the output of each, from fine to coarse."""
    maps: list[Tensor] = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode for the length of a `with` block.

    Every submodule gets its own mode back at the end, so a BatchNorm layer that was frozen in
    eval mode within a training network stays frozen.

    >>> network = nn.Dropout().train()
    >>> with evaluating(network):
    ...     network.training
    False
    >>> network.training
    True
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def eval_view(module: nn.Module) -> nn.Module:
    """Return a module in eval mode over the tensors of another one, which keeps its modes.

    Switching a module that another thread trains, or predicts with, would reach that thread too:
    dropout and BatchNorm would change under it. The view has modes of its own; parameters and
    buffers are the same tensors, also after `.to(device)` or an optimiser's step. It is never
    compiled.

    Args:
        module: any network; its submodules must not be replaced afterwards.

    >>> network = nn.Dropout().train()
    >>> eval_view(network).training, network.training
    (False, True)
    """
    return _view(module, {})


def _view(module: nn.Module, views: dict[nn.Module, nn.Module]) -> nn.Module:
    module = getattr(module, "_orig_mod", module)  # of torch.compile, which would run this one
    if module not in views:
        if type(module).__module__.startswith("torch.jit"):  # its parts are not Python's
            views[module] = deepcopy(module).eval()
            return views[module]
        view = views[module] = object.__new__(type(module))
        for name, value in vars(module).items():
            own = isinstance(value, MethodType) and value.__self__ is module
            vars(view)[name] = MethodType(value.__func__, view) if own else value
        parts = {name: part and _view(part, views) for name, part in module._modules.items()}
        vars(view).update(training=False, _modules=parts, _compiled_call_impl=None)
    return views[module]
