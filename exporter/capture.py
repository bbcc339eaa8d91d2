"""Capture: a module on the meta device becomes a torch.export program. No weight is read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporter.layouts.layout import Layout
from exporter.quiet import quiet_torch
from graphs.build import build_decoder, build_vision_encoder, on_meta
from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.signature import CacheSpec, GraphSignature, TensorSpec, VisionSpec

# torch.export specialises a dimension whose example size is 0 or 1, or equals another one's.
EXAMPLE_SIZES = {
    "batch_size": 3,
    "sequence_length": 5,
    "total_sequence_length": 7,
    "past_sequence_length": 23,
    "n": 2,
    "num_images": 11,
    "num_tiles": 13,
    "vision_tokens": 17,
}


def build_on_meta(config: DecoderConfig, dtype: torch.dtype) -> TransformerDecoder:
    """The decoder with parameters of `dtype` that have shapes and no storage."""
    with on_meta():
        decoder = build_decoder(config)
    return decoder.to(dtype).requires_grad_(False).eval()


def build_encoder_on_meta(config: DecoderConfig, dtype: torch.dtype) -> VisionEncoder:
    """The same of the vision encoder."""
    with on_meta():
        encoder = build_vision_encoder(config)
    return encoder.to(dtype).requires_grad_(False).eval()


def capture(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    vision: VisionSpec | None = None,
) -> ExportedProgram:
    """Trace layout.wrap(decoder) with the signature's dynamic dimensions."""
    return capture_module(layout.wrap(decoder, cache), signature, nesting(cache, vision))


def nesting(cache: CacheSpec, vision: VisionSpec | None) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Makes of a flat list, one item for each input, what a wrapped decoder takes: the state as one list, with a tuple
    for each layer, and keys and values of images as another (keyword containers break dynamic_shapes)."""

    def nest(items: list[Any]) -> tuple[Any, ...]:
        images = 0 if vision is None else len(vision.names())
        plain, state = len(items) - images - len(cache.tensors), len(items) - images
        nested: tuple[Any, ...] = (*items[:plain], cache.by_layer(items[plain:state]))
        return nested if vision is None else (*nested, vision.by_layer(items[state:]))

    return nest


def capture_encoder(encoder: VisionEncoder, layout: Layout, signature: GraphSignature) -> ExportedProgram:
    """Trace layout.wrap_encoder(encoder) with the signature's dynamic dimensions."""
    return capture_module(layout.wrap_encoder(encoder), signature, tuple)


def capture_module(
    module: nn.Module,
    signature: GraphSignature,
    nest: Callable[[list[Any]], tuple[Any, ...]],
    device: str = "meta",
    derived: Mapping[str, int] | None = None,
) -> ExportedProgram:
    """Trace a module on `device` that takes nest(the signature's inputs).

    Args:
        derived: {dimension: its example size} of those that the module itself says to follow from others.
    """
    derived = derived or {}
    sizes = {**EXAMPLE_SIZES, **derived}
    dims = {name: Dim.AUTO if name in derived else Dim(name, min=1) for name in signature.dims}
    examples = [_example(spec, sizes, device) for spec in signature.inputs]
    shapes = [
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in signature.inputs
    ]
    with quiet_torch(), torch.no_grad():
        return torch.export.export(module, nest(examples), dynamic_shapes=nest(shapes), strict=False)


def _example(spec: TensorSpec, sizes: Mapping[str, int], device: str) -> Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
