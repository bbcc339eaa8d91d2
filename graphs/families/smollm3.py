"""SmolLM3: Llama of which some layers turn nothing (NoPE, arXiv:2501.18795)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphs.config import DecoderConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.families.family import (
    Family,
    huggingface_names,
    read_activation,
    read_layer_types,
    read_sizes,
    windowed,
)
from graphs.keys import Keys, short
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=32_768, kv_heads=4, tied=True)
    layers = sizes["num_hidden_layers"]
    kind = LayerKind(rope=parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"], default_theta=2e6))
    has_rope = read_rope_layers(keys, layers)
    window = keys.optional_integer("sliding_window", None)
    sliding = keys.boolean("use_sliding_window", False) and window is not None
    types = read_layer_types(keys, layers, window=window)  # where it is given, it decides alone
    if types is None:
        types = tuple("sliding_attention" if sliding and not rope else "full_attention" for rope in has_rope)
    kinds = {"full_attention": kind, "sliding_attention": windowed(kind, window)}
    kinds |= {f"{name}, no rope": replace(each, rope=None) for name, each in kinds.items()}
    names = tuple(name if rope else f"{name}, no rope" for name, rope in zip(types, has_rope, strict=True))
    bias = keys.boolean("attention_bias", False)
    config = DecoderConfig(
        model_type="smollm3",
        **sizes,
        layer_types=names,
        layer_kinds={name: kinds[name] for name in sorted(set(names))},
        hidden_act=read_activation(keys),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=keys.boolean("mlp_bias", False),
    )
    keys.finish()
    return config


def read_rope_layers(keys: Keys, layers: int) -> list[bool]:
    """For each layer, whether it turns queries and keys; `no_rope_layers` holds a 1 for those that do."""
    interval = keys.integer("no_rope_layer_interval", 4)
    listed = keys.get("no_rope_layers")
    if listed is None:
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) < layers or any(flag not in (0, 1) for flag in listed):
        raise CheckpointError(
            f"{keys.where}: no_rope_layers must be a list of {layers} times 0 or 1, found {short(listed)}"
        )
    return [bool(flag) for flag in listed[:layers]]


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
