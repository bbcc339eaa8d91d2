"""A runner with a tiny made-up model, for searches that can be checked by trying everything.

Its cache holds token ids, and the logits after a token follow from the ids that its row of the cache holds up to there:
a row that is not where it should be gives other logits.
"""

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, DimRange, StateSpec
from runtimes.step_checks import check_cache_array, check_rows

EMPTY = -1


class FakeRunner:
    """See runtimes.runner.Runner; only what generation needs."""

    def __init__(self, vocab_size: int, *, seed: int = 0, max_len: int = 16, max_batch: int = 1000) -> None:
        self.vocab_size, self.seed = vocab_size, seed
        slots = StateSpec(layer=0, name="ids", dtype="float32", shape=(max_len,), slot_axis=0)
        self.cache_spec = CacheSpec(max_len=max_len, dtype="float32", tensors=(slots,))
        self.computes_in = "float32"
        self.description = "a fake"
        self.vision_spec = None
        self.signature: Any = SimpleNamespace(dims={"batch_size": DimRange(min=1, opt=1, max=max_batch)})
        self.cache = np.zeros((0, max_len), np.int64)
        self.steps: list[tuple[int, ...]] = []  # [B, S] of each
        self.reorders: list[list[int]] = []
        self.changed_logits: dict[tuple[int, ...], Sequence[float]] = {}

    def logits_after(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [V]: the model itself, without a cache."""
        ids = tuple(map(int, ids))
        if ids in self.changed_logits:
            return np.array(self.changed_logits[ids], np.float32)
        seed = zlib.crc32(repr((self.seed, ids)).encode())
        return np.random.default_rng(seed).normal(0, 2, self.vocab_size).astype(np.float32)

    def reset(self, batch_size: int) -> None:
        self.cache = np.full((batch_size, self.cache_spec.max_len), EMPTY, np.int64)

    def step(self, feeds: Feeds) -> np.ndarray:
        size = feeds["input_ids"].shape[1]
        self.steps.append(feeds["input_ids"].shape)
        assert (feeds["write_indices"] + size <= self.cache_spec.max_len).all()
        logits = np.empty((*feeds["logit_indices"].shape, self.vocab_size), np.float32)
        for row, first in enumerate(feeds["write_indices"]):
            self.cache[row, first : first + size] = feeds["input_ids"][row]
            for n, index in enumerate(feeds["logit_indices"][row]):
                slots = np.arange(feeds["position_ids"][row, index] + 1)
                slots = slots[slots < feeds["attention_mask"].shape[1]]
                logits[row, n] = self.logits_after(self.cache[row, slots[feeds["attention_mask"][row, slots] == 1]])
        return logits

    def read_cache(self, index: int) -> np.ndarray:
        assert index == 0
        return self.cache.astype(np.float32)

    def write_cache(self, index: int, array: np.ndarray) -> None:
        check_cache_array(array, index, self.cache_spec, len(self.cache))
        self.cache = array.astype(np.int64)

    def reorder_rows(self, rows: np.ndarray) -> None:
        check_rows(rows, len(self.cache))
        self.reorders.append(rows.tolist())
        self.cache = self.cache[rows]
