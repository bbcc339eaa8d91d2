"""Quantized weights as export-llm writes them; docs/formats.md."""

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.checkpoint import Checkpoint, PackedTensor, StoredTensor
from graphs.errors import CheckpointError
from graphs.quantization import GRIDS, QuantizedTensor, WeightFormat, pack_nibbles, unpack_nibbles

METADATA_KEY = "export_llm.quantization"  # of a safetensors header's __metadata__
SCALE, ZERO_POINT, TENSOR_SCALE = "_scale", "_zero_point", "_scale_2"  # behind the weight's name
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def parts(tensor: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix of the name: what is stored} of a quantized weight; inputs come first, as a MatMul reads it: [K, N].

    Codes of 4 bits lie two to a byte, the first in the low half, in the order of [K, N].
    """
    codes = tensor.codes.t().contiguous()
    if tensor.format.grid.bits == 4:
        codes = pack_nibbles(codes)
    scales = tensor.scales.t()
    stored = {"": codes, SCALE: scales.to(torch.float8_e4m3fn if tensor.format.has_tensor_scale else scale_dtype)}
    if tensor.zero_points is not None:
        zero_points = tensor.zero_points.t()
        stored[ZERO_POINT] = pack_nibbles(zero_points) if tensor.format.grid.bits == 4 else zero_points
    if tensor.format.has_tensor_scale:
        stored[TENSOR_SCALE] = torch.tensor(tensor.tensor_scale, dtype=torch.float32)
    if not tensor.format.block:  # one scale for each output
        stored = {suffix: part if suffix == "" else part.flatten() for suffix, part in stored.items()}
    return {suffix: part.contiguous() for suffix, part in stored.items()}


def part_specs(
    shape: tuple[int, int], format: WeightFormat, scale_dtype: str, *, zero_points: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{suffix: (safetensors dtype, shape)} of what `parts` returns for a weight [N, K] = shape."""
    outputs, inputs = shape
    groups = (format.scales_of(inputs), outputs) if format.block else (outputs,)
    packed = format.grid.bits == 4
    codes = ("U8", (_bytes_of(shape),)) if packed else ("F8_E4M3" if format.name == "fp8" else "I8", (inputs, outputs))
    specs: dict[str, tuple[str, tuple[int, ...]]] = {"": codes}
    specs[SCALE] = ("F8_E4M3" if format.has_tensor_scale else scale_dtype, groups)
    if zero_points:
        specs[ZERO_POINT] = ("U8", (_bytes_of(groups),)) if packed else ("I8", groups)
    if format.has_tensor_scale:
        specs[TENSOR_SCALE] = ("F32", ())
    return specs


def _bytes_of(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 2)


def describe(format: WeightFormat, shape: tuple[int, int], *, zero_points: bool) -> dict[str, Any]:
    """What the header's metadata says of one weight."""
    return {"format": format.name, "block": format.block, "shape": list(shape), "zero_points": zero_points}


def unpack(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what its files' metadata describes among `packed`; CheckpointError where that is damaged."""
    tensors, packed = dict(checkpoint.tensors), {}
    for path in sorted({tensor.path for tensor in checkpoint.tensors.values()}):
        for label, entry in _read_metadata(path).items():
            try:
                packed[label] = _take(label, entry, tensors)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path}: the quantized weight {label} is damaged: {error!r}") from None
    return dataclasses.replace(checkpoint, tensors=tensors, packed=packed) if packed else checkpoint


def _read_metadata(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(header_bytes)).get("__metadata__") or {}
    try:
        entries = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: {METADATA_KEY} in its header is damaged")
    return entries


def _take(label: str, entry: Any, tensors: dict[str, StoredTensor]) -> PackedTensor:
    """Move one weight's parts from `tensors` into a PackedTensor."""
    format = WeightFormat(name=entry["format"], block=entry["block"])
    outputs, inputs = shape = tuple(entry["shape"])
    if format.name not in GRIDS or format.block not in (0, *range(8, 1025)) or inputs % (format.block or 1):
        raise ValueError(f"unknown format {entry}")
    scale_dtype = tensors[label + SCALE].dtype
    specs = part_specs((outputs, inputs), format, scale_dtype, zero_points=entry["zero_points"])
    stored = {}
    for suffix, (dtype, part_shape) in specs.items():
        part = tensors.pop(label + suffix)
        if (part.dtype, part.shape) != (dtype, part_shape):
            raise ValueError(f"{label + suffix} is {part.dtype} {list(part.shape)}, expected {dtype} {part_shape}")
        stored[suffix] = part
    return PackedTensor(
        name=label,
        shape=shape,
        kind=f"export-llm {format}",
        nbytes=sum(part.nbytes for part in stored.values()),
        format=format,
        asymmetric=entry["zero_points"],
        dtype="F32" if format.has_tensor_scale else scale_dtype,
        read=functools.partial(_read, stored, format, (outputs, inputs)),
    )


def _read(stored: Mapping[str, StoredTensor], format: WeightFormat, shape: tuple[int, int]) -> QuantizedTensor:
    outputs, inputs = shape
    groups = format.scales_of(inputs)
    codes = _load(stored[""])
    zero_points = _load(stored[ZERO_POINT]) if ZERO_POINT in stored else None
    if format.grid.bits == 4:
        signed = format.name == "int4"
        codes = unpack_nibbles(codes, outputs * inputs, signed=signed).reshape(inputs, outputs)
        if zero_points is not None:
            zero_points = unpack_nibbles(zero_points, outputs * groups, signed=signed).reshape(groups, outputs)
    return QuantizedTensor(
        format=format,
        codes=codes.t(),
        scales=_load(stored[SCALE]).float().reshape(groups, outputs).t(),
        zero_points=None if zero_points is None else zero_points.reshape(groups, outputs).t(),
        tensor_scale=float(_load(stored[TENSOR_SCALE])) if TENSOR_SCALE in stored else 1.0,
    )


def _load(stored: StoredTensor) -> Tensor:
    raw = np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.offset)
    return torch.from_numpy(raw).view(_TORCH[stored.dtype]).reshape(stored.shape)
