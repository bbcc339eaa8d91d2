"""Reading rotary embeddings from config.json: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from graphs.config import RopeConfig
from graphs.errors import CheckpointError
from graphs.keys import Keys, short


def parse_rope(
    keys: Keys,
    head_dim: int,
    max_position_embeddings: int,
    *,
    default_theta: float = 10_000.0,
    partial: bool = False,
    original_max: int | None = None,
) -> RopeConfig:
    """The rotary embedding that all layers share.

    Args:
        partial: whether this model_type takes a partial_rotary_factor.
        original_max: original_max_position_embeddings where this model_type reads it from outside of the rope keys.
    """
    raw, where = rope_mapping(keys)
    theta = keys.get("rope_theta")
    raw.setdefault("rope_theta", default_theta if theta is None else theta)
    if not partial:
        keys.only("partial_rotary_factor", (1, 1.0))
    outer_factor = keys.get("partial_rotary_factor")
    if outer_factor is not None:
        raw.setdefault("partial_rotary_factor", outer_factor)
        if raw["partial_rotary_factor"] != outer_factor:
            raise CheckpointError(
                f"{keys.where}: partial_rotary_factor = {short(outer_factor)} contradicts {where}: remove one of them"
            )
    outer = keys.get("original_max_position_embeddings")
    if original_max is None and outer is not None and raw.get("rope_type", raw.get("type")) in STRETCHED:
        raw.setdefault("original_max_position_embeddings", outer)
    rope = read_rope(
        raw, f"{keys.where}: {where}", head_dim, max_position_embeddings, partial=partial, original_max=original_max
    )
    if theta is not None and raw["rope_theta"] != theta:
        raise CheckpointError(f"{keys.where}: rope_theta = {short(theta)} contradicts {where}: remove one of them")
    if original_max is None and outer not in (None, raw.get("original_max_position_embeddings")):
        raise CheckpointError(
            f"{keys.where}: original_max_position_embeddings = {short(outer)} contradicts {where} (rope type"
            f" {rope.rope_type}): remove one of them"
        )
    return rope


def rope_mapping(keys: Keys) -> tuple[dict[str, Any], str]:
    """(a copy of the object under whichever key config.json uses, that key)."""
    parameters = keys.get("rope_parameters")
    scaling = keys.get("rope_scaling")
    if parameters is not None and scaling is not None and parameters != scaling:
        raise CheckpointError(
            f"{keys.where}: rope_parameters {short(parameters)} and rope_scaling {short(scaling)} contradict each"
            " other: remove one"
        )
    where = "rope_parameters" if parameters is not None else "rope_scaling"
    value = parameters if parameters is not None else scaling
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{keys.where}: {where} must be an object or null, found {short(value)}")
    return dict(value or {}), where


def read_rope(
    raw: Mapping[str, Any],
    where: str,
    head_dim: int,
    max_position_embeddings: int,
    *,
    partial: bool = False,
    original_max: int | None = None,
) -> RopeConfig:
    """One rotary embedding from its own object; an unknown rope type or key is an error."""
    rope = Keys(raw, where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_READERS:
        raise CheckpointError(
            f"{where}: rope type {short(rope_type)} is not supported; supported: {', '.join(ROPE_READERS)}",
            key=rope.path("rope_type")[:-1],  # its other keys mean nothing without it
        )
    rope.used.update(("rope_type", "type"))
    if partial:
        factor = rope.number("partial_rotary_factor", 1.0)
    else:
        factor = 1.0
        rope.only("partial_rotary_factor", (1, 1.0))
    dim = int(head_dim * factor)
    if not 2 <= dim <= head_dim or dim % 2:
        raise CheckpointError(
            f"{where}: partial_rotary_factor {factor:g} of head_dim {head_dim} turns {dim} numbers of each head:"
            f" expected an even number from 2 to {head_dim}"
        )
    values: dict[str, Any] = {"theta": rope.number("rope_theta"), "dim": dim, "rope_type": rope_type}
    if original_max is not None:
        rope.used.add("original_max_position_embeddings")
        rope.raw = {**raw, "original_max_position_embeddings": original_max}
    values |= ROPE_READERS[rope_type](rope, dim, max_position_embeddings)
    unknown = sorted(set(raw) - rope.used - {"finetuned"})  # which says nothing of the maths
    if rope_type == "default":  # transformers leaves the scaling keys of other types at null, or writes a factor of 1
        unknown = [key for key in unknown if raw[key] is not None and not (key == "factor" and raw[key] == 1.0)]
    if unknown:
        raise CheckpointError(f"{where}: unknown keys {', '.join(unknown)} for rope type {rope_type}")
    return RopeConfig(**values)


def _default(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    return {}


def _linear(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    return {"factor": rope.number("factor")}


def _dynamic(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    if dim < 4:
        raise CheckpointError(f"{rope.where}: rope type dynamic needs at least 4 rotated numbers a head, found {dim}")
    rope.get("original_max_position_embeddings")  # transformers does not read it for this type
    factor = rope.number("factor")
    if factor < 1:
        raise CheckpointError(f"{rope.where}: factor must be at least 1 for rope type dynamic, found {factor:g}")
    return {"factor": factor, "original_max_position_embeddings": longest}


def _llama3(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    values = {field: rope.number(field) for field in ("factor", "low_freq_factor", "high_freq_factor")}
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise CheckpointError(
            f"{rope.where}: high_freq_factor ({values['high_freq_factor']:g}) must be above low_freq_factor"
            f" ({values['low_freq_factor']:g})"
        )
    return values | {"original_max_position_embeddings": rope.integer("original_max_position_embeddings")}


def _yarn(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    original = rope.integer("original_max_position_embeddings", longest)
    if "factor" not in rope.raw:  # null means the ratio, and a file without it is damaged
        rope.number("factor")
    if rope.number("rope_theta") == 1:
        raise CheckpointError(f"{rope.where}: rope_theta must not be 1 for rope type yarn")
    factor = rope.number("factor", longest / original)
    mscale, mscale_all_dim = (rope.number(key, 0.0, minimum=0.0) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    else:
        attention_factor = _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        "truncate": rope.boolean("truncate", True),
        "attention_factor": rope.number("attention_factor", attention_factor),
    }


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature, arXiv:2309.00071 section 3.4, as a factor of cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: Keys, dim: int, longest: int) -> dict[str, Any]:
    original = rope.integer("original_max_position_embeddings", longest)
    factor = rope.number("factor", longest / original)
    if factor <= 1:
        attention_factor = 1.0
    elif original == 1:
        raise CheckpointError(f"{rope.where}: original_max_position_embeddings must be above 1 for rope type longrope")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "short_factor": rope.numbers("short_factor", dim // 2),
        "long_factor": rope.numbers("long_factor", dim // 2),
        "original_max_position_embeddings": original,
        "attention_factor": rope.number("attention_factor", attention_factor),
    }


STRETCHED = ("llama3", "yarn", "longrope")  # the types that read original_max_position_embeddings
# rope_type: reads its own keys, given the rotated dimensions and max_position_embeddings
ROPE_READERS: dict[str, Callable[[Keys, int, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
