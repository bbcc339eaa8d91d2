"""Reading a Hugging Face checkpoint folder: config.json and safetensors, memory-mapped, checked before any use.

Nothing is ever unpickled. Opening reads headers only; `load_tensor` maps one tensor's bytes. Tensors that are stored in
another way than as plain numbers (quantized ones) are PackedTensors; graphs/formats/ has a reader for each way.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphs.errors import CheckpointError
from graphs.files import is_file, why_no_file
from graphs.keys import read_json, short
from graphs.quantization import QuantizedTensor, WeightFormat

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MOST_PROBLEMS = 40  # lines of one message
CHUNK_BYTES = 16 << 20  # how much of a file is held at once when it is streamed

# safetensors dtype: (torch dtype, bytes per element)
FLOAT_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes at `offset` from the start of `path`."""

    name: str
    dtype: str  # as safetensors writes it: F32, F16, BF16, ..
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class TensorRef(NamedTuple):
    """Where a parameter's numbers are: a tensor of the checkpoint, or some of its rows, which lie together."""

    name: str
    rows: tuple[int, int] | None = None  # first, and one past the last

    @property
    def label(self) -> str:
        """A name for what it refers to."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    def slice(self, stored: StoredTensor) -> StoredTensor:
        """Where that part of the stored tensor lies."""
        if self.rows is None:
            return stored
        first, end = self.rows
        row_bytes = stored.nbytes // stored.shape[0]
        return dataclasses.replace(
            stored,
            name=self.label,
            shape=(end - first, *stored.shape[1:]),
            offset=stored.offset + first * row_bytes,
            nbytes=(end - first) * row_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A tensor that is stored in another way than as its numbers, one after the other."""

    name: str
    shape: tuple[int, ...]
    kind: str  # how it is stored, in words: "GPTQ, 4 bits, blocks of 128", "GGUF Q4_1", ..
    nbytes: int
    # What it can be taken over as, number for number, for the stored zero points; None: as floats only (`reason`).
    format: WeightFormat | None
    asymmetric: bool = False  # it has zero points other than 0
    negative_scales: bool = False  # its scales may be below 0
    floats: bool = False  # its numbers are plain floats of `dtype`, in another order: nothing was rounded
    reason: str = ""  # why no format expresses it: "its blocks have a minimum as well as a scale"
    dtype: str = "F32"  # safetensors' name of a float dtype that holds its numbers, or comes nearest
    read: Callable[[], QuantizedTensor] | None = None  # where there is a format
    numbers: Callable[[torch.dtype], Tensor] | None = None  # where there is none: computed in that dtype
    # Of what export-llm itself wrote: where codes, scales and so on lie, by what stands behind the matrix's name; how
    # many outputs that matrix has, and which of them are this tensor's.
    parts: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    of_outputs: int = 0
    outputs: tuple[int, int] = (0, 0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Its numbers, each computed in `dtype`."""
        if self.read is not None:
            return self.read().dequantize(dtype)
        assert self.numbers is not None
        return self.numbers(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its config.json and where each tensor lies."""

    folder: Path  # or the file, of a format that has all in one
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    packed: Mapping[str, PackedTensor] = dataclasses.field(default_factory=dict)

    @property
    def all_tensors(self) -> "dict[str, StoredTensor | PackedTensor]":
        """Plain and packed ones."""
        return {**self.tensors, **self.packed}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all tensors."""
        return {name: tensor.shape for name, tensor in self.all_tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.all_tensors.values())

    def find_packed(self, ref: "TensorRef") -> PackedTensor | None:
        """The packed tensor that holds what `ref` refers to; None where plain numbers do."""
        return self.packed.get(ref.label) or self.packed.get(ref.name)

    def quantized(self, ref: "TensorRef") -> QuantizedTensor | None:
        """What `ref` refers to as codes and scales; None where it has none."""
        packed = self.find_packed(ref)
        if packed is None or packed.read is None:
            return None
        tensor, rows = packed.read(), _rows_of(packed, ref)
        return tensor if rows is None else tensor.rows(*rows)

    def load(self, ref: "TensorRef", dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that `ref` refers to: plain ones in their stored dtype, mapped; packed ones computed in `dtype`
        (float32 if it is None)."""
        packed = self.find_packed(ref)
        if packed is None:
            return load_tensor(self.place(ref))
        numbers, rows = packed.dequantize(dtype or torch.float32), _rows_of(packed, ref)
        return numbers if rows is None else numbers[slice(*rows)]

    def place(self, ref: "TensorRef") -> StoredTensor:
        """Where the plain numbers lie that `ref` refers to."""
        part = self.tensors.get(ref.label)
        return ref.slice(self.tensors[ref.name]) if part is None else part

    def shape_of(self, ref: "TensorRef") -> tuple[int, ...]:
        """The shape of what `ref` refers to."""
        tensor = self.find_packed(ref) or self.tensors.get(ref.label) or self.tensors[ref.name]
        rows = _rows_of(tensor, ref)
        return tensor.shape if rows is None else (rows[1] - rows[0], *tensor.shape[1:])

    @property
    def dtype(self) -> str:
        """The float dtype most of the bytes have: F32, F16 or BF16."""
        sizes = dict.fromkeys(FLOAT_DTYPES, 0)
        for tensor in self.all_tensors.values():
            if tensor.dtype in sizes:
                sizes[tensor.dtype] += math.prod(tensor.shape) * FLOAT_DTYPES[tensor.dtype][1]
        return max(sizes, key=lambda dtype: sizes[dtype])

    def parameter_count(self, names: Iterable[str]) -> int:
        """Elements in the named tensors, each counted once."""
        shapes = self.shapes
        return sum(math.prod(shapes[name]) for name in set(names))


def _rows_of(tensor: StoredTensor | PackedTensor, ref: TensorRef) -> tuple[int, int] | None:
    """Which rows of a tensor that was found for `ref` it means; None: all, of one that holds just these."""
    return None if tensor.name == ref.label else ref.rows


def open_checkpoint(folder: Path, weights: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint folder, or a GGUF file, and read its headers.

    Args:
        weights: safetensors files of the folder to read, under whatever names; by default those with the usual ones.

    Raises:
        CheckpointError: it is absent or no checkpoint, or a file is missing, truncated or inconsistent.
    """
    from graphs import formats  # its readers need this module

    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist: pass the folder that holds config.json and model.safetensors")
    if folder.suffix == ".gguf":
        return formats.open_gguf(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: pass the folder that holds config.json and model.safetensors")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json")
    config = read_json(folder / "config.json")
    tensors: dict[str, StoredTensor] = {}
    if weights:
        for file_name in weights:
            _merge(tensors, read_header(folder / file_name))
    elif (folder / INDEX_FILE).exists():
        weight_map = _read_index(folder)
        for file_name in sorted(set(weight_map.values())):
            _merge(tensors, read_header(folder / file_name))
        absent = sorted(
            name for name, file in weight_map.items() if name not in tensors or tensors[name].path.name != file
        )
        if absent:
            raise CheckpointError(
                f"{folder / INDEX_FILE} lists tensors that their shard does not hold: {_some(absent)}"
            )
    elif (folder / SINGLE_FILE).exists():
        tensors = read_header(folder / SINGLE_FILE)
    else:
        pickled = sorted(path.name for suffix in ("*.bin", "*.pth", "*.pt") for path in folder.glob(suffix))
        hint = f" ({_some(pickled)} would have to be unpickled, which is never done: convert it to safetensors)"
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}" + (hint if pickled else ""))
    return formats.unpack(Checkpoint(folder=folder, config=config, tensors=tensors))


def weight_files(folder: Path) -> list[Path]:
    """The files that open_checkpoint reads weights from, by their usual names."""
    if folder.is_file():
        return [folder]
    if (folder / INDEX_FILE).exists():
        return sorted({folder / name for name in _read_index(folder).values()})
    return [folder / SINGLE_FILE]


def _read_index(folder: Path) -> dict[str, str]:
    """weight_map of the index: {tensor name: file name}, every file inside the folder and present."""
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that names the file of each tensor")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            found = repr(file_name) if isinstance(file_name, str) else short(file_name)
            raise CheckpointError(
                f"{path}: {name} points outside the checkpoint folder ({found}); expected a plain file name"
            )
    missing = sorted({file for file in weight_map.values() if not is_file(folder / file)})
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the shards that its index lists: {_some(missing)}")
    return weight_map


def _merge(into: dict[str, StoredTensor], more: dict[str, StoredTensor]) -> None:
    twice = sorted(into.keys() & more.keys())
    if twice:
        first, second = into[twice[0]].path.name, more[twice[0]].path.name
        raise CheckpointError(f"{first} and {second} both hold {_some(twice)}")
    into.update(more)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; CheckpointError when the header or the file's size is wrong."""
    if reason := why_no_file(path):  # a pipe would never answer
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {reason}")
    try:
        with safe_open(path, framework="numpy"):  # the library checks the header: sizes, overlaps, holes, truncation
            pass
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file (truncated download?): {error}") from None
    start = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                path=path,
                offset=start + begin,
                nbytes=end - begin,
            )
    return tensors


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    ignorable: Callable[[str], bool],
    duplicates: Mapping[str, str],
) -> None:
    """Compare the checkpoint with {tensor name: shape}; CheckpointError lists what is wrong, up to MOST_PROBLEMS."""
    problems = [f"{kind}: {text}" for kind, text in tensor_problems(checkpoint, expected, ignorable, duplicates)]
    if problems:
        more = len(problems) - MOST_PROBLEMS
        shown = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        lines = "\n  ".join(shown)
        raise CheckpointError(
            f"{checkpoint.folder} does not hold the tensors that its config.json describes:\n  {lines}"
        )


def tensor_problems(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    ignorable: Callable[[str], bool],
    duplicates: Mapping[str, str],
    *,
    read_weights: bool = True,
) -> list[tuple[str, str]]:
    """(kind, what) of all that differs from {tensor name: shape}.

    Args:
        ignorable: says of a tensor's name that it may be there and is not used.
        duplicates: {name: original} of tensors that may be there if they hold what their original holds (tied heads).
        read_weights: False: what only the numbers themselves can tell is taken to be well.
    """
    found, shapes = checkpoint.tensors, checkpoint.shapes
    parts = {name.partition("[")[0] for name in shapes}  # "name[rows]" is a part of `name`
    problems = [
        ("missing", f"{name} {list(shape)}")
        for name, shape in sorted(expected.items())
        if name not in shapes and name not in parts
    ]
    problems += [
        ("unexpected", f"{name} {list(shapes[name])}")
        for name in sorted(shapes.keys() - expected.keys())
        if name.partition("[")[0] not in expected
        and not ignorable(name)
        and name not in duplicates
        and not _is_empty_bias(checkpoint, name, read_weights=read_weights)
    ]
    for name, shape in sorted(expected.items()):
        if name in shapes and shapes[name] != shape:
            problems.append(("wrong shape", f"{name} is {list(shapes[name])}, expected {list(shape)}"))
        tensor = found.get(name)
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(FLOAT_DTYPES)
            problems.append(("wrong dtype", f"{name} is {tensor.dtype}, expected one of {allowed}"))
    for name, original in sorted(duplicates.items()):
        both = name in found and original in found
        if both and not _same_values(found[name], found[original], read_weights=read_weights):
            reason = f"config.json ties {name} to {original}, but they differ: set tie_word_embeddings to false to use"
            problems.append(("contradiction", f"{reason} {name}, or remove it"))
    return problems


def _is_empty_bias(checkpoint: Checkpoint, name: str, *, read_weights: bool) -> bool:
    """True for a bias of zeros beside a quantized weight: some quantizers write one for layers that have none."""
    weight = name.removesuffix(".bias") + ".weight"
    stored = checkpoint.tensors.get(name)
    if (
        not name.endswith(".bias")
        or weight not in checkpoint.packed
        or stored is None
        or stored.dtype not in FLOAT_DTYPES
    ):
        return False
    return not read_weights or not load_tensor(stored).any()


def _same_values(first: StoredTensor, second: StoredTensor, *, read_weights: bool) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if not read_weights:
        return True
    with first.path.open("rb") as a, second.path.open("rb") as b:
        a.seek(first.offset)
        b.seek(second.offset)
        for start in range(0, first.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, first.nbytes - start)
            if a.read(size) != b.read(size):
                return False
    return True


def load_tensor(stored: StoredTensor) -> Tensor:
    """The tensor in its stored dtype, memory-mapped (copy on write): pages are read when they are used."""
    return map_tensor(stored, FLOAT_DTYPES[stored.dtype][0])


def map_tensor(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """The same of any dtype, which is torch's for stored.dtype."""
    if stored.nbytes == 0:
        return torch.empty(stored.shape, dtype=dtype)
    raw: np.ndarray = np.memmap(stored.path, dtype=np.uint8, mode="c", offset=stored.offset, shape=(stored.nbytes,))
    if stored.offset % dtype.itemsize:  # a header of odd length leaves the data unaligned
        raw = np.array(raw)
    return torch.from_numpy(raw).view(dtype).reshape(stored.shape)


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
