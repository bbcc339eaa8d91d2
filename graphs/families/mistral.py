"""Mistral 7B and its successors: Llama with a sliding window in every layer, arXiv:2310.06825."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, LayerKind
from graphs.families.family import (
    Family,
    huggingface_names,
    one_layer_type,
    read_activation,
    read_sizes,
    same_kind,
    windowed,
)
from graphs.keys import Keys
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=131_072, kv_heads=8)
    kind = LayerKind(rope=parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"]))
    window = keys.optional_integer("sliding_window", 4096)
    one_layer_type(keys, sizes["num_hidden_layers"], window)
    config = DecoderConfig(
        model_type="mistral",
        **sizes,
        **same_kind(sizes["num_hidden_layers"], windowed(kind, window)),
        hidden_act=read_activation(keys),
    )
    keys.finish()
    return config


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
