"""What a layout is: data that capture and lowering read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
from torch import nn

from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.artifact import GRAPH_FILES
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
    wrap: Callable[[TransformerDecoder, CacheSpec], nn.Module]
    signature: Signature
    wrap_encoder: Callable[[VisionEncoder], nn.Module]
    encoder_signature: Callable[[DecoderConfig, VisionSpec, int], GraphSignature]
    lowerings: Mapping[Any, Lowering]  # {torch operator: function that builds its ONNX nodes}
    graph_file: str = GRAPH_FILES["decoder"]
    rows_first: bool = False  # quantized weights are MatMulNBits', and not DequantizeLinear's, where it has the format
    shared_cache: bool | None = None  # for onnxruntime-genai: whether past and present are one buffer; None: not for it
    gapless: bool = False  # a row's tokens fill its cache from slot 0 on, and their positions are their slots
    finish: Callable[[ir.Model], None] | None = None  # what is left to do to the decoder's graph
