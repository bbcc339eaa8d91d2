"""Checkpoints and artifacts that many tests share."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Before torch is imported, and for the processes that tests start: models here are so small that a second thread only
# waits, and waits long where other processes want the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runtimes.artifact import Artifact, open_artifact
from runtimes.cuda import cuda_device_count
from runtimes.signature import CacheSpec, StateSpec

ROOT = Path(__file__).resolve().parent.parent
TINY_LLAMA = ROOT / "examples" / "tiny_llama"
TINY_VISION = ROOT / "examples" / "tiny_vision"
# Trained models that are not part of the repository: a folder with stories260k-llama and stories15m-llama.
SHARED_MODELS = Path(os.environ.get("EXPORT_LLM_TEST_MODELS", ROOT.parent / "shared" / "models"))


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The checkpoint that ships with the project."""
    return TINY_LLAMA


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], Path]:
    """Finds a trained checkpoint outside the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED_MODELS / name
        if not path.is_dir():
            pytest.skip(f"{name} is not at {SHARED_MODELS} (set EXPORT_LLM_TEST_MODELS)")
        return path

    return find


@pytest.fixture(scope="session")
def tiny_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Exports tiny_llama in a precision, once per session, without verification."""
    made: dict[str, Artifact] = {}

    def get(precision: str) -> Artifact:
        if precision not in made:
            from exporter.pipeline import ExportRequest, export

            out = tmp_path_factory.mktemp("tiny") / precision
            export(ExportRequest(checkpoint=TINY_LLAMA, out=out, precision=precision, verify=False))
            made[precision] = open_artifact(out)
        return made[precision]

    return get


@pytest.fixture(scope="session")
def tiny_artifact(tiny_artifacts: Callable[[str], Artifact]) -> Artifact:
    """tiny_llama as fp32 ONNX."""
    return tiny_artifacts("fp32")


@pytest.fixture(scope="session")
def one_layer_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_llama without its layers but the first: what is slow to compile compiles faster."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("one_layer") / "checkpoint"
    folder.mkdir()
    for file in TINY_LLAMA.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    dropped = ("model.layers.1.", "model.layers.2.")
    kept = {k: v for k, v in load_file(TINY_LLAMA / "model.safetensors").items() if not k.startswith(dropped)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def torch_artifact(one_layer_llama: Path) -> Artifact:
    """one_layer_llama as fp32 with packages for PyTorch, not verified; compiled once per session. Do not change it."""
    from exporter.pipeline import ExportRequest, export

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    out = one_layer_llama.parent / "artifact"
    export(ExportRequest(checkpoint=one_layer_llama, out=out, targets=("torch",), verify=False))
    return open_artifact(out)


@pytest.fixture(scope="session")
def tiny_vision() -> Path:
    """The checkpoint with eyes that ships with the project."""
    return TINY_VISION


@pytest.fixture(scope="session")
def load_tasks() -> Callable[[Path], ModuleType]:
    """Imports the tasks.py of an example's folder."""

    def load(folder: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{folder.name}_tasks", folder / "tasks.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny_vision_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """tiny_vision as fp32 ONNX, not verified; made once per session."""
    from exporter.pipeline import ExportRequest, export

    out = tmp_path_factory.mktemp("tiny_vision") / "artifact"
    export(ExportRequest(checkpoint=TINY_VISION, out=out, verify=False))
    return open_artifact(out)


@pytest.fixture(scope="session")
def key_value_cache() -> Callable[..., CacheSpec]:
    """Makes the state of a decoder of softmax attention."""

    def make(*, layers: int, kv_heads: int, max_len: int, head_dim: int, dtype: str = "float32") -> CacheSpec:
        tensors = tuple(
            StateSpec(layer=layer, name=name, dtype=dtype, shape=(kv_heads, max_len, head_dim), slot_axis=1)
            for layer in range(layers)
            for name in ("key", "value")
        )
        return CacheSpec(max_len=max_len, dtype=dtype, tensors=tensors)

    return make


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` are reported as skipped where there is no GPU."""
    if item.get_closest_marker("cuda") and not cuda_device_count():
        pytest.skip("needs a CUDA GPU: the driver offers none here")
