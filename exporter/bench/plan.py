"""What every contestant is asked to do: the same tokens, as many new ones, on as many threads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.errors import FeedError

DEFAULT_LENGTHS = (128, 512, 2048)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One benchmark. A round runs every contestant once at every prompt length."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    batch_size: int
    repeats: int  # rounds
    threads: int
    seed: int = 0

    def prompts(self, length: int, vocab_size: int) -> list[list[int]]:
        """Random token ids, one list for each row; a shorter prompt is the beginning of a longer one."""
        longest = max(self.prompt_tokens)
        ids = np.random.default_rng(self.seed).integers(0, vocab_size, (self.batch_size, longest))
        rows: list[list[int]] = ids[:, :length].tolist()
        return rows


def make_plan(
    *,
    max_len: int,
    max_batch: int,
    prompt_tokens: Sequence[int] = (),
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    threads: int | None = None,
) -> Plan:
    """A plan that the artifact has room for.

    Args:
        max_len: of the artifact's cache.
        max_batch: rows the artifact takes.
        prompt_tokens: lengths; by default those of DEFAULT_LENGTHS that fit, or the longest that does.
        threads: by default as many as the cores this process may use.

    Raises:
        FeedError: a number is too small, or more tokens or rows than the artifact takes.
    """
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    at_least = {"new-tokens": (new_tokens, 2), "batch-size": (batch_size, 1), "repeats": (repeats, 1)}
    at_least |= {"threads": (threads, 1), "prompt-tokens": (min(prompt_tokens, default=1), 1)}
    for name, (number, least) in at_least.items():
        if number < least:
            raise FeedError(f"--{name} must be at least {least}, got {number}")
    if batch_size > max_batch:
        raise FeedError(
            f"--batch-size is {batch_size}, and this artifact takes {max_batch} rows: ask for fewer, or export again"
            " with a larger --max-batch"
        )
    room = max_len - new_tokens
    fitting = [length for length in DEFAULT_LENGTHS if length <= room] or [max(room, 1)]
    lengths = tuple(sorted(set(prompt_tokens or fitting)))
    if lengths[-1] > room:
        raise FeedError(
            f"--prompt-tokens {lengths[-1]} and --new-tokens {new_tokens} make {lengths[-1] + new_tokens} tokens, and"
            f" this artifact holds {max_len}: ask for fewer, or export again with a larger --max-len"
        )
    return Plan(prompt_tokens=lengths, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats, threads=threads)
