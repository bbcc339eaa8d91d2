"""Llama 2, 3, 3.1 and 3.2 (text)."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, LayerKind
from graphs.families.family import Family, huggingface_names, one_layer_type, read_activation, read_sizes, same_kind
from graphs.keys import Keys
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=2048)
    rope = parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"])
    one_layer_type(keys, sizes["num_hidden_layers"], None)
    bias = keys.boolean("attention_bias", False)
    config = DecoderConfig(
        model_type="llama",
        **sizes,
        **same_kind(sizes["num_hidden_layers"], LayerKind(rope=rope)),
        hidden_act=read_activation(keys),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=keys.boolean("mlp_bias", False),
    )
    keys.finish()
    return config


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
