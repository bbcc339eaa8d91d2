"""Everything the maths of a decoder needs, as frozen data, read strictly from a Hugging Face config.json.

A key that changes the maths is either honoured or refused by name. A key nobody here has heard of is reported as a
warning, so that nothing is dropped in silence.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphs.errors import CheckpointError

log = logging.getLogger(__name__)

MAX_LAYERS = 4096  # a config.json that asks for more is damaged; refuse before a loop runs over it
MAX_DIM = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, arXiv:2104.09864, with the frequency scalings of Hugging Face's `rope_type`."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    interleaved: bool = False  # True: pairs (0, 1), (2, 3), .. (torchtune, Meta); False: (0, D/2), .. (Hugging Face)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-family decoder; the names are Hugging Face's config keys."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; CheckpointError when it is absent, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an endless number
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


class Keys:
    """Reads config.json key by key, checks type and range, and remembers which keys were looked at.

    `finish` names the rest: an error for one that changes the maths in a way we do not implement, a warning for one
    that is unknown.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self.where = where
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; `default` when the key is absent or null."""
        self.used.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, maximum: int = MAX_DIM) -> int:
        value = self.get(key, default)
        if isinstance(value, float) and value.is_integer():  # JSON written by tools that know only doubles
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self._wrong(key, value, f"an integer from 1 to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value <= sys.float_info.max):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.get(key, default)
        if value not in allowed:
            raise self._wrong(key, value, "one of " + ", ".join(json.dumps(a) for a in allowed))
        return value

    def only(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse any value of `key` but an absent one, null, and those in `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            expected = ", ".join(json.dumps(a) for a in allowed) or "it to be absent"
            raise CheckpointError(
                f"{self.where}: {key} = {short(value)} changes the maths and is not supported for this model_type"
                f" (expected {expected})"
            )

    def finish(self, harmless: frozenset[str]) -> None:
        unknown = sorted(key for key in self.raw if key not in self.used and key not in harmless)
        if unknown:
            log.warning("%s: unknown keys are ignored: %s", self.where, ", ".join(unknown))

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        found = "it is missing" if value is None else f"found {short(value)}"
        return CheckpointError(f"{self.where}: {key} must be {expected}, {found}")


def short(value: Any) -> str:
    """A JSON value as it may stand in a message."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


# Keys of a Hugging Face config that say nothing about inference maths.
HARMLESS_KEYS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id
    eos_token_id pad_token_id attention_dropout hidden_dropout resid_pdrop pretraining_tp auto_map _name_or_path
    _attn_implementation attn_implementation unsloth_version unsloth_fixed return_dict output_attentions
    output_hidden_states torchscript use_bfloat16 is_decoder is_encoder_decoder add_cross_attention
    chunk_size_feed_forward id2label label2id num_labels problem_type task_specific_params finetuning_task
    prefix tokenizer_class sep_token_id decoder_start_token_id pruned_heads tie_encoder_decoder max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss
    cross_attention_hidden_size rope_type
    """.split()  # noqa: SIM905
)

# What Hugging Face relatives of Llama use to change the maths. A family that implements one reads the key itself.
MATHS_KEYS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "scale_depth": (),
    "scale_emb": (1, 1.0),
    "num_experts": (),
    "num_local_experts": (),
    "n_routed_experts": (),
    "clip_qkv": (),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "is_causal": (True,),
    "rope_interleaved": (False,),
}


def parse_rope(keys: Keys) -> RopeConfig:
    """Read `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`, into a RopeConfig."""
    parameters = keys.get("rope_parameters")
    scaling = keys.get("rope_scaling")
    if parameters is not None and scaling is not None and parameters != scaling:
        raise CheckpointError(
            f"config.json: rope_parameters {short(parameters)} and rope_scaling {short(scaling)} contradict each other:"
            " remove one"
        )
    where = "rope_parameters" if parameters is not None else "rope_scaling"
    raw = dict(_mapping(parameters if parameters is not None else scaling, where))
    raw.setdefault("rope_theta", keys.get("rope_theta", 10000.0))
    rope = Keys(raw, f"config.json: {where}")

    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_FIELDS:
        raise CheckpointError(
            f"{rope.where}: rope type {short(rope_type)} is not supported; supported: {', '.join(ROPE_FIELDS)}"
        )
    rope.used.update(("rope_type", "type"))
    rope.only("partial_rotary_factor", (1, 1.0))
    values: dict[str, Any] = {"theta": rope.number("rope_theta"), "rope_type": rope_type}
    for field in ROPE_FIELDS[rope_type]:
        read = rope.integer if field == "original_max_position_embeddings" else rope.number
        values[field] = read(field)
    if rope_type == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise CheckpointError(
            f"{rope.where}: high_freq_factor ({values['high_freq_factor']:g}) must be above low_freq_factor"
            f" ({values['low_freq_factor']:g})"
        )
    outer = keys.get("original_max_position_embeddings")
    if outer not in (None, values.get("original_max_position_embeddings")):
        raise CheckpointError(
            f"config.json: original_max_position_embeddings = {short(outer)} contradicts {where} (rope type"
            f" {rope_type}): remove one of them"
        )
    unknown = sorted(set(raw) - rope.used)
    if rope_type == "default":  # transformers leaves the scaling keys of other types at null, or writes a factor of 1
        unknown = [key for key in unknown if raw[key] is not None and not (key == "factor" and raw[key] == 1.0)]
    if unknown:
        raise CheckpointError(f"{rope.where}: unknown keys {', '.join(unknown)} for rope type {rope_type}")
    return RopeConfig(**values)


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object or null, found {short(value)}")
    return value


# The numbers each rope type needs, in the order of the formulas in positions.py.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
