"""What a target is: data that the export reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.layouts.layout import Layout
from exporter.progress import Progress
from runtimes.artifact import EngineEntry
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec


@dataclass(frozen=True, kw_only=True)
class Job:
    """One graph of an unfinished artifact, whose weights and ONNX files are written."""

    graph: str  # "decoder" or "vision_encoder"
    target: str
    onnx_path: Path
    folder: Path  # which holds the weights and config.json: a checkpoint
    path: Callable[[str], Path]  # where to write the file that will be called so
    layout: Layout
    signature: GraphSignature
    cache: CacheSpec
    vision: VisionSpec | None
    gpu_archs: tuple[str, ...]
    progress: Progress


class Finish(Protocol):
    """Build an engine; its files have the names that the entry says."""

    def __call__(self, job: Job) -> EngineEntry: ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry of the --target option."""

    layout: str | None  # the layout it needs; None: any
    check: Callable[[tuple[str, ...]], None]  # raises before any work is done, if it cannot be built here
    finish: Finish | None  # None: the ONNX graph is all
    files: Callable[[str], tuple[str, ...]] = lambda graph: ()  # what `finish` writes of "decoder" or "vision_encoder"
    parses_onnx: bool = False  # it is built from the ONNX graph, by a parser that does not take every weight format
