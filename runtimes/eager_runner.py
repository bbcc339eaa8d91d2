"""The eager runner: a PyTorch module behind the runners' interface. Its caller brings the module, and so torch."""

import importlib
from types import TracebackType
from typing import Any

import numpy as np

from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, StateSpec, VisionPart
from runtimes.step_checks import HeldImages, check_images, check_reset, check_rows, check_step, require_vision


class EagerRunner:
    """Runs a module that takes the signature's inputs; see runtimes.runner.Runner for the interface."""

    def __init__(
        self,
        module: Any,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        encoder: Any = None,
        vision: VisionPart | None = None,
        device: str = "cpu",
    ) -> None:
        """`module` is called with the inputs in order, the state as a list with one tuple for each layer, and returns
        the logits and the new state (exporter/layouts wraps a decoder so). Of a decoder that sees, `encoder` returns
        (key, value) for each cross-attention layer, which `module` takes as one more list.
        """
        self._torch = importlib.import_module("torch")
        self._module = module
        self._device = device
        self._cache: list[tuple[Any, ...]] = []
        self._encoder = encoder
        self._vision = vision
        self._images: list[Any] = []
        self._held: HeldImages | None = None
        self.vision_spec = None if vision is None else vision.spec
        self._batch_size = 0
        self.signature = signature
        self.cache_spec = cache_spec
        self.computes_in = cache_spec.dtype
        self.description = f"eager PyTorch {self._torch.__version__} ({device})"

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows."""
        check_reset(batch_size, self.signature)
        self._batch_size = batch_size
        self._cache = self.cache_spec.by_layer([self._full(tensor, 0.0) for tensor in self.cache_spec.tensors])
        if self.vision_spec is not None:
            shape = self.vision_spec.array_shape(batch_size, 1, 1)
            self._images = [self._make(np.zeros(shape, np.float32)) for _ in self.vision_spec.names()]
            self._held = HeldImages(spec=self.vision_spec)

    def encode_images(self, feeds: Feeds) -> None:
        """See Runner.encode_images."""
        vision = require_vision(self._vision)
        count, tiles = check_images(feeds, vision.signature, self._batch_size)
        with self._torch.no_grad():
            pairs = self._encoder(*self._tensors(feeds, [spec.name for spec in vision.signature.inputs]))
        self._images = [tensor for pair in pairs for tensor in pair]
        self._held = HeldImages(spec=vision.spec, count=count, tiles=tiles)

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the module and keep the cache it returns. See Runner.step."""
        check_step(feeds, self.signature, self.cache_spec, self._batch_size, self._held)
        names = [spec.name for spec in self.signature.inputs if spec.name in feeds]
        images = [] if self.vision_spec is None else [self.vision_spec.by_layer(self._images)]
        with self._torch.no_grad():
            logits, self._cache = self._module(*self._tensors(feeds, names), self._cache, *images)
        result: np.ndarray = logits.float().cpu().numpy()
        return result

    def read_cache(self, index: int) -> np.ndarray:
        """See Runner.read_cache."""
        tensors = [tensor for layer in self._cache for tensor in layer]
        array: np.ndarray = tensors[index].float().cpu().numpy()
        return array

    def read_images(self, index: int) -> np.ndarray:
        """See Runner.read_images."""
        array: np.ndarray = self._images[index].float().cpu().numpy()
        return array

    def write_images(self, index: int, array: np.ndarray) -> None:
        """See Runner.write_images."""
        self._images[index] = self._make(array)

    def fill_cache(self, value: float) -> None:
        """See Runner.fill_cache."""
        for spec, tensor in zip(self.cache_spec.tensors, [t for layer in self._cache for t in layer], strict=True):
            if spec.slot_axis is not None:
                tensor.fill_(value)

    def reorder_rows(self, rows: np.ndarray) -> None:
        """See Runner.reorder_rows."""
        check_rows(rows, self._batch_size)
        index = self._torch.from_numpy(rows).to(self._device)
        self._cache = [tuple(tensor.index_select(0, index) for tensor in layer) for layer in self._cache]
        self._images = [tensor.index_select(0, index) for tensor in self._images]

    def close(self) -> None:
        """Let go of the cache and the module."""
        self._cache, self._images, self._module, self._encoder = [], [], None, None

    def __enter__(self) -> "EagerRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensors(self, feeds: Feeds, names: list[str]) -> list[Any]:
        return [self._torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self._device) for name in names]

    def _make(self, array: np.ndarray) -> Any:
        """Float32 numbers in the model's dtype."""
        return self._torch.from_numpy(array).to(self._device, getattr(self._torch, self.cache_spec.dtype))

    def _full(self, spec: StateSpec, value: float) -> Any:
        dtype = getattr(self._torch, spec.dtype)
        return self._torch.full(spec.array_shape(self._batch_size), value, dtype=dtype, device=self._device)
