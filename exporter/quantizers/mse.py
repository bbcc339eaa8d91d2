"""Scales that minimise the squared error of each block, found by search."""

import torch
from torch import Tensor

from exporter.quantizers.chunks import cat_rows, row_chunks
from graphs.quantization import (
    QuantizedTensor,
    WeightFormat,
    code_values,
    largest_scales,
    nearest_codes,
    storable,
    with_scales,
)

# Tried in turn, times the scale that maps a block's largest number to the largest code. Below 1 the largest numbers are
# cut off and all others are finer; 7/8 maps the largest to int4's lowest code, -8. Above 1 the numbers may happen to
# lie nearer to codes; e2m1's codes are denser below its largest (at 1.5, the largest number becomes 4 and not 6).
FACTORS = (1.0, 0.875, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5)
REFINEMENTS = 2


def quantize(weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """`weight` [N, K] with scales of the least squared error found; no block's is above that of rounding to nearest."""
    return quantize_weighted(weight, format, scale_dtype, None)


def quantize_weighted(
    weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype, importance_K: Tensor | None
) -> QuantizedTensor:
    """The same where the squared errors of an input count `importance_K` times."""
    starts, tensor_scale = largest_scales(weight, format, scale_dtype)
    importance = None if importance_K is None else importance_K.unflatten(0, (starts.shape[1], -1))
    parts = []
    for rows in row_chunks(weight):
        groups = weight[rows].float().unflatten(1, (starts.shape[1], -1))
        scales = search_scales(groups, starts[rows], format, scale_dtype, tensor_scale, importance)
        parts.append(with_scales(weight[rows], scales, format, tensor_scale))
    return cat_rows(parts)


def search_scales(
    groups: Tensor,
    starts: Tensor,
    format: WeightFormat,
    scale_dtype: torch.dtype,
    tensor_scale: float,
    importance: Tensor | None = None,
) -> Tensor:
    """The best scales found [N, G] for groups [N, G, B]; `starts` [N, G] are among those tried.

    Args:
        importance: [G, B], by which squared errors are multiplied.
    """
    best, best_error, best_values = starts, torch.full_like(starts, float("inf")), torch.empty_like(groups)

    def consider(scales: Tensor) -> None:
        nonlocal best, best_error, best_values
        whole = (scales * tensor_scale)[..., None]
        values = code_values(nearest_codes(groups / whole, format), format)
        squares = (groups - values * whole).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(dim=2)
        better = error < best_error
        best, best_error = torch.where(better, scales, best), torch.where(better, error, best_error)
        best_values = torch.where(better[..., None], values, best_values)

    for factor in FACTORS:
        consider(starts if factor == 1.0 else storable(starts * factor, format, scale_dtype))
    for _ in range(REFINEMENTS):
        # least squares: the scale that fits these codes best
        weighted = best_values if importance is None else best_values * importance
        fitted = (weighted * groups).sum(dim=2) / (weighted * best_values).sum(dim=2).clamp(min=1e-30) / tensor_scale
        consider(torch.where(fitted > 0, storable(fitted, format, scale_dtype), best))
    return best
