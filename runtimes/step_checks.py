"""The checks that every runner makes before a reset and a step."""

from collections.abc import Mapping

import numpy as np

from runtimes.errors import FeedError
from runtimes.signature import CacheSpec, GraphSignature


def check_reset(batch_size: int, signature: GraphSignature) -> None:
    """FeedError unless the artifact takes that many rows."""
    allowed = signature.dims["batch_size"]
    if not allowed.min <= batch_size <= allowed.max:
        raise FeedError(
            f"batch_size {batch_size}: this artifact takes {allowed.min} to {allowed.max} rows (set by --max-batch)"
        )


def check_step(
    feeds: Mapping[str, np.ndarray], signature: GraphSignature, cache_spec: CacheSpec, batch_size: int
) -> dict[str, int]:
    """Check the inputs of one step against the signature and the cache; return the dynamic dimensions' sizes.

    Args:
        batch_size: rows the cache was made for; 0 when reset was not called.

    Raises:
        FeedError: a missing or wrong input, or tokens that would be written beyond the cache (runtimes drop those
            in silence).
    """
    if not batch_size:
        raise FeedError("reset(batch_size) must be called before the first step")
    expected = {spec.name for spec in signature.inputs} - set(cache_spec.past_names())
    if missing := expected - feeds.keys():
        raise FeedError(f"missing inputs: {', '.join(sorted(missing))}")
    sizes = signature.check_feeds(feeds)
    if sizes["batch_size"] != batch_size:
        raise FeedError(f"batch_size is {sizes['batch_size']}, but reset made a cache for {batch_size}")
    limits = signature.limits
    _check_range(feeds, "input_ids", limits["input_ids"], "the vocabulary")
    _check_range(feeds, "logit_indices", sizes["sequence_length"], "this call's tokens")
    _check_range(feeds, "position_ids", limits.get("position_ids", np.iinfo(np.int64).max), "the positions")
    mask = feeds["attention_mask"] != 0
    nearest = np.where(mask.any(axis=1), mask.argmax(axis=1), np.iinfo(np.int64).max)
    if (blind := nearest > feeds["position_ids"].min(axis=1)).any():  # softmax over nothing: NaN, or anything else
        raise FeedError(
            f"rows {np.flatnonzero(blind).tolist()} hold a token that sees no cache slot: attention_mask must be 1 for"
            " a slot at or before every position"
        )
    first = int(feeds["write_indices"].min())
    last = int(feeds["write_indices"].max()) + sizes["sequence_length"]
    if first < 0 or last > cache_spec.max_len:
        raise FeedError(
            f"tokens would be written to slots {first} to {last - 1}, but the cache holds {cache_spec.max_len}"
        )
    return sizes


def check_rows(rows: np.ndarray, batch_size: int) -> None:
    """FeedError unless `rows` is int64 [batch_size] and names rows of a cache that reset made."""
    if not batch_size:
        raise FeedError("reset(batch_size) must be called before rows are reordered")
    if rows.dtype != np.int64 or rows.shape != (batch_size,):
        raise FeedError(f"rows must be int64 [{batch_size}], got {rows.dtype} {list(rows.shape)}")
    _check_range({"rows": rows}, "rows", batch_size, "the cache's rows")


def _check_range(feeds: Mapping[str, np.ndarray], name: str, end: int, what: str) -> None:
    """FeedError unless every number lies in 0 .. end - 1: a graph would read something else there, in silence."""
    low, high = int(feeds[name].min()), int(feeds[name].max())
    if low < 0 or high >= end:
        raise FeedError(f"{name} holds {low if low < 0 else high}, outside {what} (0 to {end - 1})")
