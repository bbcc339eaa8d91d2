"""Phi-3 and Phi-3.5 mini, arXiv:2404.14219: LongRoPE, and fused matrices in the checkpoint.

The checkpoint stores query, key and value projections as one matrix, and the gate and up projections as another. Rows
of a matrix lie together in the file, so each projection is a range of rows and nothing is copied apart.
"""

from collections.abc import Mapping
from typing import Any

from graphs.checkpoint import TensorRef
from graphs.config import DecoderConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.families.family import (
    Family,
    TensorNames,
    huggingface_names,
    one_layer_type,
    read_activation,
    read_sizes,
    same_kind,
    windowed,
)
from graphs.keys import Keys, short
from graphs.rope_config import parse_rope


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(_with_longrope(raw))
    sizes = read_sizes(keys, longest=4096, norm_eps=1e-5)
    rope = parse_rope(
        keys,
        sizes["head_dim"],
        sizes["max_position_embeddings"],
        partial=True,
        original_max=keys.integer("original_max_position_embeddings", 4096),
    )
    if rope.rope_type not in ("default", "longrope"):
        raise CheckpointError(
            f"config.json: rope type {short(rope.rope_type)} is not supported for model_type phi3; supported: default,"
            " longrope"
        )
    window = keys.optional_integer("sliding_window", None)
    one_layer_type(keys, sizes["num_hidden_layers"], window)
    config = DecoderConfig(
        model_type="phi3",
        **sizes,
        **same_kind(sizes["num_hidden_layers"], windowed(LayerKind(rope=rope), window)),
        hidden_act=read_activation(keys),
    )
    keys.finish()
    return config


def _with_longrope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's first config.json files call longrope "su", and one "yarn"."""
    changed = dict(raw)
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if isinstance(value, Mapping):
            name = "rope_type" if "rope_type" in value else "type"
            if value.get(name) in ("su", "yarn"):
                changed[key] = {**value, name: "longrope"}
    return changed


def tensor_names(config: DecoderConfig) -> TensorNames:
    """As in Llama, but for the fused matrices."""
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    names = huggingface_names(config)
    for i in range(config.num_hidden_layers):
        qkv = f"model.layers.{i}.self_attn.qkv_proj.weight"
        gate_up = f"model.layers.{i}.mlp.gate_up_proj.weight"
        names[f"layers.{i}.attn.q_proj.weight"] = TensorRef(qkv, (0, q_dim))
        names[f"layers.{i}.attn.k_proj.weight"] = TensorRef(qkv, (q_dim, q_dim + kv_dim))
        names[f"layers.{i}.attn.v_proj.weight"] = TensorRef(qkv, (q_dim + kv_dim, q_dim + 2 * kv_dim))
        names[f"layers.{i}.mlp.w1.weight"] = TensorRef(gate_up, (0, config.intermediate_size))
        names[f"layers.{i}.mlp.w3.weight"] = TensorRef(
            gate_up, (config.intermediate_size, 2 * config.intermediate_size)
        )
    return names


FAMILY = Family(parse_config=parse_config, tensor_names=tensor_names)
