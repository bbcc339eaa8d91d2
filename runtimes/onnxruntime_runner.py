"""The ONNX Runtime runner: past and present are bound to the same buffers, so nothing of the cache is copied."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.cuda import cuda_device_count
from runtimes.errors import FeedError, RuntimeMissingError
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, StateSpec, VisionPart, VisionSpec
from runtimes.step_checks import HeldImages, check_images, check_reset, check_rows, check_step, require_vision

# device: the execution provider that must be there
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_NUMPY = {"float32": np.float32, "float16": np.float16}
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


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
    options.log_severity_level = 3  # errors: that a lone TensorScatter copies its cache is no news here
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=[PROVIDERS["cpu"]])
    feeds = {
        value.name: array.astype(np.float16) if value.type == "tensor(float16)" else array
        for value, array in zip(session.get_inputs(), inputs, strict=True)
    }
    results: list[np.ndarray] = session.run(None, feeds)
    return results


class OnnxRuntimeRunner:
    """Runs a decoder graph of the portable layout; see runtimes.runner.Runner for the interface."""

    def __init__(
        self,
        model: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        device: str | None = None,
        device_id: int = 0,
        threads: int = 0,
        in_float32: bool = False,
    ) -> None:
        """Load `model`. The vision encoder is loaded when the first images come.

        A bfloat16 graph on the CPU, where ONNX Runtime has no bfloat16 kernels, is computed in float32 with its
        bfloat16 weights, as any 16-bit graph is with `in_float32`; `computes_in` then says float32. On the CPU, what
        weights of 4 and 8 bits multiply is rounded to 8 bits, which is much faster; with `in_float32` it is not.

        Args:
            vision: what makes the decoder see, if it can.
            device: "cpu" or "cuda"; by default CUDA where it can be used.
            threads: threads for one operator; 0 lets ONNX Runtime choose.
            in_float32: compute in float32, on the CPU.

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
        self._ort = ort
        self.device = device
        self._device_id = device_id
        self._threads = threads
        self.in_float32 = in_float32
        widened = cache_spec.dtype != "float32" and (in_float32 or (cache_spec.dtype == "bfloat16" and device == "cpu"))
        self.computes_in = "float32" if widened else cache_spec.dtype
        self.signature = signature
        self.cache_spec = cache_spec
        self.vision_spec = None if vision is None else vision.spec
        self._session = self._load(model)
        self._vision = vision
        self._encoder: Any = None
        self._binding: Any = None
        self._cache: list[Any] = []
        self._images: list[Any] = []  # keys and values, as VisionSpec.names() lists them
        self._held: HeldImages | None = None
        self._next: dict[int, Any] = {}  # by index: where a tensor's update goes that cannot be made in place
        self._batch_size = 0
        note = f", {cache_spec.dtype} computed as float32" if widened else ", all in float32" if in_float32 else ""
        self.description = f"onnxruntime {ort.__version__} ({provider}{note})"

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "OnnxRuntimeRunner":
        """Run the artifact's graphs."""
        graph, vision = artifact.manifest.graphs["decoder"], artifact.vision_part()
        return cls(artifact.path(graph.file), graph.signature, artifact.manifest.cache, vision=vision, **options)

    def _load(self, model: Path) -> Any:
        """A session, whose graph is widened where computes_in says so."""
        ort, provider = self._ort, PROVIDERS[self.device]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1" if self.in_float32 else "4")
        source: str | bytes = str(model)
        if self.computes_in != self.cache_spec.dtype:
            source = self._rewrite(model, options)
        providers: list[Any] = [provider]
        if self.device == "cuda":
            ort.preload_dlls()  # the CUDA libraries that pip installed
            # TF32 is the default there, and not what fp32 promises; shape arithmetic runs on the CPU
            providers = [(provider, {"device_id": self._device_id, "use_tf32": 0}), PROVIDERS["cpu"]]
        try:
            session = ort.InferenceSession(source, options, providers=providers)
        except ort.capi.onnxruntime_pybind11_state.NotImplemented:
            if self.device != "cpu" or isinstance(source, bytes):
                raise
            session = ort.InferenceSession(self._rewrite(model, options), options, providers=providers)
        if provider not in session.get_providers():
            raise RuntimeMissingError(
                f"ONNX Runtime could not start {provider} (its log above says why: usually a missing or mismatched"
                f" CUDA or cuDNN library, or no GPU)"
            )
        return session

    def _rewrite(self, model: Path, options: Any) -> bytes:
        """The graph as ONNX Runtime can run it on the CPU, serialised."""
        from runtimes.widen import expand_float4, load_onnx, widen

        loaded = load_onnx(model)
        expand_float4(loaded, model.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
        if self.computes_in != self.cache_spec.dtype:
            return widen(loaded)
        serialized: bytes = loaded.SerializeToString()
        return serialized

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows."""
        check_reset(batch_size, self.signature)
        self._batch_size = batch_size
        self._cache, self._next = [], {}  # free the old one first
        self._cache = [self._zeros(tensor) for tensor in self.cache_spec.tensors]
        self._binding = self._open_session().io_binding()
        presents = self.cache_spec.present_names()
        in_place = self.signature.aliases
        self._next = {i: self._zeros(self.cache_spec.tensors[i]) for i, n in enumerate(presents) if n not in in_place}
        for index in range(len(presents)):
            self._bind(index)
        if self.vision_spec is not None:
            self._held = HeldImages(spec=self.vision_spec)
            nothing = np.zeros(self.vision_spec.array_shape(batch_size, 1, 1), np.float32)
            self._show([self._upload(nothing, self.vision_spec.dtype) for _ in self.vision_spec.names()])

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images. On the CPU, picture by picture: attention holds the scores of all at once."""
        self._open_session()
        vision = require_vision(self._vision)
        count, tiles = check_images(feeds, vision.signature, self._batch_size)
        if self._encoder is None:
            self._encoder = self._load(vision.path)
        if self.device == "cpu":
            images = self._encode_one_by_one(feeds, vision.spec, count, tiles)
            self._held = HeldImages(spec=vision.spec, count=count, tiles=tiles)
            self._show(images)
            return
        binding = self._encoder.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in vision.spec.names():
            binding.bind_output(name, self.device, self._device_id)
        self._encoder.run_with_iobinding(binding)
        self._held = HeldImages(spec=vision.spec, count=count, tiles=tiles)
        self._show(binding.get_outputs())

    def _encode_one_by_one(self, feeds: Feeds, spec: VisionSpec, count: int, tiles: int) -> list[Any]:
        """Keys and values of every row's pictures; padding pictures are all the same and are encoded once."""
        shape, dtype = spec.array_shape(self._batch_size, count, tiles), _NUMPY[self._dtype(spec.dtype)]
        arrays = [np.empty(shape, dtype) for _ in spec.names()]
        size, padding = tiles * spec.patches_per_tile, None
        for row, image in np.ndindex(self._batch_size, count):
            one = {name: np.ascontiguousarray(array[row : row + 1, image : image + 1]) for name, array in feeds.items()}
            is_padding = not one["aspect_ratio_ids"].any() and not one["pixel_values"].any()
            is_padding &= int(one["aspect_ratio_mask"].sum()) == int(one["aspect_ratio_mask"][0, 0, 0]) == 1
            made = padding if is_padding else None
            if made is None:
                made = self._encoder.run(spec.names(), one)
            if is_padding:
                padding = made
            for array, part in zip(arrays, made, strict=True):
                array[row, :, image * size : (image + 1) * size] = part[0]
        return [self._upload(array, spec.dtype) for array in arrays]

    def _show(self, images: list[Any]) -> None:
        """Let the decoder read these keys and values."""
        assert self.vision_spec is not None
        self._images = images
        for name, value in zip(self.vision_spec.names(), images, strict=True):
            self._binding.bind_ortvalue_input(name, value)

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the graph; the cache is updated. See Runner.step."""
        session = self._open_session()
        check_step(feeds, self.signature, self.cache_spec, self._batch_size, self._held)
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._binding.bind_output("logits", "cpu")
        session.run_with_iobinding(self._binding)
        logits: np.ndarray = self._binding.get_outputs()[-1].numpy()
        for index, updated in self._next.items():
            self._cache[index], self._next[index] = updated, self._cache[index]
            self._bind(index)
        return logits

    def _bind(self, index: int) -> None:
        past, present = self.cache_spec.past_names()[index], self.cache_spec.present_names()[index]
        self._binding.bind_ortvalue_input(past, self._cache[index])
        self._binding.bind_ortvalue_output(present, self._next.get(index, self._cache[index]))

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        return self._download(self._cache[index])

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images."""
        return self._download(self._images[index])

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images."""
        spec = require_vision(self._vision).spec
        self._images[index] = self._upload(array, spec.dtype)
        self._binding.bind_ortvalue_input(spec.names()[index], self._images[index])

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        for buffer, tensor in zip(self._cache, self.cache_spec.tensors, strict=True):
            if tensor.slot_axis is None:
                continue
            full = np.full(tensor.array_shape(self._batch_size), value, np.float32)
            if self._dtype(tensor.dtype) == "bfloat16":
                self._ort.copy_tensors([self._bfloat16(full)], [buffer])
            else:
                buffer.update_inplace(full.astype(_NUMPY[self._dtype(tensor.dtype)], copy=False))

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows. On the CPU, only rows that move are copied; a CUDA cache goes by way of the host."""
        self._open_session()
        check_rows(rows, self._batch_size)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if not moved.size:
            return
        for buffer in (*self._cache, *self._images):
            if buffer.element_type() == _ONNX_BFLOAT16:  # numpy has no such type; its bits can be moved all the same
                bits = np.empty(buffer.shape(), np.uint16)
                host = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
                self._ort.copy_tensors([buffer], [host])
                bits[moved] = bits[rows[moved]]
                self._ort.copy_tensors([host], [buffer])
                continue
            array = buffer.numpy()  # the cache's own memory on the CPU, a copy on CUDA
            array[moved] = array[rows[moved]]
            if array.ctypes.data != buffer.data_ptr():
                buffer.update_inplace(array)

    def close(self) -> None:
        """Release the session and the cache."""
        self._binding, self._cache, self._next, self._images = None, [], {}, []
        self._session = self._encoder = None

    def __enter__(self) -> "OnnxRuntimeRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_session(self) -> Any:
        if self._session is None:
            raise FeedError("this runner is closed")
        return self._session

    def _zeros(self, tensor: StateSpec) -> Any:
        """A tensor of zeros on the device."""
        return self._upload(np.zeros(tensor.array_shape(self._batch_size), np.float32), tensor.dtype)

    def _dtype(self, dtype: str) -> str:
        """What the session takes: a widened graph has no 16-bit floats left."""
        return dtype if self.computes_in == self.cache_spec.dtype else "float32"

    def _upload(self, array: np.ndarray, dtype: str) -> Any:
        """Float32 numbers as a tensor on the device."""
        make, dtype = self._ort.OrtValue, self._dtype(dtype)
        if dtype != "bfloat16":
            return make.ortvalue_from_numpy(np.ascontiguousarray(array, _NUMPY[dtype]), self.device, self._device_id)
        buffer = make.ortvalue_from_shape_and_type(array.shape, _ONNX_BFLOAT16, self.device, self._device_id)
        self._ort.copy_tensors([self._bfloat16(array)], [buffer])
        return buffer

    def _bfloat16(self, array: np.ndarray) -> Any:
        """Float32 numbers as a host tensor; numpy has no bfloat16, which is the upper half of a float32."""
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        half = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))  # to the nearest, of two to the even one
        upper = ((bits + half) >> np.uint32(16)).astype(np.uint16)
        return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(upper, _ONNX_BFLOAT16)

    def _download(self, buffer: Any) -> np.ndarray:
        """A float32 copy of a device tensor."""
        if buffer.element_type() != _ONNX_BFLOAT16:
            return np.array(buffer.numpy(), np.float32)
        host = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.zeros(buffer.shape(), np.uint16), _ONNX_BFLOAT16
        )
        self._ort.copy_tensors([buffer], [host])
        bits: np.ndarray = host.numpy().astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
