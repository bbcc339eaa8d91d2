"""GGUF files for tests, written with the gguf package from Hugging Face models as llama.cpp's converter does it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

Q6_K_BYTES = 210  # of a block of 256 numbers


def convert(
    out: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    architecture: str = "llama",
    type_of: Callable[[str], Type] = lambda name: Type.F32,
    factors: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a GGUF file of a Hugging Face model.

    Args:
        type_of: the type of a tensor of two dimensions, by GGUF's name.
        factors: rope_freqs.weight.
        extra: metadata beside the usual; None for a value leaves a usual key out.
    """
    writer = gguf.GGUFWriter(out, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    metadata = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config["rope_theta"]),
        f"{architecture}.rope.dimension_count": head_dim,
        f"{architecture}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.bos_token_id": config.get("bos_token_id", 1),
        "tokenizer.ggml.eos_token_id": config.get("eos_token_id", 2),
        **(extra or {}),
    }
    for key, value in metadata.items():
        add(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config["num_hidden_layers"]
    )
    for name, weight in weights.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture == "llama" and ".q_proj." in name:
            weight = permute(weight, heads)
        if architecture == "llama" and ".k_proj." in name:
            weight = permute(weight, kv_heads)
        kind = type_of(gguf_name) if weight.dim() == 2 else Type.F32
        writer.add_tensor(gguf_name, encode(weight.float().numpy(), kind), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One entry of the metadata, of the type that its Python type stands for."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def permute(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp's converter does to queries and keys: pairs (i, i + D/2) become neighbours."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def encode(values: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes of a tensor: quantized by the gguf package, but for Q6_K, which it only reads."""
    if kind == Type.Q6_K:
        return random_q6_k(values.shape, scale=float(np.abs(values).max()))
    return gguf.quants.quantize(np.ascontiguousarray(values), kind)


def random_q6_k(shape: tuple[int, ...], *, scale: float, seed: int = 0) -> np.ndarray:
    """Random blocks of numbers up to about `scale`; scales of both signs, and 0."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (shape[0], shape[1] // 256, Q6_K_BYTES), dtype=np.uint8)
    halves = np.full(blocks.shape[:2], scale / 127 / 32, dtype=np.float16) * generator.choice([-1, 1], blocks.shape[:2])
    blocks[..., 208:] = halves.astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 192] = 0
    return blocks.reshape(shape[0], -1)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, weights) of a Hugging Face checkpoint in one file."""
    from safetensors.torch import load_file

    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def dequantized(path: Path) -> dict[str, Tensor]:
    """{GGUF's name: numbers} as the gguf package reads them."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }
