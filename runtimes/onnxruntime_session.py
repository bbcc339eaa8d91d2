"""ONNX Runtime on one device: loads graphs there, and moves tensors to and fro."""

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.cuda import copy_on_device, copy_to_device, copy_to_host, cuda_device_count
from runtimes.errors import ArtifactError, RuntimeMissingError

# device: the execution provider that must be there
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

NUMPY = {"float32": np.float32, "float16": np.float16}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph that comes without a path
ERRORS_ONLY = 3  # of log severities
ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

# TF32 is the default there, and not what fp32 promises. Convolutions, which only vision encoders have, do not try every
# algorithm there is when a shape is new.
#
# enable_cuda_graph is left off: a graph is captured for one set of shapes, and attention_mask, whose length says how
# much of the cache is read, is longer at every step.
CUDA_OPTIONS = {"use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}

# What ONNX Runtime raises of a file, as onnxruntime_pybind11_state names it
LOAD_ERRORS = (
    *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented"),
    "RuntimeException",
)


def import_onnxruntime() -> Any:
    """The onnxruntime module; RuntimeMissingError says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            f"ONNX Runtime is not installed ({error}): pip install 'export-llm[cpu]', or [gpu] for CUDA"
        ) from None
    return onnxruntime


def default_device() -> str:
    """ "cuda" where this ONNX Runtime can use it and there is a GPU, else "cpu"."""
    usable = PROVIDERS["cuda"] in import_onnxruntime().get_available_providers() and cuda_device_count() > 0
    return "cuda" if usable else "cpu"


def run_model(model: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run a small float32 or float16 model on the CPU; floats are cast to what it takes.

    Args:
        model: an onnx.ModelProto without external data.
        inputs: arrays in the order of the model's inputs.
    """
    return run_model_file(model.SerializeToString(), inputs)


def run_model_file(model: Path | bytes, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The same for a model in a file, which may have external data, or serialised."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY  # that a lone TensorScatter copies its cache is no news here
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=[PROVIDERS["cpu"]])
    feeds = {
        value.name: array.astype(np.float16) if value.type == "tensor(float16)" else array
        for value, array in zip(session.get_inputs(), inputs, strict=True)
    }
    results: list[np.ndarray] = session.run(None, feeds)
    return results


class OnnxRuntime:
    """ONNX Runtime as one model is run with it.

    A bfloat16 graph on the CPU, where ONNX Runtime has no bfloat16 kernels, is computed in float32 with its bfloat16
    weights, as any 16-bit graph is with `in_float32`; `computes_in` then says float32. On the CPU, what weights of 4
    and 8 bits multiply is rounded to 8 bits, which is much faster; with `in_float32` it is not.
    """

    def __init__(
        self,
        dtype: str,
        *,
        device: str | None = None,
        device_id: int = 0,
        threads: int = 0,
        in_float32: bool = False,
        log_severity: int | None = None,
    ) -> None:
        """Choose the device.

        Args:
            dtype: of the model's arithmetic.
            device: "cpu" or "cuda"; by default CUDA where it can be used.
            threads: threads for one operator; 0 lets ONNX Runtime choose.
            in_float32: compute in float32, on the CPU.
            log_severity: ONNX Runtime's own messages below it are not shown; 2 are warnings, 3 errors.

        Raises:
            RuntimeMissingError: ONNX Runtime or the device's provider is missing.
        """
        ort = import_onnxruntime()
        device = device or ("cpu" if in_float32 else default_device())
        if device not in PROVIDERS:
            raise RuntimeMissingError(f"unknown device {device!r}; known: {', '.join(PROVIDERS)}")
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise RuntimeMissingError(
                f"device {device!r} needs ONNX Runtime's {provider}, but this build offers only"
                f" {', '.join(ort.get_available_providers())}: pip uninstall onnxruntime; pip install 'export-llm[gpu]'"
            )
        self.ort = ort
        self._errors = ort.capi.onnxruntime_pybind11_state
        # UnicodeDecodeError: it quotes the file, which may be no text
        self._load_errors = (UnicodeDecodeError, *(getattr(self._errors, name) for name in LOAD_ERRORS))
        self.device = device
        self.device_id = device_id
        self.in_float32 = in_float32
        self._threads = threads
        self._log_severity = log_severity
        self._dtype = dtype
        widened = dtype != "float32" and (in_float32 or (dtype == "bfloat16" and device == "cpu"))
        self.computes_in = "float32" if widened else dtype
        note = f", {dtype} computed as float32" if widened else ", all in float32" if in_float32 else ""
        self.description = f"onnxruntime {ort.__version__} ({provider}{note})"

    def load(self, model: Path, edit: Callable[[Any], None] | None = None) -> Any:
        """A session, whose graph is widened where computes_in says so.

        Args:
            edit: changes the graph, an onnx.ModelProto, before it is loaded.

        Raises:
            ArtifactError: the file is missing, or is not what ONNX Runtime can load.
            RuntimeMissingError: the device's provider does not start.
        """
        if not model.is_file():
            raise ArtifactError(f"{model} is missing: export again")
        options = self._options()
        try:
            if self.computes_in != self._dtype or self.in_float32:
                return self._start(self._rewrite(model, options, edit), options)
            try:
                return self._start(str(model) if edit is None else self._edited(model, options, edit), options)
            except self._errors.NotImplemented:
                if self.device != "cpu":
                    raise
                return self._start(self._rewrite(model, options, edit), options)
        except self._load_errors as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArtifactError(
                f"{model} cannot be loaded by onnxruntime {self.ort.__version__}: it, or a file of weights beside it,"
                f" is damaged or needs another version ({reason}): export again"
            ) from None

    def _options(self) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        if self._log_severity is not None:
            options.log_severity_level = self._log_severity
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if self.in_float32 else "4")
        if self.device == "cuda":  # weights take what they need, and not the arena's next power of two
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        return options

    def _start(self, source: str | bytes, options: Any) -> Any:
        """A session of a file, or of a serialised graph."""
        provider = PROVIDERS[self.device]
        providers: list[Any] = [provider]
        if self.device == "cuda":
            self.ort.preload_dlls()  # the CUDA libraries that pip installed
            # shape arithmetic runs on the CPU
            providers = [(provider, CUDA_OPTIONS | {"device_id": self.device_id}), PROVIDERS["cpu"]]
        try:
            # without ONNX Runtime's own fallback, which prints to stdout and goes on on the CPU
            session = self.ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
        except (RuntimeError, ValueError, self._errors.EPFail) as error:
            if self.device == "cpu":
                raise
            raise self._missing(str(error).splitlines()[0]) from None
        if provider not in session.get_providers():
            raise self._missing(
                "its log above says why: usually a missing or mismatched CUDA or cuDNN library, or no GPU"
            )
        return session

    def _missing(self, reason: str) -> RuntimeMissingError:
        return RuntimeMissingError(
            f"ONNX Runtime could not start {PROVIDERS[self.device]} on device {self.device_id} ({reason})"
        )

    def require_on_device(self, session: Any, names: Sequence[str]) -> None:
        """RuntimeMissingError unless the session reads these inputs where the device's memory is.

        Where it has no kernel on the device, it computes on the CPU, from a copy that is made once: what a step writes
        to the tensor itself would never be read.
        """
        if self.device == "cpu":
            return
        places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        if elsewhere := [value.name for value, place in places if value.name in names and place.name == "Cpu"]:
            raise RuntimeMissingError(
                f"ONNX Runtime has no {PROVIDERS[self.device]} kernel for what reads {elsewhere[0]} in this layout and"
                " precision, and would read it on the CPU: use --device cpu, or export with another --precision or with"
                " --layout portable"
            )

    def _edited(self, model: Path, options: Any, edit: Callable[[Any], None]) -> bytes:
        """The graph after `edit`, serialised; its weights stay where they are."""
        from runtimes.widen import load_onnx

        loaded = load_onnx(model)
        edit(loaded)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(model.parent))
        serialized: bytes = loaded.SerializeToString()
        return serialized

    def _rewrite(self, model: Path, options: Any, edit: Callable[[Any], None] | None = None) -> bytes:
        """The graph as ONNX Runtime can run it on the CPU, serialised."""
        from runtimes.widen import expand_float4, load_onnx, multiply_in_float32, widen

        loaded = load_onnx(model)
        if edit is not None:
            edit(loaded)
        expand_float4(loaded, model.parent)
        if self.in_float32:
            multiply_in_float32(loaded)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(model.parent))
        if self.computes_in != self._dtype:
            return widen(loaded)
        serialized: bytes = loaded.SerializeToString()
        return serialized

    def taken(self, dtype: str) -> str:
        """What the session takes for tensors of that dtype: a widened graph has no 16-bit floats left."""
        return dtype if self.computes_in == self._dtype else "float32"

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor of zeros on the device; on the CPU, memory is taken as it is written.

        numpy asks for huge pages: a few tokens would then touch nearly all of a cache for thousands.
        """
        taken = self.taken(dtype)
        if self.device != "cpu" or taken == "bfloat16":
            return self.upload(np.zeros(shape, np.float32), dtype)
        pages = mmap.mmap(-1, math.prod(shape) * np.dtype(NUMPY[taken]).itemsize)
        array = np.frombuffer(pages, NUMPY[taken]).reshape(shape)
        return self.ort.OrtValue.ortvalue_from_numpy(array, self.device, self.device_id)

    def upload(self, array: np.ndarray, dtype: str) -> Any:
        """Float32 numbers as a tensor on the device."""
        make, dtype = self.ort.OrtValue, self.taken(dtype)
        if dtype != "bfloat16":
            return make.ortvalue_from_numpy(np.ascontiguousarray(array, NUMPY[dtype]), self.device, self.device_id)
        buffer = make.ortvalue_from_shape_and_type(array.shape, ONNX_BFLOAT16, self.device, self.device_id)
        copy_to_device(self.device_id, buffer.data_ptr(), _bfloat16(array))
        return buffer

    def overwrite(self, buffer: Any, array: np.ndarray, dtype: str) -> None:
        """Put float32 numbers into a device tensor, which stays where it is."""
        if self.taken(dtype) == "bfloat16":
            copy_to_device(self.device_id, buffer.data_ptr(), _bfloat16(array))
        else:
            buffer.update_inplace(np.ascontiguousarray(array, NUMPY[self.taken(dtype)]))

    def download(self, buffer: Any) -> np.ndarray:
        """A float32 copy of a tensor of this session, wherever it lies."""
        if buffer.element_type() != ONNX_BFLOAT16:
            return np.array(buffer.numpy(), np.float32)
        host = np.empty(buffer.shape(), np.uint16)
        if buffer.device_name() == "cpu":
            ctypes.memmove(host.ctypes.data, buffer.data_ptr(), host.nbytes)
        else:
            copy_to_host(self.device_id, buffer.data_ptr(), host)
        bits: np.ndarray = host.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)

    def reorder_rows(self, buffer: Any, rows: np.ndarray) -> None:
        """Let row b of a device tensor hold what row rows[b] held. Only rows that move are copied, on the device."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if not moved.size:
            return
        if self.device == "cpu":
            array = buffer.numpy()  # the tensor's own memory
            array[moved] = array[rows[moved]]
            return
        source = buffer
        if np.isin(rows[moved], moved).any():  # a row is needed that is overwritten as well
            source = self.ort.OrtValue.ortvalue_from_shape_and_type(
                buffer.shape(), buffer.element_type(), self.device, self.device_id
            )
            copy_on_device(self.device_id, [(source.data_ptr(), buffer.data_ptr())], buffer.tensor_size_in_bytes())
        size = buffer.tensor_size_in_bytes() // len(rows)
        targets = [buffer.data_ptr() + size * int(row) for row in moved]
        sources = [source.data_ptr() + size * int(row) for row in rows[moved]]
        copy_on_device(self.device_id, list(zip(targets, sources, strict=True)), size)


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers as bfloat16, which is the upper half of a float32 and which numpy does not have."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))  # to the nearest, of two to the even one
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)
