"""Rows, lengths and positions over any runner: prompts in, next-token logits out."""

from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.runner import Runner


class Decoding:
    """A batch of rows being decoded. Rows may have different lengths: prompts are padded on the right.

    `lengths[b]` counts the tokens of row b that are in the cache.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.max_len = runner.cache_spec.max_len
        self.lengths = np.zeros(0, np.int64)
        self._sight = np.zeros((0, 0, 1, 1), np.int64)  # [B, S, I, T]: what each token of the prompts sees
        self._next_sight = np.zeros((0, 1, 1, 1), np.int64)  # [B, 1, I, T]: what each token after them sees

    def prefill(self, prompts: Sequence[Sequence[int]], images: ImageBatch | None = None) -> np.ndarray:
        """Start anew with these token ids; return the logits after each row's last one, float32 [B, V].

        Args:
            images: what the prompts show, as runtimes.images.ImageProcessor.batch makes it of the same prompts.

        Raises:
            FeedError: an empty prompt, one longer than the cache, more rows or images than the artifact takes, or
                images for a model that reads text only.
        """
        input_ids, lengths = self._start(prompts, images)
        logits = self._feed(input_ids, 0, lengths, (lengths - 1)[:, None])
        self.lengths = lengths
        return logits[:, 0]

    def prefill_in_chunks(
        self, prompts: Sequence[Sequence[int]], chunk_tokens: int, images: ImageBatch | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Start anew with these token ids; yield the logits after every one of them, chunk by chunk.

        A chunk is (its first position, float32 [B, n, V]) with n at most chunk_tokens. Beyond a row's end, its logits
        mean nothing. The prompts are in the cache once the last chunk was taken.

        Raises:
            FeedError: as prefill.
        """
        input_ids, lengths = self._start(prompts, images)
        longest = input_ids.shape[1]
        for start in range(0, longest, chunk_tokens):
            end = min(start + chunk_tokens, longest)
            every = np.tile(np.arange(end - start, dtype=np.int64), (len(lengths), 1))
            # Rows that have ended write padding behind their end, as in a whole prefill.
            logits = self._feed(input_ids[:, start:end], start, np.minimum(lengths, end), every)
            self.lengths = np.minimum(lengths, end)
            yield start, logits

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
        slots = np.minimum(self.lengths, self.max_len - 1)  # an idle row writes where its next token would go ..
        seen = self.lengths + active  # .. and that slot is hidden: it is padding, which leaves no trace in sums
        feeds = {
            "input_ids": np.asarray(tokens, np.int64).reshape(batch, 1),
            "position_ids": slots[:, None],
            "write_indices": slots,
            "attention_mask": _mask(seen, int(slots.max()) + 1),
            "logit_indices": np.zeros((batch, 1), np.int64),
        }
        logits = self._step(feeds, self._next_sight)
        self.lengths = self.lengths + active
        return logits[:, 0]

    def reorder(self, rows: np.ndarray) -> None:
        """Let row b continue what row rows[b] held; int64 [B], a row may be taken several times."""
        self.runner.reorder_rows(rows)
        self.lengths = self.lengths[rows]
        self._next_sight = self._next_sight[rows]

    def _start(self, prompts: Sequence[Sequence[int]], images: ImageBatch | None) -> tuple[np.ndarray, np.ndarray]:
        """Reset the cache; return the prompts padded with zeros, int64 [B, longest], and their lengths."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if not len(prompts) or not lengths.min():
            raise FeedError("every prompt must hold at least one token")
        longest = int(lengths.max())
        if longest > self.max_len:
            raise FeedError(f"a prompt has {longest} tokens, this artifact holds {self.max_len} (set by --max-len)")
        self.runner.reset(len(prompts))
        self.lengths = np.zeros_like(lengths)
        input_ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = prompt
        self._show(images, lengths, longest)
        return input_ids, lengths

    def _show(self, images: ImageBatch | None, lengths: np.ndarray, longest: int) -> None:
        """Show the rows their images, if any."""
        batch = len(lengths)
        if images is None:
            self._sight = np.full((batch, longest, 1, 1), -1, np.int64)
            self._next_sight = self._sight[:, :1]
            return
        if images.cross_attention_mask.shape[:2] != (batch, longest):
            found = list(images.cross_attention_mask.shape[:2])
            raise FeedError(f"images were made for prompts of another shape: {found}, expected {[batch, longest]}")
        self.runner.encode_images(images.encoder_feeds())
        self._sight, self._next_sight = images.cross_attention_mask, images.last_mask(lengths)

    def _step(self, feeds: dict[str, np.ndarray], sight: np.ndarray) -> np.ndarray:
        """One call; `sight` is for decoders that see."""
        if self.runner.vision_spec is not None:
            feeds["cross_attention_mask"] = sight
        return self.runner.step(feeds)

    def _feed(self, input_ids: np.ndarray, start: int, seen: np.ndarray, logit_indices: np.ndarray) -> np.ndarray:
        """One call with input_ids [B, S] at positions from `start` on; row b sees its first seen[b] slots."""
        batch, size = input_ids.shape
        feeds = {
            "input_ids": input_ids,
            "position_ids": np.tile(np.arange(start, start + size, dtype=np.int64), (batch, 1)),
            "write_indices": np.full(batch, start, np.int64),
            "attention_mask": _mask(seen, start + size),
            "logit_indices": logit_indices,
        }
        return self._step(feeds, self._sight[:, start : start + size])


def limit_new_tokens(max_len: int, prompts: Sequence[Sequence[int]], max_new_tokens: int | None) -> int:
    """How many tokens each row may get: max_new_tokens, or by default as many as the cache has room for.

    A prompt longer than the cache is left to Decoding.prefill, which refuses it.

    Raises:
        FeedError: max_new_tokens is below 1, or more than a cache of max_len tokens has room for.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    room = max_len - longest + 1  # the last token is never written
    if max_new_tokens is None:
        max_new_tokens = max(room, 0)
    if max_new_tokens < 1 and longest <= max_len:
        raise FeedError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if longest <= max_len and max_new_tokens > room:
        raise FeedError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but this artifact"
            f" holds {max_len}: ask for at most {room}, or export again with a larger --max-len"
        )
    return max_new_tokens


def _mask(lengths: np.ndarray, total: int) -> np.ndarray:
    """int64 [B, total]: 1 for the first lengths[b] slots of row b."""
    return (np.arange(total) < lengths[:, None]).astype(np.int64)
