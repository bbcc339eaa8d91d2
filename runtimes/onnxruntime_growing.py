"""The ONNX Runtime runner of the dynamic layout, whose cache grows by concatenation.

It offers the static cache that Runner.step speaks of. The graph's cache has the same number of columns for every row,
and a call appends to all of them: row b keeps its slot v in column v + offsets[b]. While the next slot of every row
that is not idle follows its last column, a step copies nothing but what the graph does; else rows are moved first.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import FeedError
from runtimes.onnxruntime_session import OnnxRuntime
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, VisionPart, step_signature
from runtimes.step_checks import (
    check_cache_array,
    check_index,
    check_reset,
    check_rows,
    check_step,
    require_reset,
    require_vision,
)


class GrowingOnnxRuntimeRunner:
    """Runs a decoder graph of the dynamic layout; see runtimes.runner.Runner for the interface."""

    vision_spec = None  # the layout is for models that read text only

    def __init__(
        self,
        model: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        **options: Any,
    ) -> None:
        """Load `model`; signature is the graph's own. Options are those of OnnxRuntimeRunner."""
        assert vision is None
        self._runtime = OnnxRuntime(cache_spec.dtype, **options)
        self.device = self._runtime.device
        self.in_float32 = self._runtime.in_float32
        self.computes_in = self._runtime.computes_in
        self.description = f"{self._runtime.description}, dynamic layout"
        self.signature = step_signature(signature, cache_spec)
        self.cache_spec = cache_spec
        self._session = self._runtime.load(model)
        self._runtime.require_on_device(self._session, cache_spec.past_names())
        self._cache: list[Any] = []
        self._columns = 0
        self._offsets = np.zeros(0, np.int64)  # [B]
        self._written = np.zeros(0, np.int64)  # [B], one more than the last slot that was written
        self._fill = 0.0  # what slots hold that were never written
        self._batch_size = 0

    @classmethod
    def open(cls, artifact: Artifact, **options: Any) -> "GrowingOnnxRuntimeRunner":
        """Run the artifact's graph."""
        graph = artifact.manifest.graphs["decoder"]
        return cls(artifact.path(graph.file), graph.signature, artifact.manifest.cache, **options)

    def reset(self, batch_size: int) -> None:
        """Make an empty cache for `batch_size` rows."""
        self._open_session()
        check_reset(batch_size, self.signature)
        self._batch_size, self._columns, self._fill = batch_size, 0, 0.0
        self._offsets, self._written = np.zeros((2, batch_size), np.int64)
        self._put([np.zeros(self._shape(index, 0), np.float32) for index in range(len(self.cache_spec.tensors))])

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images: always FeedError."""
        self._open_session()
        require_vision(None)

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the graph; see Runner.step."""
        session = self._open_session()
        sizes = check_step(feeds, self.signature, self.cache_spec, self._batch_size)
        length, seen = sizes["sequence_length"], feeds["attention_mask"]
        active = self._active(feeds["write_indices"], seen)
        self._align(feeds["write_indices"], active)
        own = {"input_ids": feeds["input_ids"], "position_ids": feeds["position_ids"]}
        own["attention_mask"] = self._mask_of_columns(seen, self._columns + length)
        binding = session.io_binding()  # whose outputs are new ones every time
        for name, array in own.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in zip(self.cache_spec.past_names(), self._cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self.cache_spec.present_names():
            binding.bind_output(name, self.device, self._runtime.device_id)
        session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        self._columns += length
        self._written[active] = np.maximum(feeds["write_indices"] + length, self._written)[active]
        rows = np.arange(self._batch_size)[:, None]
        result: np.ndarray = logits.numpy()[rows, feeds["logit_indices"]]
        return result

    def _mask_of_columns(self, seen: np.ndarray, columns: int) -> np.ndarray:
        """Which columns each row sees, int64 [B, columns], of which slots it sees."""
        if columns == seen.shape[1] and not self._offsets.any():
            return seen
        slots, rows = np.arange(columns) - self._offsets[:, None], np.arange(self._batch_size)[:, None]
        known = seen[rows, slots.clip(0, seen.shape[1] - 1)]
        return np.where((slots >= 0) & (slots < seen.shape[1]), known, 0)

    def _active(self, write_indices: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """bool [B]: rows whose first new token may be seen; the others are fed padding, and may take it anywhere."""
        own: np.ndarray = seen[np.arange(self._batch_size), write_indices.clip(max=seen.shape[1] - 1)] != 0
        return own & (write_indices < seen.shape[1])

    def _align(self, write_indices: np.ndarray, active: np.ndarray) -> None:
        """Make slot write_indices[b] of every active row the next column."""
        if ((write_indices + self._offsets)[active] == self._columns).all():
            return
        columns = int(write_indices.max())
        slots = np.arange(columns) - (columns - write_indices)[:, None]
        self._put([self._rows_at(index, slots) for index in range(len(self._cache))])
        self._columns, self._offsets = columns, columns - write_indices

    def _rows_at(self, index: int, slots: np.ndarray) -> np.ndarray:
        """Tensor `index` with slot slots[b, c] of row b in its column c, float32."""
        old = self._runtime.download(self._cache[index])
        held = slots + self._offsets[:, None]
        there = (slots >= 0) & (held >= 0) & (held < self._columns)
        new = np.full(self._shape(index, slots.shape[1]), self._fill, np.float32)
        rows, columns = np.nonzero(there)
        new[rows, :, columns] = old[rows, :, held[there]]
        return new

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        self._require_reset("the cache is read")
        check_index(index, self.cache_spec.past_names())
        every = np.arange(self.cache_spec.max_len)
        slots = np.where(every < self._written[:, None], every, -1)
        return self._rows_at(index, slots)

    def write_cache(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_cache: the other tensors get as many columns."""
        self._open_session()
        check_cache_array(array, index, self.cache_spec, self._batch_size)
        whole = self.cache_spec.max_len
        if self._columns != whole or self._offsets.any():
            every = np.tile(np.arange(whole), (self._batch_size, 1))
            self._put([self._rows_at(each, every) for each in range(len(self._cache))])
            self._columns, self._offsets = whole, np.zeros_like(self._offsets)
        self._written = np.full_like(self._written, whole)
        self._cache[index] = self._runtime.upload(array.copy(), self.cache_spec.tensors[index].dtype)

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        self._require_reset("the cache is filled")
        self._fill = value
        for index in range(len(self._cache)):
            shape = self._shape(index, self._columns)
            self._cache[index] = self._runtime.upload(np.full(shape, value, np.float32), self._dtype(index))

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images: always FeedError."""
        self._require_reset("images are read")
        require_vision(None)
        raise AssertionError

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images: always FeedError."""
        self._require_reset("images are written")
        require_vision(None)

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows."""
        self._open_session()
        check_rows(rows, self._batch_size)
        for buffer in self._cache if self._columns else ():
            self._runtime.reorder_rows(buffer, rows)
        self._offsets, self._written = self._offsets[rows], self._written[rows]

    def close(self) -> None:
        """Release the session and the cache."""
        self._session, self._cache, self._batch_size = None, [], 0

    def __enter__(self) -> "GrowingOnnxRuntimeRunner":
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

    def _dtype(self, index: int) -> str:
        return self.cache_spec.tensors[index].dtype

    def _shape(self, index: int, columns: int) -> tuple[int, ...]:
        heads, _, dim = self.cache_spec.tensors[index].shape
        return (self._batch_size, heads, columns, dim)

    def _put(self, arrays: list[np.ndarray]) -> None:
        """Let these be the cache."""
        self._cache = [self._runtime.upload(array, self._dtype(index)) for index, array in enumerate(arrays)]
