"""CausalSelfAttention: single-head, multi-head, multi-query and grouped-query attention, one implementation.

The configurations: one head (num_heads = 1); a key/value head for each query head (arXiv:1706.03762); one for all of
them (arXiv:1911.02150); one for each group of them (arXiv:2305.13245). Scores are scaled by 1 / sqrt(head_dim): the
reference article's MQA and GQA listings divide by sqrt(dim), have no causal mask and use q, k, v before they exist.

Letters in shapes: B batch, S new tokens, T keys that may be seen, M cache capacity, H query heads, K key/value heads,
D head dimension, E embedding dimension.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs import ops
from graphs.config import DecoderConfig, LayerKind
from graphs.kv_cache import KVCache
from graphs.layers import NORMS
from graphs.positions import RotaryPositionalEmbeddings
from graphs.state import FusedContext, LayerState, StateTensor, StepContext

FUSED_HEAD_MULTIPLE = 16  # group_query_attention turns heads of such widths only, in ONNX Runtime


class CausalSelfAttention(nn.Module):
    """Multi-headed grouped-query self-attention, arXiv:2305.13245, with torchtune's interface.

    num_kv_heads = num_heads (or None) gives multi-head, 1 gives multi-query attention.

    Args:
        embed_dim: width of x.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, width of each.
        q_proj, k_proj, v_proj, output_proj: the projections.
        pos_embeddings: called as pos_embeddings(x [b, s, n_h, h_d], input_pos=...); None: queries and keys stay as
            they are.
        kv_cache: keys and values of earlier calls; absent, nothing is remembered.
        max_seq_len: longest x that is accepted.
        attn_dropout: dropout of the attention weights, in training only.
        q_norm, k_norm: applied to each query and key head, before the positions (arXiv:2302.05442 section 2.2).
        scale: multiplies q.k; 1 / sqrt(head_dim) unless given.
        softcap: scores become softcap * tanh(scores / softcap); 0: they do not.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, embed_dim is none of num_heads, attn_dropout lies outside
            [0, 1], or a projection's width does not fit the heads.
    """

    window: int | None = None  # tokens that a query sees, its own included; None: all before it

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
        pos_embeddings: nn.Module | None,
        kv_cache: KVCache | None = None,
        max_seq_len: int = 4096,
        attn_dropout: float = 0.0,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if not 0.0 <= attn_dropout <= 1.0:
            raise ValueError(f"attn_dropout ({attn_dropout}) must lie between 0 and 1")
        if attn_dropout and softcap:
            raise ValueError(f"attn_dropout ({attn_dropout}) must be 0: it is not implemented together with a softcap")
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
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.softcap = softcap
        self.kv_cache = kv_cache
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.pos_embeddings = pos_embeddings

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """Keys and values of max_len slots."""
        shape = (self.num_kv_heads, max_len, self.head_dim)
        return (StateTensor("key", shape, slot_axis=1), StateTensor("value", shape, slot_axis=1))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerState | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
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
        q, k = self._normalise(q, k)
        if self.pos_embeddings is not None:
            q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        q_BHSD, k_BKTD, v_BKTD = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        slots = key_slots = torch.arange(length, device=x.device) if input_pos is None else input_pos
        if self.kv_cache is not None:
            if input_pos is None:
                raise ValueError("a KV cache is set up, but input_pos is missing")
            k_BKTD, v_BKTD = self.kv_cache.update(input_pos, k_BKTD, v_BKTD)
            key_slots = torch.arange(k_BKTD.shape[2], device=x.device)
        distances_BST = (slots[..., :, None] - key_slots[..., None, :]).expand(x.shape[0], -1, -1)
        if mask is None and self.kv_cache is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        elif mask is None:
            mask = distances_BST >= 0
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape) if mask.dim() < 3 else mask
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        mask = self._narrow(mask, distances_BST.unsqueeze(1))
        if self.training and self.attn_dropout:
            out = F.scaled_dot_product_attention(
                q_BHSD, k_BKTD, v_BKTD, mask, self.attn_dropout, scale=self.scale, enable_gqa=True
            )
        else:
            out = self._attend(q_BHSD, k_BKTD, v_BKTD, mask, lambda: distances_BST)
        return self.output_proj(ops.merge_heads(out))

    def _step(self, x: Tensor, context: StepContext, past: LayerState) -> tuple[Tensor, LayerState]:
        """The exported call, with an explicit cache: (x [B, S, E], past) -> (output [B, S, E], present).

        It goes through forward, and so through __call__, because tracing names nodes after the modules called.
        """
        if isinstance(context, FusedContext):
            return self._fused_step(x, context, past)
        q_BHSD = ops.split_heads(self.q_proj(x), self.head_dim)
        k_BKSD = ops.split_heads(self.k_proj(x), self.head_dim)
        v_BKSD = ops.split_heads(self.v_proj(x), self.head_dim)
        q_BHSD, k_BKSD = self._normalise(q_BHSD, k_BKSD)
        rope = self.pos_embeddings
        if rope is not None:
            assert isinstance(rope, RotaryPositionalEmbeddings)
            tables = self._tables(rope, context, x.dtype)
            q_BHSD, k_BKSD = rope.rotate(q_BHSD, tables), rope.rotate(k_BKSD, tables)
        key, value = context.updated(past[0], k_BKSD), context.updated(past[1], v_BKSD)
        out = self._attend(q_BHSD, key, value, self._mask(context), lambda: context.distances_BST)
        return self.output_proj(ops.merge_heads(out)), (key, value)

    def _fused_step(self, x: Tensor, context: FusedContext, past: LayerState) -> tuple[Tensor, LayerState]:
        """The same in one operator, up to what that cannot do."""
        q_BSE, k_BSE = self.q_proj(x), self.k_proj(x)
        rope, tables, interleaved = self.pos_embeddings, (None, None), False
        assert rope is None or isinstance(rope, RotaryPositionalEmbeddings)
        if rope is not None and (rope.rope.depends_on_length or self.head_dim % FUSED_HEAD_MULTIPLE):
            turning = self._tables(rope, context, x.dtype)
            heads = self._normalise(*(ops.split_heads(each, self.head_dim) for each in (q_BSE, k_BSE)))
            q_BSE, k_BSE = (ops.merge_heads(rope.rotate(each, turning)) for each in heads)
        else:
            if self.q_norm is not None:
                heads = self._normalise(*(each.unflatten(-1, (-1, self.head_dim)) for each in (q_BSE, k_BSE)))
                q_BSE, k_BSE = (each.flatten(2) for each in heads)
            if rope is not None:
                interleaved = rope.rope.interleaved
                tables = context.once(("all", rope.rope, x.dtype), lambda: _all_tables(rope, context, x.dtype))
        lengths = (context.seqlens_k, context.total_sequence_length)
        out, key, value = ops.group_query_attention(
            q_BSE,
            k_BSE,
            self.v_proj(x),
            *past,
            *lengths,
            *tables,
            self.head_dim,
            interleaved,
            self.scale,
            self.softcap,
            self.window or 0,
        )
        return self.output_proj(out), (key, value)

    def _tables(
        self, rope: RotaryPositionalEmbeddings, context: StepContext, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of this call's tokens, made once for all layers that are alike."""
        lengths = context.lengths_B if rope.rope.depends_on_length else None
        return context.once((rope.rope, dtype), lambda: rope.tables(context.position_ids, dtype, lengths))

    def _normalise(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Over the last dimension, D."""
        return (q if self.q_norm is None else self.q_norm(q)), (k if self.k_norm is None else self.k_norm(k))

    # What a variant changes: which keys are seen, in torchtune's call and in the exported one, and how they are scored.

    def _narrow(self, mask: Tensor, distances_B1ST: Tensor) -> Tensor:
        return mask

    def _mask(self, context: StepContext) -> Tensor:
        return context.mask_B1ST

    def _attend(
        self, q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, mask: Tensor, distances_BST: Callable[[], Tensor]
    ) -> Tensor:
        return ops.attention(q_BHSD, k_BKMD, v_BKMD, mask, self.scale, self.softcap)


def _all_tables(rope: RotaryPositionalEmbeddings, context: FusedContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each [max_len, dim / 2]."""
    cos, sin = rope.tables(context.every_position, dtype)
    return cos[0], sin[0]


def projections(config: DecoderConfig) -> dict[str, nn.Module]:
    """q_proj, k_proj, v_proj and output_proj of the config's widths."""
    hidden = config.hidden_size
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": nn.Linear(hidden, q_dim, bias=config.attention_bias),
        "k_proj": nn.Linear(hidden, kv_dim, bias=config.attention_bias),
        "v_proj": nn.Linear(hidden, kv_dim, bias=config.attention_bias),
        "output_proj": nn.Linear(q_dim, hidden, bias=config.attention_output_bias),
    }


def softmax_arguments(config: DecoderConfig, pos_embeddings: nn.Module | None) -> dict[str, Any]:
    """What CausalSelfAttention and its variants are made with."""
    norm = NORMS[config.norm]
    return {
        "embed_dim": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        **projections(config),
        "pos_embeddings": pos_embeddings,
        "max_seq_len": config.max_position_embeddings,
        "q_norm": norm(config.head_dim, config.norm_eps) if config.qk_norm else None,
        "k_norm": norm(config.head_dim, config.norm_eps) if config.qk_norm else None,
        "scale": config.attention_scale,
        "softcap": config.attn_logit_softcapping or 0.0,
    }


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    return CausalSelfAttention(**softmax_arguments(config, pos_embeddings))
