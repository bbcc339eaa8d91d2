"""genai_config.json: what onnxruntime-genai reads beside a graph. Its parser refuses unknown keys and null."""

import json
from pathlib import Path
from typing import Any

from exporter.errors import ExportError
from exporter.layouts.genai import LOGIT_INDICES
from exporter.source import Source
from graphs.keys import read_json, short
from runtimes.artifact import CLIENT_GRAPH_FILE
from runtimes.onnxruntime_session import ERRORS_ONLY
from runtimes.signature import CacheSpec, GraphSignature

# Its own names of text models; "decoder" stands for any other.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3")


def genai_config(source: Source, signature: GraphSignature, cache: CacheSpec, *, shared_cache: bool) -> str:
    """The text of genai_config.json.

    Args:
        shared_cache: past and present are one buffer, which has room for the longest text.
    """
    config = source.config
    inputs = [spec.name for spec in signature.inputs if not spec.name.startswith("past_key_values.")]
    own_inputs = [name for name in inputs if name != LOGIT_INDICES]
    model: dict[str, Any] = {
        "type": config.model_type if config.model_type in MODEL_TYPES else "decoder",
        "vocab_size": config.vocab_size,
        "context_length": cache.max_len,
        **_special_tokens(source),
        "decoder": {
            "filename": CLIENT_GRAPH_FILE,
            "session_options": {
                "log_id": "onnxruntime-genai",
                "log_severity_level": ERRORS_ONLY,  # it would warn of an input with a default, which is meant
                "provider_options": [],
            },
            "hidden_size": config.hidden_size,
            "head_size": config.head_dim,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "inputs": {
                **{name: name for name in own_inputs},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": cache.max_len,
        "past_present_share_buffer": shared_cache,
    }
    return json.dumps({"model": model, "search": search}, indent=2) + "\n"


def _special_tokens(source: Source) -> dict[str, Any]:
    """bos, eos and pad, as the checkpoint names them; pad is needed, and is the first eos where there is none.

    Raises:
        ExportError: one is no token id.
    """
    found = dict(source.checkpoint.config)
    path: Path = source.files / "generation_config.json"
    if path.is_file() and source.checkpoint.folder.is_dir():
        found |= {key: value for key, value in read_json(path).items() if value is not None}
    tokens = {key: found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if found.get(key) is not None}
    for key, value in tokens.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not ids or not all(type(i) is int for i in ids):
            raise ExportError(f"{key} must be a token id, found {short(value)}: check generation_config.json")
    if "pad_token_id" not in tokens or tokens["pad_token_id"] < 0:
        ends = tokens.get("eos_token_id", 0)
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return tokens
