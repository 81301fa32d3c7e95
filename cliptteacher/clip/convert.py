"""Give the weights of a CLIP OpenAI's names, whoever saved them.

- OpenAI and open_clip use the same names; what differs is wrapped around them
- Hugging Face's `CLIPModel` has other names, three matrices where OpenAI has one (query, key and
  value), and transposed projections

Cost: the query, key and value matrices are copied once; everything else is renamed only.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Sizes and masks that some files carry along; all of them follow from the weights.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids)$"
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
_TRANSPOSED = ("visual.proj", "text_projection")


def to_openai_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a CLIP to OpenAI's names.

    Args:
        state_dict: weights as OpenAI, open_clip or Hugging Face's `CLIPModel` name them; all names
            may begin with ``module.``, as those of a model trained in parallel do.

    Returns:
        The same numbers under OpenAI's names, without sizes, masks and position ids.

    Raises:
        ValueError: if these are not the weights of a CLIP with a vision transformer.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    weights = {name: t for name, t in weights.items() if not _NOT_WEIGHTS.search(name)}
    if any(name.startswith("visual.layer1.") for name in weights):
        raise ValueError(
            "the image encoder must be a vision transformer, got a CLIP with a ResNet; "
            "use ViT-B/16, ViT-B/32 or ViT-L/14"
        )
    if any(name.startswith("vision_model.") for name in weights):
        weights = _from_hugging_face(weights)
    return weights


def _from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in _HUGGING_FACE_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return _join_query_key_value(renamed)


def _join_query_key_value(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the query, key and value projections of each block into ``in_proj``."""
    joined = {}
    for name, tensor in weights.items():
        block, found, kind = name.partition(".attn.q_proj.")
        if found:
            parts = [f"{block}.attn.{letter}_proj.{kind}" for letter in "qkv"]
            missing = [part for part in parts if part not in weights]
            if missing:
                raise ValueError(
                    f"the weights of a CLIP must hold {missing[0]!r}, which is missing"
                )
            joined[f"{block}.attn.in_proj_{kind}"] = torch.cat([weights[part] for part in parts])
        elif not re.search(r"\.attn\.[kv]_proj\.", name):
            joined[name] = tensor
    return joined
