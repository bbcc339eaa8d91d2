"""Gemma 2, arXiv:2408.00118: softcaps, alternating windows, norms before and after each block."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, LayerKind
from graphs.families.family import (
    Family,
    check_window,
    huggingface_names,
    read_activation,
    read_layer_types,
    read_sizes,
    windowed,
)
from graphs.keys import Keys
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=8192, kv_heads=4, head_dim=256, tied=True)
    layers = sizes["num_hidden_layers"]
    kind = LayerKind(rope=parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"]))
    window = keys.optional_integer("sliding_window", 4096)
    types = read_layer_types(keys, layers, window=window)
    if types is None:
        types = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))
        check_window(keys, types, window)
    config = DecoderConfig(
        model_type="gemma2",
        **sizes | gemma_fields(keys, sizes["hidden_size"]),
        layer_types=types,
        layer_kinds={"full_attention": kind, "sliding_attention": windowed(kind, window)},
        attn_logit_softcapping=keys.optional_number("attn_logit_softcapping", 50.0),
        final_logit_softcapping=keys.optional_number("final_logit_softcapping", 30.0),
    )
    keys.finish()
    return config


def gemma_fields(keys: Keys, hidden_size: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    keys.get("hidden_act")  # written beside hidden_activation, and not used
    bias = keys.boolean("attention_bias", False)
    return {
        "hidden_act": read_activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_bias": bias,
        "attention_output_bias": bias,
        "norm": "gemma_rms_norm",
        "post_norms": True,
        "embedding_multiplier": hidden_size**0.5,
    }


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
