"""Published weights for SegNeXt: find the file, check it, rename its tensors.

The authors' release and the toolbox's conversion of it differ in one name, and `SegNeXt` keeps
their names inside a stage, so that little is renamed:

    block2.1.attn.* -> backbone.stages.1.blocks.1.attn.*    so patch_embed2.* and norm2.*
    decode_head.*   -> head.*, its last layer conv_seg -> classifier
    the ImageNet classifier is dropped by name

Reading, hashes and the fit, tensor by tensor, are those of `weights.py`. The cost is one read of
the file.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .weights import announce, fetch, load_segformer_weights, read_state_dict

_HOST = "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segnext/"
_LICENCE = (
    "the ImageNet weights of SegNeXt are licensed under Apache-2.0; "
    "its authors ask to be contacted before commercial use"
)
# Each name ends in the first digits of the SHA-256 of its file.
SEGNEXT_IMAGENET = {
    "segnext_t": "mscan_t_20230227-119e8c9f.pth",
    "segnext_s": "mscan_s_20230227-f33ccdf2.pth",
    "segnext_b": "mscan_b_20230227-3ab7d230.pth",
    "segnext_l": "mscan_l_20230227-cef260d4.pth",
}

_PARTS = {"patch_embed": "patch_embed", "block": "blocks", "norm": "norm"}
_STAGE_PART = re.compile(r"^(patch_embed|block|norm)([1-4])\.")
_DROPPED = re.compile(r"head\.(?:weight|bias)")


def read_segnext_weights(name: str, source: str | Path) -> dict[str, Tensor]:
    """Read the weights of a SegNeXt and give its tensors the names of `SegNeXt`.

    Args:
        name: The segmenter, such as `"segnext_b"`.
        source: `"imagenet"` for the published backbone, downloaded once to the cache of
            `torch.hub`, or a file: the authors' form, the toolbox's form, or a state dict of
            `SegNeXt`.

    Returns:
        Tensors by parameter name, `backbone.*` and, if the file has them, `head.*`.

    Raises:
        FileNotFoundError: If there is no such file, or the download is impossible.
        ValueError: If the SHA-256 of the download is not the published one, or if
            nothing is published for `name`, or the file does not hold tensors by name.
    """
    if source != "imagenet":
        return convert_segnext_keys(read_state_dict(Path(source)))
    if name not in SEGNEXT_IMAGENET:
        known = ", ".join(SEGNEXT_IMAGENET)
        raise ValueError(
            f'`weights="imagenet"` exists for {known}, not for {name!r}; pass a path or None'
        )
    announce(_LICENCE)
    return convert_segnext_keys(read_state_dict(fetch(_HOST + SEGNEXT_IMAGENET[name])))


def convert_segnext_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published SegNeXt file to the parameters of `SegNeXt`.

    Args:
        state: Tensors by the names of the file.

    Returns:
        Tensors by our names; a name that no rule knows is kept, for the report of the loader.
    """
    return {_rename(key): value for key, value in state.items() if not _DROPPED.fullmatch(key)}


def load_segnext_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy converted weights into a `SegNeXt`, by the rules of `load_segformer_weights`.

    Every tensor has to fit; the head, or its last layer, may stay as initialised.

    Args:
        model: A `SegNeXt`.
        state: The result of `read_segnext_weights`.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    load_segformer_weights(model, state)


def _rename(key: str) -> str:
    if key.startswith("decode_head."):
        key = key.replace("decode_head.", "head.", 1).replace(".conv_seg.", ".classifier.")
        return key.replace(".ham_in.conv.", ".ham_in.")
    key = _STAGE_PART.sub(_name_stage_part, key.removeprefix("backbone."))
    key = key.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")  # the authors' one other name
    return f"backbone.{key}" if key.startswith("stages.") else key


def _name_stage_part(match: re.Match[str]) -> str:
    return f"stages.{int(match[2]) - 1}.{_PARTS[match[1]]}."
