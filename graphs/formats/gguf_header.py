"""The header of a GGUF file: its metadata and where each tensor lies, every count and length checked before its use.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's GGUFReader is not used: it
goes on for as long as an array claims to be, and takes nine seconds for the vocabulary of Llama 3.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs.errors import CheckpointError
from graphs.files import why_no_file
from graphs.keys import MAX_DIM, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors' data, where general.alignment does not say otherwise
MAX_ENTRIES = 1 << 20  # of metadata, or tensors
MAX_ARRAY = 1 << 22  # elements; the largest vocabularies have 262,144 tokens
MAX_TENSOR_DIMS = 4  # GGML_MAX_DIMS

# type of a value in the metadata: how it is stored
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What the header says of a tensor: `offset` from the start of the file; `shape` in torch's order."""

    name: str
    type_id: int  # of ggml
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file holds."""

    path: Path
    file_bytes: int
    metadata: Mapping[str, Any]  # numbers, strings, booleans, and lists of them
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path) -> Header:
    """Read the header; tensors' ends are not checked, which depend on their types.

    Raises:
        CheckpointError: the file is absent, no GGUF file, truncated, or its header contradicts itself.
    """
    if reason := why_no_file(path):  # a pipe would never answer
        raise CheckpointError(f"{path} cannot be read: {reason}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Cursor:
    """Reads a file from the start on; CheckpointError where it ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or not a GGUF file (truncated download?): {problem}")

    def take(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self.damaged(f"{what} would end at byte {end} of {len(self.data)}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """A number of things that follow, each of at least so many bytes."""
        number = self.number("<Q", what)
        if number > min(most, (len(self.data) - self.position) // least_bytes):
            raise self.damaged(f"{what} is {number}, more than the file can hold")
        return number

    def number(self, format: str, what: str) -> int:
        (value,) = struct.unpack(format, self.take(struct.calcsize(format), what))
        return int(value)

    def string(self, what: str) -> str:
        raw = self.take(self.number("<Q", f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not text in UTF-8") from None


def _parse(path: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(path, data)
    magic = cursor.take(4, "its first four bytes")
    if magic != MAGIC:
        raise cursor.damaged(f"it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        hint = ": written for big-endian machines" if version & 0xFFFF == 0 and version else ""
        raise CheckpointError(
            f"{path} is GGUF version {version}{hint}; supported: {', '.join(map(str, VERSIONS))}, little-endian."
            " Convert it with llama.cpp's current tools"
        )
    tensor_count = cursor.count("the number of tensors", MAX_ENTRIES, 24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("the number of metadata keys", MAX_ENTRIES, 13)):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.damaged(f"{short(key)} is there twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"the type of {key}"), key)
    infos = [_tensor(cursor) for _ in range(tensor_count)]
    names = {info.name for info in infos}
    if len(names) < len(infos):
        raise cursor.damaged("two of its tensors have the same name")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= MAX_DIM or alignment % 8:
        raise cursor.damaged(f"general.alignment is {short(alignment)}, expected a multiple of 8")
    start = -(-cursor.position // alignment) * alignment
    for info in infos:
        if info.offset % alignment:
            raise cursor.damaged(f"tensor {info.name} lies at {info.offset}, expected a multiple of {alignment}")
    return Header(
        path=path,
        file_bytes=len(data),
        metadata=metadata,
        tensors=tuple(
            TensorInfo(name=info.name, type_id=info.type_id, shape=info.shape, offset=start + info.offset)
            for info in infos
        ),
    )


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    """A metadata value of the given type."""
    if kind == STRING:
        return cursor.string(key)
    if kind == ARRAY:
        element = cursor.number("<I", f"the type of {key}'s elements")
        if element == STRING:
            return [cursor.string(key) for _ in range(cursor.count(f"the length of {key}", MAX_ARRAY, 8))]
        if element in SCALARS:
            dtype = np.dtype(SCALARS[element])
            count = cursor.count(f"the length of {key}", MAX_ARRAY, dtype.itemsize)
            return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype).tolist()
        raise cursor.damaged(f"{key} is an array of values of type {element}, which is not supported")
    if kind not in SCALARS:
        raise cursor.damaged(f"{key} has a value of type {kind}, which does not exist")
    dtype = np.dtype(SCALARS[kind])
    value = np.frombuffer(cursor.take(dtype.itemsize, key), dtype)[0]
    # the decimal number that a float32 was written as: 1e-05, not 9.999999747378752e-06
    return float(str(value)) if dtype == np.float32 else value.item()


def _tensor(cursor: _Cursor) -> TensorInfo:
    """One entry of the table of tensors; the offset counts from the start of the data."""
    name = cursor.string("a tensor's name")
    dims = cursor.number("<I", f"the number of dimensions of tensor {name}")
    if not 1 <= dims <= MAX_TENSOR_DIMS:
        raise cursor.damaged(f"tensor {name} has {dims} dimensions, expected 1 to {MAX_TENSOR_DIMS}")
    shape = tuple(cursor.number("<Q", f"the shape of tensor {name}") for _ in range(dims))[::-1]
    if not all(1 <= size <= MAX_DIM for size in shape):
        raise cursor.damaged(f"tensor {name} has the shape {list(shape)}")
    type_id = cursor.number("<I", f"the type of tensor {name}")
    return TensorInfo(name=name, type_id=type_id, shape=shape, offset=cursor.number("<Q", f"{name}'s offset"))
