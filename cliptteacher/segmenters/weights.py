"""Published weights for the students: find the file, check it, rename its tensors.

Three families of files describe the same SegFormer: the authors' release (`block1.0.attn.q`), the
toolbox's conversion (`layers.0.1.0.attn.attn.in_proj`) and Hugging Face's
(`encoder.block.0.0.attention.self.query`). One table of renamings covers them, since no pattern of
one matches a name of another; afterwards

    separate keys and values are joined, a joint query-key-value is split,
    a 1x1 convolution becomes the linear layer it is, ImageNet classifiers are dropped by name,

and what is left must fit the model tensor by tensor. Nothing is unpickled but tensors, and a
downloaded file is used only if its SHA-256 starts as its name says. Section 4.2 of
arXiv:2310.02296v1 starts every student from ImageNet. The cost is one read of the file.
"""

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..download import download
from ..tensors import read_weights

logger = logging.getLogger(__name__)

_SEGFORMER_HOST = "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segformer/"
_SEGFORMER_LICENCE = (
    "the ImageNet weights of SegFormer are licensed by NVIDIA for research and evaluation only"
)
SEGFORMER_IMAGENET = {
    "segformer_b0": "mit_b0_20220624-7e0fe6dd.pth",
    "segformer_b1": "mit_b1_20220624-02e5a6a1.pth",
    "segformer_b2": "mit_b2_20220624-66e8bf70.pth",
    "segformer_b3": "mit_b3_20220624-13b1141c.pth",
    "segformer_b4": "mit_b4_20220624-d588d980.pth",
    "segformer_b5": "mit_b5_20220624-658746d9.pth",
}

# Applied in order to every name. `#n` is a stage counted from one, see `_rename`.
_RENAMINGS = (
    (r"^(?:backbone|segformer)\.", ""),
    # The authors' release.
    (r"^patch_embed(\d)\.", r"stages.#\1.patch_embed."),
    (r"^block(\d)\.(\d+)\.", r"stages.#\1.blocks.\2."),
    (r"^norm(\d)\.", r"stages.#\1.norm."),
    (r"^decode_head\.linear_c(\d)\.proj\.", r"head.linears.#\1."),
    (r"^decode_head\.linear_fuse\.conv\.", "head.fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "head.norm."),
    (r"^decode_head\.linear_pred\.", "head.classifier."),
    # The toolbox.
    (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.patch_embed.proj."),
    (r"^layers\.(\d)\.0\.norm\.", r"stages.\1.patch_embed.norm."),
    (r"^layers\.(\d)\.1\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
    # Hugging Face.
    (r"^encoder\.patch_embeddings\.(\d)\.", r"stages.\1.patch_embed."),
    (r"^encoder\.block\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.layer_norm\.(\d)\.", r"stages.\1.norm."),
    (r"\.layer_norm_(\d)\.", r".norm\1."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.key\.", ".attn.k."),
    (r"\.attention\.self\.value\.", ".attn.v."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"^decode_head\.linear_c\.(\d)\.proj\.", r"head.linears.\1."),
    (r"^decode_head\.linear_fuse\.", "head.fuse."),
    (r"^decode_head\.batch_norm\.", "head.norm."),
    (r"^decode_head\.classifier\.", "head.classifier."),
    # The authors and Hugging Face.
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"^stages\.", "backbone.stages."),
)
# ImageNet classifiers, and a layer that the authors' head registers but never runs.
_DROPPED = re.compile(r"(?:head|classifier)\.(?:weight|bias)|decode_head\.conv_seg\..*")


class MisfitError(ValueError):
    """Weights that are not those of the model; raised without the name of their file."""


def read_segformer_weights(name: str, source: str | Path) -> dict[str, Tensor]:
    """Read the weights of a SegFormer and give its tensors the names of `Segformer`.

    Args:
        name: The segmenter, such as `"segformer_b0"`.
        source: `"imagenet"` for the published backbone, downloaded once to the cache of
            `torch.hub`, or a `.pth`, `.pt`, `.bin` or `.safetensors` file: one of the three
            published forms, or a state dict of `Segformer`.

    Returns:
        Tensors by parameter name, `backbone.*` and, if the file has them, `head.*`.

    Raises:
        FileNotFoundError: If there is no such file, or the download is impossible.
        ValueError: If the SHA-256 of the download is not the published one, or if
            nothing is published for `name`, or the file does not hold tensors by name.
    """
    if source != "imagenet":
        return convert_segformer_keys(read_state_dict(Path(source)))
    if name not in SEGFORMER_IMAGENET:
        known = ", ".join(SEGFORMER_IMAGENET)
        raise ValueError(
            f'`weights="imagenet"` exists for {known}, not for {name!r}; pass a path or None'
        )
    announce(_SEGFORMER_LICENCE)
    path = fetch(_SEGFORMER_HOST + SEGFORMER_IMAGENET[name])
    return convert_segformer_keys(read_state_dict(path))


def convert_segformer_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of any published SegFormer file to the parameters of `Segformer`.

    Args:
        state: Tensors by the names of the file.

    Returns:
        Tensors by our names; a name that no rule knows is kept, for the report of
        `load_segformer_weights`.
    """
    renamed = {_rename(key): value for key, value in state.items() if not _is_dropped(key)}
    converted: dict[str, Tensor] = {}
    for key, value in renamed.items():
        if ".attn.qkv." in key and value.ndim:
            width = value.shape[0] // 3
            converted[key.replace(".qkv.", ".q.")] = value[:width]
            converted[key.replace(".qkv.", ".kv.")] = value[width:]
        elif ".attn.k." in key and _is_pair(value, renamed.get(key.replace(".k.", ".v."))):
            partner = renamed[key.replace(".k.", ".v.")]
            converted[key.replace(".k.", ".kv.")] = torch.cat((value, partner))
        elif ".attn.v." in key and _is_pair(value, renamed.get(key.replace(".v.", ".k."))):
            continue  # joined with its key above
        else:
            is_linear = value.ndim == 4 and value.shape[2:] == (1, 1)
            converted[key] = value.flatten(1) if is_linear else value
    return converted


def load_segformer_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy converted weights into a `Segformer`; every tensor has to fit.

    Two parts may stay as initialised: the whole head, if the file has none of it, and its last
    layer, if the file's was trained for another number of outputs (the classes of a benchmark).

    Args:
        model: A `Segformer`.
        state: The result of `read_segformer_weights`.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape.
    """
    current = model.state_dict()
    kept = {key for key in current if key.startswith("head.")}
    if any(key.startswith("head.") for key in state):
        kept = {key for key in kept if is_other_classifier(key, state, current)}
    if kept:
        logger.info("left as initialised: %s", ", ".join(sorted(kept)))
    given = {key: value for key, value in state.items() if key not in kept}
    expected = {key: value for key, value in current.items() if key not in kept}
    check_fit(given, expected)
    model.load_state_dict({**current, **given})


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a file, on the CPU.

    Args:
        path: safetensors, a file of `torch.save`, or the index of a file in shards; the state dict
            may be wrapped in an entry `segmenter`, `state_dict` or `model`, and the names may
            begin with `module.` and `_orig_mod.`.

    Returns:
        Tensors by the names of the file, without these two prefixes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds anything else than tensors by name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"weights must be 'imagenet', None or an existing file, got {str(path)!r}"
        )
    return read_weights(path, ("segmenter", "state_dict", "model"))


def fetch(url: str) -> Path:
    """Return the cached copy of a published file, downloading it at the first use.

    Args:
        url: Its address; the file name ends in `-` and the first hexadecimal digits of its SHA-256.

    Returns:
        The path in `torch.hub.get_dir()/checkpoints`.

    Raises:
        FileNotFoundError: If the file is neither there nor can be downloaded.
        ValueError: If the hash is another.
        OSError: If the cache cannot be written.
    """
    path = cached(url)
    return download(url, path, digest=path.stem.rsplit("-", 1)[1])


def cached(url: str) -> Path:
    """Return where the copy of a published file lies or would lie."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _is_pair(first: Tensor, second: Tensor | None) -> bool:
    """Whether two tensors can be joined; those of a damaged file keep their names."""
    return (
        second is not None
        and first.ndim > 0
        and first.shape == second.shape
        and first.dtype == second.dtype
    )


@cache
def announce(licence: str) -> None:
    """Log a licence once a process, at a level that is shown by default."""
    logger.warning(licence)


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMINGS:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"#(\d)", lambda match: str(int(match[1]) - 1), key)


def _is_dropped(key: str) -> bool:
    dropped = _DROPPED.fullmatch(key) is not None
    if dropped:
        logger.debug("not used: %s", key)
    return dropped


def is_other_classifier(
    key: str, state: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> bool:
    """Whether a tensor is the file's last layer, made for another number of outputs."""
    layer = key.rpartition(".")[0]
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if not layer.startswith("head.classifier") or not {key, weight, bias} <= state.keys():
        return False
    theirs, ours = state[weight].shape, current[weight].shape
    other = theirs[1:] == ours[1:] and theirs[:1] != ours[:1] and theirs.numel() > 0
    return other and state[bias].shape == theirs[:1]


def check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise one error that names the tensors which are missing, unknown or do not fit."""
    common = sorted(given.keys() & expected.keys())
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unknown": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(given[key].shape)} for {tuple(expected[key].shape)}"
            for key in common
            if given[key].shape != expected[key].shape
        ],
        "of another kind of numbers": [
            f"{key} {given[key].dtype} for {expected[key].dtype}"
            for key in common
            if expected[key].is_floating_point() and not given[key].is_floating_point()
        ],
        "with numbers that are not finite": [
            key
            for key in common
            if given[key].is_floating_point() and not bool(given[key].isfinite().all())
        ],
    }
    report = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    )
    if report:
        raise MisfitError(
            f"the weights must fit the model tensor by tensor, got {report}; "
            "check the name of the segmenter and its options"
        )
