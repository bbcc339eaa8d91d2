"""The ONNX Runtime runner: past and present are bound to the same buffers, so nothing of the cache is copied."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import FeedError
from runtimes.onnxruntime_binding import StepBinding
from runtimes.onnxruntime_session import NUMPY, OnnxRuntime
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, StateSpec, VisionPart, VisionSpec
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


class OnnxRuntimeRunner:
    """Runs a decoder graph of the portable layout; see runtimes.runner.Runner for the interface."""

    def __init__(
        self,
        model: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        **options: Any,
    ) -> None:
        """Load `model`. The vision encoder is loaded when the first images come.

        Args:
            vision: what makes the decoder see, if it can.
            options: of runtimes.onnxruntime_session.OnnxRuntime: device, device_id, threads, in_float32.

        Raises:
            RuntimeMissingError: ONNX Runtime or the device's provider is missing, or has no kernel for this graph.
            ArtifactError: `model` is missing or damaged.
        """
        self._runtime = OnnxRuntime(cache_spec.dtype, **options)
        self.device = self._runtime.device
        self.in_float32 = self._runtime.in_float32
        self.computes_in = self._runtime.computes_in
        self.description = self._runtime.description
        self.signature = signature
        self.cache_spec = cache_spec
        self.vision_spec = None if vision is None else vision.spec
        self._session = self._runtime.load(model)
        kept = cache_spec.past_names() + ([] if vision is None else vision.spec.names())
        self._runtime.require_on_device(self._session, kept)
        (logits,) = (spec for spec in signature.outputs if spec.name == "logits")
        self._vocab_size = int(logits.shape[-1])
        self._in_place = set(signature.aliases)
        self._vision = vision
        self._encoder: Any = None
        self._binding: Any = None  # a StepBinding, from reset on
        self._cache: list[Any] = []
        self._images: list[Any] = []  # keys and values, as VisionSpec.names() lists them
        self._held: HeldImages | None = None
        self._next: dict[int, Any] = {}  # by index: where a tensor's update goes that cannot be made in place
        self._batch_size = 0

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "OnnxRuntimeRunner":
        """Run the artifact's graphs."""
        graph, vision = artifact.manifest.graphs["decoder"], artifact.vision_part()
        return cls(artifact.path(graph.file), graph.signature, artifact.manifest.cache, vision=vision, **options)

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows."""
        session = self._open_session()
        check_reset(batch_size, self.signature)
        self._forget()  # free the old cache first
        tensors, presents = self.cache_spec.tensors, self.cache_spec.present_names()
        self._cache = [self._zeros(tensor, batch_size) for tensor in tensors]
        self._next = {i: self._zeros(tensors[i], batch_size) for i, n in enumerate(presents) if n not in self._in_place}
        self._binding = StepBinding(self._runtime, session)
        for index in range(len(presents)):
            self._bind(index)
        if self.vision_spec is not None:
            nothing = np.zeros(self.vision_spec.array_shape(batch_size, 1, 1), np.float32)
            images = [self._runtime.upload(nothing, self.vision_spec.dtype) for _ in self.vision_spec.names()]
            self._show(images, HeldImages(spec=self.vision_spec))
        self._batch_size = batch_size

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images. On the CPU, picture by picture: attention holds the scores of all at once."""
        self._open_session()
        vision = require_vision(self._vision)
        count, tiles = check_images(feeds, vision.signature, self._batch_size)
        if self._encoder is None:
            self._encoder = self._runtime.load(vision.path)
        if self.device == "cpu":
            images = self._encode_one_by_one(feeds, vision.spec, count, tiles)
        else:
            images = self._encode_at_once(feeds, vision.spec)
        self._show(images, HeldImages(spec=vision.spec, count=count, tiles=tiles))

    def _encode_at_once(self, feeds: Feeds, spec: VisionSpec) -> list[Any]:
        """Keys and values of every row's pictures, which stay on the device."""
        binding = self._encoder.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in spec.names():
            binding.bind_output(name, self.device, self._runtime.device_id)
        self._encoder.run_with_iobinding(binding)
        made: list[Any] = binding.get_outputs()
        return made

    def _encode_one_by_one(self, feeds: Feeds, spec: VisionSpec, count: int, tiles: int) -> list[Any]:
        """Keys and values of every row's pictures; padding pictures are all the same and are encoded once."""
        shape, dtype = spec.array_shape(self._batch_size, count, tiles), NUMPY[self._runtime.taken(spec.dtype)]
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
        return [self._runtime.upload(array, spec.dtype) for array in arrays]

    def _show(self, images: list[Any], held: HeldImages) -> None:
        """Let the decoder read these keys and values."""
        self._images, self._held = images, held
        for name, value in zip(held.spec.names(), images, strict=True):
            self._binding.bind_input(name, value)

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the graph; the cache is updated. See Runner.step."""
        self._open_session()
        check_step(feeds, self.signature, self.cache_spec, self._batch_size, self._held)
        return self._run_graph(feeds)

    def _run_graph(self, feeds: Feeds) -> np.ndarray:
        """One run with these inputs beside the cache; the logits."""
        for name, array in feeds.items():
            self._binding.feed(name, array)
        logits: np.ndarray = self._binding.run("logits", (*feeds["logit_indices"].shape, self._vocab_size))
        for index, updated in self._next.items():
            self._cache[index], self._next[index] = updated, self._cache[index]
            self._bind(index)
        return logits

    def _bind(self, index: int) -> None:
        past, present = self.cache_spec.past_names()[index], self.cache_spec.present_names()[index]
        self._binding.bind_input(past, self._cache[index])
        self._binding.bind_output(present, self._next.get(index, self._cache[index]))

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        self._require_reset("the cache is read")
        check_index(index, self.cache_spec.past_names())
        return self._runtime.download(self._cache[index])

    def write_cache(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_cache."""
        self._open_session()
        check_cache_array(array, index, self.cache_spec, self._batch_size)
        self._runtime.overwrite(self._cache[index], array, self.cache_spec.tensors[index].dtype)

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images."""
        self._require_reset("images are read")
        check_index(index, require_vision(self._vision).spec.names())
        return self._runtime.download(self._images[index])

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images."""
        self._require_reset("images are written")
        spec = require_vision(self._vision).spec
        assert self._held is not None
        check_image_array(array, index, self._held, self._batch_size)
        self._images[index] = self._runtime.upload(array.copy(), spec.dtype)  # uploading on the CPU shares memory
        self._binding.bind_input(spec.names()[index], self._images[index])

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        self._require_reset("the cache is filled")
        for buffer, tensor in zip(self._cache, self.cache_spec.tensors, strict=True):
            if tensor.slot_axis is None:
                continue
            self._runtime.overwrite(
                buffer, np.full(tensor.array_shape(self._batch_size), value, np.float32), tensor.dtype
            )

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows."""
        self._open_session()
        check_rows(rows, self._batch_size)
        for buffer in (*self._cache, *self._images):
            self._runtime.reorder_rows(buffer, rows)

    def close(self) -> None:
        """Release the session and the cache."""
        self._forget()
        self._session = self._encoder = None

    def _forget(self) -> None:
        """Let go of the cache and of what the rows were shown."""
        self._batch_size = 0
        self._binding, self._cache, self._next, self._images, self._held = None, [], {}, [], None

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

    def _require_reset(self, before: str) -> None:
        self._open_session()
        require_reset(self._batch_size, before)

    def _zeros(self, tensor: StateSpec, batch_size: int) -> Any:
        """A tensor of zeros on the device."""
        return self._runtime.zeros(tensor.array_shape(batch_size), tensor.dtype)
