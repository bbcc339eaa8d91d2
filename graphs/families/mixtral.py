"""Mixtral, arXiv:2401.04088: Mistral with routed experts in every layer."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, ExpertsConfig, LayerKind
from graphs.families.family import (
    Family,
    TensorNames,
    expert_names,
    huggingface_names,
    one_layer_type,
    read_activation,
    read_expert_counts,
    read_sizes,
    same_kind,
    windowed,
)
from graphs.keys import Keys
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=131_072, norm_eps=1e-5, kv_heads=8)
    rope = parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"], default_theta=1e6)
    experts = ExpertsConfig(
        **read_expert_counts(keys, num_experts=8, num_experts_per_tok=2),
        intermediate_size=sizes["intermediate_size"],
        norm_topk_prob=True,
    )
    window = keys.optional_integer("sliding_window", None)
    one_layer_type(keys, sizes["num_hidden_layers"], window)
    kind = windowed(LayerKind(rope=rope, experts=experts), window)
    config = DecoderConfig(
        model_type="mixtral",
        **sizes,
        **same_kind(sizes["num_hidden_layers"], kind),
        hidden_act=read_activation(keys),
    )
    keys.finish()
    return config


def tensor_names(config: DecoderConfig) -> TensorNames:
    """As in Llama, with the experts' own names."""
    return huggingface_names(config) | expert_names(config, "block_sparse_moe", ("w1", "w2", "w3"))


FAMILY = Family(parse_config=parse_config, tensor_names=tensor_names)
