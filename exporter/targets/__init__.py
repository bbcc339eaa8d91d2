"""What an export can end in. ONNX is always made; the others are built from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.progress import Progress
from exporter.targets import tensorrt
from runtimes.artifact import EngineEntry
from runtimes.signature import GraphSignature


class Finish(Protocol):
    """Build an engine from an ONNX graph."""

    def __call__(
        self,
        onnx_path: Path,
        engine_path: Path,
        signature: GraphSignature,
        *,
        gpu_archs: tuple[str, ...],
        progress: Progress,
    ) -> EngineEntry: ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry of the --target option."""

    layout: str | None  # the layout it needs; None: any
    check: Callable[[tuple[str, ...]], None]  # raises before any work is done, if it cannot be built here
    finish: Finish | None  # None: the ONNX graph is all


def _any(gpu_archs: tuple[str, ...]) -> None:
    """Nothing to check."""


def _engine(target: str) -> Target:
    return Target(
        layout="portable",
        check=lambda gpu_archs: tensorrt.check(target, gpu_archs),
        finish=lambda *args, **kwargs: tensorrt.build_engine(target, *args, **kwargs),
    )


TARGETS: dict[str, Target] = {
    "onnx": Target(layout=None, check=_any, finish=None),
    "tensorrt-rtx": _engine("tensorrt-rtx"),
    "tensorrt": _engine("tensorrt"),
}
