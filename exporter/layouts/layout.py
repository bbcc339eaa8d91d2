"""What a layout is: data that capture and lowering read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, GraphSignature

Lowering = Callable[..., Any]
WRAPPED = "decoder"  # the attribute in which every wrapper holds its TransformerDecoder


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to put a decoder into an ONNX graph."""

    opset: int
    ir_version: int  # the ONNX file format that the opset came with
    wrap: Callable[[TransformerDecoder], nn.Module]  # a module whose forward takes the signature's inputs in order
    signature: Callable[[DecoderConfig, CacheSpec, int], GraphSignature]  # (config, cache, max_batch)
    lowerings: Mapping[Any, Lowering]  # {torch operator: function that builds its ONNX nodes}
