"""Sparse top-k attention: a query uses only the k keys with the best scores.

Explicit Sparse Transformer, arXiv:1912.11637 section 2, in causal form: the reference article's listing chooses among
all keys, later ones included, and drops the last queries when their number is no multiple of its chunks. As in the
paper, the k-th best score is a threshold: keys that tie with it are used as well, so the result does not depend on an
order among equals. The article cuts queries into chunks to save memory, which changes no number; runtimes do so
themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.attention.causal import CausalSelfAttention, softmax_arguments
from graphs.config import DecoderConfig, LayerKind
from graphs.near_ties import Chooser


class SparseTopKAttention(CausalSelfAttention, Chooser):
    """CausalSelfAttention over the top_k best keys; fewer where a query sees fewer."""

    def __init__(self, *args: Any, top_k: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if top_k < 1:
            raise ValueError(f"top_k ({top_k}) must be at least 1")
        if self.attn_dropout:
            raise ValueError(f"attn_dropout ({self.attn_dropout}) must be 0: it is not implemented for sparse top-k")
        self.top_k = top_k

    def _attend(
        self, q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, mask: Tensor, distances_BST: Callable[[], Tensor]
    ) -> Tensor:
        if self.swap_margin:
            return self._attend_swapped(q_BHSD, k_BKMD, v_BKMD, mask)
        return ops.attention(q_BHSD, k_BKMD, v_BKMD, mask, self.scale, self.softcap, top_k=self.top_k)

    def _attend_swapped(self, q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, mask: Tensor) -> Tensor:
        """The same with near ties swapped: each head sees only what it chose."""
        heads = []
        for head in range(self.num_heads):
            shared = head // (self.num_heads // self.num_kv_heads)
            q, k, v = q_BHSD[:, head : head + 1], k_BKMD[:, shared : shared + 1], v_BKMD[:, shared : shared + 1]
            scores = (q @ k[:, :, : mask.shape[-1]].transpose(-1, -2)).masked_fill(~mask, float("-inf"))
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen = chosen.scatter(-1, self.choose(scores, min(self.top_k, scores.shape[-1])), True)
            heads.append(ops.attention(q, k, v, mask & chosen, self.scale, self.softcap))
        return torch.cat(heads, dim=1)


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    assert kind.top_k is not None
    return SparseTopKAttention(**softmax_arguments(config, pos_embeddings), top_k=kind.top_k)
