"""Qwen 3: query and key heads are normalised, arXiv:2505.09388."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, LayerKind
from graphs.families.family import Family, huggingface_names, read_activation, read_sizes, read_window_layers
from graphs.keys import Keys
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=32_768, kv_heads=32, head_dim=128)
    kind = LayerKind(rope=parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"]))
    bias = keys.boolean("attention_bias", False)
    config = DecoderConfig(
        model_type="qwen3",
        **sizes,
        **read_window_layers(keys, sizes["num_hidden_layers"], kind),
        hidden_act=read_activation(keys),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
    )
    keys.finish()
    return config


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
