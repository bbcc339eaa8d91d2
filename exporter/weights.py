"""Weights: where each initializer's bytes will lie, putting them there, and pointing the graph at them.

Bytes stream from file to file in chunks, so memory does not grow with the model. Cast weights keep the checkpoint's
tensor names, in one model.safetensors: an artifact is itself a checkpoint that any safetensors reader can open.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from exporter.errors import ExportError
from exporter.precision import Precision
from graphs.checkpoint import CHUNK_BYTES, FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint, StoredTensor, TensorRef

HEADER_ALIGNMENT = 64  # tensors start on a cache line, so that a memory-mapped reader is not slowed down
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of one file with another, where the file system can

Progress = Callable[[int], None]  # called with the bytes just written


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which files will hold the weights, and where in them each tensor lies."""

    copies: tuple[Path, ...]  # checkpoint files taken over whole
    casts: Mapping[StoredTensor, StoredTensor]  # {tensor: what it becomes in a new model.safetensors}, in this order
    placed: Mapping[str, StoredTensor]  # by TensorRef.label; `path` is the file's name alone
    nbytes: int  # bytes that will be written


def plan_weights(checkpoint: Checkpoint, refs: Iterable[TensorRef], precision: Precision, mode: str) -> WeightPlan:
    """Decide where the tensors that the parameters refer to go.

    Args:
        mode: "copy", or "reference" to use the checkpoint's own files where they lie.

    Raises:
        ExportError: `reference` was asked for and a tensor would have to be cast, or its file is a link.
    """
    refs = set(refs)
    tensors = {name: checkpoint.tensors[name] for name in sorted({ref.name for ref in refs})}
    other = sorted(name for name, tensor in tensors.items() if tensor.dtype != precision.safetensors)
    files = sorted({tensor.path for tensor in checkpoint.tensors.values()})
    in_place = _parts(refs, {name: dataclasses.replace(t, path=Path(t.path.name)) for name, t in tensors.items()})
    if mode == "reference":
        if other:
            found = ", ".join(f"{name} is {tensors[name].dtype}" for name in other[:5])
            raise ExportError(
                f"--weights reference cannot cast: precision {precision.name} needs {precision.safetensors}, but"
                f" {len(other)} of {len(tensors)} tensors differ ({found}): use --weights copy or another --precision"
            )
        if links := [file.name for file in files if file.is_symlink()]:
            raise ExportError(
                f"--weights reference: {', '.join(links)} is a symbolic link, which ONNX tools refuse as external"
                " data: use --weights copy"
            )
        return WeightPlan(copies=(), casts={}, placed=in_place, nbytes=0)
    if not other:
        total = sum(file.stat().st_size for file in files)
        return WeightPlan(copies=tuple(files), casts={}, placed=in_place, nbytes=total)
    placed = _layout(tensors, precision)
    end = max((tensor.offset + tensor.nbytes for tensor in placed.values()), default=0)
    casts = {tensor: placed[name] for name, tensor in tensors.items()}
    return WeightPlan(copies=(), casts=casts, placed=_parts(refs, placed), nbytes=end)


def _parts(refs: Iterable[TensorRef], placed: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """{label: where what it refers to lies}."""
    return {ref.label: ref.slice(placed[ref.name]) for ref in refs}


def _layout(tensors: Mapping[str, StoredTensor], precision: Precision) -> dict[str, StoredTensor]:
    """Offsets of the cast tensors in the new model.safetensors, one after the other."""
    item_bytes = FLOAT_DTYPES[precision.safetensors][1]
    placed, end = {}, 0
    for name, tensor in tensors.items():
        nbytes = tensor.nbytes // FLOAT_DTYPES[tensor.dtype][1] * item_bytes
        placed[name] = dataclasses.replace(
            tensor, dtype=precision.safetensors, path=Path(SINGLE_FILE), offset=end, nbytes=nbytes
        )
        end += nbytes
    start = len(_header(placed))
    return {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in placed.items()}


def _header(placed: Mapping[str, StoredTensor]) -> bytes:
    """The safetensors header, its length prefix included; offsets in `placed` count from the end of the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, tensor in placed.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_weights(plan: WeightPlan, destination: Callable[[str], Path], progress: Progress) -> list[str]:
    """Carry out the plan; return the names of the files written.

    Args:
        destination: where a file of that name is to be written.

    Raises:
        ExportError: a value does not fit the precision (fp16 ends at 65504).
        OSError: the disk is full, or a file cannot be read or written.
    """
    for source in plan.copies:
        copy_file(source, destination(source.name), progress)
    written = [source.name for source in plan.copies]
    if plan.casts:
        _write_casts(plan, destination(SINGLE_FILE), progress)
        written.append(SINGLE_FILE)
    elif len(plan.copies) > 1 or (plan.copies and plan.copies[0].name != SINGLE_FILE):
        index = plan.copies[0].parent / INDEX_FILE
        copy_file(index, destination(INDEX_FILE), progress)
        written.append(INDEX_FILE)
    return written


def copy_file(source: Path, target: Path, progress: Progress = lambda _: None) -> None:
    """Copy a file: by sharing blocks where the file system can, else in chunks."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            while chunk := reader.read(CHUNK_BYTES):
                writer.write(chunk)
                progress(len(chunk))
        else:
            progress(os.fstat(writer.fileno()).st_size)


def _write_casts(plan: WeightPlan, target: Path, progress: Progress) -> None:
    start = min((cast.offset for cast in plan.casts.values()), default=0)
    relative = {cast.name: dataclasses.replace(cast, offset=cast.offset - start) for cast in plan.casts.values()}
    header = _header(relative)
    assert len(header) == start, "the header must be as long as it was planned"
    with target.open("wb") as writer:
        writer.write(header)
        progress(len(header))
        for tensor, cast in plan.casts.items():
            for chunk in _cast_chunks(tensor, cast.dtype):
                writer.write(chunk)
                progress(len(chunk))


def _cast_chunks(tensor: StoredTensor, dtype: str) -> Iterable[memoryview]:
    source_dtype, target_dtype = FLOAT_DTYPES[tensor.dtype][0], FLOAT_DTYPES[dtype][0]
    with tensor.path.open("rb", buffering=0) as reader:
        reader.seek(tensor.offset)
        left = tensor.nbytes
        buffer = bytearray(min(left, CHUNK_BYTES))
        while left:
            part = memoryview(buffer)[: min(left, CHUNK_BYTES)]
            _read_exactly(reader.readinto, part, tensor)
            left -= len(part)
            source = torch.frombuffer(part, dtype=source_dtype)
            cast = source.to(target_dtype)
            if (overflow := torch.isinf(cast) & ~torch.isinf(source)).any():
                worst = source[overflow].abs().max().item()
                raise ExportError(
                    f"{tensor.name} holds {worst:.6g}, which {dtype} cannot express (its largest number is"
                    f" {torch.finfo(target_dtype).max:.6g}): choose another --precision"
                )
            yield memoryview(cast.view(torch.uint8).numpy().data)


def _read_exactly(readinto: Callable[[memoryview], int | None], part: memoryview, tensor: StoredTensor) -> None:
    done = 0
    while done < len(part):
        count = readinto(part[done:])
        if not count:
            raise ExportError(f"{tensor.path} ended while {tensor.name} was being read: was it changed just now?")
        done += count


def attach_weights(model: ir.Model, plan: WeightPlan) -> None:
    """Point each initializer that has no value at its bytes."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        tensor = plan.placed[name]
        assert value.dtype is not None
        value.shape = ir.Shape(tensor.shape)
        value.const_value = ir.ExternalTensor(
            str(tensor.path), tensor.offset, tensor.nbytes, value.dtype, shape=ir.Shape(tensor.shape), name=name
        )


def require_space(folder: Path, nbytes: int) -> None:
    """OSError (ENOSPC) before anything is written, when `folder`'s disk has no room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free", str(folder))
