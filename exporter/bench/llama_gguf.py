"""A Llama checkpoint as a GGUF file for llama.cpp, without its tokenizer: token ids are all that a benchmark needs."""

from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import ExportError
from graphs.checkpoint import TensorRef, open_checkpoint
from graphs.config import DecoderConfig, RopeConfig
from graphs.families import find_family
from graphs.loading import check_weights

ARCHITECTURE = "llama"


def write_gguf(checkpoint: Path, kind: str, path: Path) -> None:
    """Write every matrix as `kind` (F32, Q4_0, ..) and every vector as F32.

    Raises:
        ExportError: it is no Llama with plain rotary positions; other models are stored in ways of their own.
    """
    import gguf

    opened = open_checkpoint(checkpoint)
    family = find_family(opened.config, opened.shapes)
    config = family.parse_config(opened.config)
    check_weights(family, config, opened)
    rope = config.kinds[0].rope
    if config.model_type != ARCHITECTURE or rope is None or rope.rope_type != "default":
        raise ExportError(
            f"a GGUF file is written of Llama with plain rotary positions only, and {checkpoint} is"
            f" {config.model_type} with rope type {rope and rope.rope_type}: leave llama.cpp out"
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _write_metadata(writer, config, rope)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for name in opened.shapes:
        stored_as = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored_as is None or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        numbers = opened.load(TensorRef(name)).float().numpy()
        for part, count in heads.items():
            if part in name:
                numbers = _pair_neighbours(numbers, count)
        stored_kind = gguf.GGMLQuantizationType[kind if numbers.ndim == 2 else "F32"]
        numbers = gguf.quants.quantize(np.ascontiguousarray(numbers), stored_kind)
        writer.add_tensor(stored_as, numbers, raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: Any, config: DecoderConfig, rope: RopeConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(rope.dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _pair_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp rotates them: pairs (i, i + D/2) become neighbours."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
