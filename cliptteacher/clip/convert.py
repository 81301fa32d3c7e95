"""Give the weights of a CLIP OpenAI's names, whoever saved them.

- OpenAI and open_clip use the same names; what differs is wrapped around them
- Hugging Face's `CLIPModel` has other names, three matrices where OpenAI has one (query, key and
  value), and transposed projections

A file in both namings is refused, and so are two names for one weight: to choose would be to guess.
Cost: the query, key and value matrices are copied once; everything else is renamed only.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..tensors import rename, without_prefixes

# Sizes and masks that some files carry along; all of them follow from the weights.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids)$"
)
_HUGGING_FACE = re.compile(r"^(vision_model|text_model|visual_projection|text_projection)\.")
_OPENAI = re.compile(
    r"^(visual|transformer|token_embedding|ln_final)\.|^(positional_embedding|text_projection)$"
)
_HUGGING_FACE_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")  # applied from the left
_QUERY_KEY_VALUE = re.compile(r"\.attn\.[qkv]_proj\.")


def to_openai_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a CLIP to OpenAI's names.

    Args:
        state_dict: weights as OpenAI, open_clip or Hugging Face's `CLIPModel` name them; the names
            may begin with ``module.`` and ``_orig_mod.``, as those of a wrapped model do.

    Returns:
        The same numbers under OpenAI's names, without sizes, masks and position ids.

    Raises:
        ValueError: if these are not the weights of one CLIP with a vision transformer, in one of
            the two namings.
    """
    weights = without_prefixes(state_dict)
    weights = {name: tensor for name, tensor in weights.items() if not _NOT_WEIGHTS.search(name)}
    if any(name.startswith("visual.layer1.") for name in weights):
        raise ValueError(
            "the image encoder must be a vision transformer, got a CLIP with a ResNet; "
            "use ViT-B/16, ViT-B/32 or ViT-L/14"
        )
    theirs = [name for name in weights if _HUGGING_FACE.search(name)]
    openai = [name for name in weights if _OPENAI.search(name)]
    if theirs and openai:
        raise ValueError(
            f"all names must be either OpenAI's or Hugging Face's, got {openai[0]!r} beside "
            f"{theirs[0]!r}; save the state dict of one model"
        )
    return _from_hugging_face(weights) if theirs else weights


def _from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Told from their own name: a tensor that is called `text_projection` already lies as OpenAI's.
    turned = {
        name: tensor.mT.contiguous() if name in _PROJECTIONS and tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }
    return _join_query_key_value(rename(turned, _to_openai_name))


def _to_openai_name(name: str) -> str:
    for pattern, replacement in _HUGGING_FACE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _join_query_key_value(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the query, key and value projections of each block into ``in_proj``."""
    parts = dict.fromkeys(name for name in weights if _QUERY_KEY_VALUE.search(name))
    joined = {name: tensor for name, tensor in weights.items() if name not in parts}
    for target in dict.fromkeys(_QUERY_KEY_VALUE.sub(".attn.in_proj_", name) for name in parts):
        if target in joined:
            raise ValueError(f"{target!r} must come whole or in three parts, but both are there")
        joined[target] = _stack_query_key_value(weights, target)
    return joined


def _stack_query_key_value(weights: Mapping[str, Tensor], target: str) -> Tensor:
    names = [target.replace(".in_proj_", f".{letter}_proj.") for letter in "qkv"]
    missing = [name for name in names if name not in weights]
    if missing:
        raise ValueError(f"the weights of a CLIP must hold {missing[0]!r}, which is missing")
    parts = [weights[name] for name in names]
    kinds = [f"{tuple(part.shape)} {part.dtype}" for part in parts]
    if len(set(kinds)) > 1 or parts[0].ndim == 0:
        raise ValueError(
            f"the three parts of {target!r} must have one shape and dtype, got {', '.join(kinds)}"
        )
    return torch.cat(parts)
