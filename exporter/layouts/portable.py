"""The portable layout: a static cache, standard ONNX opset 24 and no other domain.

One file of this layout runs on ONNX Runtime (CPU, CUDA), TensorRT and TensorRT-RTX. What is left out is left out
because one of them drops or refuses it: is_causal, nonpad_kv_seqlen, past/present inputs of Attention, softcap.
"""

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor, nn

from exporter.layouts.layout import Layout, Lowering
from graphs.config import DecoderConfig
from graphs.state import LayerState
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.signature import STEP_INPUTS, CacheSpec, DimRange, GraphSignature, TensorSpec, VisionSpec

OPSET = 24
IR_VERSION = 12  # ONNX 1.19, which introduced opset 24
_FLOAT = 1  # onnx.TensorProto.FLOAT
# TensorRT-RTX's compiler may fail on the Attention operator in 16 bits, with heads whose width is no multiple of this.
TENSORRT_HEAD_MULTIPLE = 8
OPT_LENGTH = 128  # tokens that kernels are chosen for
op = values.Opset("", OPSET)  # onnxscript's own typed opsets end at 23


class PortableDecoder(nn.Module):
    """The decoder with the layout's inputs, in order; the state is a list with a tuple for each layer."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.wrapped = decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        attention_mask: Tensor,
        logit_indices: Tensor,
        past_key_values: list[LayerState],
    ) -> tuple[Tensor, list[LayerState]]:
        return self.wrapped.step(input_ids, position_ids, write_indices, attention_mask, logit_indices, past_key_values)


class PortableVisionDecoder(nn.Module):
    """The same with what cross-attention layers read."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.wrapped = decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        attention_mask: Tensor,
        logit_indices: Tensor,
        cross_attention_mask: Tensor,
        past_key_values: list[LayerState],
        cross_key_values: list[LayerState],
    ) -> tuple[Tensor, list[LayerState]]:
        return self.wrapped.step(
            input_ids,
            position_ids,
            write_indices,
            attention_mask,
            logit_indices,
            past_key_values,
            cross_attention_mask,
            cross_key_values,
        )


class PortableVisionEncoder(nn.Module):
    """The vision encoder with the layout's inputs, in order."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.wrapped = encoder

    def forward(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        return self.wrapped(pixel_values, aspect_ratio_ids, aspect_ratio_mask)


def wrap(decoder: TransformerDecoder, cache: CacheSpec | None = None) -> nn.Module:
    """The decoder as the signature calls it."""
    return PortableVisionDecoder(decoder) if decoder.cross_layers else PortableDecoder(decoder)


def spec(name: str, *shape: int | str, dtype: str = "int64") -> TensorSpec:
    """One input or output."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def signature(
    config: DecoderConfig, cache: CacheSpec, max_batch: int, vision: VisionSpec | None = None
) -> GraphSignature:
    """The decoder's inputs and outputs for one model."""
    past, present = cache.past_names(), cache.present_names()
    # A slot is written before it is read, so a cache may be updated in place; a sum is read after its update is made.
    in_place = [tensor.slot_axis is not None for tensor in cache.tensors]
    length = length_range(cache)
    return GraphSignature(
        inputs=(
            *STEP_INPUTS,
            *(
                ()
                if vision is None
                else (spec("cross_attention_mask", "batch_size", "sequence_length", "num_images", "num_tiles"),)
            ),
            *cache.past_specs(),
            *(() if vision is None else _cross(vision)),
        ),
        outputs=(
            spec("logits", "batch_size", "n", config.vocab_size, dtype="float32"),
            *cache.present_specs(),
        ),
        dims={
            "batch_size": DimRange(min=1, opt=1, max=max_batch),
            "sequence_length": length,
            "total_sequence_length": length,
            "n": DimRange(min=1, opt=1, max=cache.max_len),
            **({} if vision is None else _image_dims(vision)),
        },
        aliases={new: old for new, old, aliased in zip(present, past, in_place, strict=True) if aliased},
        limits=limits(config),
    )


def limits(config: DecoderConfig) -> dict[str, int]:
    """{input: its numbers are below this}."""
    positions = {} if config.position_limit is None else {"position_ids": config.position_limit}
    return {"input_ids": config.embedding_size, **positions}


def length_range(cache: CacheSpec) -> DimRange:
    """Of tokens in a call, or in a row."""
    return DimRange(min=1, opt=min(OPT_LENGTH, cache.max_len), max=cache.max_len)


def encoder_signature(config: DecoderConfig, vision: VisionSpec, max_batch: int) -> GraphSignature:
    """The vision encoder's inputs and outputs for one model."""
    assert config.vision is not None
    size = config.vision.image_size
    tiles = ("batch_size", "num_images", "num_tiles")
    return GraphSignature(
        inputs=(
            spec("pixel_values", *tiles, config.vision.num_channels, size, size, dtype="float32"),
            spec("aspect_ratio_ids", "batch_size", "num_images"),
            spec("aspect_ratio_mask", *tiles),
        ),
        outputs=_cross(vision),
        dims={"batch_size": DimRange(min=1, opt=1, max=max_batch), **_image_dims(vision)},
        aliases={},
        limits={"aspect_ratio_ids": config.vision.max_aspect_ratio_id + 1},
    )


def _cross(vision: VisionSpec) -> tuple[TensorSpec, ...]:
    return tuple(spec(name, *vision.symbolic_shape(), dtype=vision.dtype) for name in vision.names())


def _image_dims(vision: VisionSpec) -> dict[str, DimRange]:
    """One image of max_tiles tiles is what is optimised for."""
    most = vision.max_tiles
    tokens = vision.patches_per_tile * most
    return {
        "num_images": DimRange(min=1, opt=1, max=vision.max_images),
        "num_tiles": DimRange(min=1, opt=most, max=most),
        "vision_tokens": DimRange(min=vision.patches_per_tile, opt=tokens, max=tokens * vision.max_images),
    }


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def _rotary(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    turned = 2 * cos.shape[-1]
    partial = {} if turned == x.shape[-1] else {"rotary_embedding_dim": turned}
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved), **partial)


def _update_kv_cache(cache: Any, new: Any, write_indices: Any) -> Any:
    return op.TensorScatter(cache, new, write_indices, axis=-2, mode="linear")


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    scale: float,
    softcap: float = 0.0,
    top_k: int = 0,
    slopes: Any = None,
    distances: Any = None,
) -> Any:
    odd_heads = q.shape[3] % TENSORRT_HEAD_MULTIPLE != 0 and q.dtype != ir.DataType.FLOAT
    if softcap or top_k or slopes is not None or odd_heads:
        return _plain_attention(q, k, v, mask, scale, softcap, top_k, slopes, distances)
    return op.Attention(q, _active(k, mask), _active(v, mask), mask, scale=scale)[0]


def _active(cache: Any, mask: Any) -> Any:
    """The slots that the mask speaks of: of a cache, whose capacity is a constant; other keys are all meant."""
    capacity = cache.shape[2]
    if not isinstance(capacity, int) or capacity == mask.shape[3]:
        return cache
    total = op.Shape(mask, start=3, end=4)
    return op.Slice(cache, op.Constant(value_ints=[0]), total, op.Constant(value_ints=[2]))


def _plain_attention(
    q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, top_k: int, slopes: Any, distances: Any
) -> Any:
    """Attention in MatMul and Softmax, in float32, for what the Attention operator cannot say everywhere."""
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    group = heads // kv_heads
    of_groups = op.Constant(value_ints=[2])
    q5 = op.Reshape(op.Cast(q, to=_FLOAT), op.Constant(value_ints=[0, kv_heads, group, -1, dim]))
    k5 = op.Unsqueeze(op.Transpose(op.Cast(_active(k, mask), to=_FLOAT), perm=[0, 1, 3, 2]), of_groups)
    v5 = op.Unsqueeze(op.Cast(_active(v, mask), to=_FLOAT), of_groups)
    scores = op.Mul(op.MatMul(q5, k5), op.Constant(value_float=scale))
    if softcap:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if slopes is not None:
        slopes5 = op.Reshape(slopes, op.Constant(value_ints=[1, kv_heads, group, 1, 1]))
        scores = op.Sub(scores, op.Mul(slopes5, op.Unsqueeze(distances, op.Constant(value_ints=[1, 2]))))
    nothing = op.Constant(value_float=float("-inf"))
    scores = op.Where(op.Unsqueeze(mask, of_groups), scores, nothing)
    if top_k:
        padded = op.Pad(scores, op.Constant(value_ints=[0] * 9 + [top_k]), nothing)  # there may be fewer keys
        best = op.TopK(padded, op.Constant(value_ints=[top_k]), axis=-1)[0]
        last = [op.Constant(value_ints=[number]) for number in (top_k - 1, top_k, -1)]
        scores = op.Where(op.Less(scores, op.Slice(best, *last)), nothing, scores)
    out = op.MatMul(op.Softmax(scores, axis=-1), v5)
    return op.CastLike(op.Reshape(out, op.Constant(value_ints=[0, heads, -1, v.shape[3]])), q)


def _experts(x: Any, weights: Any, w1: list[Any], w2: list[Any], w3: list[Any], act: str) -> Any:
    zero, out = op.Constant(value_float=0.0), None
    for index in range(len(w1)):
        h = ACTIVATIONS[act](_linear(x, w1[index]))
        h = op.Mul(h, _linear(x, w3[index])) if w3 else h
        first, end, axis = (op.Constant(value_ints=[number]) for number in (index, index + 1, 2))
        weight = op.Slice(weights, first, end, axis)
        part = op.Mul(op.Cast(_linear(h, w2[index]), to=_FLOAT), weight)
        part = op.Where(op.Greater(weight, zero), part, zero)
        out = part if out is None else op.Add(out, part)
    return op.CastLike(out, x)


def _linear(x: Any, weight: Any) -> Any:
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))


# hidden_act, as graphs.ops.ACTIVATION_FUNCTIONS has them
ACTIVATIONS: dict[str, Lowering] = {
    "silu": lambda x: op.Mul(x, op.Sigmoid(x)),
    "gelu": lambda x: op.Gelu(x),
    "gelu_pytorch_tanh": lambda x: op.Gelu(x, approximate="tanh"),
    "relu": lambda x: op.Relu(x),
}


def _split_heads(x: Any, head_dim: int) -> Any:
    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, -1, head_dim])), perm=[0, 2, 1, 3])


def _merge_heads(x: Any) -> Any:
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


_ops = torch.ops.export_llm

LAYOUT = Layout(
    opset=OPSET,
    ir_version=IR_VERSION,
    wrap=wrap,
    signature=signature,
    wrap_encoder=PortableVisionEncoder,
    encoder_signature=encoder_signature,
    lowerings={
        _ops.rms_norm.default: _rms_norm,
        _ops.rotary.default: _rotary,
        _ops.update_kv_cache.default: _update_kv_cache,
        _ops.attention.default: _attention,
        _ops.split_heads.default: _split_heads,
        _ops.merge_heads.default: _merge_heads,
        _ops.experts.default: _experts,
    },
)
