"""What a checkpoint is, without reading a weight."""

from pathlib import Path
from typing import Any

from exporter.precision import PRECISIONS, cache_spec
from graphs.checkpoint import open_checkpoint
from graphs.families import find_family
from graphs.loading import check_weights


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Facts about a checkpoint that can be exported; CheckpointError says why another cannot."""
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    check_weights(family, config, checkpoint)
    facts: dict[str, Any] = {
        "model_type": config.model_type,
        "parameters": checkpoint.parameter_count(family.tensor_names(config).values()),
        "dtype": checkpoint.dtype,
        "weight_bytes": checkpoint.nbytes,
        "files": len({tensor.path for tensor in checkpoint.tensors.values()}),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, {config.head_dim} wide",
        "vocab_size": config.vocab_size,
        "tied_embeddings": str(config.tie_word_embeddings).lower(),
        "rope": f"{config.rope.rope_type}, theta {config.rope.theta:g}",
        "max_position_embeddings": config.max_position_embeddings,
    }
    for precision in PRECISIONS.values():
        facts[f"cache_bytes_per_token_{precision.name}"] = cache_spec(config, 1, precision).bytes_per_token
    return facts
