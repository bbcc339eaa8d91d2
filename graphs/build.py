"""A decoder from its config."""

from torch import nn

from graphs.attention import ATTENTION
from graphs.config import DecoderConfig, LayerKind, RopeConfig
from graphs.layers import NORMS, build_mlp
from graphs.positions import ABSOLUTE, RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder, TransformerDecoderLayer


def build_decoder(config: DecoderConfig) -> TransformerDecoder:
    """The decoder with uninitialised parameters, on torch's current default device (use `meta` to hold none)."""
    ropes = {kind.rope: _rope(kind.rope, config) for kind in config.layer_kinds.values() if kind.rope is not None}
    absolute = ABSOLUTE[config.position_embedding](config) if config.position_embedding else None
    return TransformerDecoder(
        tok_embeddings=nn.Embedding(config.vocab_size, config.hidden_size),
        layers=[_layer(config, kind, ropes) for kind in config.kinds],
        max_seq_len=config.max_position_embeddings,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        norm=_norm(config),
        output=nn.Linear(config.hidden_size, config.vocab_size, bias=False),
        tie_word_embeddings=config.tie_word_embeddings,
        pos_embeddings=absolute,
        embedding_multiplier=config.embedding_multiplier,
        logits_multiplier=1.0 / config.logits_scaling,
        logits_softcap=config.final_logit_softcapping or 0.0,
    )


def _layer(
    config: DecoderConfig, kind: LayerKind, ropes: dict[RopeConfig, RotaryPositionalEmbeddings]
) -> TransformerDecoderLayer:
    rope = None if kind.rope is None else ropes[kind.rope]
    return TransformerDecoderLayer(
        attn=ATTENTION[kind.attention](config, kind, rope),
        mlp=build_mlp(config, kind.experts),
        sa_norm=_norm(config),
        mlp_norm=_norm(config),
        sa_scale=_norm(config) if config.post_norms else None,
        mlp_scale=_norm(config) if config.post_norms else None,
        residual_multiplier=config.residual_multiplier,
    )


def _norm(config: DecoderConfig) -> nn.Module:
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


def _rope(rope: RopeConfig, config: DecoderConfig) -> RotaryPositionalEmbeddings:
    return RotaryPositionalEmbeddings.from_config(rope, config.max_position_embeddings)
