"""Sliding-window attention: a query sees its own token and the window - 1 before it.

Longformer, arXiv:2004.05150, in the causal form of Mistral 7B, arXiv:2310.06825 section 2. The reference article's
listing is Longformer's own, whose window looks ahead as well: no decoder can use it. Keys and values keep a slot for
every token of the row, of which the mask shows a window: no runtime's attention operator takes a circular cache.
"""

from typing import Any

from torch import Tensor, nn

from graphs.attention.causal import CausalSelfAttention, softmax_arguments
from graphs.config import DecoderConfig, LayerKind
from graphs.state import StepContext


class SlidingWindowAttention(CausalSelfAttention):
    """CausalSelfAttention that sees `window` tokens at most."""

    window: int

    def __init__(self, *args: Any, window: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if window < 1:
            raise ValueError(f"window ({window}) must be at least 1")
        self.window = window

    def _narrow(self, mask: Tensor, distances_B1ST: Tensor) -> Tensor:
        return mask & (distances_B1ST < self.window)

    def _mask(self, context: StepContext) -> Tensor:
        return context.window_mask_B1ST(self.window)


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    assert kind.window is not None
    return SlidingWindowAttention(**softmax_arguments(config, pos_embeddings), window=kind.window)
