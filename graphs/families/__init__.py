"""The model families, by Hugging Face `model_type`: one module each, with the functions that `Family` lists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphs.config import DecoderConfig, short
from graphs.errors import CheckpointError
from graphs.families import llama
from graphs.transformer import TransformerDecoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` is read and built."""

    parse_config: Callable[[Mapping[str, Any]], DecoderConfig]
    build: Callable[[DecoderConfig], TransformerDecoder]
    tensor_names: Callable[[DecoderConfig], dict[str, str]]  # {parameter name: checkpoint tensor name}
    is_ignorable: Callable[[str], bool]  # a tensor that may be present and is not used
    duplicates: Callable[[DecoderConfig], dict[str, str]]  # {tensor that may be present: the one it must equal}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        parse_config=llama.parse_config,
        build=llama.build,
        tensor_names=llama.tensor_names,
        is_ignorable=llama.is_ignorable,
        duplicates=llama.duplicates,
    ),
}


def find_family(config_json: Mapping[str, Any]) -> Family:
    """The family for config.json's `model_type`; CheckpointError lists the supported ones."""
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type {short(model_type)} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
