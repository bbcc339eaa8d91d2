"""Greedy generation over any runner."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError
from runtimes.runner import Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What one call generated. Token lists do not include the prompt, and end with the stop id if one was met."""

    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    prefill_s: float
    decode_s: float
    decode_steps: int


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    stop_ids: Sequence[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Decode greedily from each prompt, as one batch; rows stop one by one.

    Args:
        prompts: token ids, one list per row; lengths may differ.
        max_new_tokens: per row; by default, as many as the cache has room for.
        stop_ids: a row ends when it produces one of these.
        on_token: called with (row, token id) for each new token, in order.

    Raises:
        FeedError: the cache is too small for the prompt and max_new_tokens.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    room = runner.cache_spec.max_len - longest + 1  # the last token is never written
    if max_new_tokens is None:
        max_new_tokens = max(room, 0)
    if max_new_tokens < 1 and longest <= runner.cache_spec.max_len:
        raise FeedError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if longest <= runner.cache_spec.max_len and max_new_tokens > room:
        raise FeedError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but this artifact"
            f" holds {runner.cache_spec.max_len}: ask for at most {room}, or export again with a larger --max-len"
        )
    stop = set(stop_ids)
    decoding = Decoding(runner)
    outputs: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    logits = decoding.prefill(prompts)
    prefill_end = time.perf_counter()
    active = np.ones(len(prompts), bool)
    steps = 0
    while True:
        tokens = logits.argmax(axis=-1)
        for row in np.flatnonzero(active):
            token = int(tokens[row])
            outputs[row].append(token)
            if on_token is not None:
                on_token(int(row), token)
            active[row] = token not in stop and len(outputs[row]) < max_new_tokens
        if not active.any():
            break
        logits = decoding.decode(tokens, active)
        steps += 1
    return Generation(
        prompt_ids=[list(prompt) for prompt in prompts],
        token_ids=outputs,
        prefill_s=prefill_end - start,
        decode_s=time.perf_counter() - prefill_end,
        decode_steps=steps,
    )


def read_stop_ids(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: a number or a list; empty when neither names one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ArtifactError(f"{path}: eos_token_id must be a number or a list of numbers, found {value!r}")
        if ids:
            return ids
    return []
