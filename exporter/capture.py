"""Capture: a decoder on the meta device becomes a torch.export program. No weight is read."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporter.layouts.layout import Layout
from exporter.quiet import quiet_torch
from graphs.config import DecoderConfig
from graphs.families import Family
from graphs.transformer import TransformerDecoder
from runtimes.signature import GraphSignature, TensorSpec

# torch.export specialises a dimension whose example size is 0 or 1, or equals another one's.
EXAMPLE_SIZES = {"batch_size": 3, "sequence_length": 5, "total_sequence_length": 7, "n": 2}


def build_on_meta(family: Family, config: DecoderConfig, dtype: torch.dtype) -> TransformerDecoder:
    """The decoder with parameters of `dtype` that have shapes and no storage."""
    with torch.device("meta"):
        decoder = family.build(config)
    return decoder.to(dtype).requires_grad_(False).eval()


def capture(decoder: TransformerDecoder, layout: Layout, signature: GraphSignature) -> ExportedProgram:
    """Trace layout.wrap(decoder) with the signature's dynamic dimensions."""
    dims = {name: Dim(name, min=1) for name in signature.dims}
    examples, shapes = [], []
    for spec in signature.inputs:
        examples.append(_example(spec))
        shapes.append({axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)})
    cache_inputs = set(signature.aliases.values())
    plain = [i for i, spec in enumerate(signature.inputs) if spec.name not in cache_inputs]
    cache = [i for i, spec in enumerate(signature.inputs) if spec.name in cache_inputs]
    # the wrapped module takes the cache as one list of (key, value); keyword containers break dynamic_shapes
    args = (*(examples[i] for i in plain), _pairs([examples[i] for i in cache]))
    dynamic_shapes = (*(shapes[i] for i in plain), _pairs([shapes[i] for i in cache]))
    wrapped: nn.Module = layout.wrap(decoder)
    with quiet_torch(), torch.no_grad():
        return torch.export.export(wrapped, args, dynamic_shapes=dynamic_shapes, strict=False)


def _example(spec: TensorSpec) -> Tensor:
    shape = [EXAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")


def _pairs(items: list) -> list[tuple]:
    return list(zip(items[0::2], items[1::2], strict=True))
