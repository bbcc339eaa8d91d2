"""A simulated GPU for every test of the runners, and artifacts in every layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import simulated_cuda as sim
from simulation import Simulate, Simulation, install_device, install_libraries

from runtimes.artifact import Artifact, open_artifact


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> sim.Device:
    """A simulated GPU behind cuda.bindings."""
    return install_device(monkeypatch)


@pytest.fixture
def simulate(device: sim.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Puts both libraries on the device, and engines for them into an artifact."""

    def make(artifact: Artifact) -> Simulation:
        return install_libraries(monkeypatch, device, artifact, tmp_path)

    return make


@pytest.fixture(scope="session")
def tiny_in_layout(
    tiny_llama: Path, tiny_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """tiny_llama as fp32 ONNX in a layout, not verified; exported once per session."""
    from exporter.pipeline import ExportRequest, export

    made = {"portable": tiny_artifact}

    def get(layout: str) -> Artifact:
        if layout not in made:
            out = tmp_path_factory.mktemp("layouts") / layout
            export(ExportRequest(checkpoint=tiny_llama, out=out, layout=layout, verify=False))
            made[layout] = open_artifact(out)
        return made[layout]

    return get
