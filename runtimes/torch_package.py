"""AOTInductor packages: a compiled program without its weights, which lie in the artifact's safetensors files.

A package says in its metadata where each of its constants lies, by file, offset, dtype and shape, as an ONNX graph does
of external data. Loading maps them into memory; two packages of an artifact share them.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import ArtifactError, EngineLoadError, RuntimeMissingError
from runtimes.torch_runner import import_torch

METADATA_KEY = "export_llm"
MODEL_NAME = "model"  # AOTInductor's own, of a package that holds one

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
        return cls(
            torch=data["torch"],
            device=data["device"],
            processor=tuple(data["processor"]),
            places={name: Place(**each | {"shape": tuple(each["shape"])}) for name, each in data["places"].items()},
            tables={
                name: np.frombuffer(base64.b64decode(numbers), "<f4").reshape(shape)
                for name, (shape, numbers) in data["tables"].items()
            },
        )


def read_facts(path: Path) -> tuple[PackageFacts, Mapping[str, str]]:
    """(what the package says of itself, what AOTInductor says of it), without loading any of its code.

    Raises:
        ArtifactError: there is no package of ours.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: export again with --target torch")
    loader = import_torch()._C._aoti.AOTIModelPackageLoader
    try:
        metadata = loader.load_metadata_from_package(str(path), MODEL_NAME)
        return PackageFacts.from_json(metadata[METADATA_KEY]), metadata
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{path} is damaged, or no package that export-llm wrote ({reason}): export again with --target torch"
        ) from None


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
    nbytes = int(np.prod(place.shape)) * dtype.itemsize
    try:
        raw: np.ndarray = np.memmap(folder / place.file, np.uint8, mode="c", offset=place.offset, shape=(nbytes,))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / place.file}, which holds the weights, cannot be read: {error}") from None
    if place.offset % dtype.itemsize:  # a header of odd length leaves the data unaligned
        raw = np.array(raw)
    return torch.from_numpy(raw).view(dtype).reshape(place.shape)


def _release(version: str) -> str:
    """2.13 of 2.13.0+cpu."""
    found = re.match(r"\d+\.\d+", version)
    return version if found is None else found.group()
