"""A random Llama checkpoint, made on the spot for benchmarks."""

import json
from pathlib import Path

import numpy as np

VOCAB_SIZE = 32000
LAYERS = 16


def write_checkpoint(folder: Path, millions: float, *, mlp_multiple: int = 1) -> int:
    """Write a random float32 Llama of about `millions` million parameters, tensor by tensor; return how many it has.

    Args:
        mlp_multiple: of which the feed-forward width is a multiple. Those of published Llamas are multiples of 32, and
            blocks of quantized weights are that long; 11/4 of the hidden width need not be.
    """
    hidden = 64
    while _parameters(hidden, mlp_multiple) < millions * 1e6:
        hidden += 64
    shapes = _shapes(hidden, mlp_multiple)
    entries, end = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            if "norm" in name:
                file.write(np.ones(shape, np.float32).tobytes())
            else:
                file.write((rng.standard_normal(shape, np.float32) * 0.02).tobytes())
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": _mlp_width(hidden, mlp_multiple),
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return _parameters(hidden, mlp_multiple)


def _mlp_width(hidden: int, multiple: int) -> int:
    return -(-(hidden * 11 // 4) // multiple) * multiple


def _shapes(hidden: int, mlp_multiple: int) -> dict[str, tuple[int, ...]]:
    mlp = _mlp_width(hidden, mlp_multiple)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def _parameters(hidden: int, mlp_multiple: int) -> int:
    return sum(int(np.prod(shape)) for shape in _shapes(hidden, mlp_multiple).values())
