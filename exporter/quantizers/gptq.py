"""GPTQ, arXiv:2210.17323: a weight's inputs are quantized one by one, and those that remain make up for the error.

Two additions. Inputs are taken in the order of their size, block by block: a block's scales are chosen when it is
entered, for the weights as they are then. And the weight is first fitted to the inputs that it will really get, those
that quantized layers compute, so that it gives for them what the original gave for the original ones
(GPTAQ, arXiv:2504.02692): errors of earlier layers are mended instead of passed on.

Shapes: N outputs, K inputs.
"""

import torch
from torch import Tensor

from exporter.errors import ExportError
from exporter.quantizers import mse
from exporter.quantizers.chunks import cat_rows, row_chunks
from exporter.quantizers.streaming import NOT_FINITE, StreamedLayer
from graphs.quantization import QuantizedTensor, WeightFormat, code_values, largest_scales, nearest_codes, storable

DAMPING = 0.03  # times the mean of the Hessian's diagonal, which is added to it: little text says little
MENDING = 0.5  # how much of the earlier layers' error is mended; all of it would follow this text too closely
BATCH = 128  # inputs after which all remaining ones are updated (section 3.3); a multiple of every block
CHUNK_NUMBERS = 1 << 24  # of a weight at a time: 64 MB of float32; each chunk costs a pass over all inputs
TOKENS_PER_INPUT = 1 / 8  # an expert that saw fewer has no Hessian worth the name


class Moments:
    """Second moments of a linear's inputs x: the Hessian of its squared error up to a factor.

    hessian: the mean of x^T x. drift: that of (original x - x)^T x, or None where originals are not known.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.tokens = 0
        self.hessian = torch.zeros(0)
        self.drift: Tensor | None = None

    def add(self, x: Tensor, original: Tensor | None) -> None:
        """Take in float32 [tokens, inputs]."""
        if not self.tokens:
            self.hessian = x.new_zeros(self.inputs, self.inputs)
            self.drift = None if original is None else torch.zeros_like(self.hessian)
        tokens = self.tokens + len(x)
        # means, not sums: they stay of one size, however long the text is
        self.hessian.addmm_(x.T, x, beta=self.tokens / tokens, alpha=1 / tokens)
        if original is not None and self.drift is not None:
            self.drift.addmm_((original - x).T, x, beta=self.tokens / tokens, alpha=1 / tokens)
        self.tokens = tokens


def quantize_layer(layer: StreamedLayer) -> None:
    """Quantize a layer's linears in the order in which they are computed."""
    for stage in layer.stages():
        groups = [group for group in stage if any(layer.format(name) for name in group)]
        if not groups:
            continue
        observed = layer.observe(groups, Moments)
        for group in groups:
            moments = observed.pop(group)
            for name in group:
                format = layer.format(name)
                if format is not None:
                    weight = layer.linear(name).weight
                    layer.put(f"{name}.weight", _quantize_linear(weight, moments, format, layer.scale_dtype))


def _quantize_linear(
    weight: Tensor, moments: Moments, format: WeightFormat, scale_dtype: torch.dtype
) -> QuantizedTensor:
    if moments.tokens < moments.inputs * TOKENS_PER_INPUT:
        return mse.quantize(weight, format, scale_dtype)
    return quantize(weight, moments.hessian, format, scale_dtype, drift=moments.drift)


def quantize(
    weight: Tensor,
    hessian: Tensor,
    format: WeightFormat,
    scale_dtype: torch.dtype,
    *,
    drift: Tensor | None = None,
) -> QuantizedTensor:
    """`weight` [N, K] quantized, for inputs of those Moments."""
    block = format.block or weight.shape[1]
    order = column_order(hessian.diagonal(), block)
    factor = inverse_factor(hessian, order)
    drift = None if drift is None else drift[order][:, order]
    _, tensor_scale = largest_scales(weight, format, scale_dtype)
    back, blocks_back = torch.argsort(order), torch.argsort(order[::block] // block)
    parts = []
    for rows in row_chunks(weight, CHUNK_NUMBERS):
        columns = weight[rows].float()[:, order]
        if drift is not None:
            # the least squares fit to the original results is W (hessian + drift) hessian^-1: W and this
            columns = columns + MENDING * (columns @ drift @ factor.T @ factor)
        codes, scales = _feed_errors_forward(columns.T.contiguous(), factor, format, scale_dtype, tensor_scale)
        codes = codes.view(torch.int8)[back].T.contiguous().view(codes.dtype)
        scales = scales[blocks_back].T.contiguous()
        parts.append(QuantizedTensor(format=format, codes=codes, scales=scales, tensor_scale=tensor_scale))
    return cat_rows(parts)


def column_order(sizes_K: Tensor, block: int) -> Tensor:
    """The order of quantizing inputs: blocks by their mean size, and within one by size; the largest first.

    What is quantized first has the most weights left to make up for its error, but a block's inputs stay together.
    """
    of_blocks = sizes_K.unflatten(0, (-1, block))
    within = torch.argsort(of_blocks, dim=1, descending=True, stable=True)
    blocks = torch.argsort(of_blocks.mean(dim=1), descending=True, stable=True)
    return (within[blocks] + block * blocks[:, None]).flatten()


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U with U^T U = the inverse of the hessian, damped and with inputs in that order.

    Row j of U serves to quantize the order's j-th input. The paper inverts the hessian and factors the inverse;
    factoring first, from the last input to the first, and inverting the factor gives the same U, and loses half as many
    digits.

    Raises:
        ExportError: the hessian has an infinity or a NaN in it.
    """
    if not torch.isfinite(hessian).all():
        raise ExportError(NOT_FINITE)
    backwards = order.flip(0)
    step = DAMPING * (float(hessian.diagonal().mean()) or 1.0)
    failed = True
    while failed:
        damped = hessian[backwards][:, backwards]
        damped.diagonal().add_(step)
        lower, info = torch.linalg.cholesky_ex(damped)
        failed, step = bool(info), step * 10  # if it failed, float32 had too few digits for so little damping
    del damped  # of a wide layer each of these is large
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
    del lower, unit
    return inverse.flip(0, 1)


def _feed_errors_forward(
    w_KN: Tensor, factor: Tensor, format: WeightFormat, scale_dtype: torch.dtype, tensor_scale: float
) -> tuple[Tensor, Tensor]:
    """(codes [K, N], scales [G, N]) of a weight, input by input; w_KN is used up. Section 3.3's algorithm."""
    inputs, outputs = w_KN.shape
    block = format.block or inputs
    pivots = factor.diagonal()
    # what an error of an input costs once all later ones have done their best, times a constant
    costs = pivots.square().reciprocal()
    costs = costs / costs.mean()
    codes = w_KN.new_empty((inputs, outputs), dtype=torch.float8_e4m3fn if format.name == "fp8" else torch.int8)
    scales = w_KN.new_empty((inputs // block, outputs))
    for first in range(0, inputs, BATCH):
        end = min(first + BATCH, inputs)
        errors = torch.empty_like(w_KN[first:end])
        for j in range(first, end):
            if j % block == 0:
                group = w_KN[j : j + block].T.contiguous().unsqueeze(1)  # [N, 1, B], up to date: see BATCH
                largest = group.abs().amax(dim=2) / format.grid.largest / tensor_scale
                start = storable(largest, format, scale_dtype)
                found = mse.search_scales(group, start, format, scale_dtype, tensor_scale, costs[None, j : j + block])
                scales[j // block] = found[:, 0]
            scale = scales[j // block] * tensor_scale
            codes[j] = nearest_codes(w_KN[j] / scale, format)
            error = (w_KN[j] - code_values(codes[j], format) * scale) / pivots[j]
            w_KN[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - first] = error
        w_KN[end:].addmm_(factor[first:end, end:].T, errors, alpha=-1)
    return codes, scales
