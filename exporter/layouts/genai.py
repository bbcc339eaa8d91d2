"""The genai layout: ONNX Runtime's fused operators (domain com.microsoft), for its best speed in onnxruntime-genai.

Rotary embedding, cache update and attention are one GroupQueryAttention, which updates the cache in place where past
and present are bound to one buffer. It has no mask: a row's tokens fill its cache from slot 0 on. The graph gives the
logits of each row's last token, unless the optional input logit_indices asks for others.
"""

import dataclasses
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, nn

from exporter.errors import ExportError
from exporter.layouts import portable
from exporter.layouts.dynamic import length_dims, require_text_and_caches
from exporter.layouts.portable import limits, spec
from exporter.passes import CONTRIB_DOMAIN
from exporter.passes.fuse_skip_norm import fuse_skip_norm
from exporter.passes.pack_qkv import pack_qkv
from graphs.config import DecoderConfig
from graphs.state import FusedContext, LayerState
from graphs.transformer import TransformerDecoder
from runtimes.artifact import CLIENT_GRAPH_FILE
from runtimes.signature import SLOT_DIMS, CacheSpec, DimRange, GraphSignature, VisionSpec

LOGIT_INDICES = "logit_indices"
LAST_TOKEN = -1  # a logit_indices that stands for each row's last token
HEAD_MULTIPLE = 8  # of the width of heads, in ONNX Runtime
ATTENTION = ("causal", "sliding_window")  # what GroupQueryAttention can say


class GenaiDecoder(nn.Module):
    """The decoder with the layout's inputs, in order; the cache is a list with a tuple for each layer."""

    def __init__(self, decoder: TransformerDecoder, cache: CacheSpec) -> None:
        super().__init__()
        self.wrapped = decoder
        self.max_len = cache.max_len

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logit_indices: Tensor, past_key_values: list[LayerState]
    ) -> tuple[Tensor, list[LayerState]]:
        context = FusedContext(input_ids, attention_mask, self.max_len)
        h, present = self.wrapped.advance(input_ids, context, past_key_values)
        last = context.lengths.clamp(max=input_ids.shape[1]) - 1  # in a first call, rows may be padded on the right
        wanted = torch.where(logit_indices < 0, last[:, None], logit_indices)
        return self.wrapped.logits(h.gather(1, wanted.unsqueeze(-1).expand(-1, -1, h.shape[-1]))), present


def signature(
    config: DecoderConfig, cache: CacheSpec, max_batch: int, vision: VisionSpec | None = None
) -> GraphSignature:
    """The decoder's inputs and outputs for one model; ExportError for what GroupQueryAttention cannot compute."""
    require_text_and_caches("genai", config, cache)
    _require_fusable(config)
    past, present = SLOT_DIMS["genai"]
    return GraphSignature(
        inputs=(
            spec("input_ids", "batch_size", "sequence_length"),
            spec("attention_mask", "batch_size", "total_sequence_length"),
            spec(LOGIT_INDICES, "batch_size", "n"),
            *cache.past_specs(past),
        ),
        outputs=(
            spec("logits", "batch_size", "n", config.vocab_size, dtype="float32"),
            *cache.present_specs(present),
        ),
        dims=length_dims(cache, max_batch) | {"n": DimRange(min=1, opt=1, max=cache.max_len)},
        aliases=dict(zip(cache.present_names(), cache.past_names(), strict=True)),
        limits=limits(config),
    )


def _require_fusable(config: DecoderConfig) -> None:
    problem = None
    if others := sorted({kind.attention for kind in config.kinds} - set(ATTENTION)):
        problem = f"{', '.join(others)} attention"
    elif config.position_embedding is not None:
        problem = f"{config.position_embedding} position embeddings"
    elif config.head_dim % HEAD_MULTIPLE:
        problem = f"heads of width {config.head_dim} (it must be a multiple of {HEAD_MULTIPLE})"
    if problem is not None:
        raise ExportError(f"--layout genai: ONNX Runtime's GroupQueryAttention has no {problem}: use --layout dynamic")


def _parameter(name: str, types: str, *, optional: bool = False) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single
    return OpSchema.FormalParameter(name, types, param_option=option)


# As ONNX Runtime's contrib operators document it, up to what is used here; onnxscript builds no node without a schema.
_SCHEMA = OpSchema(
    "GroupQueryAttention",
    CONTRIB_DOMAIN,
    1,
    inputs=[
        _parameter("query", "T"),
        _parameter("key", "T", optional=True),
        _parameter("value", "T", optional=True),
        _parameter("past_key", "T", optional=True),
        _parameter("past_value", "T", optional=True),
        _parameter("seqlens_k", "M"),
        _parameter("total_sequence_length", "M"),
        _parameter("cos_cache", "T", optional=True),
        _parameter("sin_cache", "T", optional=True),
    ],
    outputs=[_parameter(name, "T") for name in ("output", "present_key", "present_value")],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
        ("M", ["tensor(int32)"], ""),
    ],
    attributes=[
        *(OpSchema.Attribute(name, OpSchema.AttrType.INT, required=True) for name in ("num_heads", "kv_num_heads")),
        *(
            OpSchema.Attribute(name, onnx.helper.make_attribute(name, default))
            for name, default in (
                ("scale", 0.0),
                ("softcap", 0.0),
                ("local_window_size", -1),
                ("do_rotary", 0),
                ("rotary_interleaved", 0),
            )
        ),
    ],
)
_group_query_attention_op = values.Op(values.Opset(CONTRIB_DOMAIN, 1), "GroupQueryAttention", _SCHEMA)


def _group_query_attention(
    q: Any,
    k: Any,
    v: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    cos: Any,
    sin: Any,
    head_dim: int,
    interleaved: bool,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Any:
    turned = {} if cos is None else {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    return _group_query_attention_op(
        *(q, k, v, past_key, past_value, seqlens_k, total_sequence_length, cos, sin),
        num_heads=q.shape[2] // head_dim,
        kv_num_heads=k.shape[2] // head_dim,
        scale=scale,
        softcap=softcap,
        local_window_size=window or -1,
        **turned,
    )


def finish(model: ir.Model) -> None:
    """Fuse residuals and norms, and let the graph by itself give the logits of each row's last token.

    onnxruntime-genai asks for logits of one token only where the graph says so in its output's shape.
    """
    fuse_skip_norm(model)
    pack_qkv(model)
    asked = next(value for value in model.graph.inputs if value.name == LOGIT_INDICES)
    asked.const_value = ir.tensor([[LAST_TOKEN]], dtype=ir.DataType.INT64, name=LOGIT_INDICES)
    model.graph.initializers[LOGIT_INDICES] = asked
    logits = model.graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


LAYOUT = dataclasses.replace(
    portable.LAYOUT,
    wrap=GenaiDecoder,
    finish=finish,
    rows_first=True,
    shared_cache=True,
    gapless=True,
    signature=signature,
    graph_file=CLIENT_GRAPH_FILE,
    lowerings={
        **portable.LAYOUT.lowerings,
        torch.ops.export_llm.group_query_attention.default: _group_query_attention,
    },
)
