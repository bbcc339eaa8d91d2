"""Attention variants, one file each; all have the call of CausalSelfAttention."""

from collections.abc import Callable

from torch import nn

from graphs.attention import aft_full, aft_local, aft_simple, alibi, causal, linformer, sliding_window, sparse_top_k
from graphs.config import DecoderConfig, LayerKind

# LayerKind.attention: makes the layer from the config, its kind and its rotary embedding (None: no rotation)
ATTENTION: dict[str, Callable[[DecoderConfig, LayerKind, nn.Module | None], nn.Module]] = {
    "causal": causal.build,
    "sliding_window": sliding_window.build,
    "alibi": alibi.build,
    "sparse_top_k": sparse_top_k.build,
    "linformer": linformer.build,
    "aft_full": aft_full.build,
    "aft_local": aft_local.build,
    "aft_simple": aft_simple.build,
}
