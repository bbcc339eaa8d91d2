"""Round to nearest: the largest number of each block gets the format's largest code."""

import torch
from torch import Tensor

from exporter.quantizers.chunks import cat_rows, row_chunks
from graphs.quantization import QuantizedTensor, WeightFormat, largest_scales, with_scales


def quantize(weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """`weight` [N, K] with the scales of graphs.quantization.largest_scales."""
    scales, tensor_scale = largest_scales(weight, format, scale_dtype)
    chunks = (with_scales(weight[rows], scales[rows], format, tensor_scale) for rows in row_chunks(weight))
    return cat_rows(list(chunks))
