"""Faults in graphs of less precision, or with quantized weights."""

import numpy as np

from tests.mutants.edits import (
    Op,
    after,
    attribute,
    both,
    rewire,
    swap_outputs,
    through,
    through_ops,
)
from tests.mutants.text_edits import (
    BF16,
    FP16,
    graph,
    norm_in_half,
    theta,
)

PRECISIONS = (
    graph("mean of squares overflows fp16", "outlier-fp16", 1, "layers.1.mlp_norm", norm_in_half),
    graph(
        "rope angles in fp16",
        "long-fp16",
        0,
        "layers.0.attn",
        both(through_ops("layers.0.attn/Cos", 0, *through(FP16)), through_ops("layers.0.attn/Sin", 0, *through(FP16))),
    ),
    graph(
        "eps lost to fp16",
        "llama-fp16",
        0,
        "layers.0.sa_norm",
        attribute("layers.0.sa_norm/RMSNormalization", "epsilon", 0.0),
    ),
    graph(
        "attention scale off by 1 %, fp16",
        "llama-fp16",
        2,
        "layers.2.attn",
        attribute("layers.2.attn/Attention", "scale", lambda scale: scale * 1.01),
    ),
    graph(
        "logits in bf16 before they are fp32, fp16",
        "llama-fp16",
        None,
        "output",
        after("output/MatMul", *through(BF16, FP16)),
    ),
    graph("rope theta 10100 for 10000, bf16", "llama-bf16", 0, "layers.0.attn", theta(10_000, 10_100)),
    graph(
        "another layer's norm, bf16",
        "llama-bf16",
        2,
        "layers.2.sa_norm",
        rewire("layers.2.sa_norm/RMSNormalization", 1, "model.layers.1.input_layernorm.weight"),
    ),
    graph(
        "k and v swapped as the packed projection is split, int8",
        "llama-int8",
        1,
        "layers.1.attn.qkv_proj",
        swap_outputs("layers.1.attn.qkv_proj/Split", 1, 2),
    ),
    graph(
        "scales of another layer, int8",
        "llama-int8",
        1,
        "layers.1.mlp.w2",
        rewire("layers.1.mlp.w2/DequantizeLinear", 1, "model.layers.2.mlp.down_proj.weight_scale"),
    ),
    graph("rope theta 10500 for 10000, int8", "llama-int8", 0, "layers.0.attn", theta(10_000, 10_500)),
    graph(
        "gate and up swapped as the packed projection is split, int4",
        "llama-int4",
        1,
        "layers.1.mlp.gate_up_proj",
        swap_outputs("layers.1.mlp.gate_up_proj/Split", 0, 1),
    ),
    graph(
        "scales shifted by a block, int4",
        "llama-int4",
        1,
        "layers.1.mlp.w2",
        through_ops("layers.1.mlp.w2/DequantizeLinear", 1, Op("Gather", (np.r_[1:8, 0],), {"axis": 0})),
    ),
    graph(
        "head's scales in bf16, int4",
        "llama-int4",
        None,
        "output",
        through_ops("output/DequantizeLinear", 1, *through(BF16)),
    ),
    graph(
        "eps 1e-6 for 1e-5 in one norm, int4",
        "llama-int4",
        1,
        "layers.1.mlp_norm",
        attribute("layers.1.mlp_norm/RMSNormalization", "epsilon", 1e-6),
    ),
)
