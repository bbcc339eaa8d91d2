"""The model families, by Hugging Face `model_type`: one module each, with a FAMILY."""

from collections.abc import Container, Mapping
from typing import Any

from graphs.errors import CheckpointError
from graphs.families import (
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    mixtral,
    mllama,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    torchtune,
    transformer_decoder,
)
from graphs.families.family import Family
from graphs.keys import short

__all__ = ["FAMILIES", "Family", "find_family"]

FAMILIES: dict[str, Family] = {
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "mllama": mllama.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
    "transformer_decoder": transformer_decoder.FAMILY,
}


def find_family(config_json: Mapping[str, Any], tensors: Container[str] = ()) -> Family:
    """The family for config.json's `model_type`; CheckpointError lists the supported ones.

    Args:
        tensors: names in the checkpoint; they tell a checkpoint that torchtune wrote from one of Hugging Face's.
    """
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {short(model_type)} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    if family.for_tensors is not None:
        return family.for_tensors(tensors)
    if torchtune.EMBEDDING in tensors and model_type != "transformer_decoder":
        return torchtune.with_torchtune_names(model_type, family)
    return family
