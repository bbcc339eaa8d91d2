"""The first rung of parity: each boundary operator alone, with this model's heads, widths and precision."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.layouts.layout import Layout
from exporter.quiet import quiet_torch
from graphs import ops
from graphs.attention.alibi import alibi_slopes
from graphs.attention.causal import FUSED_HEAD_MULTIPLE
from graphs.config import DecoderConfig, LayerKind
from graphs.positions import inverse_frequencies
from runtimes.onnxruntime_session import run_model
from runtimes.parity import Rung, compare

BATCH, QUERIES, KEYS, CAPACITY = 2, 3, 7, 11


def _biases(kind: LayerKind, config: DecoderConfig, mask_shape: torch.Size) -> dict[str, Any]:
    distances = torch.arange(QUERIES)[:, None] + (KEYS - QUERIES) - torch.arange(KEYS)
    return {
        "slopes": alibi_slopes(config.num_attention_heads),
        "distances": distances.to(torch.float32).expand(mask_shape[0], -1, -1),
    }


# LayerKind.attention, where scores are those of the attention operator: its further arguments
SCORED: dict[str, Callable[[LayerKind, DecoderConfig, torch.Size], dict[str, Any]]] = {
    "causal": lambda kind, config, mask_shape: {},
    "cross": lambda kind, config, mask_shape: {},
    "sliding_window": lambda kind, config, mask_shape: {},
    "alibi": _biases,
    "sparse_top_k": lambda kind, config, mask_shape: {"top_k": kind.top_k},
}


class _BoundaryOps(nn.Module):
    """Every boundary operator once, on inputs of its own."""

    def __init__(self, config: DecoderConfig, *, fused: bool) -> None:
        super().__init__()
        self.config = config
        self.fused = fused  # attention with rotary embedding and cache in one operator

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        x_heads: Tensor,
        q: Tensor,
        new: Tensor,
        cache: Tensor,
        angles: Tensor,
        mask: Tensor,
        at: Tensor,
    ) -> dict[str, Tensor]:
        config = self.config
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        results = {
            "rms_norm": ops.rms_norm(x, weight, config.norm_eps),
            "update_kv_cache": ops.update_kv_cache(cache, new, at),
            "split_heads": ops.split_heads(x_heads, config.head_dim),
            "merge_heads": ops.merge_heads(q),
        }
        for rope in {kind.rope for kind in config.kinds if kind.rope is not None}:
            tables = cos[..., : rope.dim // 2], sin[..., : rope.dim // 2]
            results["rotary"] = ops.rotary(q, *tables, rope.interleaved)
        softcap = config.attn_logit_softcapping or 0.0
        for kind in config.kinds:
            if kind.attention in SCORED:
                extra = SCORED[kind.attention](kind, config, mask.shape)
                results[f"{kind.attention} attention"] = ops.attention(
                    q, cache, cache.flip(2), mask, config.attention_scale, softcap, **extra
                )
        if self.fused:
            results |= self._fused(x_heads, new, cache, softcap)
        return results

    def _fused(self, q: Tensor, new: Tensor, cache: Tensor, softcap: float) -> dict[str, Tensor]:
        """group_query_attention, as every kind of layer uses it, behind a past of CAPACITY tokens or none."""
        config, results = self.config, {}
        kinds = {(kind.rope, kind.window) for kind in config.kinds}
        for past in (CAPACITY, 0):
            for rope, window in kinds:
                tables = (None, None)
                if rope is not None and not config.head_dim % FUSED_HEAD_MULTIPLE:
                    angles = torch.arange(CAPACITY + QUERIES)[:, None] * inverse_frequencies(rope)
                    tables = (angles.cos().to(q.dtype), angles.sin().to(q.dtype))
                rows = 1 if past else BATCH  # the operator goes on with several tokens of one row only
                key = ops.merge_heads(new)[:rows]
                end = past + QUERIES
                out, _, _ = ops.group_query_attention(
                    *(q[:rows], key, key.flip(2), cache[:rows, :, :past], cache[:rows, :, :past].flip(2)),
                    torch.full((rows,), end - 1, dtype=torch.int32),
                    torch.full((), end, dtype=torch.int32),
                    *(*tables, config.head_dim, tables[0] is not None and rope is not None and rope.interleaved),
                    *(config.attention_scale, softcap, window or 0),
                )
                name = "group_query_attention" + (" with a past" if past else "")
                results[f"{name}, window {window}" if window else name] = out
        return results


def op_rungs(config: DecoderConfig, layout: Layout, dtype: torch.dtype) -> list[Rung]:
    """Lower one graph of all boundary operators, run it on ONNX Runtime (CPU), and compare each with float64.

    bfloat16, for which that has no kernels, cannot be asked for.
    """
    module = _BoundaryOps(config, fused=torch.ops.export_llm.group_query_attention.default in layout.lowerings)
    inputs = _inputs(config, dtype)
    with quiet_torch(), torch.no_grad():
        program = torch.export.export(module, inputs, strict=False)
        onnx_program = torch.onnx.export(
            program,
            opset_version=layout.opset,
            custom_translation_table=dict(layout.lowerings),
            optimize=False,
            verbose=False,
        )
        assert onnx_program is not None
        eager = module(*inputs)
        truth = module(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    model = ir.to_proto(onnx_program.model)
    feeds = [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in inputs]
    results = run_model(model, feeds)
    return [
        compare(
            f"operator {name}",
            result,
            truth[name].numpy(),
            eager[name].double().numpy(),
            str(dtype).removeprefix("torch."),
        )
        for name, result in zip(truth, results, strict=True)
    ]


def _inputs(config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    visible = torch.arange(KEYS) <= torch.arange(QUERIES)[:, None] + KEYS - QUERIES
    mask = visible.expand(BATCH, 1, QUERIES, KEYS).clone()
    mask[1, :, :, 1] = False
    return (
        normal(BATCH, QUERIES, config.hidden_size),
        normal(config.hidden_size),
        normal(BATCH, QUERIES, heads * dim),
        normal(BATCH, heads, QUERIES, dim),
        normal(BATCH, kv_heads, QUERIES, dim),
        normal(BATCH, kv_heads, CAPACITY, dim),
        torch.rand(BATCH, QUERIES, dim // 2, generator=rng) * 100,
        mask,
        torch.tensor([2, 5]),
    )
