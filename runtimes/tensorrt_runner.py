"""The TensorRT and TensorRT-RTX runner: one engine, a context per profile, a cache updated in place.

Decode steps are replayed as CUDA graphs. A graph fixes every shape, so the attention mask is padded with zeros to a
multiple of MASK_BUCKET, and one graph serves all the steps of a bucket.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.cuda import cuda_device_count
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.runner import Feeds
from runtimes.signature import DTYPE_BYTES, CacheSpec, GraphSignature
from runtimes.step_checks import check_reset, check_step
from runtimes.tensorrt_api import get_logger, import_tensorrt

log = logging.getLogger(__name__)

PREFILL, DECODE = 0, 1  # profile indices, as exporter/targets/tensorrt.py builds them
MASK_BUCKET = 64


class Cuda:
    """The few CUDA runtime calls that are needed, with errors as exceptions."""

    def __init__(self, device_id: int) -> None:
        if not cuda_device_count():
            raise RuntimeMissingError("running an engine needs a CUDA GPU, and there is none here")
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise RuntimeMissingError(
                f"running an engine needs CUDA's Python bindings ({error}): pip install cuda-bindings"
            ) from None
        self.api = runtime
        self.call(runtime.cudaSetDevice, device_id)
        self.stream = self.call(runtime.cudaStreamCreate)

    def call(self, function: Any, *args: Any) -> Any:
        """Call; return the result without the error code. RuntimeError when the call failed."""
        error, *result = function(*args)
        if error != self.api.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{function.__name__} failed: {error.name}")
        return result[0] if result else None

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to device memory, in stream order."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(self.api.cudaMemcpyAsync, target, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, source: int) -> None:
        """Copy device memory to a contiguous host array, and wait for it."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(self.api.cudaMemcpyAsync, array.ctypes.data, source, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything in the stream."""
        self.call(self.api.cudaStreamSynchronize, self.stream)


class Buffers:
    """Named device allocations that grow when they must; `generation` counts how often an address changed."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._memory: dict[str, tuple[int, int]] = {}  # name: (address, bytes)
        self.generation = 0

    def get(self, name: str, nbytes: int) -> int:
        """Address of at least `nbytes` bytes; kept from call to call unless it has to grow."""
        address, size = self._memory.get(name, (0, 0))
        if size < nbytes:
            if address:
                self._cuda.call(self._cuda.api.cudaFree, address)
            address = int(self._cuda.call(self._cuda.api.cudaMalloc, nbytes))
            self._memory[name] = (address, nbytes)
            self.generation += 1
        return address

    def free(self) -> None:
        """Release all."""
        for address, _ in self._memory.values():
            self._cuda.call(self._cuda.api.cudaFree, address)
        self._memory.clear()


class TensorRTRunner:
    """Runs a decoder engine; see runtimes.runner.Runner for the interface."""

    target = "tensorrt"

    def __init__(
        self,
        engine_path: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        device_id: int = 0,
        cuda_graphs: bool = True,
    ) -> None:
        """Load an engine.

        Raises:
            RuntimeMissingError: no library, no CUDA bindings, or no GPU.
            ArtifactError: the engine is damaged, or made for another GPU or library version.
        """
        trt = import_tensorrt(self.target)
        self._cuda = Cuda(device_id)
        logger = get_logger(self.target)
        logger.clear()
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine_path.read_bytes())
        if self._engine is None:
            reason = "; ".join(logger.errors[-3:]) or "the library gave no reason"
            raise ArtifactError(
                f"{engine_path.name} cannot be loaded by {self.target} {trt.__version__}: it was made for another GPU"
                f" or library version, or is damaged ({reason}): export again on, or for, this machine"
            )
        self._check_interface(signature, cache_spec)
        self._contexts = []
        for profile in (PREFILL, DECODE):
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, int(self._cuda.stream))
            self._contexts.append(context)
        self._cuda.synchronize()
        self._buffers = Buffers(self._cuda)
        self._batch_size = 0
        self._use_graphs = cuda_graphs
        self._graphs: dict[tuple[int, int, int], Any] = {}  # {(batch, total, buffer generation): graph}
        (logits,) = (spec for spec in signature.outputs if spec.name == "logits")
        self._vocab_size = int(logits.shape[-1])
        self.signature = signature
        self.cache_spec = cache_spec
        self.description = f"{self.target} {trt.__version__}"

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "TensorRTRunner":
        """Run the artifact's engine for this library."""
        engine = artifact.manifest.engines.get(cls.target)
        if engine is None:
            held = ", ".join(artifact.manifest.engines) or "none"
            raise ArtifactError(
                f"{artifact.folder} holds no {cls.target} engine (engines: {held}): export with --target {cls.target}"
            )
        signature = artifact.manifest.graphs[engine.graph].signature
        return cls(artifact.path(engine.file), signature, artifact.manifest.cache, **options)

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows."""
        self._require_open()
        check_reset(batch_size, self.signature)
        self._batch_size = batch_size
        shape = self.cache_spec.array_shape(batch_size)
        for past, present in self._cache_names():
            address = self._buffers.get(past, self._tensor_bytes())
            self._cuda.call(self._cuda.api.cudaMemsetAsync, address, 0, self._tensor_bytes(), self._cuda.stream)
            for context in self._contexts:
                _require(context.set_input_shape(past, shape), f"shape of {past}")
                _require(context.set_tensor_address(past, address), f"address of {past}")
                _require(context.set_tensor_address(present, address), f"address of {present}")
        self._cuda.synchronize()

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the engine; the cache is updated in place. See Runner.step."""
        self._require_open()
        sizes = check_step(feeds, self.signature, self.cache_spec, self._batch_size)
        decode = sizes["sequence_length"] == 1 and sizes["n"] == 1
        feeds = _pad_mask(feeds, self.cache_spec.max_len) if decode else feeds
        context = self._contexts[DECODE if decode else PREFILL]
        for name, array in feeds.items():
            array = np.ascontiguousarray(array)
            address = self._buffers.get(name, array.nbytes)
            self._cuda.upload(address, array)
            _require(context.set_input_shape(name, array.shape), f"shape of {name}")
            _require(context.set_tensor_address(name, address), f"address of {name}")
        logits = np.empty((self._batch_size, sizes["n"], self._vocab_size), np.float32)
        address = self._buffers.get("logits", logits.nbytes)
        _require(context.set_tensor_address("logits", address), "address of logits")
        if decode and self._use_graphs:
            self._replay(context, feeds["attention_mask"].shape[1])
        else:
            self._enqueue(context)
        self._cuda.download(logits, address)
        return logits

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        self._require_open()
        array = np.empty(self.cache_spec.array_shape(self._batch_size), _numpy_dtype(self.cache_spec.dtype))
        self._cuda.download(array, self._buffers.get(self.cache_spec.past_names()[index], array.nbytes))
        return array.astype(np.float32)

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        self._require_open()
        shape = self.cache_spec.array_shape(self._batch_size)
        array = np.full(shape, value, np.float32).astype(_numpy_dtype(self.cache_spec.dtype))
        for past in self.cache_spec.past_names():
            self._cuda.upload(self._buffers.get(past, array.nbytes), array)
        self._cuda.synchronize()  # the host array may go

    def close(self) -> None:
        """Release the engine, its contexts and all device memory."""
        if self._engine is None:
            return
        self._cuda.synchronize()
        for graph in self._graphs.values():
            self._cuda.call(self._cuda.api.cudaGraphExecDestroy, graph)
        self._graphs.clear()
        self._buffers.free()
        self._contexts, self._engine, self._runtime = [], None, None
        self._cuda.call(self._cuda.api.cudaStreamDestroy, self._cuda.stream)

    def __enter__(self) -> "TensorRTRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._cuda.stream)):
            raise RuntimeError(f"{self.target} could not run the engine: {get_logger(self.target).errors[-3:]}")

    def _replay(self, context: Any, total: int) -> None:
        """Run a decode step from its CUDA graph, which is captured the second time its shapes come up."""
        key = (self._batch_size, total, self._buffers.generation)
        graph = self._graphs.get(key)
        if graph is not None:
            self._cuda.call(self._cuda.api.cudaGraphLaunch, graph, self._cuda.stream)
            return
        self._enqueue(context)  # the first run after a change of shape may allocate, which a capture must not
        self._cuda.synchronize()
        self._graphs[key] = self._capture(context)

    def _capture(self, context: Any) -> Any:
        api = self._cuda.api
        mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call(api.cudaStreamBeginCapture, self._cuda.stream, mode)
        self._enqueue(context)
        graph = self._cuda.call(api.cudaStreamEndCapture, self._cuda.stream)
        executable = self._cuda.call(api.cudaGraphInstantiate, graph, 0)
        self._cuda.call(api.cudaGraphDestroy, graph)
        return executable

    def _check_interface(self, signature: GraphSignature, cache_spec: CacheSpec) -> None:
        """The engine's tensors, and which of them share memory, must be what the manifest says."""
        engine = self._engine
        held = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        expected = {spec.name for spec in (*signature.inputs, *signature.outputs)}
        if held != expected:
            raise ArtifactError(f"the engine's tensors differ from the manifest's: {sorted(held ^ expected)}")
        for present, past in signature.aliases.items():
            if (aliased := engine.get_aliased_input_tensor(present)) != past:
                raise ArtifactError(f"the engine does not update {past} in place ({present} aliases {aliased!r})")

    def _cache_names(self) -> list[tuple[str, str]]:
        return list(zip(self.cache_spec.past_names(), self.cache_spec.present_names(), strict=True))

    def _tensor_bytes(self) -> int:
        elements = int(np.prod(self.cache_spec.array_shape(self._batch_size)))
        return elements * DTYPE_BYTES[self.cache_spec.dtype]

    def _require_open(self) -> None:
        if self._engine is None:
            raise FeedError("this runner is closed")


class TensorRTRTXRunner(TensorRTRunner):
    """The same for TensorRT-RTX engines."""

    target = "tensorrt-rtx"


TENSORRT_RUNNERS: dict[str, type[TensorRTRunner]] = {
    runner.target: runner for runner in (TensorRTRunner, TensorRTRTXRunner)
}


def _pad_mask(feeds: Feeds, max_len: int) -> Feeds:
    """Zeros to the next bucket edge: slots that are masked anyway."""
    mask = feeds["attention_mask"]
    total = min(-(-mask.shape[1] // MASK_BUCKET) * MASK_BUCKET, max_len)
    return {**feeds, "attention_mask": np.pad(mask, ((0, 0), (0, total - mask.shape[1])))}


def _require(done: bool, what: str) -> None:
    if not done:
        raise FeedError(f"the engine refuses the {what}")


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
