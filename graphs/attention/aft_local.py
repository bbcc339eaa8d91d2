"""AFT-local: learned position biases within a window, none beyond; arXiv:2105.14103 section 3.2.

Tokens beyond the window still count, with w = 0 as in the paper. The reference article's listing gives them
w = -inf, which hides them, and multiplies its parameter by a mask that it then fills in place.

The state is the window's keys and values, and the sums of AFT-simple over all tokens before it: it does not grow.
"""

import torch
from torch import Tensor, nn

from graphs.attention.attention_free import (
    AttentionFree,
    aft_projections,
    divide,
    finite_or_zero,
    first_slot,
    refuse_mask,
    rescale,
    sums_state,
)
from graphs.config import DecoderConfig, LayerKind
from graphs.state import LayerState, StateTensor, StepContext


class AFTLocalAttention(AttentionFree):
    """As AFT-full, with w_t,t' learned for t - t' < window, and 0 elsewhere.

    position_bias [max_seq_len, window] holds w_t,t-d at [t, d].
    """

    def __init__(self, embed_dim: int, max_seq_len: int, window: int, **projections: nn.Module) -> None:
        super().__init__(embed_dim, **projections)
        if window < 2:
            raise ValueError(f"window ({window}) must be at least 2: a token and one before it")
        self.max_seq_len = max_seq_len
        self.window = window
        self.position_bias = nn.Embedding(max_seq_len, window)

    def state(self, max_len: int) -> tuple[StateTensor, ...]:
        """The last window - 1 keys and values, and three numbers for each channel, whatever max_len is."""
        window = (self.window - 1, self.embed_dim)
        return (StateTensor("key", window, None), StateTensor("value", window, None), *sums_state(self.embed_dim))

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

        Without a state, the row begins at slot input_pos[0].

        Raises:
            ValueError: a mask is given, or s is above max_seq_len.
        """
        if context is not None and past is not None:
            before = context.once(("window slots", self.window), lambda: self._valid_before(context))
            mixed, present = self._mix(x, context.slots_BS, context.valid_BS, before, past)
            return self._gate(x, mixed), present
        refuse_mask(mask)
        batch, length = x.shape[:2]
        if length > self.max_seq_len:
            raise ValueError(f"seq_len ({length}) of the input is bigger than max_seq_len ({self.max_seq_len})")
        slots = (first_slot(input_pos) + torch.arange(length, device=x.device)[None]).expand(batch, -1)
        past = tuple(tensor.zeros(batch, x.dtype, x.device) for tensor in self.state(0))
        valid = x.new_ones((batch, self.window - 1 + length), dtype=torch.bool)
        mixed, _ = self._mix(x, slots, valid[:, self.window - 1 :], ~valid[:, : self.window - 1], past)
        return self._gate(x, mixed)

    def _valid_before(self, context: StepContext) -> Tensor:
        """bool [B, W - 1]: which of the slots before each row's first new token hold a token that may be seen."""
        back = torch.arange(self.window - 1, device=context.write_indices.device) - (self.window - 1)
        slots = context.write_indices[:, None] + back
        held = context.attention_mask.gather(1, slots.clamp(min=0, max=context.attention_mask.shape[1] - 1))
        return (held != 0) & (slots >= 0)

    def _mix(
        self, x: Tensor, slots_BS: Tensor, valid_BS: Tensor, before_BW: Tensor, past: LayerState
    ) -> tuple[Tensor, LayerState]:
        """([B, S, E], present). The window's tokens and the new ones stand in one row, L = W - 1 + S."""
        old_key, old_value, *sums = past
        window, length = self.window, x.shape[1]
        wide = sums[0].dtype
        key = torch.cat((old_key, self.k_proj(x)), dim=1)
        value = torch.cat((old_value, self.v_proj(x)), dim=1)
        valid_BL = torch.cat((before_BW, valid_BS), dim=1)
        k_BLE = key.to(wide).masked_fill(~valid_BL.unsqueeze(-1), float("-inf"))
        v_BLE = value.to(wide).masked_fill(~valid_BL.unsqueeze(-1), 0.0)

        numerator, denominator, peak, nothing = rescale(tuple(sums), k_BLE)
        exp_k = torch.exp(k_BLE - peak.unsqueeze(1))

        # query i stands at place W - 1 + i; d places back it sees the token at place W - 1 + i - d
        back_SL = torch.arange(length, device=x.device)[:, None] + (window - 1)
        back_SL = back_SL - torch.arange(window - 1 + length, device=x.device)
        bias_BSW = self.position_bias(slots_BS).to(wide)
        near = back_SL.clamp(min=0, max=window - 1).expand(x.shape[0], -1, -1)
        bias_BSL = torch.where(back_SL < window, bias_BSW.gather(2, near), 0.0)
        bias_BSL = bias_BSL.masked_fill((back_SL < 0) | ~valid_BL.unsqueeze(1), float("-inf"))
        bias_B11 = torch.where(nothing[:, :1], float("-inf"), 0.0).unsqueeze(1)  # of the sums
        top_BS1 = finite_or_zero(torch.maximum(bias_BSL.amax(dim=-1, keepdim=True), bias_B11))
        exp_w, carry_BS1 = torch.exp(bias_BSL - top_BS1), torch.exp(bias_B11 - top_BS1)
        numerators = exp_w @ (exp_k * v_BLE) + carry_BS1 * numerator.unsqueeze(1)
        denominators = exp_w @ exp_k + carry_BS1 * denominator.unsqueeze(1)

        # the next call's window ends at the row's last valid token; what lies before it joins the sums
        ends_BS = valid_BS * torch.arange(1, length + 1, device=x.device)
        count_B11 = ends_BS.amax(dim=1).reshape(-1, 1, 1)
        stay = (torch.arange(window - 1, device=x.device)[:, None] + count_B11).expand(-1, -1, self.embed_dim)
        leave = (torch.arange(window - 1 + length, device=x.device)[:, None] < count_B11).to(wide)
        present = (
            key.gather(1, stay),
            value.gather(1, stay),
            numerator + (leave * exp_k * v_BLE).sum(dim=1),
            denominator + (leave * exp_k).sum(dim=1),
            peak,
        )
        return divide(numerators, denominators), present


def build(config: DecoderConfig, kind: LayerKind, pos_embeddings: nn.Module | None) -> nn.Module:
    """The variant for a layer of this kind."""
    assert kind.window is not None
    return AFTLocalAttention(config.hidden_size, config.max_position_embeddings, kind.window, **aft_projections(config))
