"""A decoder from its config."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphs.attention import ATTENTION, cross
from graphs.attention.cross import TanhGate, TransformerCrossAttentionLayer
from graphs.config import DecoderConfig, LayerKind, RopeConfig
from graphs.layers import NORMS, build_mlp
from graphs.positions import ABSOLUTE, RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder, TransformerDecoderLayer
from graphs.vision import VisionEncoder


class _NoInit(TorchFunctionMode):
    """Leaves out what torch.nn.init would do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are built within have parameters with shapes and no storage.

    Random numbers are not drawn for them: for that alone torch would import its compiler, which takes half a second.
    """
    with torch.device("meta"), _NoInit():
        yield


def build_decoder(config: DecoderConfig) -> TransformerDecoder:
    """The decoder with uninitialised parameters, on torch's current default device (use `meta` to hold none)."""
    ropes = {kind.rope: _rope(kind.rope, config) for kind in config.layer_kinds.values() if kind.rope is not None}
    absolute = ABSOLUTE[config.position_embedding](config) if config.position_embedding else None
    return TransformerDecoder(
        tok_embeddings=nn.Embedding(config.embedding_size, config.hidden_size),
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
        num_patches=1 if config.vision is None else config.vision.num_patches,
    )


def build_vision_encoder(config: DecoderConfig) -> VisionEncoder:
    """The vision encoder of config.vision, down to the keys and values of the decoder's cross-attention layers."""
    assert config.vision is not None
    return VisionEncoder(config.vision, config.hidden_size, [cross.build(config) for _ in config.cross_layers])


def _layer(config: DecoderConfig, kind: LayerKind, ropes: dict[RopeConfig, RotaryPositionalEmbeddings]) -> nn.Module:
    if kind.attention == "cross":
        return TransformerCrossAttentionLayer(
            attn=cross.build(config),
            mlp=build_mlp(config, kind.experts),
            ca_norm=_norm(config),
            mlp_norm=_norm(config),
            ca_scale=TanhGate(),
            mlp_scale=TanhGate(),
        )
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
