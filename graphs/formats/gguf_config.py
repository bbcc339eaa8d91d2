"""A Hugging Face config.json from GGUF metadata: the same names for sizes and rope, and nothing that is passed over.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; how llama.cpp reads them: its src/models/.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphs.config import RopeConfig
from graphs.errors import CheckpointError
from graphs.keys import MAX_LAYERS, Keys, short
from graphs.positions import inverse_frequencies

# general.architecture: (architectures, model_type) of Hugging Face
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

# Keys of the architecture that say nothing of the maths, or say again what other keys or the tensors say.
HARMLESS = ("vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.finetuned")
# Keys that may be there with the value that says what we compute anyway.
SAME = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}

LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1, and 3.2
LLAMA3_ROPE: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def find_architecture(metadata: Mapping[str, Any], where: str) -> str:
    """general.architecture, if it is supported; CheckpointError for parts of models, and files that are no model."""
    keys = Keys(metadata, where)
    if keys.get("general.type", "model") != "model":
        raise CheckpointError(f"{where} is no language model but: {short(metadata['general.type'])} (general.type)")
    parts = keys.get("split.count", 0)
    if parts not in (0, 1):
        raise CheckpointError(f"{where} is one of {short(parts)} parts: merge them with llama-gguf-split --merge")
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: general.architecture {short(architecture)} is not supported; supported:"
            f" {', '.join(ARCHITECTURES)}"
        )
    experts = keys.get(f"{architecture}.expert_count", 0)
    if experts != 0:
        raise CheckpointError(
            f"{where}: mixtures of experts are not supported in GGUF ({architecture}.expert_count is"
            f" {short(experts)}): export the Hugging Face checkpoint"
        )
    return architecture


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: Tensor | None, where: str
) -> dict[str, Any]:
    """What config.json says of the model.

    Args:
        shapes: {GGUF's name: shape} of all tensors; which are there decides on biases and on a tied head.
        rope_factors: rope_freqs.weight, what Llama 3.1 divides each frequency by.

    Raises:
        CheckpointError: a key is missing or wrong, or changes the maths in a way that is not supported.
    """
    architecture = find_architecture(metadata, where)
    keys = Keys(metadata, where)
    keys.get(f"{architecture}.expert_count")

    def name(key: str) -> str:
        return f"{architecture}.{key}"

    heads = keys.integer(name("attention.head_count"))
    hidden = keys.integer(name("embedding_length"))
    head_dim = keys.integer(
        name("attention.key_length"), keys.integer(name("rope.dimension_count"), max(hidden // heads, 1))
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.only(name(key), (head_dim,))
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{where} holds no token_embd.weight: not a language model, or one of several parts")
    longest = keys.integer(name("context_length"))
    classes, model_type = ARCHITECTURES[architecture]
    config: dict[str, Any] = {
        "architectures": [classes],
        "model_type": model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer(name("feed_forward_length")),
        "num_hidden_layers": keys.integer(name("block_count"), maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer(name("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": keys.number(name("attention.layer_norm_rms_epsilon")),
        "rope_theta": keys.number(name("rope.freq_base"), 10_000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    config["rope_scaling"] = _read_rope(keys, name, config, rope_factors)
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
        window = keys.integer(name("attention.sliding_window"), 0, minimum=0)
        if window:  # Mistral's first models; files that leave it out attend to all, in llama.cpp too
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
            if config.pop("attention_bias") or config.pop("mlp_bias"):
                raise CheckpointError(f"{where}: biases beside a sliding window are not supported")
    for token in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{token}" in metadata:
            config[token] = keys.integer(f"tokenizer.ggml.{token}", minimum=0)
    _refuse_others(keys, architecture)
    return config


def _read_rope(keys: Keys, name: Any, config: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any] | None:
    """rope_scaling of config.json; None where nothing is scaled."""
    factor = keys.number(name("rope.scaling.factor"), keys.number(name("rope.scale_linear"), 0.0, minimum=0), minimum=0)
    kind = keys.get(name("rope.scaling.type"), "linear" if factor else "none")  # llama.cpp's default
    original = keys.integer(name("rope.scaling.original_context_length"), config["max_position_embeddings"], minimum=0)
    if factors is not None:
        if kind != "none":
            raise CheckpointError(
                f"{keys.where}: rope_freqs.weight beside {name('rope.scaling.type')} {short(kind)} is not supported"
            )
        return find_llama3(factors, config["head_dim"], config["rope_theta"], keys.where)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        keys.number(name("rope.scaling.factor"))
        betas = {
            beta: keys.number(name(f"rope.scaling.yarn_{beta}"), default)
            for beta, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    raise CheckpointError(
        f"{keys.where}: {name('rope.scaling.type')} {short(kind)} is not supported; supported: none, linear, yarn"
    )


def find_llama3(factors: Tensor, head_dim: int, theta: float, where: str) -> dict[str, Any] | None:
    """rope_scaling of Llama 3.1 or 3.2, whichever has these factors; None where all are 1.

    llama.cpp stores what the frequencies are divided by, and not the numbers that this follows from.
    """
    if factors.shape == (head_dim // 2,):
        for factor in (1.0, *LLAMA3_FACTORS):
            unscaled = RopeConfig(theta=theta, dim=head_dim)
            scaled = RopeConfig(theta=theta, dim=head_dim, rope_type="llama3", factor=factor, **LLAMA3_ROPE)
            expected = inverse_frequencies(unscaled) / inverse_frequencies(scaled)
            if torch.allclose(factors, expected, rtol=1e-4, atol=0):  # both sides are computed in float32
                return None if factor == 1 else {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    raise CheckpointError(
        f"{where}: rope_freqs.weight {list(factors.shape)} has other factors than Llama 3.1's and 3.2's"
        f" ({', '.join(f'{factor:g}' for factor in LLAMA3_FACTORS)}, of {head_dim // 2} frequencies): not supported"
    )


def _refuse_others(keys: Keys, architecture: str) -> None:
    """CheckpointError for the first key of the architecture that nobody read and that says something."""
    prefix = f"{architecture}."
    for key, value in keys.raw.items():
        short_key = key.removeprefix(prefix)
        if not key.startswith(prefix) or key in keys.used or short_key in HARMLESS:
            continue
        if value != SAME[short_key] if short_key in SAME else value:
            raise CheckpointError(f"{keys.where}: {key} = {short(value)} is not supported: it may change the maths")
