"""Artifacts with engines: simulated ones with the simulated GPU and libraries that run them, and real ones."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import simulated_cuda as sim

from exporter.pipeline import ExportRequest, export
from runtimes import tensorrt_runner
from runtimes.artifact import Artifact, EngineEntry, engine_key, open_artifact
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.runner import open_runner
from runtimes.tensorrt_api import FLAVORS, get_logger, import_tensorrt


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


def install_device(patch: pytest.MonkeyPatch) -> sim.Device:
    """Put a simulated GPU behind cuda.bindings."""
    device = sim.Device()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = device.module()
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", bindings)
    patch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    patch.setattr(tensorrt_runner, "cuda_device_count", lambda: 1)
    return device


def install_libraries(patch: pytest.MonkeyPatch, device: sim.Device, artifact: Artifact, folder: Path) -> Simulation:
    """Put both libraries on the device, and engines for them into an artifact."""
    libraries = {target: sim.Library(device, rtx=target == "tensorrt-rtx") for target in FLAVORS}
    for target, library in libraries.items():
        patch.setitem(sys.modules, FLAVORS[target].module, library.module())
    # The real loggers stay as they are: a library listens only to the first that it was given in a process.
    patch.setattr(tensorrt_runner, "get_logger", functools.cache(get_logger.__wrapped__))
    return Simulation(device=device, libraries=libraries, artifact=simulated_artifact(artifact, folder))


@contextlib.contextmanager
def simulated(artifact: Artifact, folder: Path) -> Iterator[Artifact]:
    """An artifact with engines that run inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        simulation = install_libraries(patch, install_device(patch), artifact, folder)
        yield simulation.artifact
        assert not simulation.device.alive().keys() - {"TensorRT objects"}


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


def export_for_this_gpu(
    checkpoint: Path, out: Path, targets: Sequence[str] = tuple(FLAVORS), precision: str = "fp32"
) -> Artifact:
    """With engines for this machine, from the first of those libraries that is installed; or skip the test."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    installed = [target for target in targets if _is_installed(target)]
    if not installed:
        pytest.skip(f"needs the library of {' or '.join(targets)}")
    request = ExportRequest(checkpoint=checkpoint, out=out, targets=(installed[0],), precision=precision, verify=False)
    export(request)
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
