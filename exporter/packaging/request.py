"""What a packager is asked for, and what it answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PackageRequest:
    """The options of `export-llm package`."""

    artifact: Path
    out: Path
    name: str | None = None  # None: as the artifact's folder is called
    runtime: str = "onnxruntime"
    device: str | None = None  # None: a GPU where the server has one
    threads: int | None = None  # for one operator, on the CPU; None: the runtime chooses
    max_sequences: int | None = None  # None: as many as the artifact takes rows
    idle_timeout_s: float = 60
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """One model of a package."""

    name: str
    folder: Path
    files: dict[str, int]  # {path in the folder: bytes}
    states: int  # tensors that the server keeps from request to request


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written."""

    models: tuple[PackagedModel, ...]
    warnings: tuple[str, ...]


class Packager(Protocol):
    """Write an artifact as another server wants it."""

    def __call__(self, request: PackageRequest, progress: Progress) -> Package:
        """ExportError, or ArtifactError, before anything is written if it cannot be done."""
