"""Methods of quantizing weights. docs/quantization.md compares them.

Some look at a weight alone. Others need calibration: text that goes through the model, layer by layer
(exporter/quantizers/calibration.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.quantizers import awq, gptq, mse, rtn
from exporter.quantizers.streaming import StreamedLayer
from graphs.quantization import QuantizedTensor, WeightFormat


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A method; it has one of the two functions."""

    # (weight [N, K], its format, the dtype of scales) -> its codes
    quantize_weight: Callable[[Tensor, WeightFormat, torch.dtype], QuantizedTensor] | None = None
    # quantizes the weights of a layer through which calibration text goes
    quantize_layer: Callable[[StreamedLayer], None] | None = None
    compares: bool = False  # quantize_layer also needs what the layer's inputs would be had nothing been quantized

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs text."""
        return self.quantize_layer is not None


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer(quantize_weight=rtn.quantize),
    "mse": Quantizer(quantize_weight=mse.quantize),
    "gptq": Quantizer(quantize_layer=gptq.quantize_layer, compares=True),
    "awq": Quantizer(quantize_layer=awq.quantize_layer),
}
