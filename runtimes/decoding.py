"""Rows, lengths and positions over any runner: prompts in, next-token logits out."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.prefix import Prefix, check_prompts, read_prefix, write_prefix
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
        self._shows_images = False

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        images: ImageBatch | None = None,
        *,
        prefix: Prefix | None = None,
        chunk_tokens: int | None = None,
    ) -> np.ndarray:
        """Start anew with these token ids; return the logits after each row's last one, float32 [B, V].

        Args:
            images: what the prompts show, as runtimes.images.ImageProcessor.batch makes it of the same prompts.
            prefix: what every prompt begins with, which is then not computed again. Of a prompt that is the prefix and
                nothing else, the last token is.
            chunk_tokens: feed at most so many tokens of a row in one call, which bounds the memory that a long prompt
                needs; by default, all at once.

        Raises:
            FeedError: an empty prompt, one longer than the cache, more rows or images than the artifact takes, images
                for a model that reads text only; a prompt that begins otherwise than the prefix, or shows images as
                well; a prompt that has to be fed whole (CacheSpec.steady_len).
        """
        first = 0 if prefix is None else self._first_left(prefix, prompts, images)
        input_ids, lengths = self._start(prompts, images)
        if prefix is not None:
            write_prefix(self.runner, prefix, len(lengths))
        result: np.ndarray | None = None

        def last_tokens(start: int, end: int) -> np.ndarray:
            return np.clip(lengths - 1 - start, 0, end - start - 1)[:, None]

        for start, logits in self._feed_chunks(input_ids, lengths, first, chunk_tokens, last_tokens):
            ends_later = (lengths > start)[:, None]  # what earlier chunks said of such a row means nothing
            result = logits[:, 0] if result is None else np.where(ends_later, logits[:, 0], result)
        assert result is not None
        return result

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

        def every_token(start: int, end: int) -> np.ndarray:
            return np.tile(np.arange(end - start, dtype=np.int64), (len(lengths), 1))

        yield from self._feed_chunks(input_ids, lengths, 0, chunk_tokens, every_token)

    def decode(self, tokens: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """Append one token to each active row; return the next logits, float32 [B, V].

        Rows that are not active keep their length, and their logits mean nothing.

        Raises:
            FeedError: an active row is full.
        """
        counts = np.ones(len(self.lengths), np.int64) if active is None else active.astype(np.int64)
        return self.append(np.asarray(tokens, np.int64).reshape(-1, 1), counts)[:, 0]

    def append(self, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Append the first counts[b] of tokens[b] to each row; return the logits after each, float32 [B, S, V].

        Beyond a row's count, its logits mean nothing, and a count of 0 leaves the row as it is.

        Args:
            tokens: int64 [B, S].
            counts: int64 [B], at most S.

        Raises:
            FeedError: a row with a count above 0 has no room for S tokens.
        """
        batch, size = tokens.shape
        if (full := (counts > 0) & (self.lengths + size > self.max_len)).any():
            what = "full" if size == 1 else f"too full for {size} more tokens"
            raise FeedError(
                f"rows {np.flatnonzero(full).tolist()} are {what}: this artifact holds {self.max_len} tokens"
            )
        every = np.arange(size, dtype=np.int64)
        slots = np.minimum(self.lengths, self.max_len - size)  # an idle row writes where its next tokens would go ..
        seen = self.lengths + counts  # .. and those slots are hidden: they are padding, which leaves no trace in sums
        feeds = {
            "input_ids": tokens,
            "position_ids": slots[:, None] + every,
            "write_indices": slots,
            "attention_mask": _mask(seen, int(slots.max()) + size),
            "logit_indices": np.tile(every, (batch, 1)),
        }
        logits = self._step(feeds, np.repeat(self._next_sight, size, axis=1))
        self.lengths = self.lengths + counts
        return logits

    def rewind(self, lengths: np.ndarray) -> None:
        """Keep the first lengths[b] tokens of each row. Nothing is copied: what comes next is written over the others.

        Raises:
            FeedError: the model sums over its tokens, and a sum does not know what it held before.
        """
        check_can_rewind(self.runner)
        assert (lengths <= self.lengths).all()
        self.lengths = lengths

    def take_prefix(self, token_ids: Sequence[int], row: int = 0) -> Prefix:
        """What these tokens left in the cache; they must be the first of that row.

        Raises:
            FeedError: the row shows images, or the model sums over its tokens and the row has others after these.
        """
        if self._shows_images:
            raise FeedError(
                "a prefix is of text alone, and this prompt shows images: what tokens read of them is not in the cache"
            )
        behind = int(self.lengths[row]) - len(token_ids)
        if not token_ids or behind < 0 or (behind and self.runner.cache_spec.sum_names()):
            raise FeedError(
                f"a prefix of {len(token_ids)} tokens cannot be taken of a row of {self.lengths[row]}: it must have"
                " one at least, and of a model that sums over its tokens all"
            )
        return read_prefix(self.runner, token_ids, row)

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
        self._shows_images = images is not None
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

    def _first_left(self, prefix: Prefix, prompts: Sequence[Sequence[int]], images: ImageBatch | None) -> int:
        """The first position that has to be computed where all prompts begin with the prefix."""
        if images is not None:
            raise FeedError(
                "a prefix is of text alone, and these prompts show images, which change what the tokens before them"
                " read: leave out the prefix or the images"
            )
        check_prompts(prefix, prompts)
        size, shortest = len(prefix.token_ids), min(map(len, prompts), default=0)
        if shortest == size and (sums := self.runner.cache_spec.sum_names()):
            raise FeedError(
                "a prompt holds nothing but the prefix, whose last token this model cannot compute again, because"
                f" {sums[0]} sums over all tokens: let the prompt go on after it"
            )
        return min(size, shortest - 1)

    def _feed_chunks(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        first: int,
        chunk_tokens: int | None,
        logit_indices: Callable[[int, int], np.ndarray],
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Feed the tokens from position `first` on; yield each chunk's first position, and its logits."""
        longest = input_ids.shape[1]
        if chunk_tokens is not None and chunk_tokens < 1:
            raise FeedError(f"a chunk must hold at least 1 token, got {chunk_tokens}")
        left = longest - first
        chunks = 1 if chunk_tokens is None else -(-left // chunk_tokens)
        steady = self.runner.cache_spec.steady_len
        if steady is not None and longest > steady and (first or chunks > 1):
            raise FeedError(
                f"a prompt has {longest} tokens, and beyond {steady} this model's positions depend on how long the text"
                " is when they are fed: feed it whole, without a prefix, chunks, or log-probabilities of prompts"
            )
        # Of equal size, so that no token is left over: a call with one takes other kernels, which round otherwise.
        edges = [first + left * chunk // chunks for chunk in range(chunks + 1)]
        for start, end in itertools.pairwise(edges):
            # Rows that have ended write padding behind their end, as in a whole prefill.
            seen = np.minimum(lengths, end)
            logits = self._feed(input_ids[:, start:end], start, seen, logit_indices(start, end))
            self.lengths = seen
            yield start, logits

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


def check_can_rewind(runner: Runner) -> None:
    """FeedError for a model that cannot forget its last tokens."""
    if sums := runner.cache_spec.sum_names():
        raise FeedError(
            f"this model cannot be taken back to fewer tokens: {sums[0]} sums over all tokens so far, and has no slot"
            " for each of them"
        )


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
