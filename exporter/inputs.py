"""What an export is made from: a digest of all of it, and a look at every number while the files are read for that."""

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import ExportError
from exporter.progress import Progress
from exporter.source import COPIED_FILES, Source
from graphs.checkpoint import INDEX_FILE, Checkpoint, StoredTensor, read_header, weight_files
from runtimes.artifact import FileEntry, file_entry
from runtimes.hashing import CHUNK_BYTES, sha256_of, sha256_of_chunks

if TYPE_CHECKING:
    from exporter.pipeline import ExportRequest

MOST_NAMES = 8  # of tensors in one message
OWN_PACKAGES = ("exporter", "graphs", "runtimes")
# What the request says that changes nothing in the artifact, or is in the digest in another way.
_ELSEWHERE = {"checkpoint", "out", "force", "calibration", "eval_text", "allow_nonfinite"}

# The bits of a float that are all ones in infinities and in what is no number: (as what to read it, mask).
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("u1", 0x7F),  # it has no infinity
    "F8_E5M2": ("u1", 0x7C),
}
_STEP_BYTES = 1 << 18  # looked at together: what is computed of it stays in the processor's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Every file of a checkpoint that an export reads."""

    files: Mapping[str, FileEntry]
    nonfinite: Mapping[str, str]  # {tensor: what it holds} of weights with numbers that are none


def read_inputs(source: Source, progress: Progress) -> Inputs:
    """Read every byte of the checkpoint once, on all cores; the holes of sparse files are known without that."""
    paths = weight_files(source.checkpoint.folder)
    progress.start("read checkpoint", sum(path.stat().st_size for path in paths))
    found: dict[str, str] = {}
    files = {}
    for path in paths:
        look = _Look(_floats(source.checkpoint, path), found)
        digest = sha256_of_chunks(path, look, progress.advance)
        files[path.name] = FileEntry(sha256=digest, bytes=path.stat().st_size, chunk_bytes=CHUNK_BYTES)
    if source.checkpoint.folder.is_dir():
        small = (source.files / name for name in (INDEX_FILE, *COPIED_FILES))
        files |= {path.name: file_entry(path) for path in small if path.is_file()}
    return Inputs(files=files, nonfinite=dict(sorted(found.items())))


def refuse_nonfinite(inputs: Inputs, *, allowed: bool) -> tuple[str, ...]:
    """Warnings; ExportError where weights hold NaN or infinity, and that is not allowed."""
    if not inputs.nonfinite:
        return ()
    shown = ", ".join(f"{name} holds {what}" for name, what in list(inputs.nonfinite.items())[:MOST_NAMES])
    more = len(inputs.nonfinite) - MOST_NAMES
    text = f"{len(inputs.nonfinite)} weights are not finite: {shown}" + (f" and {more} more" if more > 0 else "")
    if not allowed:
        raise ExportError(f"{text}: the checkpoint is damaged or its training diverged; --allow-nonfinite exports it")
    return (text,)


def inputs_key(request: "ExportRequest", inputs: Inputs, tools: Mapping[str, str], precision: str) -> str:
    """SHA-256 of everything that decides what an export makes: files, options, and the programs that make it."""
    options = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    facts: dict[str, Any] = {
        "options": {name: each for name, each in options.items() if name not in _ELSEWHERE} | {"precision": precision},
        "texts": [None if text is None else _digest(text) for text in (request.calibration, request.eval_text)],
        "files": {name: entry.to_json() for name, entry in inputs.files.items()},
        "tools": dict(tools),
        "program": program_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(text: Path) -> str:
    return sha256_of(text) if text.is_file() else ""


@functools.cache
def program_digest() -> str:
    """Of our own source text: a version number says little of a program that is being worked on."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        root = Path(importlib.import_module(package).__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _floats(checkpoint: Checkpoint, path: Path) -> list[StoredTensor]:
    """The file's tensors that are stored as floats: scales of quantized weights as well."""
    if path.suffix == ".safetensors":
        tensors: Iterable[StoredTensor] = read_header(path).values()
    else:
        tensors = [tensor for tensor in checkpoint.tensors.values() if tensor.path == path]
    return sorted((tensor for tensor in tensors if tensor.dtype in _EXPONENTS), key=lambda tensor: tensor.offset)


class _Look:
    """Looks for numbers that are none in the pieces of a file."""

    def __init__(self, tensors: list[StoredTensor], found: dict[str, str]) -> None:
        self._tensors = tensors
        self._starts = np.array([tensor.offset for tensor in tensors], np.int64)
        self._found = found

    def __call__(self, offset: int, data: memoryview, mine: int) -> None:
        """Look at `mine` bytes that lie at `offset`; `data` holds a few more, for a number that ends beyond them."""
        index = max(0, int(np.searchsorted(self._starts, offset, side="right")) - 1)
        for tensor in self._tensors[index:]:
            if tensor.offset >= offset + mine:
                break
            kind, mask = _EXPONENTS[tensor.dtype]
            size = np.dtype(kind).itemsize
            end = min(tensor.offset + tensor.nbytes, offset + mine)
            first = max(tensor.offset, offset + (tensor.offset - offset) % size)  # numbers that begin in this piece
            count = -(-(end - first) // size)
            if count > 0 and _any_nonfinite(np.frombuffer(data, kind, count, first - offset), mask):
                self._found[tensor.name] = "NaN or infinity"


def _any_nonfinite(bits: np.ndarray, mask: int) -> bool:
    step = _STEP_BYTES // bits.itemsize
    number = bits.dtype.type(mask)
    return any(bool(((bits[at : at + step] & number) == number).any()) for at in range(0, len(bits), step))
