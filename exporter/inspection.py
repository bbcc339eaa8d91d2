"""What a checkpoint is and what export would refuse in it, from its headers; and what export knows at all."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from exporter.capture import build_on_meta
from exporter.layouts import LAYOUTS
from exporter.precision import FLOAT_TYPES, PRECISIONS, cache_spec, vision_spec
from exporter.targets import TARGETS
from graphs.attention import ATTENTION
from graphs.checkpoint import open_checkpoint
from graphs.config import DecoderConfig, LayerKind, VisionConfig
from graphs.errors import CheckpointError
from graphs.families import FAMILIES, find_family
from graphs.families.family import Family
from graphs.layers import NORMS
from graphs.loading import check_size, check_weights
from graphs.ops import ACTIVATION_FUNCTIONS
from graphs.positions import ABSOLUTE, ROPE_TYPES


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Facts about a checkpoint; `refused` lists what export would refuse, with the reason (empty: nothing).

    Raises:
        CheckpointError: there is no readable checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    facts: dict[str, Any] = {
        "model_type": checkpoint.config.get("model_type"),
        "dtype": checkpoint.dtype,
        "weight_bytes": checkpoint.nbytes,
        "files": len({tensor.path for tensor in checkpoint.tensors.values()}) or 1,
    }
    if checkpoint.packed:
        kinds = Counter(tensor.kind for tensor in checkpoint.packed.values())
        facts["stored_as"] = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    refused = []
    try:
        family = find_family(checkpoint.config, checkpoint.shapes)
        config = family.parse_config(checkpoint.config)
        check_size(config, checkpoint)
    except CheckpointError as error:
        return facts | {"refused": [str(error)]}
    try:
        check_weights(family, config, checkpoint)
    except CheckpointError as error:
        refused.append(str(error))
    else:
        names = {ref.name for ref in family.all_refs(config)}
        facts["parameters"] = checkpoint.parameter_count(names)
    return facts | _config_facts(config) | {"refused": refused}


def _config_facts(config: DecoderConfig) -> dict[str, Any]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    facts: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "layer_kinds": _layer_kinds(config),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "feed_forward": f"{'gated ' if config.gated_mlp else ''}{config.hidden_act}",
        "norm": f"{config.norm}, eps {config.norm_eps:g}",
        "heads": f"{heads} query, {kv_heads} key/value, {config.head_dim} wide",
        "vocab_size": config.vocab_size,
        "tied_embeddings": str(config.tie_word_embeddings).lower(),
        "positions": config.position_embedding or _ropes(config),
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.position_limit is not None:
        facts["max_len_limit"] = config.position_limit
    if config.vision is not None:
        facts |= _vision_facts(config.vision)
    decoder = build_on_meta(config, torch.float32)
    for precision in FLOAT_TYPES.values():
        cache = cache_spec(decoder, 1, precision.dtype)
        facts[f"cache_bytes_per_token_{precision.name}"] = cache.bytes_per_token
        if (vision := vision_spec(config, precision.dtype, 1)) is not None:
            facts[f"bytes_per_image_{precision.name}"] = vision.bytes_per_image
        if cache.bytes_per_row:
            facts[f"state_bytes_per_row_{precision.name}"] = cache.bytes_per_row
    return facts


def _vision_facts(vision: VisionConfig) -> dict[str, Any]:
    return {
        "vision_layers": f"{vision.num_hidden_layers} local, {vision.num_global_layers} global",
        "vision_hidden_size": vision.hidden_size,
        "vision_heads": f"{vision.attention_heads}, {vision.hidden_size // vision.attention_heads} wide",
        "image": f"up to {vision.max_num_tiles} tiles of {vision.image_size} x {vision.image_size} pixels",
        "vision_tokens_per_tile": vision.num_patches,
    }


def _layer_kinds(config: DecoderConfig) -> str:
    """Such as `13 sliding_window (4096 tokens), 13 causal`."""
    counts = Counter(_kind_name(kind) for kind in config.kinds)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _kind_name(kind: LayerKind) -> str:
    notes = []
    if kind.window is not None:
        notes.append(f"{kind.window} tokens")
    if kind.top_k is not None:
        notes.append(f"{kind.top_k} keys")
    if kind.experts is not None:
        notes.append(f"{kind.experts.num_experts_per_tok} of {kind.experts.num_experts} experts")
    return kind.attention + (f" ({', '.join(notes)})" if notes else "")


def _ropes(config: DecoderConfig) -> str:
    """Such as `rope default, theta 10000; rope linear, theta 1e+06`."""
    names = []
    for kind in config.layer_kinds.values():
        rope = kind.rope
        if kind.attention == "cross":  # images have no positions
            continue
        if rope is None:
            names.append("none")
        else:
            partial = "" if rope.dim == config.head_dim else f", {rope.dim} of {config.head_dim}"
            names.append(f"rope {rope.rope_type}, theta {rope.theta:g}{partial}")
    return "; ".join(dict.fromkeys(names))


def known() -> dict[str, dict[str, str] | list[str]]:
    """What export can read, build and write; families and attention variants with a line about each."""
    return {
        "model_type": {name: _about(family) for name, family in FAMILIES.items()},
        "attention": {name: _first_line(sys.modules[build.__module__].__doc__) for name, build in ATTENTION.items()},
        "rope_type": list(ROPE_TYPES),
        "position_embedding": ["rope", *ABSOLUTE, "none"],
        "norm": list(NORMS),
        "hidden_act": list(ACTIVATION_FUNCTIONS),
        "layout": list(LAYOUTS),
        "precision": list(PRECISIONS),
        "target": list(TARGETS),
    }


def _about(family: Family) -> str:
    return _first_line(sys.modules[family.parse_config.__module__].__doc__)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
