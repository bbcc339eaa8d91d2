"""The numbers that a reference computes with: a checkpoint's, rounded as the artifact's should be."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from exporter.precision import FloatType
from exporter.quantizers import rtn
from exporter.reference import StreamedWeights, rounded_block
from exporter.weight_choice import WeightChoice
from graphs.checkpoint import Checkpoint, TensorRef


class Weights:
    """Weights of a checkpoint, read when they are asked for; quantized ones are what they are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        rounded_to: torch.dtype,
        *,
        int8_activations: bool = False,
        choices: Mapping[TensorRef, WeightChoice] | None = None,
    ) -> None:
        """Read from `checkpoint`.

        Args:
            rounded_to: what plain weights are rounded to first.
            int8_activations: what quantized weights multiply is rounded to 8 bits, as ONNX Runtime's CPU kernels do.
            choices: how weights are rounded, to the nearest code.
        """
        self._checkpoint = checkpoint
        self._device = device
        self._rounded_to = rounded_to
        self._int8_activations = int8_activations
        self._choices = choices or {}

    def load(self, ref: TensorRef, dtype: torch.dtype) -> Tensor:
        """What `ref` refers to."""
        choice = self._choices.get(ref)
        if choice is not None and not choice.kept:
            return self._round(self._checkpoint.load(ref, torch.float32), choice).to(self._device, dtype)
        return StreamedWeights(self._checkpoint, self._device, dtype, self._rounded_to).load(ref)

    def _round(self, plain: Tensor, choice: WeightChoice) -> Tensor:
        """Rounded to nearest, to what the choice says."""
        if isinstance(choice.stored, FloatType):
            return plain.to(getattr(torch, choice.stored.dtype))
        return rtn.quantize(plain.float(), choice.stored, self._rounded_to).dequantize(torch.float32)

    def look_up(self, ref: TensorRef, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a table; a plain one is not cast for the few that are wanted."""
        if ref in self._choices or self._checkpoint.find_packed(ref) is not None:
            return F.embedding(ids, self.load(ref, dtype))
        return F.embedding(ids, self._checkpoint.load(ref).to(self._device)).to(self._rounded_to).to(dtype)

    def rounded_block(self, ref: TensorRef) -> int | None:
        """In blocks of how many numbers what that weight multiplies is rounded to 8 bits; None: it is not."""
        return rounded_block(self._checkpoint, ref) if self._int8_activations else None
