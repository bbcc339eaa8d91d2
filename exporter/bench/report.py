"""What a benchmark found, as data: docs/performance.md describes the JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.bench.measure import Measured, Run
from exporter.bench.plan import Plan
from exporter.bench.spread import Spread, spread_of

SCHEMA_VERSION = 1
FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """One contestant at one prompt length. Rates are tokens a second of all rows together."""

    prompt_tokens: int
    warmup_s: float  # of the first run, which is not among the others
    first_token_s: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prefill_ratio: Spread  # of the rate to the first contestant's, round by round
    decode_ratio: Spread
    bandwidth_share: float | None  # bytes that decoding must read, of those the CPU can read in that time; None: a GPU
    token_ids: list[list[int]]
    first_difference: int | None  # first new token that is not the first contestant's, -1: none; None: not compared


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contestant."""

    name: str
    description: str
    precision: str
    weight_bytes: int  # that are read for each token
    cache_bytes_per_token: int
    load_s: Spread
    loaded_bytes: int
    peak_bytes: int
    lengths: list[AtLength]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole benchmark; ratios are to `results[0]`."""

    machine: Mapping[str, Any]
    plan: Plan
    bandwidth_bytes_per_s: Spread
    results: list[Result]
    not_run: Mapping[str, str]  # {peer: why}
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def make_report(
    measured: Sequence[Measured],
    bandwidth: Mapping[int, Sequence[float]],
    plan: Plan,
    *,
    machine: Mapping[str, Any],
    not_run: Mapping[str, str],
    weight_bytes: Sequence[int],
    number_bytes: int,
) -> Report:
    """Judge what was measured.

    Args:
        bandwidth: bytes a second, round by round, by prompt length.
        weight_bytes: that each contestant reads for a token.
        number_bytes: of a number in the artifact's cache.
    """
    results = []
    for each, weights in zip(measured, weight_bytes, strict=True):
        cache_bytes = each.contestant.cache_bytes_per_token
        if each.cache_number_bytes is not None:
            cache_bytes = cache_bytes * each.cache_number_bytes // number_bytes
        lengths = [
            _at_length(each, measured[0], length, plan, weights, cache_bytes, spread_of(bandwidth[length]).median)
            for length in plan.prompt_tokens
        ]
        results.append(
            Result(
                name=each.contestant.name,
                description=each.description,
                precision=each.contestant.precision,
                weight_bytes=weights,
                cache_bytes_per_token=cache_bytes,
                load_s=spread_of(each.load_s),
                loaded_bytes=each.loaded_bytes,
                peak_bytes=each.peak_bytes,
                lengths=lengths,
            )
        )
    reads = [rate for rates in bandwidth.values() for rate in rates]
    return Report(
        machine=machine, plan=plan, bandwidth_bytes_per_s=spread_of(reads), results=results, not_run=dict(not_run)
    )


def _at_length(
    each: Measured, first: Measured, length: int, plan: Plan, weights: int, cache_bytes: int, bandwidth: float
) -> AtLength:
    runs, others = each.runs[length], first.runs[length]
    steps = plan.new_tokens - 1
    step_s = spread_of([run.decode_s for run in runs]).median / steps
    # On average over the steps, half of the new tokens are in the cache.
    step_bytes = weights + plan.batch_size * cache_bytes * (length + plan.new_tokens / 2)
    pairs = list(zip(runs, others, strict=True))
    return AtLength(
        prompt_tokens=length,
        warmup_s=each.warmup_s[length],
        first_token_s=spread_of([run.prefill_s for run in runs]),
        prefill_tokens_per_s=spread_of([plan.batch_size * length / run.prefill_s for run in runs]),
        decode_tokens_per_s=spread_of([plan.batch_size * steps / run.decode_s for run in runs]),
        prefill_ratio=spread_of([other.prefill_s / run.prefill_s for run, other in pairs]),
        decode_ratio=spread_of([other.decode_s / run.decode_s for run, other in pairs]),
        bandwidth_share=None if each.contestant.on_gpu else step_bytes / step_s / bandwidth,
        token_ids=runs[0].token_ids,
        first_difference=_first_difference(runs[0], others[0]) if _comparable(each, first) else None,
    )


def _comparable(each: Measured, first: Measured) -> bool:
    """Whether both should choose the same tokens: everyone rounds weights in a way of its own."""
    precisions = {each.contestant.precision, first.contestant.precision}
    return each is not first and len(precisions) == 1 and precisions <= set(FLOATS)


def _first_difference(run: Run, other: Run) -> int:
    """Which new token is the first that differs in some row; -1: none does."""
    different = (np.array(run.token_ids) != np.array(other.token_ids)).any(axis=0)
    return int(different.argmax()) if different.any() else -1
