"""A simulated GPU for every test of the runners."""

import functools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import simulated_cuda as sim
from simulation import Simulate, Simulation, simulated_artifact

from runtimes import tensorrt_runner
from runtimes.artifact import Artifact
from runtimes.tensorrt_api import FLAVORS, get_logger


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> sim.Device:
    """A simulated GPU behind cuda.bindings."""
    device = sim.Device()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = device.module()
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    monkeypatch.setattr(tensorrt_runner, "cuda_device_count", lambda: 1)
    return device


@pytest.fixture
def simulate(device: sim.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Puts both libraries on the device, and engines for them into an artifact."""

    def make(artifact: Artifact) -> Simulation:
        libraries = {target: sim.Library(device, rtx=target == "tensorrt-rtx") for target in FLAVORS}
        for target, library in libraries.items():
            monkeypatch.setitem(sys.modules, FLAVORS[target].module, library.module())
        # The real loggers stay as they are: a library listens only to the first that it was given in a process.
        monkeypatch.setattr(tensorrt_runner, "get_logger", functools.cache(get_logger.__wrapped__))
        return Simulation(device=device, libraries=libraries, artifact=simulated_artifact(artifact, tmp_path))

    return make
