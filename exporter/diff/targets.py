"""What a graph can be run on so that it shows its inner values: by the name of the runtime, how it is opened."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from exporter.diff.engine import ExposedEngine
from exporter.diff.exposed import ExposedGraph
from runtimes.artifact import Artifact, Manifest
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.tensorrt_api import FLAVORS


class Target(Protocol):
    """A graph that shows its values."""

    names: tuple[str, ...]  # of what it shows
    description: str
    computes_in: str
    rounds_activations: bool  # what quantized weights multiply is rounded to 8 bits

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value, and the graph's own outputs, for feeds of all its inputs; floats are float32."""


Open = Callable[[str, Iterable[str]], Target]  # (graph of the manifest, wanted values)


def ways_to_run(artifact: Artifact, runtime: str, device: str | None) -> dict[str, Open]:
    """{name: how to open a graph}, the most exact one first.

    Raises:
        RuntimeMissingError: the runtime shows no values.
        ArtifactError: it does not run this layout.
    """
    if runtime not in WAYS:
        raise RuntimeMissingError(f"--runtime {runtime} shows no inner values; diff takes {', '.join(WAYS)}")
    return WAYS[runtime](artifact, device)


def _onnxruntime(artifact: Artifact, device: str | None) -> dict[str, Open]:
    """In float32 as well, where a small mistake cannot hide behind rounding."""
    ways: dict[str, Open] = {}
    if needs_float32(artifact.manifest):
        ways["onnxruntime in float32"] = functools.partial(_open_graph, artifact, in_float32=True)
    return ways | {"onnxruntime": functools.partial(_open_graph, artifact, device=device)}


def needs_float32(manifest: Manifest) -> bool:
    """Whether ONNX Runtime computes the artifact less precisely than it can."""
    return manifest.cache.dtype == "float16" or manifest.quantization is not None


def _open_graph(artifact: Artifact, graph: str, wanted: Iterable[str], **options: object) -> ExposedGraph:
    entry = artifact.manifest.graphs[graph]
    return ExposedGraph(artifact.path(entry.file), entry.signature, artifact.manifest.cache.dtype, wanted, **options)


def _tensorrt(target: str, artifact: Artifact, device: str | None) -> dict[str, Open]:
    if artifact.manifest.layout != "portable":
        raise ArtifactError(
            f"--runtime {target} runs artifacts of the layout portable, and {artifact.folder} has the layout"
            f" {artifact.manifest.layout}: use --runtime onnxruntime"
        )

    def open_engine(graph: str, wanted: Iterable[str]) -> ExposedEngine:
        entry = artifact.manifest.graphs[graph]
        return ExposedEngine(target, artifact.path(entry.file), entry.signature, artifact.manifest.cache.dtype, wanted)

    return {target: open_engine}


WAYS: Mapping[str, Callable[[Artifact, str | None], dict[str, Open]]] = {
    "onnxruntime": _onnxruntime,
    **{name: functools.partial(_tensorrt, name) for name in FLAVORS},
}
