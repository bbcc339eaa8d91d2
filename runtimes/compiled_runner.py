"""The compiled runner: PyTorch modules, compiled when they are first called, over a static cache."""

from typing import Any

from runtimes.signature import CacheSpec, GraphSignature, StateSpec, VisionPart
from runtimes.torch_runner import TorchRunner

# attention_mask is padded to a power of two, this at least: each of its sizes may be compiled or recorded anew.
SMALLEST_MASK = 64


class CompiledRunner(TorchRunner):
    """Runs modules that update the state in place; see runtimes.runner.Runner for the interface.

    Compiling takes seconds at the first call, and again where a batch of one row becomes one of several. On a GPU,
    decode steps are replayed as CUDA graphs.
    """

    def __init__(
        self,
        prefill: Any,
        decode: Any,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        encoder: Any = None,
        vision: VisionPart | None = None,
        device: str = "cpu",
    ) -> None:
        """Prepare the modules; nothing is compiled yet.

        Args:
            prefill: takes one tuple of the signature's inputs, the state as a list with one tuple for each layer (and
                keys and values of images as another), writes the new state over the old and returns the logits.
            decode: the same for one token of each row.
            encoder: of a decoder that sees, returns (key, value) for each cross-attention layer.
        """
        super().__init__(signature, cache_spec, vision=vision, device=device, what="torch.compile")
        # Without CUDA graphs in prefill, whose lengths differ from call to call.
        mode = "reduce-overhead" if device == "cuda" else "default"
        self._prefill = self._torch.compile(prefill, dynamic=True)
        self._decode = self._torch.compile(decode, dynamic=True, mode=mode)
        self._encoder: Any = None if encoder is None else self._torch.compile(encoder, dynamic=True)

    def _zeros(self, spec: StateSpec, batch_size: int) -> Any:
        tensor = super()._zeros(spec, batch_size)
        self._torch._dynamo.mark_static_address(tensor)  # CUDA graphs may then write to it where it lies
        return tensor

    def _run(self, inputs: list[Any], sizes: dict[str, int]) -> Any:
        names = [spec.name for spec in self.signature.inputs]
        mask = names.index("attention_mask")
        inputs[mask] = self._padded(inputs[mask])
        images = [] if self.vision_spec is None else [self.vision_spec.by_layer(self._images)]
        one_token = sizes["sequence_length"] == sizes["n"] == 1
        module = self._decode if one_token else self._prefill
        return module((*inputs, self.cache_spec.by_layer(self._cache), *images))

    def _padded(self, mask: Any) -> Any:
        """The mask with zeros behind it: slots that nobody sees."""
        total = mask.shape[1]
        wanted = max(SMALLEST_MASK, 1 << (total - 1).bit_length())
        return self._torch.nn.functional.pad(mask, (0, min(wanted, self.cache_spec.max_len) - total))

    def _encode(self, inputs: list[Any]) -> list[Any]:
        return [tensor for pair in self._encoder(*inputs) for tensor in pair]

    def _release(self) -> None:
        self._prefill = self._decode = self._encoder = None
