"""AFT-full: a learned bias for each pair of positions; arXiv:2105.14103 section 3.1.

The bias is factorised, w_t,t' = a_t . b_t', as in the paper's section 3.2 (parameterization). Every pair has a bias
of its own, so no sum can be carried on: the state is a key and a value for each slot.
"""

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.attention.attention_free import (
    AttentionFree,
    aft_projections,
    divide,
    finite_or_zero,
    refuse_mask,
)
from graphs.config import DecoderConfig, LayerKind
from graphs.state import LayerState, StateTensor, StepContext


class AFTFullAttention(AttentionFree):
    """y_t = sigmoid(q_t) * sum_t'<=t exp(k_t' + w_t,t') v_t' / sum_t'<=t exp(k_t' + w_t,t').

    query_bias and key_bias [max_seq_len, rank] hold a and b.
    """

    def __init__(self, embed_dim: int, max_seq_len: int, rank: int, **projections: nn.Module) -> None:
        super().__init__(embed_dim, **projections)
        self.max_seq_len = max_seq_len
        self.query_bias = nn.Embedding(max_seq_len, rank)
        self.key_bias = nn.Embedding(max_seq_len, rank)

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """Keys and values of max_len slots, as of one head that is embed_dim wide."""
        shape = (1, max_len, self.embed_dim)
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
        """x [b, s, d] -> [b, s, d]; with an explicit state, also the layer's present. mask must be None.

        Without a state, input_pos are the tokens' slots.

        Raises:
            ValueError: a mask is given, or s is above max_seq_len.
        """
        k_BSE, v_BSE = self.k_proj(x), self.v_proj(x)
        if context is not None and past is not None:
            key = ops.update_kv_cache(past[0], k_BSE.unsqueeze(1), context.write_indices)
            value = ops.update_kv_cache(past[1], v_BSE.unsqueeze(1), context.write_indices)
            slots_T = context.key_slots_T
            k_BTE, v_BTE = (cache.squeeze(1).index_select(1, slots_T) for cache in (key, value))
            seen = context.mask_B1ST.squeeze(1)
            return self._gate(x, self._mix(k_BTE, v_BTE, seen, context.slots_BS, slots_T[None])), (key, value)
        refuse_mask(mask)
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"seq_len ({length}) of the input is bigger than max_seq_len ({self.max_seq_len})")
        slots = torch.arange(length, device=x.device) if input_pos is None else input_pos
        slots = slots.reshape(-1, length)
        seen = (slots.unsqueeze(1) <= slots.unsqueeze(2)).expand(x.shape[0], -1, -1)
        return self._gate(x, self._mix(k_BSE, v_BSE, seen, slots, slots))

    def _mix(self, k_BTE: Tensor, v_BTE: Tensor, seen_BST: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, S, E]; queries [B or 1, S] and keys [B or 1, T] are slots."""
        wide = torch.promote_types(k_BTE.dtype, torch.float32)
        used = seen_BST.any(dim=1).unsqueeze(-1)  # slots that no query sees may hold anything
        k_BTE = k_BTE.to(wide).masked_fill(~used, float("-inf"))
        v_BTE = v_BTE.to(wide).masked_fill(~used, 0.0)
        exp_k = torch.exp(k_BTE - finite_or_zero(k_BTE.amax(dim=1, keepdim=True)))
        bias = self.query_bias(queries).to(wide) @ self.key_bias(keys).to(wide).transpose(1, 2)
        bias = bias.expand(seen_BST.shape).masked_fill(~seen_BST, float("-inf"))
        exp_w = torch.exp(bias - finite_or_zero(bias.amax(dim=-1, keepdim=True)))
        return divide(exp_w @ (exp_k * v_BTE), exp_w @ exp_k)


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    return AFTFullAttention(
        config.hidden_size, config.max_position_embeddings, config.aft_rank, **aft_projections(config)
    )
