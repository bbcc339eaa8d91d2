"""Llama 3.1's shapes as checkpoints that take no room: real config, index and headers; numbers are holes of the files.

A hole reads as zeros. Copying such a folder may fill the holes: keep it where it was made.
"""

import json
import math
from pathlib import Path

SHARD_BYTES = 5_000_000_000  # as Hugging Face splits them
ITEM_BYTES = 2  # bfloat16
VOCAB_SIZE = 128_256
KV_HEADS = 8
HEAD_DIM = 128

ROPE_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# {name: (layers, hidden size, feed-forward width)}
SHAPES = {"8b": (32, 4096, 14_336), "70b": (80, 8192, 28_672)}


def write_sparse_checkpoint(folder: Path, shape: str) -> int:
    """Write config.json, the index and the shards of a shape; return how many parameters it has."""
    layers, hidden, width = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 131_072,
        "model_type": "llama",
        "num_attention_heads": hidden // HEAD_DIM,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": ROPE_SCALING,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = _tensors(layers, hidden, width)
    shards = _split(tensors)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file_name, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    parameters = sum(math.prod(each) for each in tensors.values())
    index = {"metadata": {"total_size": ITEM_BYTES * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return parameters


def _tensors(layers: int, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    kv_width = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for layer in range(layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, width),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv_width, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv_width, hidden),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (VOCAB_SIZE, hidden)}


def _split(tensors: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Names by shard, each of at most SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in tensors.items():
        nbytes = ITEM_BYTES * math.prod(shape)
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    return shards


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    entries, end = {}, 0
    for name, shape in tensors.items():
        nbytes = ITEM_BYTES * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
