"""ALiBi: attention scores fall linearly with distance, by a slope of each head's own; arXiv:2108.12409.

Positions enter nowhere else, so texts may be longer than those of training. The article gives no listing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.attention.causal import CausalSelfAttention, softmax_arguments
from graphs.config import DecoderConfig, LayerKind
from graphs.fixed_buffers import FixedBuffers


def alibi_slopes(num_heads: int) -> Tensor:
    """float32 [num_heads] on the CPU: 2^(-8/n), 2^(-16/n), .. for a power of two n.

    For other numbers of heads, the slopes of the next lower power of two n and then every second one of 2 n: the
    authors' own code, github.com/ofirpress/attention_with_linear_biases.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


class ALiBiAttention(CausalSelfAttention, FixedBuffers):
    """CausalSelfAttention whose scores lose slope * (slots between query and key)."""

    slopes: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pos_embeddings is not None:
            raise ValueError("ALiBi takes the place of other positions: pos_embeddings must be None")
        if self.attn_dropout:
            raise ValueError(f"attn_dropout ({self.attn_dropout}) must be 0: it is not implemented for ALiBi")
        self._register()

    def real_buffers(self) -> dict[str, Tensor]:
        """The buffers' values, on the CPU."""
        return {"slopes": alibi_slopes(self.num_heads)}

    def _attend(
        self, q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, mask: Tensor, distances_BST: Callable[[], Tensor]
    ) -> Tensor:
        distances = distances_BST().to(torch.float32)
        return ops.attention(
            q_BHSD, k_BKMD, v_BKMD, mask, self.scale, self.softcap, slopes=self.slopes, distances=distances
        )


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    return ALiBiAttention(**softmax_arguments(config, pos_embeddings))
