"""Faults in graphs of the layouts dynamic and genai."""

from tests.mutants.edits import (
    attribute,
    both,
    constant,
    swap,
)
from tests.mutants.text_edits import graph

LAYOUTS = (
    graph(
        "new keys before old ones",
        "llama-dynamic",
        1,
        "layers.1.attn",
        swap("layers.1.attn/Concat", 0, 1),
    ),
    graph(
        "attention scale off by 0.1 %, dynamic",
        "llama-dynamic",
        2,
        "layers.2.attn",
        attribute("layers.2.attn/Attention", "scale", lambda scale: scale * 1.001),
    ),
    graph(
        "window off by one, dynamic",
        "mistral-dynamic",
        0,
        "layers.0.attn",
        constant("layers.0.attn/Less", 1, lambda window: window + 1),
    ),
    graph(
        "rope pairs interleaved in one layer, fused",
        "llama-genai",
        1,
        "layers.1.attn",
        attribute("layers.1.attn/GroupQueryAttention", "rotary_interleaved", 1),
    ),
    graph(
        "a window that the model has not, fused",
        "llama-genai",
        2,
        "layers.2.attn",
        attribute("layers.2.attn/GroupQueryAttention", "local_window_size", 64),
    ),
    graph(
        "a softcap that the model has not, fused",
        "llama-genai",
        1,
        "layers.1.attn",
        attribute("layers.1.attn/GroupQueryAttention", "softcap", 50.0),
    ),
    graph(
        "rope tables begin at position 1, fused",
        "llama-genai",
        0,
        "layers.0.attn",
        both(
            constant("layers.0.attn/Range", 0, lambda start: start + 1),
            constant("layers.0.attn/Range", 1, lambda end: end + 1),
        ),
    ),
)
