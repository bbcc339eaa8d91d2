"""What a layout is: data that capture and lowering read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec

Lowering = Callable[..., Any]
WRAPPED = "wrapped"  # the attribute in which every wrapper holds its module


class Signature(Protocol):
    """The decoder's inputs and outputs for one model."""

    def __call__(
        self, config: DecoderConfig, cache: CacheSpec, max_batch: int, vision: VisionSpec | None = None
    ) -> GraphSignature: ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to put a decoder into an ONNX graph."""

    opset: int
    ir_version: int  # the ONNX file format that the opset came with
    # A module whose forward takes the signature's inputs in order; state, and keys and values of images, as one list
    # each, with a tuple for each layer.
    wrap: Callable[[TransformerDecoder], nn.Module]
    signature: Signature
    wrap_encoder: Callable[[VisionEncoder], nn.Module]
    encoder_signature: Callable[[DecoderConfig, VisionSpec, int], GraphSignature]
    lowerings: Mapping[Any, Lowering]  # {torch operator: function that builds its ONNX nodes}
