"""Published weights for Swin: torchvision's ImageNet files, or a state dict of our own.

    features.*  -> backbone.features.*        the same tensors under the same names
    norm.*      -> backbone.norms.3.*         the norm after the last stage
    head.weight, head.bias                    the ImageNet classifier, dropped by name

The norms of the other stages and the heads are new: a part that the file lacks as a whole stays as
initialised, everything else must fit tensor by tensor. A downloaded file is used only if its
SHA-256 starts as its name says, and nothing is unpickled but tensors. Section 4.2 of
arXiv:2310.02296v1 starts every student from ImageNet. The cost is one read of the file.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .weights import announce, check_fit, fetch, is_other_classifier, read_state_dict

logger = logging.getLogger(__name__)

# Names of torchvision's enumerations; each has one member, IMAGENET1K_V1.
SWIN_IMAGENET = {
    "swin_t": "Swin_T_Weights",
    "swin_s": "Swin_S_Weights",
    "swin_b": "Swin_B_Weights",
}
_SWIN_LICENCE = (
    "the ImageNet weights of Swin are torchvision's, under its BSD 3-Clause licence; the terms of "
    "ImageNet, on which they were trained, may apply as well"
)
# What no ImageNet model has. The last norm is not among them.
_NEW_PARTS = ("backbone.norms.0.", "backbone.norms.1.", "backbone.norms.2.", "head.", "auxiliary.")


def read_swin_weights(name: str, source: str | Path) -> dict[str, Tensor]:
    """Read the weights of a Swin and give its tensors the names of `Swin`.

    Args:
        name: The segmenter, such as `"swin_t"`.
        source: `"imagenet"` for torchvision's backbone, downloaded once to the cache of
            `torch.hub`, or a `.pth`, `.pt` or `.safetensors` file: torchvision's, or a state dict
            of `Swin`.

    Returns:
        Tensors by parameter name, `backbone.*` and, if the file has them, the heads.

    Raises:
        FileNotFoundError: If there is no such file, or the download is impossible.
        ValueError: If the SHA-256 of the download is not the published one, or if
            nothing is published for `name`, or the file does not hold tensors by name.
    """
    if source != "imagenet":
        return convert_swin_keys(read_state_dict(Path(source)))
    if name not in SWIN_IMAGENET:
        known = ", ".join(SWIN_IMAGENET)
        raise ValueError(
            f'`weights="imagenet"` exists for {known}, not for {name!r}; pass a path or None'
        )
    from torchvision.models import get_weight  # slow to import

    announce(_SWIN_LICENCE)
    published = get_weight(f"{SWIN_IMAGENET[name]}.IMAGENET1K_V1")
    return convert_swin_keys(read_state_dict(fetch(published.url)))


def convert_swin_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of torchvision's Swin to those of `Swin`; our own names stay.

    Args:
        state: Tensors by the names of the file.

    Returns:
        Tensors by our names, without the ImageNet classifier; a name that no rule knows is kept,
        for the report of `load_swin_weights`.
    """
    dropped = ("head.weight", "head.bias")
    return {_rename(key): value for key, value in state.items() if key not in dropped}


def load_swin_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy converted weights into a `Swin`; every tensor has to fit.

    As initialised stay those parts of the model that the file lacks as a whole (the heads, the
    norms of the first three stages), and a last layer that the file has for another number of
    channels. An auxiliary head of the file alone is not used.

    Args:
        model: A `Swin`.
        state: The result of `read_swin_weights`.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    current = model.state_dict()
    new = tuple(part for part in _NEW_PARTS if not any(key.startswith(part) for key in state))
    kept = {
        key for key in current if key.startswith(new) or is_other_classifier(key, state, current)
    }
    if kept:
        layers = sorted({key.rpartition(".")[0] for key in kept})
        logger.info("left as initialised: %s", ", ".join(layers))
    has_auxiliary = any(key.startswith("auxiliary.") for key in current)
    given = {
        key: value
        for key, value in state.items()
        if key not in kept and (has_auxiliary or not key.startswith("auxiliary."))
    }
    expected = {key: value for key, value in current.items() if key not in kept}
    check_fit(given, expected)
    model.load_state_dict({**current, **given})


def _rename(key: str) -> str:
    key = re.sub(r"^features\.", "backbone.features.", key)
    return re.sub(r"^norm\.", "backbone.norms.3.", key)
