"""Checkpoints that torchtune wrote: its own parameter names, beside the config.json of Hugging Face's checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from graphs.build import build_decoder
from graphs.checkpoint import TensorRef
from graphs.config import DecoderConfig, LayerKind
from graphs.errors import CheckpointError
from graphs.families.family import Family, TensorNames

EMBEDDING = "tok_embeddings.weight"

# model_type: whether torchtune turns neighbouring numbers, as its RotaryPositionalEmbeddings does; it has reordered the
# rows of the query and key projections to suit.
INTERLEAVED = {"llama": True, "mistral": True, "qwen2": False}


def with_torchtune_names(model_type: str, family: Family) -> Family:
    """The family, for a checkpoint of torchtune's."""
    if model_type not in INTERLEAVED:
        raise CheckpointError(
            f"the tensors have torchtune's names, and model_type {model_type} is not supported in that format;"
            f" supported: {', '.join(INTERLEAVED)}"
        )

    def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
        config = family.parse_config(raw)
        kinds = {name: _turned(kind, INTERLEAVED[model_type]) for name, kind in config.layer_kinds.items()}
        return replace(config, layer_kinds=kinds)

    return Family(parse_config=parse_config, tensor_names=own_names)


def _turned(kind: LayerKind, interleaved: bool) -> LayerKind:
    return kind if kind.rope is None else replace(kind, rope=replace(kind.rope, interleaved=interleaved))


def own_names(config: DecoderConfig) -> TensorNames:
    """Every parameter under our own name, which is torchtune's; a tied output has none."""
    with torch.device("meta"):
        decoder = build_decoder(config)
    names = {name: TensorRef(name) for name, _ in decoder.named_parameters()}
    if config.tie_word_embeddings:
        names["output.weight"] = names[EMBEDDING]
    return names
