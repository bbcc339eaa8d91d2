"""What the runners on PyTorch share: the state, the images, and the checks. A runner adds how a step is computed."""

import importlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtimes.errors import FeedError, RuntimeMissingError
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, StateSpec, VisionPart
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


def import_torch() -> Any:
    """The torch module; RuntimeMissingError says how to install it."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise RuntimeMissingError(f"PyTorch is not installed ({error}): pip install torch") from None


def torch_device(asked: str | None) -> str:
    """ "cpu" or "cuda", as asked for, by default CUDA where it can be used; RuntimeMissingError if it is not there."""
    has_gpu = import_torch().cuda.is_available()
    device = asked or ("cuda" if has_gpu else "cpu")
    if device not in ("cpu", "cuda"):
        raise RuntimeMissingError(f"unknown device {device!r}; known: cpu, cuda")
    if device == "cuda" and not has_gpu:
        raise RuntimeMissingError(
            "device 'cuda' needs a GPU and a PyTorch built for CUDA, and this one finds none: use --device cpu"
        )
    return device


class TorchRunner(ABC):
    """Holds the state as tensors of one device; see runtimes.runner.Runner for the interface."""

    def __init__(
        self, signature: GraphSignature, cache_spec: CacheSpec, *, vision: VisionPart | None, device: str, what: str
    ) -> None:
        """`what` computes the steps, in words."""
        self._torch = import_torch()
        self.device = device
        self.signature = signature
        self.cache_spec = cache_spec
        self.vision_spec = None if vision is None else vision.spec
        self.computes_in = cache_spec.dtype
        self.description = f"{what} {self._torch.__version__} ({device})"
        self._vision = vision
        self._cache: list[Any] = []  # as CacheSpec.tensors lists them
        self._images: list[Any] = []  # as VisionSpec.names() lists them
        self._held: HeldImages | None = None
        self._batch_size = 0
        self._closed = False

    @abstractmethod
    def _run(self, inputs: list[Any], sizes: dict[str, int]) -> Any:
        """Logits of inputs without state and images; self._cache is updated."""

    @abstractmethod
    def _encode(self, inputs: list[Any]) -> list[Any]:
        """The vision encoder's keys and values, as VisionSpec.names() lists them."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what computes."""

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows; memory is kept where their number is as before."""
        self._require_open()
        check_reset(batch_size, self.signature)
        if batch_size == self._batch_size:
            for tensor in self._cache:
                tensor.zero_()
        else:
            self._batch_size, self._cache = 0, []  # free the old one first
            self._cache = [self._zeros(tensor, batch_size) for tensor in self.cache_spec.tensors]
        self._batch_size = batch_size
        if self.vision_spec is not None:
            shape = self.vision_spec.array_shape(batch_size, 1, 1)
            self._images = [self._make(np.zeros(shape, np.float32)) for _ in self.vision_spec.names()]
            self._held = HeldImages(spec=self.vision_spec)

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images."""
        self._require_open()
        vision = require_vision(self._vision)
        count, tiles = check_images(feeds, vision.signature, self._batch_size)
        with self._torch.no_grad():
            made = self._encode(self._tensors(feeds, [spec.name for spec in vision.signature.inputs]))
        self._images = [tensor.contiguous() for tensor in made]  # compiled decoders do not look at strides
        self._held = HeldImages(spec=vision.spec, count=count, tiles=tiles)

    def step(self, feeds: Feeds) -> np.ndarray:
        """See Runner.step."""
        self._require_open()
        sizes = check_step(feeds, self.signature, self.cache_spec, self._batch_size, self._held)
        names = [spec.name for spec in self.signature.inputs if spec.name in feeds]
        with self._torch.no_grad():
            logits = self._run(self._tensors(feeds, names), sizes)
        result: np.ndarray = logits.float().cpu().numpy()
        return result

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        self._require_reset("the cache is read")
        check_index(index, self.cache_spec.past_names())
        return self._read(self._cache[index])

    def write_cache(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_cache."""
        self._require_open()
        check_cache_array(array, index, self.cache_spec, self._batch_size)
        self._cache[index].copy_(self._torch.tensor(array))

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        self._require_reset("the cache is filled")
        for spec, tensor in zip(self.cache_spec.tensors, self._cache, strict=True):
            if spec.slot_axis is not None:
                tensor.fill_(value)

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images."""
        self._require_reset("images are read")
        check_index(index, require_vision(self._vision).spec.names())
        return self._read(self._images[index])

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images."""
        self._require_reset("images are written")
        require_vision(self._vision)
        assert self._held is not None
        check_image_array(array, index, self._held, self._batch_size)
        self._images[index] = self._make(array)

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows. Only rows that move are copied."""
        self._require_open()
        check_rows(rows, self._batch_size)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if not moved.size:
            return
        to, source = (self._torch.from_numpy(index).to(self.device) for index in (moved, rows[moved]))
        for tensor in (*self._cache, *self._images):
            tensor[to] = tensor[source]

    def close(self) -> None:
        """Let go of the cache and what computes."""
        self._closed, self._batch_size = True, 0
        self._cache, self._images = [], []
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise FeedError("this runner is closed")

    def _require_reset(self, before: str) -> None:
        self._require_open()
        require_reset(self._batch_size, before)

    def _tensors(self, feeds: Feeds, names: list[str]) -> list[Any]:
        return [self._torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self.device) for name in names]

    def _make(self, array: np.ndarray) -> Any:
        """Float32 numbers in the model's dtype, in memory of its own."""
        return self._torch.tensor(array, dtype=getattr(self._torch, self.cache_spec.dtype), device=self.device)

    def _read(self, tensor: Any) -> np.ndarray:
        """A float32 copy."""
        array: np.ndarray = tensor.detach().to("cpu", self._torch.float32, copy=True).numpy()
        return array

    def _zeros(self, spec: StateSpec, batch_size: int) -> Any:
        dtype = getattr(self._torch, spec.dtype)
        return self._torch.zeros(spec.array_shape(batch_size), dtype=dtype, device=self.device)
