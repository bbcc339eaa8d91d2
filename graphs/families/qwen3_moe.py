"""Qwen 3 with routed experts, arXiv:2505.09388."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphs.config import DecoderConfig, ExpertsConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.families.family import (
    Family,
    TensorNames,
    expert_names,
    huggingface_names,
    one_layer_type,
    read_activation,
    read_expert_counts,
    read_sizes,
    windowed,
)
from graphs.keys import Keys, short
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=32_768, kv_heads=4)
    layers = sizes["num_hidden_layers"]
    rope = parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"])
    experts = ExpertsConfig(
        **read_expert_counts(keys, num_experts=128, num_experts_per_tok=8),
        intermediate_size=keys.integer("moe_intermediate_size", 768),
        norm_topk_prob=keys.boolean("norm_topk_prob", False),
    )
    window = keys.optional_integer("sliding_window", 4096)
    window = window if keys.boolean("use_sliding_window", False) else None
    one_layer_type(keys, layers, window)
    dense = windowed(LayerKind(rope=rope), window)
    kinds = {"dense": dense, "experts": replace(dense, experts=experts)}
    step = keys.integer("decoder_sparse_step", 1)
    dense_layers = keys.get("mlp_only_layers", [])
    if not isinstance(dense_layers, list) or any(type(i) is not int or not 0 <= i < layers for i in dense_layers):
        raise CheckpointError(
            f"{keys.where}: mlp_only_layers must be a list of layers, 0 to {layers - 1}, found {short(dense_layers)}"
        )
    names = tuple("dense" if i in dense_layers or (i + 1) % step else "experts" for i in range(layers))
    bias = keys.boolean("attention_bias", False)
    config = DecoderConfig(
        model_type="qwen3_moe",
        **sizes,
        layer_types=names,
        layer_kinds={name: kinds[name] for name in sorted(set(names))},
        hidden_act=read_activation(keys),
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
    )
    keys.finish()
    return config


def tensor_names(config: DecoderConfig) -> TensorNames:
    """As in Llama, with the experts' own names."""
    return huggingface_names(config) | expert_names(config, "mlp", ("gate_proj", "down_proj", "up_proj"))


FAMILY = Family(parse_config=parse_config, tensor_names=tensor_names)
