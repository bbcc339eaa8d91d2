"""Gemma 3 (text), arXiv:2503.19786: a rotary embedding for each kind of layer, query and key norms."""

from collections.abc import Mapping
from typing import Any

from graphs.config import DecoderConfig, LayerKind, RopeConfig
from graphs.errors import CheckpointError
from graphs.families.family import Family, check_window, huggingface_names, read_layer_types, read_sizes, windowed
from graphs.families.gemma2 import gemma_fields
from graphs.keys import Keys, short
from graphs.rope_config import read_rope, rope_mapping

THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def parse_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json strictly; CheckpointError names the first key that is missing, wrong or not supported."""
    keys = Keys(raw)
    sizes = read_sizes(keys, longest=131_072, kv_heads=4, head_dim=256, tied=True)
    layers = sizes["num_hidden_layers"]
    window = keys.optional_integer("sliding_window", 4096)
    pattern = keys.integer("sliding_window_pattern", 6)
    types = read_layer_types(keys, layers, window=window)
    if types is None:
        keys.only(
            "_sliding_window_pattern", (pattern,)
        )  # transformers writes it, beside layer_types, and never reads it
        types = tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers))
        check_window(keys, types, window)
    keys.get("_sliding_window_pattern")
    keys.only("attn_logit_softcapping", ())  # transformers keeps it and does not apply it
    ropes = read_ropes(keys, sizes["head_dim"], sizes["max_position_embeddings"])
    config = DecoderConfig(
        model_type="gemma3_text",
        **sizes | gemma_fields(keys, sizes["hidden_size"]),
        layer_types=types,
        layer_kinds={
            "full_attention": LayerKind(rope=ropes["full_attention"]),
            "sliding_attention": windowed(LayerKind(rope=ropes["sliding_attention"]), window),
        },
        qk_norm=True,
        final_logit_softcapping=keys.optional_number("final_logit_softcapping", None),
    )
    keys.finish()
    return config


def read_ropes(keys: Keys, head_dim: int, longest: int) -> dict[str, RopeConfig]:
    """A rotary embedding for each kind of layer.

    transformers 5 writes one object for each; before, `rope_scaling` and `rope_theta` were for full attention, and
    `rope_local_base_freq` for sliding attention, which is never scaled.
    """
    raw, where = rope_mapping(keys)
    if where == "rope_scaling":
        if raw.keys() & THETA.keys():
            raise CheckpointError(f"{keys.where}: {where} is for full attention alone: write rope_parameters instead")
        raw = {"full_attention": raw}
    unknown = sorted(raw.keys() - THETA.keys())
    if unknown:
        raise CheckpointError(f"{keys.where}: {where} has keys other than {', '.join(THETA)}: {', '.join(unknown)}")
    thetas = {
        "full_attention": keys.get("rope_theta", THETA["full_attention"]),
        "sliding_attention": keys.get("rope_local_base_freq", THETA["sliding_attention"]),
    }
    ropes = {}
    for name, theta in thetas.items():
        value = raw.get(name) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{keys.where}: {where}.{name} must be an object, found {short(value)}")
        outer = "rope_theta" if name == "full_attention" else "rope_local_base_freq"
        if "rope_theta" in value and outer in keys.raw and value["rope_theta"] != theta:
            raise CheckpointError(
                f"{keys.where}: {outer} = {short(theta)} contradicts {where}.{name}: remove one of them"
            )
        ropes[name] = read_rope({"rope_theta": theta, **value}, f"{keys.where}: {where}.{name}", head_dim, longest)
    return ropes


FAMILY = Family(parse_config=parse_config, tensor_names=huggingface_names)
