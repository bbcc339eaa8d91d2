"""Llama 2, 3, 3.1 and 3.2 (text), as Hugging Face's `model_type: llama` stores them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphs.attention.causal import CausalSelfAttention
from graphs.config import HARMLESS_KEYS, MATHS_KEYS, MAX_LAYERS, DecoderConfig, Keys, parse_rope, short
from graphs.errors import CheckpointError
from graphs.layers import FeedForward, RMSNorm
from graphs.positions import RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder, TransformerDecoderLayer


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    keys.one_of("hidden_act", ("silu", "swish"), "silu")
    for key, allowed in MATHS_KEYS.items():
        keys.only(key, allowed)
    layer_types = keys.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(
            f"config.json: layer_types {short(layer_types)} must all be full_attention for model_type llama"
        )

    heads = keys.integer("num_attention_heads")
    hidden = keys.integer("hidden_size")
    if hidden % heads:
        raise CheckpointError(
            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}): check config.json"
        )
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"num_heads ({heads}) must be a multiple of num_kv_heads ({kv_heads}): check config.json")
    head_dim = keys.integer("head_dim", hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"head_dim ({head_dim}) must be even for rotary embedding: check config.json")

    config = DecoderConfig(
        model_type="llama",
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=keys.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=keys.integer("max_position_embeddings", 2048),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=parse_rope(keys),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=keys.boolean("attention_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
    )
    keys.finish(HARMLESS_KEYS)
    return config


def build(config: DecoderConfig) -> TransformerDecoder:
    """The decoder with uninitialised parameters, on torch's current default device (use `meta` to hold none)."""
    rope = RotaryPositionalEmbeddings.from_config(config.rope, config.head_dim, config.max_position_embeddings)
    return TransformerDecoder(
        tok_embeddings=nn.Embedding(config.vocab_size, config.hidden_size),
        layer=[_layer(config, rope) for _ in range(config.num_hidden_layers)],
        num_layers=config.num_hidden_layers,
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        output=nn.Linear(config.hidden_size, config.vocab_size, bias=False),
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _layer(config: DecoderConfig, rope: RotaryPositionalEmbeddings) -> TransformerDecoderLayer:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    attention = CausalSelfAttention(
        embed_dim=hidden,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        q_proj=nn.Linear(hidden, q_dim, bias=config.attention_bias),
        k_proj=nn.Linear(hidden, kv_dim, bias=config.attention_bias),
        v_proj=nn.Linear(hidden, kv_dim, bias=config.attention_bias),
        output_proj=nn.Linear(q_dim, hidden, bias=config.attention_bias),
        pos_embeddings=rope,
        max_seq_len=config.max_position_embeddings,
    )
    feed_forward = FeedForward(
        gate_proj=nn.Linear(hidden, mlp, bias=config.mlp_bias),
        down_proj=nn.Linear(mlp, hidden, bias=config.mlp_bias),
        up_proj=nn.Linear(hidden, mlp, bias=config.mlp_bias),
    )
    return TransformerDecoderLayer(
        attn=attention,
        mlp=feed_forward,
        sa_norm=RMSNorm(hidden, eps=config.rms_norm_eps),
        mlp_norm=RMSNorm(hidden, eps=config.rms_norm_eps),
    )


def tensor_names(config: DecoderConfig) -> dict[str, str]:
    """{parameter name: checkpoint tensor name}; tied parameters share one tensor."""
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "output.weight": "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight",
    }
    per_layer = {
        "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
    }
    linears = {
        "attn.q_proj": ("self_attn.q_proj", config.attention_bias),
        "attn.k_proj": ("self_attn.k_proj", config.attention_bias),
        "attn.v_proj": ("self_attn.v_proj", config.attention_bias),
        "attn.output_proj": ("self_attn.o_proj", config.attention_bias),
        "mlp.w1": ("mlp.gate_proj", config.mlp_bias),
        "mlp.w2": ("mlp.down_proj", config.mlp_bias),
        "mlp.w3": ("mlp.up_proj", config.mlp_bias),
    }
    for ours, (theirs, has_bias) in linears.items():
        per_layer[f"{ours}.weight"] = f"{theirs}.weight"
        if has_bias:
            per_layer[f"{ours}.bias"] = f"{theirs}.bias"
    for i in range(config.num_hidden_layers):
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in per_layer.items()}
    return names


def is_ignorable(name: str) -> bool:
    """True for tensors that old Llama checkpoints store but that follow from config.json."""
    return name.endswith(".rotary_emb.inv_freq")


def duplicates(config: DecoderConfig) -> dict[str, str]:
    """Some writers store a tied head as well."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
