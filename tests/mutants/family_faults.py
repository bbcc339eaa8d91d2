"""Faults in what sets one model family apart: windows, softcaps, experts, multipliers, further norms."""

import numpy as np

from tests.mutants.edits import (
    attribute,
    both,
    constant,
    rewire,
    text_attribute,
)
from tests.mutants.text_edits import (
    graph,
    grouped_as_interleaved,
    rotate_layer,
)

FAMILIES = (
    graph(
        "window one too long",
        "mistral-fp32",
        0,
        "layers.0.attn",
        constant("layers.0.attn/Less", 1, lambda window: window + 1),
    ),
    graph(
        "window one too short",
        "mistral-fp32",
        0,
        "layers.0.attn",
        constant("layers.0.attn/Less", 1, lambda window: window - 1),
    ),
    graph(
        "one layer without its window",
        "mistral-fp32",
        1,
        "layers.1.attn",
        rewire("layers.1.attn/Attention", 3, "layers.0.attn/Unsqueeze_8"),
    ),
    graph(
        "attention scale from hidden_size / heads",
        "mistral-fp32",
        1,
        "layers.1.attn",
        attribute("layers.1.attn/Attention", "scale", 8**-0.5),
    ),
    graph("GQA groups interleaved, 6 heads on 2", "mistral-fp32", 2, "layers.2.attn", grouped_as_interleaved(2, 6, 2)),
    graph(
        "norm weight's +1 missing",
        "gemma2-fp32",
        1,
        "layers.1.sa_scale",
        rewire("layers.1.sa_scale/RMSNormalization", 1, "model.layers.1.post_attention_layernorm.weight"),
    ),
    graph(
        "softcap of attention missing",
        "gemma2-fp32",
        1,
        "layers.1.attn",
        rewire("layers.1.attn/Where", 1, "layers.1.attn/Mul"),
    ),
    graph(
        "softcap of logits 3.03 for 3",
        "gemma2-fp32",
        None,
        "",
        both(constant("/Div", 1, lambda cap: cap * 1.01), constant("/Mul_2", 1, lambda cap: cap * 1.01)),
    ),
    graph("softcap of logits missing", "gemma2-fp32", None, "", rewire("/Mul_2", 0, "/Div")),
    graph(
        "embedding scale rounded to bf16",
        "gemma2-fp32",
        None,
        "",
        constant("/Mul", 1, lambda scale: np.float32(6.9375)),
    ),
    graph(
        "exact gelu for its tanh form",
        "gemma2-fp32",
        1,
        "layers.1.mlp.activation",
        text_attribute("layers.1.mlp.activation/Gelu", "approximate", "none"),
    ),
    graph(
        "attention scale from head_dim",
        "gemma2-fp32",
        1,
        "layers.1.attn",
        constant("layers.1.attn/Mul", 1, lambda scale: np.float32(10**-0.5)),
    ),
    graph(
        "window in a layer of full attention",
        "gemma2-fp32",
        1,
        "layers.1.attn",
        rewire("layers.1.attn/Unsqueeze_3", 0, "layers.0.attn/Or"),
    ),
    graph(
        "local rope in a global layer",
        "gemma3-fp32",
        1,
        "layers.1.attn",
        both(
            *(
                rewire(f"layers.1.attn/{node}", index, f"layers.0.attn/{table}")
                for node in ("RotaryEmbedding", "RotaryEmbedding_2")
                for index, table in ((1, "Cos"), (2, "Sin"))
            )
        ),
    ),
    graph(
        "norm of keys missing",
        "gemma3-fp32",
        1,
        "layers.1.attn.k_norm",
        rewire("layers.1.attn/RotaryEmbedding_2", 0, "layers.1.attn/Transpose_2"),
    ),
    graph(
        "expert weights not renormalised",
        "qwen3_moe-fp32",
        2,
        "layers.2.mlp",
        rewire("layers.2.mlp/ScatterElements", 2, "layers.2.mlp/TopK"),
    ),
    graph(
        "one expert's output taken for another's",
        "qwen3_moe-fp32",
        2,
        "layers.2.mlp",
        rewire("layers.2.mlp/Mul_6", 0, "layers.2.mlp/Cast"),
    ),
    graph(
        "the least likely experts chosen",
        "qwen3_moe-fp32",
        0,
        "layers.0.mlp",
        attribute("layers.0.mlp/TopK", "largest", 0),
    ),
    graph(
        "norm of queries uses the keys' weight",
        "qwen3_moe-fp32",
        1,
        "layers.1.attn.q_norm",
        rewire("layers.1.attn.q_norm/RMSNormalization", 1, "model.layers.1.self_attn.k_norm.weight"),
    ),
    graph(
        "rope's attention factor missing",
        "phi3-longrope",
        0,
        "layers.0.attn",
        both(
            constant("layers.0.attn/Mul_2", 1, lambda factor: np.float32(1)),
            constant("layers.0.attn/Mul_3", 1, lambda factor: np.float32(1)),
        ),
    ),
    graph(
        "long rope begins a token late",
        "phi3-longrope",
        0,
        "layers.0.attn",
        constant("layers.0.attn/Greater", 1, lambda length: length + 1),
    ),
    graph(
        "residual multiplier forgotten once",
        "granite-fp32",
        1,
        "layers.1",
        rewire("layers.1/Add_2", 1, "layers.1.mlp.w2/Add"),
    ),
    graph(
        "bias of keys dropped",
        "granite-fp32",
        1,
        "layers.1.attn.k_proj",
        rewire("layers.1.attn/Reshape_2", 0, "layers.1.attn.k_proj/MatMul"),
    ),
    graph("logits divided by less", "granite-fp32", None, "", constant("/Mul_2", 1, lambda scale: scale * 1.001)),
    graph("rope in a layer that has none", "smollm3-fp32", 1, "layers.1.attn", rotate_layer(1)),
    graph(
        "windows end a layer early",
        "qwen2-fp32",
        2,
        "layers.2.attn",
        rewire("layers.2.attn/Attention", 3, "layers.0.attn/Unsqueeze_4"),
    ),
)
