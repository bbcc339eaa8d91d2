"""Artifacts with engines: simulated ones with the simulated GPU and libraries that run them, and real ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import simulated_cuda as sim

from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, EngineEntry, engine_key, open_artifact
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.runner import open_runner
from runtimes.tensorrt_api import FLAVORS, import_tensorrt


@dataclasses.dataclass
class Simulation:
    """A simulated GPU, the two libraries on it, and an artifact with engines for each."""

    device: sim.Device
    libraries: dict[str, sim.Library]
    artifact: Artifact

    def engine_file(self, target: str = "tensorrt") -> Path:
        return self.artifact.path(self.artifact.manifest.engines[target].file)

    def count(self, kind: str) -> int:
        """How often work of that kind ran."""
        return sum(kind in line for line in self.device.log)


Simulate = Callable[[Artifact], Simulation]


def simulated_artifact(artifact: Artifact, folder: Path) -> Artifact:
    """The artifact in another folder, with an engine of each library for each of its graphs and nothing else."""
    engines = {}
    for target in FLAVORS:
        for name, graph in artifact.manifest.graphs.items():
            file = f"{name}.{target}.engine"
            engines[engine_key(target, name)] = EngineEntry(
                file=file, graph=name, target=target, library_version="0.0.simulated", gpu_archs=()
            )
            profiles = 2 if name == "decoder" else 1
            sim.write_engine(folder / file, artifact.path(graph.file), graph.signature, profiles=profiles)
    return Artifact(folder=folder, manifest=dataclasses.replace(artifact.manifest, engines=engines))


def export_for_this_gpu(checkpoint: Path, out: Path) -> Artifact:
    """With engines for this machine, from TensorRT where it is installed, else from TensorRT-RTX; or skip the test."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    installed = [target for target in FLAVORS if _is_installed(target)]
    if not installed:
        pytest.skip("needs the tensorrt or the tensorrt_rtx library")
    export(ExportRequest(checkpoint=checkpoint, out=out, targets=(installed[0],), verify=False))
    artifact = open_artifact(out)
    try:
        open_runner(artifact, installed[0]).close()
    except ArtifactError as error:
        pytest.skip(f"{installed[0]} does not run on this GPU: {error}")
    return artifact


def _is_installed(target: str) -> bool:
    try:
        import_tensorrt(target)
    except RuntimeMissingError:
        return False
    return True
