"""Beam search over any runner: the likeliest continuations that a search of bounded width finds.

Rows of the batch are prompts x beams. When a beam is continued twice and another not at all, their cache rows move with
them (Runner.reorder_rows). Scores, which finished candidates count, and when the search ends follow Hugging Face
transformers.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.decoding import Decoding, limit_new_tokens
from runtimes.errors import FeedError
from runtimes.generation import prefill
from runtimes.images import ImageBatch
from runtimes.prefix import Prefix
from runtimes.runner import Runner
from runtimes.sampling import check_logits, log_softmax
from runtimes.stopping import Decode, added_text, check_stop_strings, finish_reason

MAX_LENGTH_PENALTY = 10  # either way; far more overflows a float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One continuation. Token ids hold the stop id, or the tokens of the stop string, if it ended with one.

    Attributes:
        score: the sum of token_logprobs over their number to the power of length_penalty.
        finish_reason: "stop_id", "stop_string" or "length".
        text: what the tokens add to the prompt's text, up to the stop string; empty without `decode`.
    """

    token_ids: list[int]
    token_logprobs: list[float]
    score: float
    finish_reason: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """What one call found: per prompt, its hypotheses, best first; at most num_beams of them.

    prompt_logprobs are as in runtimes.generation.Generation.
    """

    prompt_ids: list[list[int]]
    hypotheses: list[list[Hypothesis]]
    prompt_logprobs: list[list[float | None]]
    prefill_s: float
    decode_s: float
    decode_steps: int


def beam_search(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    max_new_tokens: int | None = None,
    *,
    images: ImageBatch | None = None,
    prefix: Prefix | None = None,
    prefill_chunk_tokens: int | None = None,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    logprobs: bool = False,
    early_stopping: bool | str = False,
) -> BeamSearch:
    """Search for the continuations of each prompt with the highest scores.

    With num_beams of at least the number of possible continuations and early_stopping="never", the result is that of
    trying them all.

    Args:
        prompts: token ids, one list per prompt; lengths may differ. Each takes num_beams rows of the artifact's batch.
        num_beams: continuations that are followed at a time, per prompt.
        max_new_tokens: of each continuation; by default, as many as the cache has room for.
        images: what the prompts show, as runtimes.images.ImageProcessor.batch makes it of the same prompts.
        prefix, prefill_chunk_tokens: as in runtimes.generation.generate.
        length_penalty: above 0 favours long continuations, below 0 short ones; 0 compares plain sums.
        stop_ids, stop_strings, decode: as in runtimes.generation.generate.
        logprobs: report the prompts' log-probabilities too.
        early_stopping: when num_beams continuations have ended: True stops; False stops unless a beam would beat the
            worst of them if it ended now; "never" stops unless one could still beat it at some length, which may take
            as many steps as the cache has room for.

    Raises:
        FeedError: more rows than the artifact takes, a cache that is too small, something missing or out of range.
    """
    _check(runner, prompts, num_beams, length_penalty)
    if early_stopping not in (True, False, "never"):
        raise FeedError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    max_new_tokens = limit_new_tokens(runner.cache_spec.max_len, prompts, max_new_tokens)
    check_stop_strings(stop_strings, decode)
    rows = [prompt for prompt in prompts for _ in range(num_beams)]
    images = None if images is None else images.repeat(num_beams)
    decoding = Decoding(runner)
    start = time.perf_counter()
    logits, scored = prefill(
        decoding, rows, images, prefix=prefix, chunk_tokens=prefill_chunk_tokens, logprobs=logprobs
    )
    prefill_end = time.perf_counter()

    searches = [
        _Search(
            prompt,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            decode=decode,
            early_stopping=early_stopping,
        )
        for prompt in prompts
    ]
    steps = 0
    active = [True] * len(rows)
    while True:
        check_logits(logits, np.array(active))
        origins, tokens, active = [], [], []
        for first, search in zip(range(0, len(rows), num_beams), searches, strict=True):
            parents = search.advance(log_softmax(logits[first : first + num_beams]))
            origins += [first + parent for parent in parents]
            tokens += [beam.ids[-1] if beam.ids else 0 for beam in search.beams]
            active += [beam.logprob > -math.inf for beam in search.beams]
        if not any(active):
            break
        decoding.reorder(np.array(origins, np.int64))
        logits = decoding.decode(np.array(tokens, np.int64), np.array(active))
        steps += 1
    return BeamSearch(
        prompt_ids=[list(prompt) for prompt in prompts],
        hypotheses=[search.finished for search in searches],
        prompt_logprobs=scored[::num_beams],
        prefill_s=prefill_end - start,
        decode_s=time.perf_counter() - prefill_end,
        decode_steps=steps,
    )


@dataclasses.dataclass(frozen=True)
class _Beam:
    """A continuation that may go on; a place without one has the log-probability -inf."""

    ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    logprob: float = -math.inf


@dataclasses.dataclass
class _Search:
    """The beams of one prompt: `beams` go on, each at the place of its row, and `finished` are the best that ended."""

    prompt: Sequence[int]
    num_beams: int
    max_new_tokens: int
    length_penalty: float
    stop_ids: Sequence[int]
    stop_strings: Sequence[str]
    decode: Decode | None
    early_stopping: bool | str
    finished: list[Hypothesis] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        # All rows hold the same prompt: only one may be continued, or every continuation would come num_beams times.
        self.beams = [_Beam(logprob=0.0)] + [_Beam()] * (self.num_beams - 1)

    def advance(self, logprobs: np.ndarray) -> list[int]:
        """Continue every beam by the best tokens; return, for each place, the place it continues.

        Args:
            logprobs: float64 [num_beams, V]; rows of places without a beam mean nothing.
        """
        totals = np.array([beam.logprob for beam in self.beams])[:, None] + logprobs
        going: list[tuple[int, _Beam]] = []
        for rank, (place, token) in enumerate(_best_first(totals)):
            parent = self.beams[place]
            score = float(logprobs[place, token])
            beam = _Beam((*parent.ids, token), (*parent.token_logprobs, score), float(totals[place, token]))
            reason = finish_reason(beam.ids, self._is_stopped(beam), self.stop_ids, self.max_new_tokens)
            if not reason:
                going.append((place, beam))
            elif rank < self.num_beams:  # the rest are there only so that enough beams go on
                self._finish(beam, reason)
            at_the_end = len(beam.ids) == self.max_new_tokens and rank + 1 >= self.num_beams
            if len(going) == self.num_beams or at_the_end:
                break
        if self._is_decided([beam for _, beam in going]):
            going = []
        placed = self._place(going)
        self.beams = [beam for _, beam in placed]
        return [origin for origin, _ in placed]

    def _place(self, going: list[tuple[int, _Beam]]) -> list[tuple[int, _Beam]]:
        """Give every beam a place: where it can, the one it continues, so that few rows of the cache have to move."""
        placed: dict[int, tuple[int, _Beam]] = {}
        for pair in going:
            placed.setdefault(pair[0], pair)
        others = [pair for pair in going if placed[pair[0]] is not pair]
        for place in range(self.num_beams):
            if place not in placed:
                placed[place] = others.pop(0) if others else (place, _Beam())
        return [placed[place] for place in range(self.num_beams)]

    def _is_stopped(self, beam: _Beam) -> bool:
        return bool(self.stop_strings) and self._text(beam)[1]

    def _finish(self, beam: _Beam, reason: str) -> None:
        found = Hypothesis(
            token_ids=list(beam.ids),
            token_logprobs=list(beam.token_logprobs),
            score=self._score(beam.logprob, len(beam.ids)),
            finish_reason=reason,
            text=self._text(beam)[0],
        )
        self.finished = sorted([*self.finished, found], key=lambda each: -each.score)[: self.num_beams]

    def _is_decided(self, going: list[_Beam]) -> bool:
        """True when no beam is expected to end above the worst of num_beams finished ones; see early_stopping."""
        if len(self.finished) < self.num_beams:
            return not going
        if self.early_stopping is True:
            return True
        bounds = (self._score(beam.logprob, self._hopeful_length(len(beam.ids))) for beam in going)
        return max(bounds, default=-math.inf) <= self.finished[-1].score

    def _hopeful_length(self, length: int) -> int:
        """The length at which a beam is compared with those that have ended."""
        if self.early_stopping != "never":
            return length
        # Sums only fall. A positive penalty divides the most at the last length, a negative one multiplies the least
        # at the next.
        return self.max_new_tokens if self.length_penalty > 0 else length + 1

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty

    def _text(self, beam: _Beam) -> tuple[str, bool]:
        if self.decode is None:
            return "", False
        return added_text(self.decode, self.prompt, beam.ids, self.stop_strings)


def _best_first(totals: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, column) of every number above -inf: largest first, of equals the first. Sorts no more than are taken."""
    flat = totals.reshape(-1)
    left = np.flatnonzero(flat > -np.inf)
    take = 4 * len(totals)
    while left.size:
        last = np.partition(flat[left], -take)[-take] if take < left.size else -np.inf
        chosen = flat[left] >= last
        for index in left[chosen][np.argsort(-flat[left[chosen]], kind="stable")]:
            row, column = divmod(int(index), totals.shape[1])
            yield row, column
        left = left[~chosen]


def _check(runner: Runner, prompts: Sequence[Sequence[int]], num_beams: int, length_penalty: float) -> None:
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise FeedError(f"num_beams must be a whole number of at least 1, got {num_beams!r}")
    if not abs(length_penalty) <= MAX_LENGTH_PENALTY:
        raise FeedError(
            f"length_penalty must be a number from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {length_penalty}"
        )
    rows, most = len(prompts) * num_beams, runner.signature.dims["batch_size"].max
    if rows > most:
        raise FeedError(
            f"prompts ({len(prompts)}) times beams ({num_beams}) are {rows} rows, but this artifact takes at most"
            f" {most}: use fewer beams or prompts, or export again with a larger --max-batch"
        )
