"""The first rung of parity: each boundary operator alone, with this model's heads, widths and precision."""

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter.layouts.layout import Layout
from exporter.quiet import quiet_torch
from graphs import ops
from graphs.config import DecoderConfig
from runtimes.onnxruntime_runner import run_model
from runtimes.parity import Rung, compare

BATCH, QUERIES, KEYS, CAPACITY = 2, 3, 7, 11


class _BoundaryOps(nn.Module):
    """Every boundary operator once, on inputs of its own."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config

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
        return {
            "rms_norm": ops.rms_norm(x, weight, config.rms_norm_eps),
            "rotary": ops.rotary(q, cos, sin, config.rope.interleaved),
            "update_kv_cache": ops.update_kv_cache(cache, new, at),
            "attention": ops.attention(q, cache, cache.flip(2), mask, config.head_dim**-0.5),
            "split_heads": ops.split_heads(x_heads, config.head_dim),
            "merge_heads": ops.merge_heads(q),
        }


def op_rungs(config: DecoderConfig, layout: Layout, dtype: torch.dtype) -> list[Rung]:
    """Lower one graph of all boundary operators, run it on ONNX Runtime (CPU), and compare each with float64.

    bfloat16, for which that has no kernels, cannot be asked for.
    """
    module = _BoundaryOps(config)
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
