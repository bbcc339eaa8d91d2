"""Quantized weights as export-llm writes them; docs/formats.md."""

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.checkpoint import Checkpoint, PackedTensor, StoredTensor, map_tensor
from graphs.errors import CheckpointError
from graphs.keys import short
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


def rows_first_parts(tensor: QuantizedTensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with outputs first, as ONNX Runtime's MatMulNBits reads it: codes of 8 bits, or two of 4 to a byte, the
    first in the low half, counted from the lowest; [N, G, bytes of a block].

    Zero points of 4 bits lie two to a byte, row by row; they are written only where not all are 0.
    """
    bits, block = tensor.format.grid.bits, tensor.format.block
    codes = _from_lowest(tensor.codes, bits)
    packed = codes if bits == 8 else _pack_rows(codes)
    stored = {"": packed.reshape(len(codes), -1, block * bits // 8), SCALE: tensor.scales.to(scale_dtype)}
    if tensor.zero_points is not None:
        points = _from_lowest(tensor.zero_points, bits)
        stored[ZERO_POINT] = points if bits == 8 else _pack_rows(points)
    return {suffix: part.contiguous() for suffix, part in stored.items()}


def _from_lowest(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _pack_rows(codes: Tensor) -> Tensor:
    """Two numbers of 4 bits to a byte within each row, which is filled up with 0; uint8 [N, ceil(n / 2)]."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _unpack_rows(packed: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each row."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :count]


def fits_rows_first(format: WeightFormat) -> bool:
    """Whether weights of that format may be stored with outputs first."""
    return format.name in ("int4", "int8") and format.block >= 16 and format.block & (format.block - 1) == 0


def rows_first_specs(
    shape: tuple[int, int], format: WeightFormat, scale_dtype: str, *, zero_points: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """part_specs, of what rows_first_parts returns."""
    outputs, inputs = shape
    groups, bits = format.scales_of(inputs), format.grid.bits
    specs: dict[str, tuple[str, tuple[int, ...]]] = {"": ("U8", (outputs, groups, format.block * bits // 8))}
    specs[SCALE] = (scale_dtype, (outputs, groups))
    if zero_points:
        specs[ZERO_POINT] = ("U8", (outputs, -(-groups * bits // 8)))
    return specs


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


def describe(
    format: WeightFormat,
    shape: tuple[int, int],
    *,
    zero_points: bool,
    rows_first: bool = False,
    joined: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What the header's metadata says of one weight.

    Args:
        rows_first: it is stored as rows_first_parts has it.
        joined: {name: outputs} of the weights that it holds, one after the other.
    """
    entry = {"format": format.name, "block": format.block, "shape": list(shape), "zero_points": zero_points}
    entry |= {"rows_first": True} if rows_first else {}
    return entry if joined is None else {**entry, "joined": dict(joined)}


def unpack(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what its files' metadata describes among `packed`; CheckpointError where that is damaged."""
    tensors, packed = dict(checkpoint.tensors), dict[str, PackedTensor]()
    for path in sorted({tensor.path for tensor in checkpoint.tensors.values()}):
        for label, entry in _read_metadata(path).items():
            try:
                packed |= _members(_take(label, entry, tensors), entry.get("joined"))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path}: the quantized weight {label} is damaged: {error!r}") from None
    return dataclasses.replace(checkpoint, tensors=tensors, packed=packed) if packed else checkpoint


def _read_metadata(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(header_bytes)).get("__metadata__") or {}
    try:
        entries = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
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
    rows_first = entry.get("rows_first", False)
    if not isinstance(entry["zero_points"], bool):
        raise ValueError(f"zero_points must be true or false, found {short(entry['zero_points'])}")
    if rows_first not in (False, fits_rows_first(format)):
        raise ValueError(f"{format} is not stored with outputs first")
    specs_of = rows_first_specs if rows_first else part_specs
    specs = specs_of((outputs, inputs), format, scale_dtype, zero_points=entry["zero_points"])
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
        read=functools.partial(_read_rows_first if rows_first else _read, stored, format, (outputs, inputs)),
        parts={} if rows_first else stored,
        of_outputs=outputs,
        outputs=(0, outputs),
    )


def _members(whole: PackedTensor, joined: Any) -> dict[str, PackedTensor]:
    """The weights that a stored one stands for, by their names: itself, or those it is made of."""
    if joined is None:
        return {whole.name: whole}
    if not isinstance(joined, dict) or sum(joined.values()) != whole.shape[0] or min(joined.values()) < 1:
        raise ValueError(f"the outputs of {joined} are not those of {list(whole.shape)}")
    assert whole.read is not None
    members, first = {}, 0
    for name, outputs in joined.items():
        members[name] = dataclasses.replace(
            whole,
            name=name,
            shape=(outputs, whole.shape[1]),
            nbytes=whole.nbytes * outputs // whole.shape[0],
            read=functools.partial(_read_rows, whole.read, first, first + outputs),
            outputs=(first, first + outputs),
        )
        first += outputs
    return members


def _read_rows(read: Callable[[], QuantizedTensor], first: int, end: int) -> QuantizedTensor:
    return read().rows(first, end)


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


def map_part(stored: StoredTensor) -> Tensor:
    """One of `parts` as it is stored, memory-mapped."""
    return map_tensor(stored, _TORCH[stored.dtype])


def _read_rows_first(
    stored: Mapping[str, StoredTensor], format: WeightFormat, shape: tuple[int, int]
) -> QuantizedTensor:
    (outputs, inputs), bits = shape, format.grid.bits
    groups = format.scales_of(inputs)

    def numbers(suffix: str, count: int) -> Tensor:
        packed = _load(stored[suffix]).reshape(outputs, -1)
        codes = packed if bits == 8 else _unpack_rows(packed, count)
        return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)

    return QuantizedTensor(
        format=format,
        codes=numbers("", inputs),
        scales=_load(stored[SCALE]).float(),
        zero_points=numbers(ZERO_POINT, groups) if ZERO_POINT in stored else None,
    )


def _load(stored: StoredTensor) -> Tensor:
    raw = np.fromfile(stored.path, np.uint8, stored.nbytes, offset=stored.offset)
    return torch.from_numpy(raw).view(_TORCH[stored.dtype]).reshape(stored.shape)
