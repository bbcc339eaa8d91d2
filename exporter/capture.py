"""Capture: a decoder on the meta device becomes a torch.export program. No weight is read."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporter.layouts.layout import Layout
from exporter.quiet import quiet_torch
from graphs.build import build_decoder
from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, GraphSignature, TensorSpec

# torch.export specialises a dimension whose example size is 0 or 1, or equals another one's.
EXAMPLE_SIZES = {"batch_size": 3, "sequence_length": 5, "total_sequence_length": 7, "n": 2}


def build_on_meta(config: DecoderConfig, dtype: torch.dtype) -> TransformerDecoder:
    """The decoder with parameters of `dtype` that have shapes and no storage."""
    with torch.device("meta"):
        decoder = build_decoder(config)
    return decoder.to(dtype).requires_grad_(False).eval()


def capture(
    decoder: TransformerDecoder, layout: Layout, signature: GraphSignature, cache: CacheSpec
) -> ExportedProgram:
    """Trace layout.wrap(decoder) with the signature's dynamic dimensions."""
    dims = {name: Dim(name, min=1) for name in signature.dims}
    examples, shapes = [], []
    for spec in signature.inputs:
        examples.append(_example(spec))
        shapes.append({axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)})
    # the wrapped module takes the state as one list, a tuple for each layer; keyword containers break dynamic_shapes
    plain = len(signature.inputs) - len(cache.tensors)
    args = (*examples[:plain], cache.by_layer(examples[plain:]))
    dynamic_shapes = (*shapes[:plain], cache.by_layer(shapes[plain:]))
    wrapped: nn.Module = layout.wrap(decoder)
    with quiet_torch(), torch.no_grad():
        return torch.export.export(wrapped, args, dynamic_shapes=dynamic_shapes, strict=False)


def _example(spec: TensorSpec) -> Tensor:
    shape = [EXAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
