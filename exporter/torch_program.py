"""Programs for PyTorch's own compiler: the boundary operators as their references, and the cache updated in place.

A decoder becomes two programs. Both take the portable layout's inputs and return the logits; the new state is written
over the old one, because a cache that is returned would be copied whole for every token.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from exporter.capture import EXAMPLE_SIZES, capture_module, nesting
from exporter.layouts.layout import WRAPPED, Layout
from exporter.quiet import quiet_torch
from graphs import ops
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.signature import CacheSpec, GraphSignature, TensorSpec, VisionSpec

DECODER_PREFIX = f"decoder.{WRAPPED}."  # of the names of a decoder's parameters in its programs
ENCODER_PREFIX = f"{WRAPPED}."

# A decode step has one new token a row, and its logits are asked for: sizes that the compiler may count on.
DECODE_SIZES = {"sequence_length": 1, "n": 1}


def write_by_index(cache_BKMD: Tensor, new_BKSD: Tensor, write_indices: Tensor) -> Tensor:
    """graphs.ops.update_kv_cache, as an operator that Inductor turns into one that writes in place."""
    rows, heads, steps = (torch.arange(size, device=write_indices.device) for size in new_BKSD.shape[:3])
    slots_B1S = (write_indices[:, None] + steps)[:, None]
    return cache_BKMD.index_put((rows[:, None, None], heads[:, None], slots_B1S), new_BKSD)


_ops = torch.ops.export_llm

DECOMPOSITIONS: dict[Any, Any] = {
    _ops.rms_norm.default: ops.rms_norm_reference,
    _ops.rotary.default: ops.rotary_reference,
    _ops.update_kv_cache.default: write_by_index,
    _ops.attention.default: ops.attention_reference,
    _ops.split_heads.default: ops.split_heads_reference,
    _ops.merge_heads.default: ops.merge_heads_reference,
    _ops.experts.default: ops.experts_reference,
}


class InPlace(nn.Module):
    """A wrapped decoder that takes its inputs as one tuple, writes the new state over the old, and returns logits."""

    def __init__(self, decoder: nn.Module, vision: VisionSpec | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.vision = vision

    def forward(self, inputs: tuple[Any, ...]) -> Tensor:
        state = inputs[-1]
        if self.vision is not None:
            *_, mask_BSIT, state, images = inputs
            tiles = mask_BSIT.shape[2] * mask_BSIT.shape[3]
            torch._check(images[0][0].shape[2] == tiles * self.vision.patches_per_tile)
        logits, present = self.decoder(*inputs)
        for old, new in zip(state, present, strict=True):
            for tensor, updated in zip(old, new, strict=True):
                tensor.copy_(updated)
        result: Tensor = logits
        return result


def decode_signature(signature: GraphSignature) -> GraphSignature:
    """The decoder's, of a decode step."""

    def fix(spec: TensorSpec) -> TensorSpec:
        shape = tuple(DECODE_SIZES.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
        return dataclasses.replace(spec, shape=shape)

    return dataclasses.replace(
        signature, inputs=tuple(map(fix, signature.inputs)), outputs=tuple(map(fix, signature.outputs))
    )


def decoder_program(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    vision: VisionSpec | None,
) -> ExportedProgram:
    """A decoder on the CPU as a program that takes ((the signature's inputs, nested),)."""
    nest = nesting(cache, vision)
    module = InPlace(layout.wrap(decoder, cache), vision)
    derived = {}
    if vision is not None:
        tiles = EXAMPLE_SIZES["num_images"] * EXAMPLE_SIZES["num_tiles"]
        derived = {"vision_tokens": tiles * vision.patches_per_tile}
    return _decomposed(capture_module(module, signature, lambda items: (nest(items),), "cpu", derived))


def encoder_program(encoder: VisionEncoder, layout: Layout, signature: GraphSignature) -> ExportedProgram:
    """A vision encoder on the CPU."""
    return _decomposed(capture_module(layout.wrap_encoder(encoder), signature, tuple, "cpu"))


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    with quiet_torch():
        return program.run_decompositions(DECOMPOSITIONS)


def on_device(program: ExportedProgram, device: str, moved: dict[int, Tensor]) -> ExportedProgram:
    """The program for `device`; `moved` holds the tensors that other programs took there, and gets the new ones."""
    if device == "cpu":
        return program
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"  # programs compare it with that of a tensor, which has a number
    for name, tensor in program.state_dict.items():
        if tensor.data_ptr() not in moved:
            moved[tensor.data_ptr()] = tensor.detach().to(device)
        there = moved[tensor.data_ptr()]
        is_parameter = isinstance(tensor, nn.Parameter)
        program.state_dict[name] = nn.Parameter(there, requires_grad=False) if is_parameter else there
    return move_to_device_pass(program, device)
