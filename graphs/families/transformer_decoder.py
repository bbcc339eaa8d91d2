"""Any decoder that these parts can make, under torchtune's parameter names: `model_type: transformer_decoder`.

Its config.json uses Hugging Face's keys, and keys of its own for what no Hugging Face model offers: `attention` (one
name, or a list with one for each layer), `position_embedding`, `norm`, `gated_mlp`. docs/attention.md lists them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphs.attention import ATTENTION
from graphs.attention.linformer import refuse_decoder
from graphs.config import DecoderConfig, ExpertsConfig, LayerKind, RopeConfig
from graphs.errors import CheckpointError
from graphs.families.family import Family, read_activation, read_expert_counts, read_sizes
from graphs.families.torchtune import own_names
from graphs.keys import Keys, short
from graphs.layers import NORMS
from graphs.positions import ABSOLUTE
from graphs.rope_config import parse_rope

ROTATED = ("causal", "sliding_window", "sparse_top_k")  # the kinds whose queries and keys a rotary embedding turns
SCORED = (*ROTATED, "alibi")  # the kinds that score keys
WINDOWED = ("sliding_window", "aft_local")


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=4096, odd_heads=True)
    sizes["norm_eps"] = keys.number("norm_eps", sizes["norm_eps"])
    layers = sizes["num_hidden_layers"]
    names = read_attention(keys, layers)
    positions = keys.one_of(
        "position_embedding", ("rope", "none", *ABSOLUTE), "rope" if set(names) & set(ROTATED) else "none"
    )
    if positions == "rope" and not set(names) & set(ROTATED):
        raise CheckpointError(
            f'{keys.where}: position_embedding "rope" turns queries and keys, but attention {short(sorted(set(names)))}'
            f" has none to turn: expected none, {', '.join(ABSOLUTE)}"
        )
    if positions == "sinusoidal" and sizes["hidden_size"] % 2:
        raise CheckpointError(f"hidden_size ({sizes['hidden_size']}) must be even for sinusoidal positions")
    rope = _read_rope(keys, sizes) if positions == "rope" else None
    for key in () if rope else ("rope_scaling", "rope_parameters"):
        keys.only(key, ())  # there is nothing for it to say
    if raw.keys() & {"num_local_experts", "num_experts"}:
        keys.only("mlp_bias", (False,))  # experts have none
    experts = _read_experts(keys) if raw.keys() & {"num_local_experts", "num_experts"} else None
    kinds = {name: _kind(keys, name, rope if name in ROTATED else None, experts) for name in dict.fromkeys(names)}
    if not any(name in SCORED for name in names):
        keys.only("qk_norm", (False,))
        keys.only("attn_logit_softcapping", ())
    config = DecoderConfig(
        model_type="transformer_decoder",
        **sizes,
        layer_types=names,
        layer_kinds=kinds,
        norm=keys.one_of("norm", tuple(NORMS), "rms_norm"),
        hidden_act=read_activation(keys),
        gated_mlp=keys.boolean("gated_mlp", True),
        qk_norm=keys.boolean("qk_norm", False),
        post_norms=keys.boolean("post_norms", False),
        attention_bias=keys.boolean("attention_bias", False),
        attention_output_bias=keys.boolean("attention_output_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
        position_embedding=positions if positions in ABSOLUTE else None,
        attn_logit_softcapping=keys.optional_number("attn_logit_softcapping", None),
        final_logit_softcapping=keys.optional_number("final_logit_softcapping", None),
        embedding_multiplier=keys.number("embedding_multiplier", 1.0),
        residual_multiplier=keys.number("residual_multiplier", 1.0),
        logits_scaling=keys.number("logits_scaling", 1.0),
        aft_rank=keys.integer("aft_rank", 128) if "aft_full" in names else 0,
    )
    keys.finish()
    return config


def read_attention(keys: Keys, layers: int) -> tuple[str, ...]:
    """`attention` for each layer; CheckpointError for an unknown name, and for one that no decoder can have."""
    value = keys.get("attention", "causal")
    names = value if isinstance(value, list) else [value] * layers
    unknown = [name for name in names if not isinstance(name, str) or name not in ATTENTION]
    if unknown or len(names) != layers:
        raise CheckpointError(
            f"{keys.where}: attention must be one of {', '.join(ATTENTION)}, or a list of them for {layers} layers,"
            f" found {short(value)}"
        )
    if "linformer" in names:
        refuse_decoder()
    return tuple(names)


def _kind(keys: Keys, name: str, rope: RopeConfig | None, experts: ExpertsConfig | None) -> LayerKind:
    return LayerKind(
        attention=name,
        window=keys.integer("sliding_window", minimum=2 if name == "aft_local" else 1) if name in WINDOWED else None,
        top_k=keys.integer("attention_top_k") if name == "sparse_top_k" else None,
        rope=rope,
        experts=experts,
    )


def _read_rope(keys: Keys, sizes: Mapping[str, Any]) -> RopeConfig:
    rope = parse_rope(keys, sizes["head_dim"], sizes["max_position_embeddings"], partial=True)
    return replace(rope, interleaved=keys.boolean("rope_interleaved", True))


def _read_experts(keys: Keys) -> ExpertsConfig:
    return ExpertsConfig(
        **read_expert_counts(keys, num_experts=8, num_experts_per_tok=2),
        intermediate_size=keys.integer("moe_intermediate_size", keys.integer("intermediate_size")),
        norm_topk_prob=keys.boolean("norm_topk_prob", True),
    )


FAMILY = Family(parse_config=parse_config, tensor_names=own_names)
