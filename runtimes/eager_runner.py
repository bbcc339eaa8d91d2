"""The eager runner: a PyTorch module behind the runners' interface. Its caller brings the module."""

from typing import Any

from runtimes.signature import CacheSpec, GraphSignature, VisionPart
from runtimes.torch_runner import TorchRunner


class EagerRunner(TorchRunner):
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
        super().__init__(signature, cache_spec, vision=vision, device=device, what="eager PyTorch")
        self._module = module
        self._encoder = encoder

    def _run(self, inputs: list[Any], sizes: dict[str, int]) -> Any:
        images = [] if self.vision_spec is None else [self.vision_spec.by_layer(self._images)]
        logits, present = self._module(*inputs, self.cache_spec.by_layer(self._cache), *images)
        self._cache = [tensor for layer in present for tensor in layer]
        return logits

    def _encode(self, inputs: list[Any]) -> list[Any]:
        return [tensor for pair in self._encoder(*inputs) for tensor in pair]

    def _release(self) -> None:
        self._module = self._encoder = None
