"""Weights: where each initializer's bytes will lie, putting them there, and pointing the graph at them.

Bytes stream from file to file in chunks, so memory does not grow with the model. Cast weights keep the checkpoint's
tensor names, in one model.safetensors: an artifact is itself a checkpoint that any safetensors reader can open.
"""

import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from exporter.errors import ExportError
from exporter.precision import FloatType, Precision
from exporter.weight_choice import Choices, WeightChoice
from graphs.checkpoint import CHUNK_BYTES, FLOAT_DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint, StoredTensor, TensorRef
from graphs.formats import own
from graphs.quantization import QuantizedTensor, WeightFormat, join_outputs

HEADER_ALIGNMENT = 64  # tensors start on a cache line, so that a memory-mapped reader is not slowed down
COPY_BYTES = 64 << 20  # at a time
# What os.copy_file_range raises where it is not to be had: of file systems, kernels and sandboxes
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)

Progress = Callable[[int], None]  # called with the bytes just written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Some tensors of the new model.safetensors, and how to make their bytes, one after the other."""

    outputs: tuple[StoredTensor, ...]
    make: Callable[[], Iterable[memoryview]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """Where a quantized weight lies: what graphs.formats.own writes, [K, N]."""

    format: WeightFormat
    shape: tuple[int, int]  # (N, K)
    parts: Mapping[str, StoredTensor]  # by suffix of the name
    members: Mapping[str, int]  # {TensorRef.label: outputs} of the weights that it holds, in order
    rows_first: bool  # as MatMulNBits reads it, and not as DequantizeLinear does


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which files will hold the weights, and where in them each tensor lies."""

    placed: Mapping[str, StoredTensor]  # by TensorRef.label; `path` is the file's name alone
    nbytes: int  # bytes that will be written
    copies: tuple[Path, ...] = ()  # checkpoint files taken over whole
    jobs: tuple[Job, ...] = ()  # what a new model.safetensors is made of, in this order
    quantized: Mapping[str, QuantizedWeight] = dataclasses.field(default_factory=dict)  # by name
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the new file's header

    @property
    def copied_files(self) -> tuple[Path, ...]:
        """`copies`, and the index where readers need it to find them."""
        if not self.copies or [source.name for source in self.copies] == [SINGLE_FILE]:
            return self.copies
        return (*self.copies, self.copies[0].parent / INDEX_FILE)

    @property
    def files(self) -> dict[str, int]:
        """{name: bytes} of the files that will be written."""
        sizes = {source.name: source.stat().st_size for source in self.copied_files}
        return {**sizes, SINGLE_FILE: self.nbytes} if self.jobs else sizes

    @property
    def stored(self) -> list[StoredTensor]:
        """Every tensor that the graph refers to."""
        return [*self.placed.values(), *(part for weight in self.quantized.values() for part in weight.parts.values())]


def plan_weights(
    checkpoint: Checkpoint, refs: Iterable[TensorRef], precision: FloatType | Precision, mode: str
) -> WeightPlan:
    """Decide where the tensors that the parameters refer to go, all in one float dtype.

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
        return WeightPlan(placed=in_place, nbytes=0)
    if not other:
        total = sum(file.stat().st_size for file in files)
        return WeightPlan(copies=tuple(files), placed=in_place, nbytes=total)
    jobs = _lay_out([_cast_job(tensor, precision.safetensors) for tensor in tensors.values()], {})
    placed = {tensor.name: tensor for job in jobs for tensor in job.outputs}
    return WeightPlan(jobs=jobs, placed=_parts(refs, placed), nbytes=_end(jobs))


# Makes the codes of a weight that is to be quantized.
Quantize = Callable[[TensorRef, WeightChoice], QuantizedTensor]


def plan_choices(
    checkpoint: Checkpoint,
    choices: Choices,
    precision: Precision,
    quantize: Quantize,
    changed: Mapping[TensorRef, Callable[[], Tensor]],
    *,
    rows_first: bool = False,
) -> WeightPlan:
    """Decide where tensors go that are stored in several ways.

    Args:
        quantize: called when a weight's turn comes to be written.
        changed: weights that calibration changed, stored as floats.
        rows_first: quantized weights are for MatMulNBits, as far as their formats allow.
    """
    jobs: dict[str, Job] = {}
    matrices = _matrices(checkpoint, choices, rows_first=rows_first)
    entries = {}
    for ref, choice in sorted(choices.items(), key=lambda item: item[0].label):
        if isinstance(choice.stored, WeightFormat):
            matrix = matrices[choice.joined or ref.label]
            if matrix.name not in jobs:
                entries[matrix.name] = matrix.describe()
                jobs[matrix.name] = _quantize_job(checkpoint, matrix, precision, quantize)
        elif ref in changed:
            jobs[ref.label] = _numbers_job(checkpoint, ref, choice.stored, changed[ref])
        elif choice.packed is not None:
            numbers = functools.partial(checkpoint.load, ref, torch.float64)
            jobs[ref.label] = _numbers_job(checkpoint, ref, choice.stored, numbers)
        elif ref.name not in jobs:
            jobs[ref.name] = _cast_job(checkpoint.tensors[ref.name], choice.stored.safetensors)
    metadata = {own.METADATA_KEY: json.dumps(entries, separators=(",", ":"))} if entries else {}
    laid_out = dict(zip(jobs, _lay_out(list(jobs.values()), metadata), strict=True))
    quantized, placed = {}, {}
    for name, matrix in matrices.items():
        outputs = {tensor.name.removeprefix(name): tensor for tensor in laid_out[name].outputs}
        quantized[name] = QuantizedWeight(
            format=matrix.format,
            shape=matrix.shape,
            parts=outputs,
            members=matrix.members,
            rows_first=matrix.rows_first,
        )
    for ref, choice in choices.items():
        if isinstance(choice.stored, WeightFormat):
            continue
        if ref.label in laid_out:
            (placed[ref.label],) = laid_out[ref.label].outputs
        else:
            placed[ref.label] = ref.slice(laid_out[ref.name].outputs[0])
    done = tuple(laid_out.values())
    return WeightPlan(jobs=done, placed=placed, quantized=quantized, metadata=metadata, nbytes=_end(done))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Matrix:
    """Weights that are quantized and stored as one, their outputs one after the other."""

    name: str
    parts: tuple[tuple[TensorRef, WeightChoice], ...]
    shape: tuple[int, int]  # (N, K)
    members: Mapping[str, int]  # {TensorRef.label: outputs}
    rows_first: bool

    @property
    def format(self) -> WeightFormat:
        format = self.parts[0][1].format
        assert format is not None
        return format

    @property
    def zero_points(self) -> bool:
        return self.parts[0][1].has_zero_points

    def describe(self) -> dict[str, Any]:
        """What the header's metadata says of it."""
        joined = self.members if len(self.members) > 1 else None
        return own.describe(
            self.format, self.shape, zero_points=self.zero_points, rows_first=self.rows_first, joined=joined
        )


def _matrices(checkpoint: Checkpoint, choices: Choices, *, rows_first: bool) -> dict[str, _Matrix]:
    """What is quantized, by the name that it is stored under."""
    groups: dict[str, list[tuple[TensorRef, WeightChoice]]] = {}
    for ref, choice in choices.items():
        if choice.format is not None:
            groups.setdefault(choice.joined or ref.label, []).append((ref, choice))
    matrices = {}
    for name, parts in groups.items():
        members = {ref.label: checkpoint.shape_of(ref)[0] for ref, _ in parts}
        shape = (sum(members.values()), checkpoint.shape_of(parts[0][0])[1])
        format = parts[0][1].format
        assert format is not None
        matrices[name] = _Matrix(
            name=name,
            parts=tuple(parts),
            shape=shape,
            members=members,
            rows_first=rows_first and own.fits_rows_first(format),
        )
    return matrices


def _quantize_job(checkpoint: Checkpoint, matrix: _Matrix, precision: Precision, quantize: Quantize) -> Job:
    specs_of, parts_of = (
        (own.rows_first_specs, own.rows_first_parts) if matrix.rows_first else (own.part_specs, own.parts)
    )
    specs = specs_of(matrix.shape, matrix.format, precision.safetensors, zero_points=matrix.zero_points)
    outputs = tuple(_output(matrix.name + suffix, dtype, shape) for suffix, (dtype, shape) in specs.items())

    def codes(ref: TensorRef, choice: WeightChoice) -> QuantizedTensor:
        if not choice.kept:
            return quantize(ref, choice)
        tensor = checkpoint.quantized(ref)
        assert tensor is not None
        tensor = as_int8(tensor) if matrix.format != tensor.format else tensor
        _require_scales(tensor, ref, precision)
        return tensor

    def make() -> Iterable[memoryview]:
        tensor = join_outputs([codes(ref, choice) for ref, choice in matrix.parts])
        stored = parts_of(tensor, getattr(torch, precision.dtype))
        assert list(stored) == list(specs)
        del tensor
        for part in stored.values():
            yield _bytes(part)

    return Job(outputs=outputs, make=make)


def as_int8(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same weight in int8: codes of 4 bits, their zero points subtracted, are whole numbers from -15 to 15, and may
    change their sign so that all scales are above 0."""
    codes = tensor.codes
    if tensor.zero_points is not None:
        groups = codes.unflatten(1, (tensor.scales.shape[1], -1)) - tensor.zero_points[..., None]
        codes = groups.flatten(1)
    signs = torch.where(tensor.scales < 0, -1, 1).to(torch.int8)
    codes = (codes.unflatten(1, (signs.shape[1], -1)) * signs[..., None]).flatten(1)
    format = WeightFormat(name="int8", block=tensor.format.block)
    return dataclasses.replace(tensor, codes=codes, scales=tensor.scales.abs(), zero_points=None, format=format)


def _require_scales(tensor: QuantizedTensor, ref: TensorRef, precision: Precision) -> None:
    dtype = getattr(torch, precision.dtype)
    if not torch.equal(tensor.scales.to(dtype).float(), tensor.scales):
        raise ExportError(
            f"the scales of {ref.label} cannot be expressed in {precision.compute.name}, so its weights would change:"
            f" export with --precision {tensor.format.name}:dtype=fp32"
        )


def _numbers_job(checkpoint: Checkpoint, ref: TensorRef, stored: FloatType, numbers: Callable[[], Tensor]) -> Job:
    """One whole tensor of floats, from numbers that are computed."""

    def make() -> Iterable[memoryview]:
        yield _bytes(_cast(numbers(), ref.label, stored.safetensors).contiguous())

    return Job(outputs=(_output(ref.label, stored.safetensors, checkpoint.shape_of(ref)),), make=make)


def _cast_job(tensor: StoredTensor, dtype: str) -> Job:
    return Job(
        outputs=(_output(tensor.name, dtype, tensor.shape),), make=functools.partial(_cast_chunks, tensor, dtype)
    )


def _output(name: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor of the new file, whose place is not known yet."""
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    return StoredTensor(name=name, dtype=dtype, shape=shape, path=Path(SINGLE_FILE), offset=0, nbytes=nbytes)


_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _parts(refs: Iterable[TensorRef], placed: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """{label: where what it refers to lies}."""
    return {ref.label: ref.slice(placed[ref.name]) for ref in refs}


def _lay_out(jobs: list[Job], metadata: Mapping[str, str]) -> tuple[Job, ...]:
    """Give the jobs' outputs their offsets in the new model.safetensors, one after the other."""
    outputs = [tensor for job in jobs for tensor in job.outputs]
    offsets, end = [], 0
    for tensor in outputs:
        offsets.append(end)
        end += tensor.nbytes
    relative = [dataclasses.replace(each, offset=offset) for each, offset in zip(outputs, offsets, strict=True)]
    start = len(_header(relative, metadata))
    placed = iter([dataclasses.replace(tensor, offset=start + tensor.offset) for tensor in relative])
    return tuple(dataclasses.replace(job, outputs=tuple(next(placed) for _ in job.outputs)) for job in jobs)


def _end(jobs: Iterable[Job]) -> int:
    return max((tensor.offset + tensor.nbytes for job in jobs for tensor in job.outputs), default=0)


def _header(outputs: Iterable[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header, its length prefix included; offsets count from the end of the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for tensor in outputs:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_weights(
    plan: WeightPlan, put: Callable[[str, Callable[[Path], None]], None], progress: Progress
) -> list[str]:
    """Carry out the plan; return the names of the files written.

    Args:
        put: given each file's name and what writes it to a path, one after the other.

    Raises:
        ExportError: a value does not fit the precision (fp16 ends at 65504).
        OSError: the disk is full, or a file cannot be read or written.
    """
    for source in plan.copied_files:
        put(source.name, functools.partial(copy_file, source, progress=progress))
    if plan.jobs:
        put(SINGLE_FILE, functools.partial(_write_jobs, plan, progress=progress))
    return list(plan.files)


def copy_file(source: Path, target: Path, progress: Progress = lambda _: None) -> None:
    """Copy a file: in the kernel, which shares blocks where the file system can, else through memory.

    In few calls: whoever copies while another thread computes in Python waits for the interpreter after each.
    """
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        try:
            while count := os.copy_file_range(reader.fileno(), writer.fileno(), COPY_BYTES):
                progress(count)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
        # what the kernel does not copy: all of it, if its file systems are of two kinds
        buffer = memoryview(bytearray(min(COPY_BYTES, os.fstat(reader.fileno()).st_size - reader.tell())))
        while buffer and (count := reader.readinto(buffer)):
            done = 0
            while done < count:
                done += writer.write(buffer[done:count]) or 0
            progress(count)


def _write_jobs(plan: WeightPlan, target: Path, *, progress: Progress) -> None:
    outputs = [tensor for job in plan.jobs for tensor in job.outputs]
    start = min(tensor.offset for tensor in outputs)
    relative = [dataclasses.replace(tensor, offset=tensor.offset - start) for tensor in outputs]
    header = _header(relative, plan.metadata)
    assert len(header) == start, "the header must be as long as it was planned"
    with target.open("wb") as writer:
        writer.write(header)
        progress(len(header))
        for job in plan.jobs:
            for chunk in job.make():
                writer.write(chunk)
                progress(len(chunk))
            last = job.outputs[-1]
            assert writer.tell() == last.offset + last.nbytes, f"{last.name} must be as long as it was planned"


def _cast_chunks(tensor: StoredTensor, dtype: str) -> Iterable[memoryview]:
    source_dtype = FLOAT_DTYPES[tensor.dtype][0]
    with tensor.path.open("rb", buffering=0) as reader:
        reader.seek(tensor.offset)
        left = tensor.nbytes
        buffer = bytearray(min(left, CHUNK_BYTES))
        while left:
            part = memoryview(buffer)[: min(left, CHUNK_BYTES)]
            _read_exactly(reader.readinto, part, tensor)
            left -= len(part)
            source = torch.frombuffer(part, dtype=source_dtype)
            yield memoryview(_cast(source, tensor.name, dtype).view(torch.uint8).numpy().data)


def _cast(source: Tensor, name: str, dtype: str) -> Tensor:
    """Numbers rounded to a safetensors dtype; ExportError where one is too large for it."""
    target_dtype = FLOAT_DTYPES[dtype][0]
    cast = source.to(target_dtype)
    if (overflow := torch.isinf(cast) & ~torch.isinf(source)).any():
        worst = source[overflow].abs().max().item()
        raise ExportError(
            f"{name} holds {worst:.6g}, which {dtype} cannot express (its largest number is"
            f" {torch.finfo(target_dtype).max:.6g}): choose another --precision"
        )
    return cast


def _read_exactly(readinto: Callable[[memoryview], int | None], part: memoryview, tensor: StoredTensor) -> None:
    done = 0
    while done < len(part):
        count = readinto(part[done:])
        if not count:
            raise ExportError(f"{tensor.path} ended while {tensor.name} was being read: was it changed just now?")
        done += count


def attach_weights(model: ir.Model, plan: WeightPlan) -> None:
    """Point each initializer that has no value at its bytes."""
    parts = {part.name: part for weight in plan.quantized.values() for part in weight.parts.values()}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        tensor = parts.get(name) or plan.placed[name]
        assert value.dtype is not None
        if name not in parts:  # whose shape is that of the codes, which may lie two to a byte
            value.shape = ir.Shape(tensor.shape)
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            str(tensor.path), tensor.offset, tensor.nbytes, value.dtype, shape=ir.Shape(value.shape), name=name
        )


def require_space(folder: Path, nbytes: int) -> None:
    """OSError (ENOSPC) before anything is written, when `folder`'s disk has no room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free", str(folder))
