"""Quantized weights: which formats there are, and what a code stands for.

A weight [N, K] (outputs, inputs) has one code for each number, and one scale for each run of `block` inputs of one
output: weight = scale * (value of the code - zero point). Formats say which values the codes have.

    int8, int4: whole numbers.
    fp8: float8 e4m3, arXiv:2209.05433.
    nvfp4: float4 e2m1 in blocks of 16, whose scales are float8 e4m3 themselves and share a second scale for the whole
        tensor.

N outputs, K inputs, G scales of each output: K / block, or 1.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest float8 e4m3
# What the sixteen codes of float4 e2m1 stand for; the upper eight are the lower eight's negatives.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that the codes of a format can have."""

    bits: int
    lowest: float
    largest: float  # what the largest weight of a block is mapped to
    blocks: tuple[int, ...]  # that may be asked for; 0: one scale for each output
    block: int  # without being asked


GRIDS: dict[str, Grid] = {
    "int8": Grid(bits=8, lowest=-128, largest=127, blocks=(0, 16, 32, 64, 128), block=0),
    "int4": Grid(bits=4, lowest=-8, largest=7, blocks=(16, 32, 64, 128), block=32),
    "fp8": Grid(bits=8, lowest=-FP8_MAX, largest=FP8_MAX, blocks=(0,), block=0),
    "nvfp4": Grid(bits=4, lowest=-6, largest=6, blocks=(NVFP4_BLOCK,), block=NVFP4_BLOCK),
}


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a weight is quantized."""

    name: str  # a key of GRIDS
    block: int  # inputs that share a scale; 0: all of an output's

    @property
    def grid(self) -> Grid:
        """The values of the codes."""
        return GRIDS[self.name]

    @property
    def has_tensor_scale(self) -> bool:
        """True where scales are float8, and a second scale multiplies them all."""
        return self.name == "nvfp4"

    def scales_of(self, inputs: int) -> int:
        """G, for a weight of so many inputs."""
        return inputs // self.block if self.block else 1

    def __str__(self) -> str:
        return f"{self.name}/{self.block}" if self.block else self.name


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized weight in memory.

    codes [N, K]: int8 holding whole numbers (int8, int4) or indices into e2m1's sixteen values (nvfp4), or
    float8_e4m3fn. scales float32 [N, G]. zero_points int8 [N, G], or None where all are 0. tensor_scale multiplies all
    scales; 1 but for nvfp4, whose `scales` are then numbers that float8 e4m3 can express.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    tensor_scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], every step computed in `dtype`."""
        values = code_values(self.codes, self.format, dtype).unflatten(1, (self.scales.shape[1], -1))
        if self.zero_points is not None:
            values = values - self.zero_points.to(dtype)[..., None]
        scales = self.scales.to(dtype) * self.tensor_scale
        return (values * scales[..., None]).flatten(1)

    def rows(self, first: int, end: int) -> "QuantizedTensor":
        """Some of its outputs."""
        zero_points = None if self.zero_points is None else self.zero_points[first:end]
        return dataclasses.replace(
            self, codes=self.codes[first:end], scales=self.scales[first:end], zero_points=zero_points
        )


def join_outputs(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One weight [N1 + N2 + .., K] of several that are quantized alike."""
    first, *others = tensors
    if not others:
        return first
    assert all(tensor.format == first.format and tensor.tensor_scale == first.tensor_scale for tensor in others)
    zero_points = [tensor.zero_points for tensor in tensors if tensor.zero_points is not None]
    assert len(zero_points) in (0, len(tensors))
    return dataclasses.replace(
        first,
        codes=torch.cat([tensor.codes for tensor in tensors]),
        scales=torch.cat([tensor.scales for tensor in tensors]),
        zero_points=torch.cat(zero_points) if zero_points else None,
    )


def code_values(codes: Tensor, format: WeightFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for, before any scale."""
    if format.name != "nvfp4":
        return codes.to(dtype)
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=dtype)
    return table[codes.int()]


def nearest_codes(values: Tensor, format: WeightFormat) -> Tensor:
    """The codes of the values (already divided by their scales) that lie nearest; ties to the even code."""
    if format.name == "fp8":
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if format.name == "nvfp4":
        # steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; round() takes ties to the even one
        m = values.abs().clamp(max=FP4_VALUES[-1])
        index = torch.where(m < 2, (2 * m).round(), torch.where(m < 4, m.round() + 2, (m / 2).round() + 4))
        return (index + 8 * (values < 0)).to(torch.int8)
    return values.round().clamp(format.grid.lowest, format.grid.largest).to(torch.int8)


def with_scales(weight: Tensor, scales: Tensor, format: WeightFormat, tensor_scale: float = 1.0) -> QuantizedTensor:
    """`weight` [N, K] rounded to the nearest codes, for symmetric scales [N, G]."""
    groups = weight.float().unflatten(1, (scales.shape[1], -1))
    codes = nearest_codes(groups / (scales * tensor_scale)[..., None], format).flatten(1)
    return QuantizedTensor(format=format, codes=codes, scales=scales, tensor_scale=tensor_scale)


def largest_scales(weight: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> tuple[Tensor, float]:
    """(scales [N, G], tensor scale) that map the largest number of each block to the grid's largest value.

    Scales are numbers that scale_dtype (nvfp4: float8 e4m3) can express, and above 0.
    """
    magnitudes = weight.float().unflatten(1, (format.scales_of(weight.shape[1]), -1)).abs().amax(dim=2)
    return round_scales(magnitudes / format.grid.largest, format, scale_dtype)


def round_scales(scales: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> tuple[Tensor, float]:
    """(scales, tensor scale) near float32 `scales`, as they can be stored."""
    if format.has_tensor_scale:
        # NVIDIA's recipe: the largest block scale becomes float8's largest number
        tensor_scale = max(float(scales.max()) / FP8_MAX, torch.finfo(torch.float32).tiny)
        return storable(scales / tensor_scale, format, scale_dtype), tensor_scale
    return storable(scales, format, scale_dtype), 1.0


def storable(scales: Tensor, format: WeightFormat, scale_dtype: torch.dtype) -> Tensor:
    """The scales that can be stored nearest to these, above 0; nvfp4's beside a tensor scale that is fixed already."""
    if format.has_tensor_scale:
        smallest = 2.0**-9  # of float8 e4m3
        return scales.clamp(smallest, FP8_MAX).to(torch.float8_e4m3fn).float()
    # a block of zeros has any scale; one that 16 bits cannot express would divide by zero
    return scales.clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits in memory order, two to a byte, the first in the low half; uint8 [ceil(n / 2)]. ONNX INT4."""
    flat = codes.flatten().view(torch.uint8) & 0xF
    if len(flat) % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return flat[0::2] | (flat[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int, *, signed: bool) -> Tensor:
    """The first `count` codes of pack_nibbles' result, int8."""
    flat = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten()[:count].view(torch.int8)
    return (flat ^ 8) - 8 if signed else flat
