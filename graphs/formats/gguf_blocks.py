"""What ggml's types look like in a file, and how their bytes become numbers.

A quantized row is a run of blocks, each with a 16-bit scale of its own. The layouts:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h.

N rows, G blocks in a row, then the bytes of a block or the numbers in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphs.quantization import QuantizedTensor, WeightFormat


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """How a type is stored, and what it can be taken over as."""

    name: str
    block: int  # numbers
    block_bytes: int
    dtype: str  # safetensors' name of the float dtype that the numbers, or their scales, have
    format: WeightFormat | None = None
    codes: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # blocks: (codes [N, K], scales [N, scales])
    numbers: Callable[[Tensor, torch.dtype], Tensor] | None = None  # blocks and the dtype to compute in: [N, K]
    negative_scales: bool = False  # scales may be below 0, where flipping all codes would leave the format
    reason: str = ""  # why there is no format


def _halves(blocks: Tensor, first: int) -> Tensor:
    """float32 [N, G]: the float16 at byte `first` of each block."""
    return blocks[..., first : first + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of some bytes, then their high halves."""
    return torch.cat((packed & 0xF, packed >> 4), dim=-1)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """w = d (q - 8)."""
    return _tidy(_nibbles(blocks[..., 2:]).to(torch.int8) - 8, _halves(blocks, 0), lowest=-8)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """w = d q."""
    return _tidy(blocks[..., 2:].view(torch.int8), _halves(blocks, 0), lowest=-128)


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """w = d s (q - 32), with one s for each 16 numbers; d s is exact in float32.

    The low four bits of 128 numbers are the low, then the high halves of 64 bytes; their upper two bits lie in 32
    bytes, four numbers in each, 32 apart.
    """
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    codes = (low | (high << 4)).to(torch.int8) - 32
    scales = _halves(blocks, 208)[..., None] * blocks[..., 192:208].view(torch.int8).float()
    return _tidy(codes.flatten(1).unflatten(1, (-1, 16)), scales.flatten(1), lowest=-128)


def _tidy(codes: Tensor, scales: Tensor, *, lowest: int) -> tuple[Tensor, Tensor]:
    """(codes [N, K], scales): the same numbers, with scales above 0 where it can be: TensorRT takes no others.

    It cannot be where a scale is below 0 and the lowest code is among its codes: that one's negative has no code.
    """
    if bool((scales < 0).any()):
        flipped = (scales < 0) & (codes.amin(-1) > lowest)
        if bool(flipped.any()):
            codes, scales = torch.where(flipped[..., None], -codes, codes), torch.where(flipped, -scales, scales)
    zero = scales == 0
    if bool(zero.any()):
        codes, scales = codes.masked_fill(zero[..., None], 0), scales.masked_fill(zero, 1.0)
    return codes.flatten(1), scales


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """w = d q + m."""
    scale, minimum = (_halves(blocks, first).to(dtype)[..., None] for first in (0, 2))
    return (scale * _nibbles(blocks[..., 4:]).to(dtype) + minimum).flatten(1)


# number of the type in the file; https://github.com/ggml-org/ggml/blob/master/include/ggml.h, enum ggml_type
GGML_TYPES = {
    0: GgmlType(name="F32", block=1, block_bytes=4, dtype="F32"),
    1: GgmlType(name="F16", block=1, block_bytes=2, dtype="F16"),
    30: GgmlType(name="BF16", block=1, block_bytes=2, dtype="BF16"),
    2: GgmlType(
        name="Q4_0",
        block=32,
        block_bytes=18,
        dtype="F16",
        format=WeightFormat(name="int4", block=32),
        codes=_q4_0,
        negative_scales=True,
    ),
    3: GgmlType(
        name="Q4_1",
        block=32,
        block_bytes=20,
        dtype="F16",
        numbers=_q4_1,
        reason="its blocks have a minimum beside their scale",
    ),
    8: GgmlType(
        name="Q8_0",
        block=32,
        block_bytes=34,
        dtype="F16",
        format=WeightFormat(name="int8", block=32),
        codes=_q8_0,
    ),
    14: GgmlType(
        name="Q6_K",
        block=256,
        block_bytes=210,
        dtype="F32",  # a scale is the product of a float16 and 8 bits
        format=WeightFormat(name="int8", block=16),
        codes=_q6_k,
    ),
}


def read_blocks(kind: GgmlType, path: Path, offset: int, shape: tuple[int, int], rows: Tensor | None) -> Tensor:
    """uint8 [N, G, bytes]: the blocks of a tensor, mapped; with `rows`, in that order and copied."""
    outputs, inputs = shape
    blocks = (outputs, inputs // kind.block, kind.block_bytes)
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=blocks))
    return mapped if rows is None else mapped[rows]


def read_codes(
    kind: GgmlType, path: Path, offset: int, shape: tuple[int, int], rows: Tensor | None = None
) -> QuantizedTensor:
    """A tensor of a type that has a format."""
    assert kind.format is not None
    assert kind.codes is not None
    codes, scales = kind.codes(read_blocks(kind, path, offset, shape, rows))
    return QuantizedTensor(format=kind.format, codes=codes, scales=scales)


def read_numbers(
    dtype: torch.dtype, *, kind: GgmlType, path: Path, offset: int, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """A tensor of a type that has none, computed in `dtype`."""
    assert kind.numbers is not None
    return kind.numbers(read_blocks(kind, path, offset, shape, rows), dtype)
