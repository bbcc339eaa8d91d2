"""CausalSelfAttention: multi-head, grouped-query and multi-query attention, one implementation.

Letters in shapes: B batch, S new tokens, T keys that may be seen, M cache capacity, H query heads, K key/value heads,
D head dimension, E embedding dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs import ops
from graphs.kv_cache import KVCache
from graphs.positions import RotaryPositionalEmbeddings


class StepContext(NamedTuple):
    """What every layer of one call shares: made once per graph."""

    rope: tuple[Tensor, Tensor]  # cos and sin, each [B, S, D/2]
    mask: Tensor  # bool [B, 1, S, T]: which key each query sees
    write_indices: Tensor  # int64 [B]: slot of the first new token in each row's cache


LayerCache = tuple[Tensor, Tensor]  # key, value: each [B, K, M, D]


class CausalSelfAttention(nn.Module):
    """Multi-headed grouped-query self-attention, arXiv:2305.13245, with torchtune's interface.

    num_kv_heads = num_heads (or None) gives multi-head, 1 gives multi-query attention.

    Args:
        embed_dim: width of x.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, width of each.
        q_proj, k_proj, v_proj, output_proj: the projections.
        pos_embeddings: called as pos_embeddings(x [b, s, n_h, h_d], input_pos=...).
        kv_cache: keys and values of earlier calls; absent, nothing is remembered.
        max_seq_len: longest x that is accepted.
        attn_dropout: dropout of the attention weights, in training only.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, embed_dim is none of num_heads, attn_dropout lies outside
            [0, 1], or a projection's width does not fit the heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        pos_embeddings: nn.Module,
        kv_cache: KVCache | None = None,
        max_seq_len: int = 4096,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if not 0.0 <= attn_dropout <= 1.0:
            raise ValueError(f"attn_dropout ({attn_dropout}) must lie between 0 and 1")
        widths = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        for (name, heads), projection in zip(widths.items(), (q_proj, k_proj, v_proj), strict=True):
            if isinstance(projection, nn.Linear) and projection.out_features != heads * head_dim:
                raise ValueError(
                    f"{name} gives {projection.out_features} features, expected {heads} heads of {head_dim}:"
                    f" {heads * head_dim}"
                )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.attn_dropout = attn_dropout
        self.scale = 1 / math.sqrt(head_dim)
        self.kv_cache = kv_cache
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.pos_embeddings = pos_embeddings

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerCache | None = None,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """torchtune's call: x [b, s, d] -> [b, s, d]. With `context` and `past`, see _step.

        mask is bool, [b, s, keys] or [b, 1, s, keys] (any of them may be 1 to broadcast); without it attention is
        causal. input_pos [s] gives the positions, and is needed when there is a KV cache.

        Raises:
            ValueError: s is above max_seq_len, or there is a KV cache and no input_pos.
        """
        if context is not None and past is not None:
            return self._step(x, context, past)
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"seq_len ({length}) of the input is bigger than max_seq_len ({self.max_seq_len})")
        if input_pos is not None and input_pos.shape[-1] != length:
            raise ValueError(f"input_pos has shape {tuple(input_pos.shape)}, expected ({length},)")
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q_BHSD = self.pos_embeddings(q, input_pos=input_pos).transpose(1, 2)
        k_BKTD = self.pos_embeddings(k, input_pos=input_pos).transpose(1, 2)
        v_BKTD = v.transpose(1, 2)
        positions = torch.arange(length, device=x.device)
        if self.kv_cache is not None:
            if input_pos is None:
                raise ValueError("a KV cache is set up, but input_pos is missing")
            k_BKTD, v_BKTD = self.kv_cache.update(input_pos, k_BKTD, v_BKTD)
            positions = input_pos
        if mask is None:
            mask = positions[:, None] >= torch.arange(k_BKTD.shape[2], device=x.device)
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape) if mask.dim() < 3 else mask
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        if self.training and self.attn_dropout:
            out = F.scaled_dot_product_attention(
                q_BHSD, k_BKTD, v_BKTD, mask, self.attn_dropout, scale=self.scale, enable_gqa=True
            )
        else:
            out = ops.attention(q_BHSD, k_BKTD, v_BKTD, mask, self.scale)
        return self.output_proj(ops.merge_heads(out))

    def _step(self, x: Tensor, context: StepContext, past: LayerCache) -> tuple[Tensor, LayerCache]:
        """The exported call, with an explicit cache: (x [B, S, E], past) -> (output [B, S, E], present).

        It goes through forward, and so through __call__, because tracing names nodes after the modules called.
        """
        assert isinstance(self.pos_embeddings, RotaryPositionalEmbeddings)
        q_BHSD = ops.split_heads(self.q_proj(x), self.head_dim)
        k_BKSD = ops.split_heads(self.k_proj(x), self.head_dim)
        v_BKSD = ops.split_heads(self.v_proj(x), self.head_dim)
        q_BHSD = self.pos_embeddings.rotate(q_BHSD, context.rope)
        k_BKSD = self.pos_embeddings.rotate(k_BKSD, context.rope)
        key = ops.update_kv_cache(past[0], k_BKSD, context.write_indices)
        value = ops.update_kv_cache(past[1], v_BKSD, context.write_indices)
        out = ops.attention(q_BHSD, key, value, context.mask, self.scale)
        return self.output_proj(ops.merge_heads(out)), (key, value)
