"""The ONNX Runtime runners, beyond what the conformance suite asks of every runner."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from runner_cases import PROMPTS, assert_rows_are_reordered, assert_the_cache_can_be_written, forced_logits

from runtimes.artifact import Artifact
from runtimes.cuda import copy_on_device
from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.onnxruntime_binding import StepBinding
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.onnxruntime_session import OnnxRuntime
from runtimes.runner import Runner, open_runner


@pytest.fixture
def runner(tiny_artifact: Artifact):
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 0.15), ("bf16", 0.8)])
def test_lower_precisions_stay_near_fp32(
    tiny_artifacts: Callable[[str], Artifact], runner: Runner, precision: str, atol: float
) -> None:
    """Loose by design (parity is strict): a wrong cast or a shifted weight would be off by tens."""
    forced = np.random.default_rng(2).integers(3, 98, (len(PROMPTS), 5))
    with open_runner(tiny_artifacts(precision), device="cpu") as lower:
        np.testing.assert_allclose(
            forced_logits(lower, PROMPTS, forced), forced_logits(runner, PROMPTS, forced), atol=atol
        )


def test_bfloat16_on_the_cpu_says_that_it_computes_in_float32(tiny_artifacts: Callable[[str], Artifact]) -> None:
    """ONNX Runtime has no bfloat16 kernels there: the runner must say what it does instead."""
    with open_runner(tiny_artifacts("bf16"), device="cpu") as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert runner.computes_in == "float32"
        assert "bfloat16 computed as float32" in runner.description


def test_the_cache_is_updated_in_place(tiny_artifact: Artifact) -> None:
    """ONNX Runtime warns on stderr when TensorScatter has to copy its cache; it must have no reason to."""
    program = (
        "import sys; from runtimes.runner import open_runner; from runtimes.decoding import Decoding\n"
        "import onnxruntime; onnxruntime.set_default_logger_severity(0)\n"
        "with open_runner(sys.argv[1], device='cpu') as runner:\n"
        "    decoding = Decoding(runner); decoding.prefill([[1, 5, 9], [1, 7]])\n"
        "    for _ in range(3): decoding.decode([3, 4])\n"
    )
    command = [sys.executable, "-c", program, str(tiny_artifact.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stderr  # the log is on, so that silence about copies means something
    assert "in-place optimization not activated" not in done.stderr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rows_are_reordered_and_caches_written(tiny_artifacts: Callable[[str], Artifact], precision: str) -> None:
    """In lower precisions of the cache as in the one that the conformance suite runs in."""
    with open_runner(tiny_artifacts(precision), device="cpu") as runner:
        assert_rows_are_reordered(runner)
        assert_the_cache_can_be_written(runner)


# --- on a device, simulated -------------------------------------------------------------------------------------------


class Driver:
    """CUDA's driver, with host memory for device memory; a call that its context does not allow fails."""

    def __init__(self) -> None:
        self.retained = self.pushed = self.copies = 0
        self.failing = ""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            return 700 if name == self.failing else getattr(self, f"_{name}")(*args)

        call.__name__ = name
        return call

    def _cuInit(self, flags: int) -> int:
        return 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0 if ordinal == 0 else 101

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.retained += 1
        return 0

    def _cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.retained -= 1
        return 0

    def _cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.pushed += 1
        return 0

    def _cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.pushed -= 1
        return 0

    def _cuCtxSynchronize(self) -> int:
        return 0 if self.pushed else 201

    def _copy(self, target: Any, source: Any, nbytes: Any) -> int:
        assert self.pushed
        self.copies += 1
        ctypes.memmove(target.value, source.value, nbytes.value)
        return 0

    _cuMemcpyDtoD_v2 = _cuMemcpyHtoD_v2 = _cuMemcpyDtoH_v2 = _copy


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Installed as the driver's library."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def on_device(driver: Driver) -> Callable[[str], OnnxRuntime]:
    """Makes a runtime whose tensors lie on the device. ONNX Runtime's own copy_tensors knows no CUDA memory."""

    def make(dtype: str) -> OnnxRuntime:
        runtime = OnnxRuntime(dtype, device="cpu")
        on_host = runtime.ort.OrtValue.ortvalue_from_shape_and_type
        runtime.device, runtime.computes_in = "cuda", dtype
        runtime.ort = SimpleNamespace(
            OrtValue=SimpleNamespace(
                ortvalue_from_shape_and_type=lambda shape, dtype, device, number: on_host(shape, dtype)
            )
        )
        return runtime

    return make


@pytest.mark.parametrize(("rows", "copies"), [([1, 0, 2], 3), ([1, 1, 2], 1), ([0, 1, 2], 0), ([2, 0, 1], 4)])
def test_rows_move_on_the_device(
    driver: Driver, on_device: Callable[[str], OnnxRuntime], rows: list[int], copies: int
) -> None:
    """No row goes by way of the host, and one that is overwritten is still there for whoever needs it."""
    runtime, make = on_device("float16"), onnxruntime.OrtValue
    before = np.random.default_rng(0).random((3, 2, 5, 4)).astype(np.float16)
    buffer = make.ortvalue_from_numpy(before.copy())
    runtime.reorder_rows(buffer, np.array(rows))
    np.testing.assert_array_equal(buffer.numpy(), before[rows])
    assert driver.copies == copies
    assert (driver.retained, driver.pushed) == (0, 0)


def test_bfloat16_goes_to_the_device_and_back(on_device: Callable[[str], OnnxRuntime]) -> None:
    """Rounded to the nearest, of two to the even one."""
    runtime = on_device("bfloat16")
    numbers = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    rounded = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    buffer = runtime.upload(numbers, "bfloat16")
    np.testing.assert_array_equal(runtime.download(buffer), rounded)
    runtime.overwrite(buffer, -numbers, "bfloat16")
    np.testing.assert_array_equal(runtime.download(buffer), -rounded)


@pytest.mark.parametrize("call", ["cuMemcpyDtoD_v2", "cuCtxSynchronize", "cuCtxPushCurrent_v2"])
def test_a_driver_that_refuses(driver: Driver, call: str) -> None:
    """The call is named, and the thread's context is what it was."""
    driver.failing = call
    with pytest.raises(RuntimeError, match=rf"the CUDA driver's {call} failed with error 700"):
        copy_on_device(0, [(0, 0)], 0)
    assert (driver.retained, driver.pushed) == (0, 0)


def test_a_cache_that_would_be_read_on_the_cpu(tiny_artifact: Artifact) -> None:
    """Where the device has no kernel, what steps write to the device would never be read."""
    runtime = OnnxRuntime("float32", device="cpu")
    names = tiny_artifact.manifest.cache.past_names()
    session = runtime.load(tiny_artifact.path("decoder.onnx"))
    runtime.require_on_device(session, names)
    runtime.device = "cuda"
    with pytest.raises(RuntimeMissingError, match=rf"no CUDAExecutionProvider kernel for what reads {names[0]}"):
        runtime.require_on_device(session, names)


def test_inputs_are_bound_anew_where_binding_copies(tiny_artifact: Artifact) -> None:
    """A GPU's binding copies what it is given when it is given; a host's reads it when it runs."""
    runtime = OnnxRuntime("float32", device="cpu")
    session = runtime.load(tiny_artifact.path("decoder.onnx"))
    for device, expected in (("cpu", [1, 0, 1]), ("cuda", [1, 1, 1])):
        runtime.device = device
        binding = StepBinding(runtime, session)
        bound: list[str] = []
        binding.bind_input = lambda name, value, bound=bound: bound.append(name)
        counts = []
        for shape in ((1, 1), (1, 1), (1, 2)):
            bound.clear()
            binding.feed("input_ids", np.ones(shape, np.int64))
            counts.append(len(bound))
        assert counts == expected


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_missing_provider_is_named(tiny_artifact: Artifact, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what this build offers and what to install."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    expected = r"CUDAExecutionProvider, but .* only CPUExecutionProvider.*\[gpu\]" if device == "cuda" else "cpu, cuda"
    with pytest.raises(RuntimeMissingError, match=expected):
        open_runner(tiny_artifact, device=device)


def test_missing_onnxruntime_says_how_to_install_it(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'export-llm\[cpu\]'"):
        open_runner(tiny_artifact, device="cpu")


def test_unknown_runtimes_and_absent_engines_are_named(tiny_artifact: Artifact) -> None:
    """The message lists what there is."""
    with pytest.raises(RuntimeMissingError, match="unknown runtime 'tflite'; known: onnxruntime, tensorrt"):
        open_runner(tiny_artifact, "tflite")
    with pytest.raises(ArtifactError, match=r"holds no tensorrt-rtx engine \(engines: none\).*--target tensorrt-rtx"):
        open_runner(tiny_artifact, "tensorrt-rtx")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_rows_are_reordered(tiny_artifacts: Callable[[str], Artifact], precision: str) -> None:
    """On the device. A batch of other rows may round elsewhere: only the moves are exact."""
    with open_runner(tiny_artifacts(precision), device="cuda") as runner:
        assert_rows_are_reordered(runner, atol=1.0)


@pytest.mark.cuda
def test_cuda_refuses_what_it_has_no_kernel_for(tiny_in_layout: Callable[[str], Artifact]) -> None:
    """GroupQueryAttention is for 16-bit floats there."""
    with pytest.raises(RuntimeMissingError, match=r"no CUDAExecutionProvider kernel for what reads past_key_values"):
        open_runner(tiny_in_layout("genai"), device="cuda")
