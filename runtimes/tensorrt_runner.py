"""The TensorRT and TensorRT-RTX runner: an engine per graph, a context per profile, a cache updated in place.

Decode steps are replayed as CUDA graphs. A graph fixes every shape, so the attention mask is padded with zeros to a
multiple of MASK_BUCKET, and one graph serves all the steps of a bucket.
"""

import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, engine_key
from runtimes.cuda import cuda_device_count
from runtimes.errors import ArtifactError, EngineLoadError, FeedError, RuntimeMissingError
from runtimes.runner import Feeds
from runtimes.signature import DTYPE_BYTES, CacheSpec, GraphSignature, StateSpec, VisionPart
from runtimes.step_checks import (
    HeldImages,
    check_cache_array,
    check_image_array,
    check_images,
    check_index,
    check_reset,
    check_rows,
    check_step,
    require_reset,
    require_vision,
)
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
        try:
            self.call(runtime.cudaSetDevice, device_id)
            # non-blocking: what others do in the default stream must not spoil a capture
            self.stream = self.call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        except RuntimeError as error:
            raise RuntimeMissingError(
                f"CUDA device {device_id} cannot be used ({error}); devices here: {cuda_device_count()}, from 0 on."
                " If the driver is too old, update it, or install the cuda-bindings of its CUDA version"
            ) from None

    def call(self, function: Any, *args: Any) -> Any:
        """Call; return the result without the error code. RuntimeError when the call failed."""
        error, *result = function(*args)
        if error != self.api.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{function.__name__} failed: {error.name}")
        return result[0] if result else None

    def upload(self, target: int, array: np.ndarray) -> None:
        """Copy a contiguous host array to device memory, in stream order; it must live until the stream is idle."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(self.api.cudaMemcpyAsync, target, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, array: np.ndarray, source: int) -> None:
        """Copy device memory to a contiguous host array, and wait for it."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(self.api.cudaMemcpyAsync, array.ctypes.data, source, array.nbytes, kind, self.stream)
        self.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy from device memory to device memory, in stream order; the two must not overlap."""
        kind = self.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call(self.api.cudaMemcpyAsync, target, source, nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for everything in the stream."""
        self.call(self.api.cudaStreamSynchronize, self.stream)

    def release(self, function: Any, *args: Any) -> None:
        """Call a function that frees something. After a fault on the device it fails like every call, which is not
        news: the fault itself was raised where it showed.
        """
        (error, *_) = function(*args)
        if error != self.api.cudaError_t.cudaSuccess:
            log.debug("%s failed: %s", function.__name__, error.name)


class Buffers:
    """Named device allocations that are kept from call to call, and grow when they must."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._memory: dict[str, tuple[int, int]] = {}  # name: (address, bytes)

    def get(self, name: str, nbytes: int) -> int:
        """Address of at least `nbytes` bytes. The stream must be idle if the buffer has to grow."""
        address, size = self._memory.get(name, (0, 0))
        if size < nbytes:
            if address:
                del self._memory[name]
                self._cuda.release(self._cuda.api.cudaFree, address)
            address = int(self._cuda.call(self._cuda.api.cudaMalloc, nbytes))
            self._memory[name] = (address, nbytes)
        return address

    def free(self) -> None:
        """Release all."""
        for address, _ in self._memory.values():
            self._cuda.release(self._cuda.api.cudaFree, address)
        self._memory.clear()


class BoundContext:
    """An execution context that remembers its shapes and addresses.

    `generation` counts the changes: what was captured from the context before one is void after it.
    """

    def __init__(self, context: Any, profile: int, stream: int) -> None:
        self.context = context
        self.generation = 0
        self._bound: dict[str, tuple[Any, int]] = {}
        _require(context.set_optimization_profile_async(profile, stream), f"profile {profile}")

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Give a tensor its address, and an input its shape."""
        if self._bound.get(name) == (shape, address):
            return
        self.generation += 1
        if shape is not None:
            _require(self.context.set_input_shape(name, shape), f"shape of {name}")
        _require(self.context.set_tensor_address(name, address), f"address of {name}")
        self._bound[name] = (shape, address)


class TensorRTRunner:
    """Runs a decoder engine; see runtimes.runner.Runner for the interface."""

    target = "tensorrt"

    def __init__(
        self,
        engine_path: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        device_id: int = 0,
        cuda_graphs: bool = True,
    ) -> None:
        """Load an engine. The vision encoder's is loaded when the first images come.

        Args:
            vision: what makes the decoder see, if it can.

        Raises:
            RuntimeMissingError: no library, no CUDA bindings, or no GPU.
            ArtifactError: the engine is damaged, made for another GPU or library version, or not what the signature
                says.
            RuntimeError: the device has too little memory.
        """
        trt = import_tensorrt(self.target)
        self.signature = signature
        self.cache_spec = cache_spec
        self.vision_spec = None if vision is None else vision.spec
        self.computes_in = cache_spec.dtype
        self.description = f"{self.target} {trt.__version__}"
        self._trt = trt
        (logits,) = (spec for spec in signature.outputs if spec.name == "logits")
        self._vocab_size = int(logits.shape[-1])
        names = zip(cache_spec.past_names(), cache_spec.present_names(), cache_spec.tensors, strict=True)
        self._state: list[tuple[str, str, StateSpec]] = list(names)  # (input name, output name, tensor)
        # sums, which no engine updates in place
        self._copied = [each for each in self._state if each[1] not in signature.aliases]
        self._batch_size = 0
        self._use_graphs = cuda_graphs
        self._graph: tuple[int, Any] | None = None  # (generation of the decode context, executable graph)
        self._contexts: list[BoundContext] = []
        self._engines: list[Any] = []
        self._vision = vision
        self._encoder: BoundContext | None = None
        self._held: HeldImages | None = None
        self._runtime = trt.Runtime(get_logger(self.target))
        self._cuda = Cuda(device_id)
        self._buffers = Buffers(self._cuda)
        self._open = True
        try:
            self._contexts = self._load(engine_path, signature, (PREFILL, DECODE))
        except BaseException:
            self.close()
            raise

    def _load(self, engine_path: Path, signature: GraphSignature, profiles: tuple[int, ...]) -> list[BoundContext]:
        """Load an engine; a context for each of its profiles."""
        if not engine_path.is_file():
            raise ArtifactError(f"{engine_path} is missing: export again with --target {self.target}")
        logger = get_logger(self.target)
        logger.clear()
        engine = self._runtime.deserialize_cuda_engine(engine_path.read_bytes())
        if engine is None:
            reason = "; ".join(logger.errors[-3:]) or "the library gave no reason"
            raise EngineLoadError(
                f"{engine_path.name} cannot be loaded by {self.target} {self._trt.__version__}: it was made for another"
                f" GPU or library version, or is damaged ({reason}): export again on, or for, this machine"
            )
        _check_interface(engine, signature, len(profiles))
        self._engines.append(engine)
        contexts = []
        for profile in profiles:
            context = self._make_context(engine)
            if context is None:
                reason = "; ".join(logger.errors[-3:]) or "out of memory"
                raise RuntimeError(f"{self.target} could not make an execution context: {reason}")
            contexts.append(BoundContext(context, profile, int(self._cuda.stream)))
        self._cuda.synchronize()
        return contexts

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "TensorRTRunner":
        """Run the artifact's engines for this library."""
        engine = artifact.engine(cls.target, f"{cls.target} engine")
        vision = artifact.vision_part(artifact.manifest.engines.get(engine_key(cls.target, "vision_encoder")))
        signature = artifact.manifest.graphs[engine.graph].signature
        return cls(artifact.path(engine.file), signature, artifact.manifest.cache, vision=vision, **options)

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows."""
        self._require_open()
        check_reset(batch_size, self.signature)
        self._cuda.synchronize()
        self._batch_size = 0  # until the cache is whole
        self._drop_graph()
        for past, present, tensor in self._state:
            nbytes = batch_size * tensor.row_bytes
            address = self._buffers.get(past, nbytes)
            self._cuda.call(self._cuda.api.cudaMemsetAsync, address, 0, nbytes, self._cuda.stream)
            updated = address if present in self.signature.aliases else self._buffers.get(present, nbytes)
            for context in self._contexts:
                context.bind(past, address, tensor.array_shape(batch_size))
                context.bind(present, updated)
        if self.vision_spec is not None:
            self._held = HeldImages(spec=self.vision_spec)
            nbytes = batch_size * self._image_row_bytes()
            for _, address in self._bind_images(batch_size):
                self._cuda.call(self._cuda.api.cudaMemsetAsync, address, 0, nbytes, self._cuda.stream)
        self._cuda.synchronize()
        self._batch_size = batch_size

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images. Keys and values stay where the encoder's engine writes them."""
        self._require_open()
        vision = require_vision(self._vision)
        count, tiles = check_images(feeds, vision.signature, self._batch_size)
        if self._encoder is None:
            (self._encoder,) = self._load(vision.path, vision.signature, (0,))
        batch_size, self._batch_size = self._batch_size, 0  # until the images are whole
        self._cuda.synchronize()  # buffers may have to grow
        self._held = HeldImages(spec=vision.spec, count=count, tiles=tiles)
        host = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # alive until all is done
        for name, array in host.items():
            address = self._buffers.get(name, array.nbytes)
            self._cuda.upload(address, array)
            self._encoder.bind(name, address, array.shape)
        for name, address in self._bind_images(batch_size):
            self._encoder.bind(name, address)
        self._enqueue(self._encoder)
        self._cuda.synchronize()
        self._batch_size = batch_size

    def _bind_images(self, batch_size: int) -> list[tuple[str, int]]:
        """Let the decoder read keys and values of the images that are held; (name, address) of each."""
        held = self._held
        assert held is not None
        shape = held.spec.array_shape(batch_size, held.count, held.tiles)
        bound = []
        for name in held.spec.names():
            address = self._buffers.get(name, batch_size * self._image_row_bytes())
            for context in self._contexts:
                context.bind(name, address, shape)
            bound.append((name, address))
        return bound

    def _image_row_bytes(self) -> int:
        """Bytes of one row of a key or value of the images that are held."""
        held = self._held
        assert held is not None
        return math.prod(held.spec.array_shape(1, held.count, held.tiles)) * DTYPE_BYTES[held.spec.dtype]

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the engine; the cache is updated in place. See Runner.step."""
        self._require_open()
        sizes = check_step(feeds, self.signature, self.cache_spec, self._batch_size, self._held)
        decode = sizes["sequence_length"] == 1 and sizes["n"] == 1
        feeds = _pad_mask(feeds, self.cache_spec.max_len) if decode else feeds
        bound = self._contexts[DECODE if decode else PREFILL]
        host = {name: np.ascontiguousarray(array) for name, array in feeds.items()}  # alive until the download
        for name, array in host.items():
            address = self._buffers.get(name, array.nbytes)
            self._cuda.upload(address, array)
            bound.bind(name, address, array.shape)
        logits = np.empty((self._batch_size, sizes["n"], self._vocab_size), np.float32)
        address = self._buffers.get("logits", logits.nbytes)
        bound.bind("logits", address)
        if decode and self._use_graphs:
            self._replay(bound)
        else:
            self._enqueue(bound)
        for past, present, tensor in self._copied:  # the engine still read the old while it wrote the new
            nbytes = self._batch_size * tensor.row_bytes
            source, target = self._buffers.get(present, nbytes), self._buffers.get(past, nbytes)
            self._cuda.copy(target, source, nbytes)
        self._cuda.download(logits, address)
        return logits

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        self._require_reset("the cache is read")
        check_index(index, self.cache_spec.past_names())
        tensor = self.cache_spec.tensors[index]
        array = np.empty(tensor.array_shape(self._batch_size), _numpy_dtype(tensor.dtype))
        self._cuda.download(array, self._buffers.get(self.cache_spec.past_names()[index], array.nbytes))
        return array.astype(np.float32)

    def write_cache(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_cache."""
        self._require_open()
        check_cache_array(array, index, self.cache_spec, self._batch_size)
        self._overwrite(self.cache_spec.past_names()[index], array, self.cache_spec.tensors[index].dtype)

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images."""
        self._require_reset("images are read")
        check_index(index, require_vision(self._vision).spec.names())
        held = self._held
        assert held is not None
        array = np.empty(held.spec.array_shape(self._batch_size, held.count, held.tiles), _numpy_dtype(held.spec.dtype))
        self._cuda.download(array, self._buffers.get(held.spec.names()[index], array.nbytes))
        return array.astype(np.float32)

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images."""
        self._require_reset("images are written")
        spec = require_vision(self._vision).spec
        assert self._held is not None
        check_image_array(array, index, self._held, self._batch_size)
        self._overwrite(spec.names()[index], array, spec.dtype)

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        self._require_reset("the cache is filled")
        for past, _, tensor in self._state:
            if tensor.slot_axis is not None:
                self._overwrite(past, np.full(tensor.array_shape(self._batch_size), value, np.float32), tensor.dtype)

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows. Nothing leaves the device, and every address stays, so graphs stay valid."""
        self._require_open()
        check_rows(rows, self._batch_size)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if not moved.size:
            return
        crossing = bool(np.isin(rows[moved], moved).any())  # a row is needed that is overwritten as well
        tensors = [(past, tensor.row_bytes) for past, _, tensor in self._state]
        if self.vision_spec is not None:
            tensors += [(name, self._image_row_bytes()) for name in self.vision_spec.names()]
        if crossing:
            self._cuda.synchronize()  # the buffer may have to grow
            largest = max(row_bytes for _, row_bytes in tensors)
            before = self._buffers.get("reorder_rows", self._batch_size * largest)  # one tensor as it was
        for name, row_bytes in tensors:
            nbytes = self._batch_size * row_bytes
            address = self._buffers.get(name, nbytes)
            if crossing:
                self._cuda.copy(before, address, nbytes)
            source = before if crossing else address
            for row in map(int, moved):
                self._cuda.copy(address + row * row_bytes, source + int(rows[row]) * row_bytes, row_bytes)

    def close(self) -> None:
        """Release the engine, its contexts and all device memory."""
        if not self._open:
            return
        self._open = False
        self._cuda.release(self._cuda.api.cudaStreamSynchronize, self._cuda.stream)
        self._drop_graph()
        self._contexts.clear()
        self._encoder = self._runtime = None
        self._engines.clear()
        self._buffers.free()
        self._cuda.release(self._cuda.api.cudaStreamDestroy, self._cuda.stream)

    def __enter__(self) -> "TensorRTRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _overwrite(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Put float32 numbers into a tensor that is there."""
        host = np.ascontiguousarray(array.astype(_numpy_dtype(dtype)))
        self._cuda.upload(self._buffers.get(name, host.nbytes), host)
        self._cuda.synchronize()  # the host array may go

    def _make_context(self, engine: Any) -> Any:
        return engine.create_execution_context()

    def _enqueue(self, bound: BoundContext) -> None:
        if not bound.context.execute_async_v3(int(self._cuda.stream)):
            raise RuntimeError(f"{self.target} could not run the engine: {get_logger(self.target).errors[-3:]}")

    def _replay(self, bound: BoundContext) -> None:
        """Run a decode step from its CUDA graph; one is captured after the first step of new shapes or addresses."""
        if self._graph is not None and self._graph[0] == bound.generation:
            self._cuda.call(self._cuda.api.cudaGraphLaunch, self._graph[1], self._cuda.stream)
            return
        self._drop_graph()
        self._enqueue(bound)  # the first run after a change of shape may allocate, which a capture must not
        self._cuda.synchronize()
        try:
            self._graph = (bound.generation, self._capture(bound))
        except RuntimeError as error:
            log.warning("decoding without CUDA graphs: %s", str(error))
            self._use_graphs = False

    def _capture(self, bound: BoundContext) -> Any:
        api = self._cuda.api
        mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call(api.cudaStreamBeginCapture, self._cuda.stream, mode)
        try:
            self._enqueue(bound)
        except RuntimeError:
            self._cuda.release(api.cudaStreamEndCapture, self._cuda.stream)  # or the stream stays unusable
            raise
        graph = self._cuda.call(api.cudaStreamEndCapture, self._cuda.stream)
        try:
            return self._cuda.call(api.cudaGraphInstantiate, graph, 0)
        finally:
            self._cuda.release(api.cudaGraphDestroy, graph)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.release(self._cuda.api.cudaGraphExecDestroy, self._graph[1])
            self._graph = None

    def _require_open(self) -> None:
        if not self._open:
            raise FeedError("this runner is closed")

    def _require_reset(self, before: str) -> None:
        self._require_open()
        require_reset(self._batch_size, before)


class TensorRTRTXRunner(TensorRTRunner):
    """The same for TensorRT-RTX engines.

    That library compiles kernels for the shapes it meets and exchanges them while it runs, which a graph captured from
    outside would not notice; so it captures its own.
    """

    target = "tensorrt-rtx"

    def _make_context(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        if self._use_graphs:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def _replay(self, bound: BoundContext) -> None:
        self._enqueue(bound)


TENSORRT_RUNNERS: dict[str, type[TensorRTRunner]] = {
    runner.target: runner for runner in (TensorRTRunner, TensorRTRTXRunner)
}


def _check_interface(engine: Any, signature: GraphSignature, profiles: int) -> None:
    """The engine's profiles and tensors, and which of them share memory, must be what the manifest says."""
    if engine.num_optimization_profiles != profiles:
        raise ArtifactError(
            f"the engine has {engine.num_optimization_profiles} profiles, expected {profiles} (a decoder's are prefill"
            " and decode)"
        )
    specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    held = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if held != specs.keys():
        raise ArtifactError(f"the engine's tensors differ from the manifest's: {sorted(held ^ specs.keys())}")
    for name, spec in specs.items():
        dtype = _DTYPES.get(engine.get_tensor_dtype(name).name)
        shape = tuple(engine.get_tensor_shape(name))
        expected = tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
        if dtype != spec.dtype or shape != expected:
            raise ArtifactError(
                f"the engine's {name} is {dtype} {list(shape)}, but the manifest says {spec.dtype} {list(expected)}"
            )
    for present, past in signature.aliases.items():
        if (aliased := engine.get_aliased_input_tensor(present)) != past:
            raise ArtifactError(f"the engine does not update {past} in place ({present} aliases {aliased!r})")


# TensorRT's names of what the signature calls otherwise
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
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
