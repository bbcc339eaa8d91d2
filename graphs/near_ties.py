"""Choices that rounding can turn: which experts a token gets, which keys it uses.

Where the last thing chosen and the first one left out are nearly equal, a runtime may choose the other one and be
right. How far that moves a result is seen by computing a reference with all such choices made the other way.
"""

from torch import Tensor, nn


class Chooser(nn.Module):
    """A module that keeps the best k of something."""

    # Relative difference below which the k-th and the next choice change places; 0 chooses as the model does. Only a
    # reference sets it.
    swap_margin: float = 0.0

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """Indices [.., k] of the best scores, with near ties at the end swapped by swap_margin."""
        picked = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
        chosen = picked.indices[..., :k].clone()
        if self.swap_margin and picked.indices.shape[-1] > k:
            last, next_best = picked.values[..., k - 1], picked.values[..., k]
            near = last - next_best <= self.swap_margin * last.abs().maximum(next_best.abs())
            near &= next_best.isfinite()  # -inf: something that may not be chosen
            chosen[..., -1] = picked.indices[..., k].where(near, chosen[..., -1])
        return chosen
