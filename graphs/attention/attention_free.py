"""What the three Attention Free Transformers share; arXiv:2105.14103.

    y_t = sigmoid(q_t) * sum_t'<=t exp(k_t' + w_t,t') v_t' / sum_t'<=t exp(k_t' + w_t,t')

element by element: each of the E channels is a head of its own. q, k and v are E wide. t counts a row's slots.

The reference article's three listings sum over the whole text, t' > t included: no decoder can. These follow the
paper's causal form. Exponentials are float32 and taken relative to the largest key of the call (and of the state), so
a channel's keys may differ by some 80 within one call before the smallest of them are lost.

Letters in shapes: B batch, S new tokens, T slots that may be seen, E embedding dimension, W window.
"""

import torch
from torch import Tensor, nn

from graphs.config import DecoderConfig
from graphs.state import LayerState, StateTensor


class AttentionFree(nn.Module):
    """Projections and gate; a subclass says how values are mixed."""

    def __init__(
        self, embed_dim: int, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, output_proj: nn.Module
    ) -> None:
        super().__init__()
        for name, projection in {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj}.items():
            if isinstance(projection, nn.Linear) and projection.out_features != embed_dim:
                raise ValueError(f"{name} gives {projection.out_features} features, expected embed_dim: {embed_dim}")
        self.embed_dim = embed_dim
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj

    def _gate(self, x: Tensor, mixed: Tensor) -> Tensor:
        """sigmoid(q) * mixed, projected."""
        wide = torch.sigmoid(self.q_proj(x).to(mixed.dtype)) * mixed
        return self.output_proj(wide.to(x.dtype))


def first_slot(input_pos: Tensor | None) -> Tensor | int:
    """Where a text begins that is given without a cache: [b, 1], or one number for all rows."""
    if input_pos is None:
        return 0
    return input_pos[..., :1].reshape(-1, 1)


def rescale(sums: LayerState, k_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(numerator, denominator, peak, bool: nothing was in them) of sums that these keys are about to join.

    Sums are kept times exp(-peak), where peak is the largest key so far; keys of -inf are padding.
    """
    numerator, denominator, peak = sums
    nothing = denominator == 0
    new_peak = finite_or_zero(torch.maximum(peak.masked_fill(nothing, float("-inf")), k_BLE.amax(dim=1)))
    carried = torch.exp(peak - new_peak).masked_fill(nothing, 0.0)
    return numerator * carried, denominator * carried, new_peak, nothing


def sums_state(embed_dim: int) -> tuple[StateTensor, ...]:
    """The sums that `rescale` takes: three numbers for each channel."""
    return tuple(StateTensor(name, (embed_dim,), None, float32=True) for name in ("numerator", "denominator", "peak"))


def refuse_mask(mask: Tensor | None) -> None:
    """ValueError: there is no matrix of scores that a mask could apply to."""
    if mask is not None:
        raise ValueError("attention-free layers are always causal: mask must be None")


def finite_or_zero(largest: Tensor) -> Tensor:
    """A maximum over nothing, -inf, as 0: then exp(-inf - 0) is 0 and not NaN."""
    return torch.where(largest == float("-inf"), 0.0, largest)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The weighted mean; 0 for padding that sees nothing."""
    return numerator / torch.where(denominator == 0, 1.0, denominator)


def aft_projections(config: DecoderConfig) -> dict[str, nn.Module]:
    """The four square projections."""
    hidden, bias = config.hidden_size, config.attention_bias
    names = ("q_proj", "k_proj", "v_proj")
    linears: dict[str, nn.Module] = {name: nn.Linear(hidden, hidden, bias=bias) for name in names}
    return linears | {"output_proj": nn.Linear(hidden, hidden, bias=config.attention_output_bias)}
