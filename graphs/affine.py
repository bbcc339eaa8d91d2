"""8-bit affine quantization of a whole tensor: q = round(x / scale + zero_point), x = scale * (q - zero_point).

arXiv:1712.05877 section 2.1. Unlike the symmetric formats of graphs/quantization.py, the codes cover just the tensor's
own range, so that nothing of an all-positive tensor's codes is wasted.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AffineTensor(NamedTuple):
    """codes: uint8, of x's shape; scale is above 0, and zero_point is a code, that of 0."""

    codes: Tensor
    scale: float
    zero_point: int


def quantize_affine(x: Tensor, num_bits: int = 8) -> AffineTensor:
    """The nearest codes 0 .. 2^num_bits - 1; 0 is always expressed exactly (padding and masks depend on it).

    Raises:
        ValueError: num_bits is not within 2 .. 8, or x holds a NaN or an infinity.
    """
    if not 2 <= num_bits <= 8:
        raise ValueError(f"num_bits must be from 2 to 8, got {num_bits}")
    wide = x.to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("x must be finite: a NaN or an infinity has no code")
    qmax = 2**num_bits - 1
    low = min(0.0, float(wide.min())) if wide.numel() else 0.0
    high = max(0.0, float(wide.max())) if wide.numel() else 0.0
    # a tensor of zeros has no range of its own; and below the smallest double, nothing could be divided
    scale = max((high - low) / qmax, torch.finfo(torch.float64).tiny) if high > low else 1.0
    zero_point = min(max(round(-low / scale), 0), qmax)
    codes = torch.clamp(torch.round(wide / scale + zero_point), 0, qmax).to(torch.uint8)
    return AffineTensor(codes, scale, zero_point)


def dequantize_affine(quantized: AffineTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * (codes - zero_point), rounded to `dtype` once."""
    return ((quantized.codes.to(torch.float64) - quantized.zero_point) * quantized.scale).to(dtype)
