"""config.json is read strictly: what changes the maths is honoured or refused by name, what is unknown is reported."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphs.build import build_decoder
from graphs.checkpoint import open_checkpoint
from graphs.config import DecoderConfig, LayerKind, RopeConfig
from graphs.errors import CheckpointError
from graphs.families import FAMILIES, find_family, llama
from graphs.keys import HARMLESS_KEYS, MATHS_KEYS, MAX_LAYERS, read_json
from graphs.layers import ACTIVATION_ALIASES
from graphs.loading import check_weights
from graphs.ops import ACTIVATION_FUNCTIONS
from graphs.positions import ROPE_TYPES, RotaryPositionalEmbeddings, inverse_frequencies
from graphs.rope_config import ROPE_READERS

# Every key that a Llama 3.2 config.json of Hugging Face holds and that the decoder needs.
COMPLETE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# A rope of each type with the keys that it cannot do without, for COMPLETE's heads of 16.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 128,
    },
}
DEEP = json.loads("[" * 300 + "1" + "]" * 300)


def parse(without: str = "", **changes: Any) -> DecoderConfig:
    raw = {**COMPLETE, **changes}
    raw.pop(without, None)
    return llama.parse_config(raw)


def rope_of(config: DecoderConfig) -> RopeConfig:
    """The one that all layers share."""
    assert set(config.layer_types) == set(config.layer_kinds) == {"full_attention"}
    rope = config.layer_kinds["full_attention"].rope
    assert rope is not None
    return rope


def refused(message: str, **changes: Any) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        parse(**changes)


def assert_short(message: str) -> None:
    """One line that a person can read, whatever the value was."""
    assert len(message) < 400
    assert "\n" not in message


# --- what is read ------------------------------------------------------------------------------------------------


def test_every_field_comes_from_its_key() -> None:
    """The values all differ, so that no two keys can be mixed up."""
    assert parse(attention_bias=True, mlp_bias=True, tie_word_embeddings=False) == DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        layer_types=("full_attention", "full_attention"),
        layer_kinds={"full_attention": LayerKind(rope=RopeConfig(theta=500_000.0, dim=16))},
        norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_scale=0.25,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    assert parse(attention_bias=True).mlp_bias is False
    assert parse(mlp_bias=True).attention_output_bias is False
    assert parse().tie_word_embeddings is True


def test_defaults_are_transformers_own() -> None:
    """A config.json with the required keys only means what LlamaConfig makes of it."""
    required = {k: COMPLETE[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    required |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    ours, theirs = llama.parse_config(required), LlamaConfig(**required)
    for field in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.attention_output_bias == theirs.attention_bias
    assert rope_of(ours) == RopeConfig(theta=theirs.rope_parameters["rope_theta"], dim=theirs.head_dim)


def test_null_means_absent() -> None:
    """Hugging Face writes null for what is not set."""
    optional = {"num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias"}
    optional |= {
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "hidden_act",
        "rope_parameters",
        "layer_types",
    }
    absent = {key: value for key, value in COMPLETE.items() if key not in optional}
    assert parse(**dict.fromkeys(optional)) == llama.parse_config(absent)


def test_numbers_may_be_written_as_doubles_or_integers() -> None:
    """Some tools know doubles only; some write 500000 for a float."""
    assert parse(hidden_size=64.0, num_hidden_layers=2.0, rope_theta=500_000) == parse()
    assert isinstance(parse(hidden_size=64.0).hidden_size, int)


@pytest.mark.parametrize("hidden_act", list(ACTIVATION_FUNCTIONS))
def test_activation_is_the_one_that_transformers_has_under_its_name(hidden_act: str) -> None:
    x = torch.linspace(-6, 6, 1001)
    activation = build_decoder(parse(hidden_act=hidden_act)).layers[1].mlp.activation
    torch.testing.assert_close(activation(x), ACT2FN[hidden_act](x), rtol=0, atol=1e-6)
    assert hidden_act == "relu" or not torch.allclose(activation(x), torch.relu(x), atol=1e-3)


@pytest.mark.parametrize("names", [("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")])
def test_an_activation_may_have_two_names(names: tuple[str, str]) -> None:
    x = torch.linspace(-6, 6, 1001)
    first, second = (build_decoder(parse(hidden_act=name)).layers[0].mlp.activation(x) for name in names)
    assert torch.equal(first, second)


# --- model types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "mllama_text_model", "Llama", "", None, 3, ["llama"], {"llama": 1}])
def test_unknown_model_type_lists_those_supported(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: model_type .* is not supported; supported: ") as caught:
        find_family({"model_type": model_type})
    named, supported = str(caught.value).split(" is not supported; supported: ")
    assert named.endswith((repr(model_type), json.dumps(model_type)))
    assert supported.split(", ") == sorted(FAMILIES)
    assert "llama" in FAMILIES


def test_missing_model_type() -> None:
    with pytest.raises(CheckpointError, match=r"model_type (None|null) is not supported; supported: .*llama"):
        find_family({})
    assert find_family({"model_type": "llama"}).parse_config(COMPLETE) == parse()


# --- keys that are missing or wrong ------------------------------------------------------------------------------

REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
INTEGERS = [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"]
NUMBERS = ["rms_norm_eps", "rope_theta"]
BOOLEANS = ["tie_word_embeddings", "attention_bias", "mlp_bias"]


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str, null: bool) -> None:
    changes = {key: None} if null else {}
    refused(f"config.json: {key} must be an integer from 1 to ", without="" if null else key, **changes)
    refused("it is missing", without="" if null else key, **changes)


@pytest.mark.parametrize(
    "value",
    ["64", "", True, False, 0, -1, 0.5, 64.5, [64], {}, 2**31, 10**30, 10**400, math.nan, math.inf, -math.inf, DEEP],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("key", INTEGERS)
def test_what_is_no_positive_integer_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"config.json: {key} must be an integer from 1 to ")
    assert f", found {json.dumps(value)[:77]}" in message
    assert_short(message)


@pytest.mark.parametrize("layers", [MAX_LAYERS + 1, 100_000_000])
def test_absurd_number_of_layers_is_refused_at_once(layers: int) -> None:
    refused(f"num_hidden_layers must be an integer from 1 to {MAX_LAYERS}, found {layers}", num_hidden_layers=layers)
    assert parse(num_hidden_layers=MAX_LAYERS).num_hidden_layers == MAX_LAYERS


@pytest.mark.parametrize(
    "value",
    ["1e-5", True, False, 0, 0.0, -1e-5, [1e-5], {}, math.nan, math.inf, -math.inf, 10**400, DEEP],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_positive_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**{key: value})
    message = str(caught.value)
    assert re.match(rf"config\.json: .*{key} must be a number above 0, found ", message)
    assert_short(message)


@pytest.mark.parametrize("value", ["true", 0, 1, 1.0, [], {}])
@pytest.mark.parametrize("key", BOOLEANS)
def test_what_is_no_boolean_is_refused(key: str, value: Any) -> None:
    refused(f"config.json: {key} must be true or false, found {json.dumps(value)}", **{key: value})


def test_hidden_size_must_be_divisible_by_heads() -> None:
    refused("hidden_size (64) must be a multiple of num_attention_heads (5): check config.json", num_attention_heads=5)


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_heads_must_be_divisible_by_kv_heads(kv_heads: int) -> None:
    refused(
        f"num_heads (4) must be a multiple of num_kv_heads ({kv_heads}): check config.json",
        num_key_value_heads=kv_heads,
    )


def test_head_dim_must_be_even() -> None:
    refused("head_dim (15) must be even for rotary embedding: check config.json", head_dim=15)
    refused(
        "head_dim (7) must be even for rotary embedding: check config.json",
        without="head_dim",
        hidden_size=28,
    )


# --- keys that change the maths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hidden_act", ["gelu_fast", "quick_gelu", "relu2", "sigmoid", "tanh", "SiLU", "", ["silu"], {}, 1, True]
)
def test_other_activations_are_refused(hidden_act: Any) -> None:
    allowed = ", ".join(f'"{name}"' for name in (*ACTIVATION_FUNCTIONS, *ACTIVATION_ALIASES))
    refused(f"config.json: hidden_act must be one of {allowed}, found {json.dumps(hidden_act)}", hidden_act=hidden_act)


# Of MATHS_KEYS, those that Llama has itself: what it refuses of them is further below.
LLAMAS_OWN = {"layer_types", "attention_bias", "mlp_bias"}
# A value with which a relative of Llama computes something else, for every other key that MATHS_KEYS lists.
CHANGED: dict[str, Any] = {
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "sliding_window": 4096,
    "use_sliding_window": True,
    "attention_chunk_size": 8192,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "use_qk_norm": True,
    "qk_norm": True,
    "qk_layernorm": True,
    "no_rope_layers": [1, 1, 1, 0],
    "no_rope_layer_interval": 4,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 64,
    "clip_qkv": 8.0,
    "alibi": True,
    "parallel_attn": True,
    "use_parallel_residual": True,
    "is_causal": False,
    "rope_interleaved": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": True,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "shared_expert_intermediate_size": 512,
    "rope_local_base_freq": 10_000.0,
    "use_mrope": True,
    "rope_type": "linear",
}
# The value of each key, where it has one, with which nothing changes.
NEUTRAL: dict[str, Any] = {
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 1.0,
    "use_qk_norm": False,
    "qk_norm": False,
    "qk_layernorm": False,
    "no_rope_layers": [],
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1,
    "logits_scaling": 1.0,
    "logit_scale": 1,
    "scale_emb": 1,
    "alibi": False,
    "parallel_attn": False,
    "use_parallel_residual": False,
    "is_causal": True,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "mlp_only_layers": [],
    "use_mrope": False,
    "rope_type": "default",
}


def test_every_maths_key_has_a_value_here() -> None:
    assert set(MATHS_KEYS) - LLAMAS_OWN == set(CHANGED)
    assert not set(MATHS_KEYS) & HARMLESS_KEYS


@pytest.mark.parametrize("key", list(CHANGED))
def test_key_that_changes_the_maths_is_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**{key: CHANGED[key]})
    message = str(caught.value)
    assert message.startswith(
        f"config.json: {key} = {json.dumps(CHANGED[key])} changes the maths and is not supported for this model_type"
    )
    expected = json.dumps(NEUTRAL[key]) if key in NEUTRAL else "it to be absent"
    assert re.search(rf"\(expected .*{re.escape(expected)}.*\)$", message)


@pytest.mark.parametrize("key", list(MATHS_KEYS))
def test_null_changes_nothing(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse(**{key: None}) == parse()
    assert not caplog.records


@pytest.mark.parametrize("key", list(NEUTRAL))
def test_neutral_value_changes_nothing(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert parse(**{key: NEUTRAL[key]}) == parse()
    assert not caplog.records


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config = .{77}\.\.\. changes the maths") as caught:
        parse(quantization_config={"modules": ["x" * 50] * 50})
    assert_short(str(caught.value))


@pytest.mark.parametrize(
    "layer_types",
    [["full_attention", "sliding_attention"], ["chunked_attention"], "full_attention", 3, True, {"full_attention": 1}],
    ids=str,
)
def test_other_kinds_of_layers_are_refused(layer_types: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: layer_types must "):
        parse(layer_types=layer_types)


def test_layers_of_full_attention_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert parse(layer_types=["full_attention", "full_attention"]) == parse()
    assert not caplog.records


# --- rotary embedding --------------------------------------------------------------------------------------------


def styles(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """The same rope in the ways that config.json is written: classic, older still, transformers 5."""
    older = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    return [
        {"rope_theta": 1e4, "rope_scaling": rope},
        {"rope_theta": 1e4, "rope_scaling": older},
        {"rope_theta": 1e4, "rope_scaling": {**rope, "type": rope.get("rope_type")}},
        {"rope_theta": None, "rope_parameters": {**rope, "rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_parameters": rope},
    ]


# What follows from COMPLETE's max_position_embeddings = 512 where the rope's own keys do not say it.
FOLLOWS: dict[str, dict[str, Any]] = {
    "dynamic": {"original_max_position_embeddings": 512},
    "yarn": {"attention_factor": 0.1 * math.log(4.0) + 1.0},
    "longrope": {"attention_factor": math.sqrt(1 + math.log(512 / 128) / math.log(128))},
}


@pytest.mark.parametrize("style", range(5))
@pytest.mark.parametrize("rope_type", list(ROPES))
def test_rope_is_read_in_every_style(rope_type: str, style: int) -> None:
    rope = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in {**ROPES[rope_type], **FOLLOWS.get(rope_type, {})}.items()
    }
    assert rope_of(parse(**styles(ROPES[rope_type])[style])) == RopeConfig(theta=1e4, dim=16, **rope)


def test_rope_readers_and_formulas_are_for_the_same_types() -> None:
    assert set(ROPE_READERS) == set(ROPE_TYPES) == set(ROPES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_fast", 16.0),
        ("beta_slow", 2.0),
        ("truncate", False),
        ("attention_factor", 1.25),
        ("original_max_position_embeddings", 64),
        ("factor", 3.0),
    ],
)
def test_yarn_fields_come_from_their_keys(field: str, value: Any) -> None:
    rope = rope_of(parse(rope_scaling={**ROPES["yarn"], field: value}))
    assert getattr(rope, field) == value
    assert getattr(rope_of(parse(rope_scaling=ROPES["yarn"])), field) != value


@pytest.mark.parametrize("style", range(5))
@pytest.mark.parametrize("rope_type", ["su", "mrope", "proportional", "Linear", "", 7, ["llama3"], {}])
def test_unsupported_rope_type_lists_those_supported(rope_type: Any, style: int) -> None:
    changes = styles({"rope_type": rope_type, "factor": 4.0})[style]
    where = "rope_parameters" if style >= 3 else "rope_scaling"
    refused(
        f"config.json: {where}: rope type {json.dumps(rope_type)} is not supported; supported: {', '.join(ROPES)}",
        **changes,
    )


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("style", range(5))
@pytest.mark.parametrize(
    ("rope_type", "field"),
    [
        ("linear", "factor"),
        ("dynamic", "factor"),
        *(("llama3", field) for field in LLAMA3_ROPE if field != "rope_type"),
        ("longrope", "short_factor"),
        ("longrope", "long_factor"),
    ],
)
def test_missing_rope_field_is_named(rope_type: str, field: str, style: int, null: bool) -> None:
    rope = ROPES[rope_type]
    rope = {**rope, field: None} if null else {name: value for name, value in rope.items() if name != field}
    with pytest.raises(CheckpointError, match=rf"config\.json: rope_.*: {field} must be .*, it is missing"):
        parse(**styles(rope)[style])


@pytest.mark.parametrize("value", ["8", True, 0, -1, math.nan, math.inf, [8], {}], ids=str)
@pytest.mark.parametrize(
    ("rope_type", "field"),
    [
        *(("llama3", field) for field in LLAMA3_ROPE if field != "rope_type"),
        ("linear", "factor"),
        ("dynamic", "factor"),
        *(("yarn", field) for field in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")),
        *(("longrope", field) for field in ROPES["longrope"] if field != "rope_type"),
    ],
)
def test_wrong_rope_field_is_named(rope_type: str, field: str, value: Any) -> None:
    with pytest.raises(
        CheckpointError, match=rf"rope_scaling: {field} must be .*, found {re.escape(json.dumps(value))}"
    ):
        parse(rope_scaling={**ROPES[rope_type], field: value})


@pytest.mark.parametrize("field", ["short_factor", "long_factor"])
@pytest.mark.parametrize("factors", [[], [1.0] * 7, [1.0] * 9, [1.0] * 7 + [0], [1.0] * 7 + ["1"], [1.0] * 7 + [True]])
def test_longrope_needs_a_factor_for_each_pair(factors: list[Any], field: str) -> None:
    message = f"config.json: rope_scaling: {field} must be a list of 8 numbers above 0, found {json.dumps(factors)}"
    refused(message, rope_scaling={**ROPES["longrope"], field: factors})


def test_dynamic_rope_cannot_shrink() -> None:
    rope = {"rope_type": "dynamic", "factor": 0.5}
    refused("config.json: rope_scaling: factor must be at least 1 for rope type dynamic, found 0.5", rope_scaling=rope)


@pytest.mark.parametrize("style", range(5))
@pytest.mark.parametrize(
    ("rope", "unknown"),
    [
        ({**LLAMA3_ROPE, "attention_factor": 1.2}, "attention_factor"),
        ({**LLAMA3_ROPE, "mscale": None, "beta_fast": 32}, "beta_fast, mscale"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "default", "short_factor": [1.0]}, "short_factor"),
        ({**ROPES["dynamic"], "beta_fast": 32}, "beta_fast"),
        ({**ROPES["yarn"], "low_freq_factor": 1.0}, "low_freq_factor"),
        ({**ROPES["longrope"], "short_mscale": 1.2, "long_mscale": 1.3}, "long_mscale, short_mscale"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unknown_rope_keys_are_named(rope: dict[str, Any], unknown: str, style: int) -> None:
    with pytest.raises(CheckpointError, match=rf"unknown keys {unknown} for rope type {rope['rope_type']}"):
        parse(**styles(rope)[style])


def test_rope_parameters_per_kind_of_layer_are_refused() -> None:
    """transformers 5 nests them for models with several kinds of layers."""
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    refused("config.json: rope_parameters: unknown keys full_attention for rope type default", rope_parameters=nested)


def test_default_rope_may_hold_a_factor_of_one_and_nulls() -> None:
    assert parse(rope_scaling={"rope_type": "default", "factor": 1.0, "low_freq_factor": None}) == parse()
    assert parse(rope_scaling={}) == parse()


@pytest.mark.parametrize("value", ["linear", ["linear", 2.0], 2.0, True, DEEP], ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_no_object_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} must be an object or null, found ") as caught:
        parse(**{key: value})
    assert_short(str(caught.value))


@pytest.mark.parametrize("factor", [0.5, 0.0, 0.99])
def test_partial_rotary_inside_rope_is_refused(factor: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    refused(f"config.json: rope_parameters: partial_rotary_factor = {factor} changes the maths", rope_parameters=rope)
    whole = parse(rope_parameters={**rope, "partial_rotary_factor": 1.0}, without="rope_theta")
    assert rope_of(whole) == RopeConfig(theta=1e4, dim=16)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_two_thetas_are_refused(where: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    refused(f"config.json: rope_theta = 500000.0 contradicts {where}: remove one", rope_theta=5e5, **{where: rope})
    assert rope_of(parse(rope_theta=1e4, **{where: rope})) == RopeConfig(theta=1e4, dim=16)


def test_the_original_length_may_stand_outside() -> None:
    """transformers reads original_max_position_embeddings from either place."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    inside = parse(rope_scaling={**yarn, "original_max_position_embeddings": 16, "finetuned": True})
    assert parse(rope_scaling=yarn, original_max_position_embeddings=16) == inside


def test_sizes_have_limits() -> None:
    """A damaged number is refused before anything is made of it."""
    refused("head_dim (65538) must be at most 65536: check config.json", head_dim=65538)
    mixtral = {"model_type": "mixtral", "num_local_experts": 2**31 - 1}
    with pytest.raises(CheckpointError, match="num_local_experts must be an integer from 1 to 4096"):
        FAMILIES["mixtral"].parse_config(COMPLETE | mixtral)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "phi3", "granite", "qwen3_moe"])
def test_layer_types_of_layers_that_are_alike(model_type: str) -> None:
    """They may say what is so anyway; anything else is refused."""
    family, raw = FAMILIES[model_type], COMPLETE | {"model_type": model_type, "sliding_window": None}
    if model_type == "granite":
        del raw["sliding_window"]
    layers = raw["num_hidden_layers"]
    assert family.parse_config(raw | {"layer_types": ["full_attention"] * layers}) == family.parse_config(raw)
    with pytest.raises(CheckpointError, match="layer_types must all be full_attention"):
        family.parse_config(raw | {"layer_types": ["sliding_attention"] * layers})


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    """The message stays readable however much is missing."""
    (tmp_path / "config.json").write_text(json.dumps(COMPLETE | {"model_type": "llama", "num_hidden_layers": 300}))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    family = FAMILIES["llama"]
    with pytest.raises(CheckpointError, match=r"and \d+ more$") as caught:
        check_weights(family, family.parse_config(checkpoint.config), checkpoint)
    assert len(str(caught.value).splitlines()) < 50


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rope_theta": 1e6}, id="rope_theta"),
        pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, id="linear"),
        pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, id="factor below 1"),
        pytest.param({"rope_scaling": LLAMA3_ROPE}, id="llama3"),
        pytest.param({"rope_scaling": {**LLAMA3_ROPE, "factor": 2.0}}, id="factor"),
        pytest.param({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, id="low_freq_factor"),
        pytest.param({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 16.0}}, id="high_freq_factor"),
        pytest.param(
            {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 400}}, id="original positions"
        ),
        pytest.param({"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 400}, id="original, outside"),
        pytest.param({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, id="empty band"),
        pytest.param(
            {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 8.0, "high_freq_factor": 2.0}}, id="band upside down"
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            id="rope_scaling beside rope_parameters",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}, "rope_theta": 5e5}, id="two thetas"
        ),
        pytest.param({"rope_scaling": LLAMA3_ROPE, "partial_rotary_factor": 0.5}, id="partial"),
        pytest.param({"head_dim": 32}, id="head_dim"),
        pytest.param({"rope_scaling": ROPES["dynamic"]}, id="dynamic"),
        pytest.param({"rope_scaling": {**ROPES["dynamic"], "factor": 8.0}}, id="dynamic, factor"),
        pytest.param({"rope_scaling": ROPES["dynamic"], "max_position_embeddings": 100}, id="dynamic, positions"),
        pytest.param(
            {"rope_scaling": {**ROPES["dynamic"], "original_max_position_embeddings": 100}}, id="dynamic, original"
        ),
        pytest.param({"rope_scaling": ROPES["yarn"]}, id="yarn"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "factor": 8.0}}, id="yarn, factor"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "factor": None}}, id="yarn, factor from positions"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "beta_fast": 8.0, "beta_slow": 0.5}}, id="yarn, betas"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "truncate": False}}, id="yarn, not truncated"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "attention_factor": 0.7}}, id="yarn, attention factor"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "mscale": 0.7, "mscale_all_dim": 0.4}}, id="yarn, mscales"),
        pytest.param({"rope_scaling": {**ROPES["yarn"], "mscale": 0.7}}, id="yarn, one mscale"),
        pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, id="yarn, original from positions"),
        pytest.param({"rope_scaling": ROPES["longrope"]}, id="longrope"),
        pytest.param({"rope_scaling": {**ROPES["longrope"], "factor": 32.0}}, id="longrope, factor"),
        pytest.param({"rope_scaling": {**ROPES["longrope"], "attention_factor": 1.5}}, id="longrope, attention factor"),
        pytest.param({"rope_scaling": ROPES["longrope"], "max_position_embeddings": 4096}, id="longrope, positions"),
        pytest.param(
            {
                "rope_scaling": {**ROPES["longrope"], "original_max_position_embeddings": None},
                "original_max_position_embeddings": 128,
            },
            id="longrope, original outside",
        ),
    ],
)
def test_rope_means_what_it_means_in_transformers_or_is_refused(changes: dict[str, Any]) -> None:
    """Never a third thing: frequencies and tables are transformers' for the same config.json, or there is an error."""
    raw = {**COMPLETE, **changes}
    theirs, unchanged = hugging_face_tables(raw), hugging_face_tables(COMPLETE)
    assert theirs[0].shape != unchanged[0].shape or not torch.allclose(theirs, unchanged, atol=1e-3)
    try:
        rope = rope_of(llama.parse_config(raw))
    except CheckpointError:
        return
    short = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw)))).inv_freq
    torch.testing.assert_close(inverse_frequencies(rope), short, rtol=1e-6, atol=0)
    module = RotaryPositionalEmbeddings.from_config(rope, 1000)
    for length, expected in zip(TEXT_LENGTHS, theirs, strict=True):
        positions = torch.arange(length - 10, length)[None]
        found = module.tables(positions, torch.float32, torch.tensor([float(length)]))
        torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=3e-4)  # positions * eps


TEXT_LENGTHS = (10, 100, 128, 129, 512, 513, 900)  # within and beyond the original contexts


def hugging_face_tables(raw: dict[str, Any]) -> Tensor:
    """[lengths, 2, 1, 10, dim / 2]: cosines and sines of the last ten tokens of texts of those lengths."""
    tables = []
    for length in TEXT_LENGTHS:
        # transformers changes the dictionaries that it is given, and its module remembers the longest text
        module = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(raw))))
        full = torch.stack(module(torch.empty(0), torch.arange(length - 10, length)[None]))
        tables.append(full.chunk(2, dim=-1)[0])
    return torch.stack(tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 4.0}},
            'config.json: rope_parameters {"rope_theta": 10000.0} and rope_scaling {"type": "linear", "factor": 4.0}'
            " contradict each other: remove one",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 400},
            "config.json: original_max_position_embeddings = 400 contradicts rope_scaling (rope type llama3): remove"
            " one of them",
        ),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.5, "high_freq_factor": 2}},
            "config.json: rope_scaling: high_freq_factor (2) must be above low_freq_factor (4.5)",
        ),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4, "high_freq_factor": 4}},
            "config.json: rope_parameters: high_freq_factor (4) must be above low_freq_factor (4)",
        ),
    ],
    ids=["two places", "original positions", "band upside down", "empty band"],
)
def test_contradicting_rope_keys_are_refused(changes: dict[str, Any], message: str) -> None:
    refused(message, **changes)


def test_rope_keys_that_agree_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Said twice is said once."""
    both = parse(rope_parameters=LLAMA3_ROPE, rope_scaling=dict(LLAMA3_ROPE), original_max_position_embeddings=64)
    assert both == parse(rope_scaling=LLAMA3_ROPE)
    assert not caplog.records


def test_most_of_the_above_are_honoured() -> None:
    """The test above would pass if everything were refused."""
    for rope in (*ROPES.values(), {**LLAMA3_ROPE, "factor": 2.0}, {"rope_type": "linear", "factor": 0.5}):
        parse(rope_scaling=rope)
    parse(head_dim=32, rope_theta=1e6)


# --- unknown keys ------------------------------------------------------------------------------------------------


def test_unknown_keys_are_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse(zebra=1, mystery_multiplier=None) == parse()
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: unknown keys are ignored: mystery_multiplier, zebra"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_config_written_by_transformers_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither does one with the bookkeeping keys of older versions."""
    LlamaConfig(**json.loads(json.dumps(COMPLETE))).save_pretrained(tmp_path)
    written = read_json(tmp_path / "config.json")
    assert llama.parse_config(written) == parse()
    llama.parse_config(
        {**written, "torch_dtype": "bfloat16", "_name_or_path": "x", "pretraining_tp": 1, "id2label": {}}
    )
    assert not caplog.records


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"a": 1,}',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"PK\x03\x04",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "quotes", "comma", "utf-16", "bom", "zip", "deep list", "deep object", "long number"],
)
def test_what_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} cannot be read as JSON: ") as caught:
        read_json(path)
    assert_short(str(caught.value).replace(str(path), ""))


@pytest.mark.parametrize(
    ("content", "kind"), [("[1]", "list"), ('"x"', "str"), ("3", "int"), ("null", "NoneType"), ("true", "bool")]
)
def test_json_that_is_no_object_is_refused(content: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} holds a {kind}, expected a JSON object"):
        read_json(path)


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: .*[Dd]irectory"):
        read_json(tmp_path / "config.json")


DEEP_KEYS = ["hidden_size", "rms_norm_eps", "mlp_bias", "hidden_act", "rope_scaling", "layer_types", "model_type"]


@pytest.mark.parametrize("key", DEEP_KEYS)
def test_a_value_as_deep_as_the_parser_lets_pass_is_one_short_message(key: str, tmp_path: Path) -> None:
    """What json.loads accepts just below its limit, the message must be able to quote."""
    path = tmp_path / "config.json"
    text = json.dumps({**COMPLETE, key: "?"})
    for depth in range(700, 1000):
        path.write_text(text.replace('"?"', "[" * depth + "]" * depth))
        with pytest.raises(CheckpointError) as caught:
            find_family(raw := read_json(path)).parse_config(raw)
        assert_short(str(caught.value).replace(str(path), ""))


JUNK: list[Any] = [
    *(True, False, 0, 1, -1, 2.5, 10**400, math.nan, math.inf, "", "x", "full_attention", "linear"),
    *([], [1], [[]], [None], ["full_attention"], {}, {"x": 1}, {"full_attention": None}),
    *({"rope_type": value} for value in (None, "default", "linear", "llama3", "yarn", "dynamic", "longrope", [], 1)),
    *({"rope_type": "linear", "factor": value} for value in (None, "x", 0, 10**400, [], {})),
    *({**ROPES["dynamic"], "factor": value} for value in (None, "x", 0, 0.5, 10**400, 1e308, [], {})),
    *({**ROPES["yarn"], "factor": value} for value in (None, "x", 0, 0.5, 1e-308, 10**400, 1e308, [], {})),
    *({**ROPES["yarn"], "mscale": value, "mscale_all_dim": value} for value in (None, "x", 0, -1, 1e-308, 1e308, [])),
    *({**ROPES["longrope"], "original_max_position_embeddings": value} for value in (None, "x", 0, 1, 2, 2**31, [])),
    *({**ROPES["longrope"], "long_factor": value} for value in (None, "x", 0, [], [[1.0]] * 8, [1e308] * 8, {"0": 1})),
    *({"rope_theta": value} for value in (None, "x", 0, -1, 10**400, [], {})),
]


@pytest.mark.parametrize("key", [*COMPLETE, *MATHS_KEYS, "rope_parameters", "layer_types", "torch_dtype", "zebra"])
def test_any_value_gives_a_config_or_a_checkpoint_error(key: str) -> None:
    """No other exception, whatever a damaged or foreign config.json holds."""
    for value in JUNK:
        raw = {**COMPLETE, key: value}
        try:
            assert isinstance(find_family(raw).parse_config(raw), DecoderConfig)
        except CheckpointError:
            continue
