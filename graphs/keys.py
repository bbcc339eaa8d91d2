"""Reading config.json strictly: types, ranges, and no key that changes the maths is ever passed over.

A key that changes the maths is either honoured or refused by name. A key nobody here has heard of is reported as a
warning, so that nothing is dropped in silence.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphs.errors import CheckpointError, legible
from graphs.files import MAX_JSON_BYTES, leads_out, why_no_file

log = logging.getLogger(__name__)

MAX_LAYERS = 4096  # a config.json that asks for more is damaged; refuse before a loop runs over it
MAX_EXPERTS = 4096
MAX_HEAD_DIM = 65_536
MAX_DIM = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; CheckpointError when it is absent, unreadable, too large or not an object, or a
    link that leads out of its folder."""
    require_inside(path)
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    if reason := why_no_file(path):
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}")
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}: it is damaged")
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an endless number
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def require_inside(path: Path) -> None:
    """CheckpointError where a file that is taken over as it is, or read as text, is a link out of its folder."""
    if leads_out(path):
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint's folder, to {os.path.realpath(path)}: put the file"
            " itself there, if you trust it"
        )


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

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_DIM) -> int:
        value = self.get(key, default)
        if isinstance(value, float) and value.is_integer():  # JSON written by tools that know only doubles
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._wrong(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """None where the key is null; `default` where it is absent."""
        if key in self.raw and self.raw[key] is None:
            self.used.add(key)
            return None
        return default if key not in self.raw and default is None else self.integer(key, default)

    def number(self, key: str, default: float | None = None, *, minimum: float | None = None) -> float:
        """A finite number: above 0, or at least `minimum`."""
        value = self.get(key, default)
        if not _is_number(value) or not (value > 0 if minimum is None else value >= minimum):
            raise self._wrong(
                key, value, "a number above 0" if minimum is None else f"a number of at least {minimum:g}"
            )
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A number above 0; None where the key is null, `default` where it is absent."""
        if key in self.raw and self.raw[key] is None:
            self.used.add(key)
            return None
        return default if key not in self.raw and default is None else self.number(key, default)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(_is_number(v) and v > 0 for v in value):
            raise self._wrong(key, value, f"a list of {count} numbers above 0")
        return tuple(float(v) for v in value)

    def strings(self, key: str, count: int, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list of `count` of the allowed words; None where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(v not in allowed for v in value):
            raise self._wrong(key, value, f"a list of {count} of {', '.join(allowed)}")
        return tuple(value)

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
                f" (expected {expected})",
                key=self.path(key),
            )

    def finish(self) -> None:
        """Refuse the keys nobody read that change the maths; warn of those nobody knows."""
        for key, allowed in MATHS_KEYS.items():
            if key not in self.used:
                self.only(key, allowed)
        unknown = sorted(key for key in self.raw if key not in self.used and key not in HARMLESS_KEYS)
        if unknown:
            log.warning("%s: unknown keys are ignored: %s", self.where, legible(", ".join(unknown)))

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        found = "it is missing" if value is None else f"found {short(value)}"
        return CheckpointError(f"{self.where}: {key} must be {expected}, {found}", key=self.path(key))

    def path(self, key: str) -> tuple[str, ...]:
        """Where `key` stands in config.json: `where` names the objects around it."""
        return (*self.where.split(": ")[1:], key)


def _is_number(value: Any) -> bool:
    """True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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
    cross_attention_hidden_size embd_pdrop mlp_dropout layer_norm_dropout output_router_logits
    router_aux_loss_coef router_jitter_noise cache_implementation max_window_layers transformers.js_config
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
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "rope_type": ("default",),
    "layer_types": (),
    "hidden_activation": (),
    "use_bidirectional_attention": (False,),
    "norm_topk_prob": (),
    "mlp_only_layers": ([],),
    "shared_expert_intermediate_size": (),
    "rope_local_base_freq": (),
}
