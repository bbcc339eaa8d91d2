"""Linformer: keys and values are projected from the text's length to k rows; arXiv:2006.04768 section 4.

Every query sees a mixture of all tokens, later ones included, so it has no causal incremental form: it is for encoders,
and exports as a graph without state.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor, nn

from graphs.config import DecoderConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.state import LayerState, StepContext


class LinformerAttention(nn.Module):
    """softmax(Q (E K)^T / sqrt(d)) (F V) for each head; E and F [k, max_seq_len] are shared by the heads.

    A shorter text uses the first columns of E and F, as if it were padded with zero keys. The reference article's
    listing cannot run (`max_seq_len: -`, an undefined n), adds a bias to the projection of the length, pads queries,
    and leaves out the output projection.

    Raises:
        ValueError: embed_dim is no multiple of num_heads, or k is not between 1 and max_seq_len.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_seq_len: int,
        k: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if not 1 <= k <= max_seq_len:
            raise ValueError(f"k ({k}) must be at least 1 and at most max_seq_len ({max_seq_len})")
        self.head_dim = embed_dim // num_heads
        self.max_seq_len = max_seq_len
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.proj_e = nn.Parameter(torch.randn(k, max_seq_len) / math.sqrt(k))  # the paper's N(0, 1/k)
        self.proj_f = nn.Parameter(torch.randn(k, max_seq_len) / math.sqrt(k))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerState | None = None,
    ) -> Tensor:
        """x [b, s, d] -> [b, s, d]; mask bool [b, s] is False for padding, whose keys and values count as zero.

        Raises:
            ValueError: there is a decoding state (Linformer has none), or s is above max_seq_len.
        """
        if context is not None or past is not None:
            raise ValueError("Linformer has no causal incremental form: it cannot be used in a decoder")
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"seq_len ({length}) of the input is bigger than max_seq_len ({self.max_seq_len})")
        k, v = self.k_proj(x), self.v_proj(x)
        if mask is not None:
            k, v = k * mask.unsqueeze(-1), v * mask.unsqueeze(-1)
        rows = torch.arange(length, device=x.device)
        k = self.proj_e.index_select(1, rows) @ k  # [b, k, d]
        v = self.proj_f.index_select(1, rows) @ v
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (t.to(wide).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (self.q_proj(x), k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.head_dim), dim=-1)
        return self.output_proj((weights @ v).transpose(1, 2).flatten(2).to(x.dtype))


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """CheckpointError: a decoder cannot be made of it."""
    refuse_decoder()


def refuse_decoder() -> NoReturn:
    """CheckpointError, with what to do instead."""
    raise CheckpointError(
        "attention linformer has no causal incremental form, so there is no decoder with it: every query sees a mixture"
        " of the whole text. Export the layer alone, without state: exporter.stateless.export_stateless"
    )
