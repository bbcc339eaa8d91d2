"""AOTInductor packages: a compiled program without its weights, which lie in the artifact's safetensors files.

A package says in its metadata where each of its constants lies, by file, offset, dtype and shape, as an ONNX graph does
of external data. Loading maps them into memory; two packages of an artifact share them.
"""

import base64
import dataclasses
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import ArtifactError, EngineLoadError, RuntimeMissingError
from runtimes.files import MAX_JSON_BYTES, is_file, require_inside, shown
from runtimes.torch_runner import import_torch

MOST = 2**62  # of any size
METADATA_KEY = "export_llm"
MODEL_NAME = "model"  # AOTInductor's own, of a package that holds one
# What it says of the code, once for each file of it
METADATA_FILE = re.compile(rf"(^|/)data/aotinductor/{MODEL_NAME}/[^/]*_metadata\.json$")

# safetensors dtype: torch's name
DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a constant's numbers lie."""

    file: str  # in the package's folder
    offset: int
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    def check(self) -> None:
        """ValueError where it is no place in a file of the package's own folder."""
        if not isinstance(self.file, str) or Path(self.file).name != self.file or self.file in ("", "..", "."):
            raise ValueError(f"a constant lies in {shown(self.file)}, expected a plain file name")
        sizes = (*self.shape, self.offset)
        if not all(type(size) is int and 0 <= size <= MOST for size in sizes) or self.dtype not in DTYPES:
            raise ValueError(f"a constant is {shown(self.dtype)} {shown(self.shape)} at {shown(self.offset)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageFacts:
    """What a package says of itself."""

    torch: str  # the version that compiled it
    device: str  # cpu or cuda
    processor: tuple[str, ...]  # what the one that compiled it can do; its code may use any of that
    places: Mapping[str, Place]  # by the constant's name in the program
    tables: Mapping[str, np.ndarray]  # constants that are computed and not stored: rotary frequencies; float32

    def to_json(self) -> str:
        """For the package's metadata."""
        tables = {
            name: [list(table.shape), base64.b64encode(table.astype("<f4").tobytes()).decode()]
            for name, table in self.tables.items()
        }
        places = {name: dataclasses.asdict(place) for name, place in self.places.items()}
        facts: dict[str, Any] = {"torch": self.torch, "device": self.device, "processor": self.processor}
        facts |= {"places": places, "tables": tables}
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "PackageFacts":
        """The inverse of to_json."""
        data = json.loads(text)
        facts = cls(
            torch=data["torch"],
            device=data["device"],
            processor=tuple(data["processor"]),
            places={name: Place(**each | {"shape": tuple(each["shape"])}) for name, each in data["places"].items()},
            tables={
                name: np.frombuffer(base64.b64decode(numbers), "<f4").reshape(shape)
                for name, (shape, numbers) in data["tables"].items()
            },
        )
        for place in facts.places.values():
            place.check()
        words = (facts.torch, facts.device, *facts.processor)
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"it was made by {shown(words)}, expected text")
        return facts


def read_facts(path: Path) -> tuple[PackageFacts, Mapping[str, str]]:
    """(what the package says of itself, what AOTInductor says of it), without loading any of its code.

    Raises:
        ArtifactError: there is no package of ours.
    """
    require_inside(path)
    if not is_file(path):
        raise ArtifactError(f"{path} is missing: export again with --target torch")
    try:
        metadata = _read_metadata(path)
        return PackageFacts.from_json(metadata[METADATA_KEY]), metadata
    except Exception as error:  # zipfile raises many; nothing but what the file holds can be the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{path} is damaged, or no package that export-llm wrote ({reason}): export again with --target torch"
        ) from None


def _read_metadata(path: Path) -> dict[str, str]:
    """AOTInductor's metadata of a package. PyTorch's own reader is not used: damaged files crash it."""
    with zipfile.ZipFile(path) as file:
        entry = next(each for each in file.infolist() if METADATA_FILE.search(each.filename))
        if entry.file_size > MAX_JSON_BYTES:
            raise ValueError(f"its metadata has {entry.file_size:,} bytes")
        metadata = json.loads(file.read(entry))
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no object of strings")
    return metadata


def check_machine(path: Path, facts: PackageFacts, metadata: Mapping[str, str]) -> None:
    """Refuse a package that would not run here, or not rightly.

    Raises:
        EngineLoadError: it was compiled by another PyTorch, or for another processor or GPU.
        RuntimeMissingError: it needs a GPU, and there is none.
    """
    torch = import_torch()
    if _release(facts.torch) != _release(torch.__version__):
        raise EngineLoadError(
            f"{path.name} was compiled by PyTorch {facts.torch}, and this is {torch.__version__}: install that version,"
            " or export again with --target torch"
        )
    if facts.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeMissingError(
                f"{path.name} was compiled for a CUDA GPU, and PyTorch finds none here: run it on such a machine, or"
                " export again with --target torch"
            )
        made_for = metadata.get("AOTI_COMPUTE_CAPABILITY", "").replace(".", "")
        here = "".join(map(str, torch.cuda.get_device_capability()))
        if made_for not in ("", here):
            raise EngineLoadError(
                f"{path.name} was compiled for compute capability {made_for}, and this GPU has {here}: export again on"
                " this machine with --target torch"
            )
    if missing := sorted(set(facts.processor) - set(processor_features())):
        raise EngineLoadError(
            f"{path.name} was compiled for a processor with {', '.join(missing)}, which this one lacks: export again on"
            " this machine with --target torch"
        )


def processor_features() -> tuple[str, ...]:
    """What this machine's processor can do, as PyTorch names it, and its architecture."""
    known: Mapping[str, Any] = import_torch().cpu.get_capabilities()
    return tuple(sorted([known["architecture"], *(name for name, value in known.items() if value is True)]))


def load_constants(folder: Path, facts: PackageFacts, device: str, loaded: dict[Place, Any]) -> dict[str, Any]:
    """{name: tensor} of the package's constants: mapped on the CPU, copied to a GPU.

    Args:
        folder: in which the files lie.
        loaded: what other packages of the artifact loaded, which is taken from there; more is added.
    """
    torch = import_torch()
    for place in facts.places.values():
        if place not in loaded:
            loaded[place] = _map(torch, folder, place).to(device)
    tables = {name: torch.tensor(numbers, device=device) for name, numbers in facts.tables.items()}
    return {name: loaded[place] for name, place in facts.places.items()} | tables


def _map(torch: Any, folder: Path, place: Place) -> Any:
    dtype = getattr(torch, DTYPES[place.dtype])
    nbytes = math.prod(place.shape) * dtype.itemsize
    require_inside(folder / place.file)
    try:
        raw: np.ndarray = np.memmap(folder / place.file, np.uint8, mode="c", offset=place.offset, shape=(nbytes,))
    except (OSError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{folder / place.file}, which holds the weights, cannot be read: {error}") from None
    if place.offset % dtype.itemsize:  # a header of odd length leaves the data unaligned
        raw = np.array(raw)
    return torch.from_numpy(raw).view(dtype).reshape(place.shape)


def _release(version: str) -> str:
    """2.13 of 2.13.0+cpu."""
    found = re.match(r"\d+\.\d+", version)
    return version if found is None else found.group()
