"""AFT-simple: no position biases; arXiv:2105.14103 section 3.2, w = 0. Its state does not grow with the text."""

import torch
from torch import Tensor, nn

from graphs.attention.attention_free import (
    AttentionFree,
    aft_projections,
    divide,
    refuse_mask,
    rescale,
    sums_state,
)
from graphs.config import DecoderConfig, LayerKind
from graphs.state import LayerState, StateTensor, StepContext


class AFTSimpleAttention(AttentionFree):
    """y_t = sigmoid(q_t) * sum_t'<=t exp(k_t') v_t' / sum_t'<=t exp(k_t').

    The state is both sums, scaled by exp(-peak), where peak is the largest key so far.
    """

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """Three numbers for each channel, whatever max_len is."""
        return sums_state(self.embed_dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        *,
        context: StepContext | None = None,
        past: LayerState | None = None,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """x [b, s, d] -> [b, s, d]; with an explicit state, also the layer's present. mask must be None."""
        if context is not None and past is not None:
            mixed, present = self._mix(x, context.valid_BS, past)
            return self._gate(x, mixed), present
        refuse_mask(mask)
        past = tuple(tensor.zeros(x.shape[0], x.dtype, x.device) for tensor in self.state(0))
        mixed, _ = self._mix(x, x.new_ones(x.shape[:2], dtype=torch.bool), past)
        return self._gate(x, mixed)

    def _mix(self, x: Tensor, valid_BS: Tensor, past: LayerState) -> tuple[Tensor, LayerState]:
        wide = past[0].dtype
        v_BSE = self.v_proj(x).to(wide)
        k_BSE = self.k_proj(x).to(wide).masked_fill(~valid_BS.unsqueeze(-1), float("-inf"))
        numerator, denominator, peak, _ = rescale(past, k_BSE)
        weights = torch.exp(k_BSE - peak.unsqueeze(1))
        numerators = numerator.unsqueeze(1) + (weights * v_BSE).cumsum(dim=1)
        denominators = denominator.unsqueeze(1) + weights.cumsum(dim=1)
        return divide(numerators, denominators), (numerators[:, -1], denominators[:, -1], peak)


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    return AFTSimpleAttention(config.hidden_size, **aft_projections(config))
