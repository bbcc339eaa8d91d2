"""Safetensors files in NumPy alone: the library's NumPy side has no bfloat16, and runtimes do without it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# dtype: (safetensors' name for it, how NumPy holds it; bfloat16 as the upper half of a float32)
_STORED: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
    "int64": ("I64", np.int64),
}
_DTYPES = {stored: dtype for dtype, (stored, _) in _STORED.items()}

Header = dict[str, Any]


def encode(parts: Iterable[tuple[str, str, np.ndarray]]) -> tuple[Header, bytearray]:
    """(header without metadata, data) of tensors: name, dtype, numbers."""
    header: Header = {}
    data = bytearray()
    for name, dtype, array in parts:
        encoded = _encode(array, dtype)
        offsets = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": _STORED[dtype][0], "shape": list(array.shape), "data_offsets": offsets}
        data += encoded
    return header, data


def join(header: Header, metadata: Mapping[str, str], data: bytearray) -> bytes:
    """The bytes of the file."""
    text = json.dumps(header | {"__metadata__": dict(metadata)}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def split(content: bytes) -> tuple[Header, dict[str, str], bytes]:
    """(header without metadata, metadata, data); ValueError, TypeError and the like where it is damaged."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    return header, metadata, content[start:]


def decode(header: Header, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, floats as float32, and their dtypes; ValueError, KeyError and the like where it is damaged."""
    arrays, dtypes = {}, {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        dtypes[name] = _DTYPES[entry["dtype"]]
        arrays[name] = _decode(data[first:end], dtypes[name]).reshape(entry["shape"])
    return arrays, dtypes


def _encode(array: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes; exact, where the numbers come from tensors of that dtype."""
    if dtype == "bfloat16":
        array = np.ascontiguousarray(array, np.float32).view(np.uint32) >> np.uint32(16)
    return np.ascontiguousarray(array, np.dtype(_STORED[dtype][1]).newbyteorder("<")).tobytes()


def _decode(data: bytes, dtype: str) -> np.ndarray:
    """The inverse, flat: floats as float32."""
    array = np.frombuffer(data, np.dtype(_STORED[dtype][1]).newbyteorder("<"))
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.int64 if dtype == "int64" else np.float32)
