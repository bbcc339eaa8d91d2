"""Weights a few rows at a time, so that what is computed from them takes little memory."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphs.quantization import QuantizedTensor

CHUNK_NUMBERS = 1 << 20  # 4 MB of float32, and some times that for what is computed from them


def row_chunks(weight: Tensor, numbers: int = CHUNK_NUMBERS) -> Iterator[slice]:
    """Runs of rows of `weight` [N, K] that hold so many numbers at most; one row at least."""
    step = max(1, numbers // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        yield slice(first, min(first + step, weight.shape[0]))


def cat_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One weight of the rows of several, which share a tensor scale and have no zero points."""
    codes = torch.cat([part.codes.view(torch.int8) for part in parts]).view(parts[0].codes.dtype)
    return dataclasses.replace(parts[0], codes=codes, scales=torch.cat([part.scales for part in parts]))
