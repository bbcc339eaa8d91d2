"""The portable layout: a static cache, standard ONNX opset 24 and no other domain.

One file of this layout runs on ONNX Runtime (CPU, CUDA), TensorRT and TensorRT-RTX. What is left out is left out
because one of them drops or refuses it: is_causal, nonpad_kv_seqlen, past/present inputs of Attention, softcap.
"""

from typing import Any

import torch
from onnxscript import values
from torch import Tensor, nn

from exporter.layouts.layout import Layout
from graphs.attention.causal import LayerCache
from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, DimRange, GraphSignature, TensorSpec

OPSET = 24
IR_VERSION = 12  # ONNX 1.19, which introduced opset 24
op = values.Opset("", OPSET)  # onnxscript's own typed opsets end at 23


class PortableDecoder(nn.Module):
    """The decoder with the layout's inputs, in order; the cache is a list of (key, value) per layer."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        attention_mask: Tensor,
        logit_indices: Tensor,
        past_key_values: list[LayerCache],
    ) -> tuple[Tensor, list[LayerCache]]:
        return self.decoder.step(input_ids, position_ids, write_indices, attention_mask, logit_indices, past_key_values)


def signature(config: DecoderConfig, cache: CacheSpec, max_batch: int) -> GraphSignature:
    """The layout's inputs and outputs for one model."""

    def spec(name: str, *shape: int | str, dtype: str = "int64") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    cache_shape = cache.symbolic_shape()
    past, present = cache.past_names(), cache.present_names()
    length = DimRange(min=1, opt=min(128, cache.max_len), max=cache.max_len)
    return GraphSignature(
        inputs=(
            spec("input_ids", "batch_size", "sequence_length"),
            spec("position_ids", "batch_size", "sequence_length"),
            spec("write_indices", "batch_size"),
            spec("attention_mask", "batch_size", "total_sequence_length"),
            spec("logit_indices", "batch_size", "n"),
            *(spec(name, *cache_shape, dtype=cache.dtype) for name in past),
        ),
        outputs=(
            spec("logits", "batch_size", "n", config.vocab_size, dtype="float32"),
            *(spec(name, *cache_shape, dtype=cache.dtype) for name in present),
        ),
        dims={
            "batch_size": DimRange(min=1, opt=1, max=max_batch),
            "sequence_length": length,
            "total_sequence_length": length,
            "n": DimRange(min=1, opt=1, max=cache.max_len),
        },
        aliases=dict(zip(present, past, strict=True)),
    )


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps, stash_type=1)


def _rotary(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved))


def _update_kv_cache(cache: Any, new: Any, write_indices: Any) -> Any:
    return op.TensorScatter(cache, new, write_indices, axis=-2, mode="linear")


def _attention(q: Any, k: Any, v: Any, mask: Any, scale: float) -> Any:
    start, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
    total = op.Shape(mask, start=3, end=4)
    k_BKTD, v_BKTD = op.Slice(k, start, total, axis), op.Slice(v, start, total, axis)
    return op.Attention(q, k_BKTD, v_BKTD, mask, scale=scale)[0]


def _split_heads(x: Any, head_dim: int) -> Any:
    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, -1, head_dim])), perm=[0, 2, 1, 3])


def _merge_heads(x: Any) -> Any:
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


_ops = torch.ops.export_llm

LAYOUT = Layout(
    opset=OPSET,
    ir_version=IR_VERSION,
    wrap=PortableDecoder,
    signature=signature,
    lowerings={
        _ops.rms_norm.default: _rms_norm,
        _ops.rotary.default: _rotary,
        _ops.update_kv_cache.default: _update_kv_cache,
        _ops.attention.default: _attention,
        _ops.split_heads.default: _split_heads,
        _ops.merge_heads.default: _merge_heads,
    },
)
