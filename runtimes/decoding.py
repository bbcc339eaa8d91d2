"""Rows, lengths and positions over any runner: prompts in, next-token logits out."""

from collections.abc import Sequence

import numpy as np

from runtimes.errors import FeedError
from runtimes.runner import Runner


class Decoding:
    """A batch of rows being decoded. Rows may have different lengths: prompts are padded on the right.

    `lengths[b]` counts the tokens of row b that are in the cache.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.max_len = runner.cache_spec.max_len
        self.lengths = np.zeros(0, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Start anew with these token ids; return the logits after each row's last one, float32 [B, V].

        Raises:
            FeedError: an empty prompt, one longer than the cache, or more rows than the artifact takes.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if not len(prompts) or not lengths.min():
            raise FeedError("every prompt must hold at least one token")
        longest = int(lengths.max())
        if longest > self.max_len:
            raise FeedError(f"a prompt has {longest} tokens, this artifact holds {self.max_len} (set by --max-len)")
        batch = len(prompts)
        self.runner.reset(batch)
        input_ids = np.zeros((batch, longest), np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = prompt
        logits = self.runner.step(
            {
                "input_ids": input_ids,
                "position_ids": np.tile(np.arange(longest, dtype=np.int64), (batch, 1)),
                "write_indices": np.zeros(batch, np.int64),
                "attention_mask": _mask(lengths, longest),
                "logit_indices": (lengths - 1)[:, None],
            }
        )
        self.lengths = lengths
        return logits[:, 0]

    def decode(self, tokens: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """Append one token to each active row; return the next logits, float32 [B, V].

        Rows that are not active keep their length, and their logits mean nothing.

        Raises:
            FeedError: an active row is full.
        """
        batch = len(self.lengths)
        active = np.ones(batch, bool) if active is None else active
        if (full := active & (self.lengths >= self.max_len)).any():
            raise FeedError(f"rows {np.flatnonzero(full).tolist()} are full: this artifact holds {self.max_len} tokens")
        slots = np.minimum(self.lengths, self.max_len - 1)  # an idle row writes where its next token would go
        seen = slots + 1
        logits = self.runner.step(
            {
                "input_ids": np.asarray(tokens, np.int64).reshape(batch, 1),
                "position_ids": slots[:, None],
                "write_indices": slots,
                "attention_mask": _mask(seen, int(seen.max())),
                "logit_indices": np.zeros((batch, 1), np.int64),
            }
        )
        self.lengths = self.lengths + active
        return logits[:, 0]


def _mask(lengths: np.ndarray, total: int) -> np.ndarray:
    """int64 [B, total]: 1 for the first lengths[b] slots of row b."""
    return (np.arange(total) < lengths[:, None]).astype(np.int64)
