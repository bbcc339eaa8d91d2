"""Generation over any runner, one token at a time: greedy or sampled, until a stop id, a stop string or a length."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from runtimes.decoding import Decoding, limit_new_tokens
from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.prefix import Prefix
from runtimes.rows import Rows
from runtimes.runner import Runner
from runtimes.sampling import Sampling, log_softmax
from runtimes.speculative import Draft, DraftReport, Speculation
from runtimes.stopping import Decode, check_stop_strings, read_stop_ids

__all__ = ["Generation", "generate", "read_stop_ids"]

LOGITS_PER_CALL = 128  # of prompt tokens, over all rows: 64 MB for a vocabulary of 128,000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What one call generated. Token lists do not include the prompt, and end with the stop id if one was met.

    Attributes:
        finish_reasons: per row "stop_id", "stop_string" or "length".
        texts: per row, what the tokens add to the prompt's text, up to the stop string; empty without `decode`. Token
            lists are not cut: they hold the tokens of the stop string.
        token_logprobs: per row and token, its natural log-probability under the model's own logits, before repetition
            penalty, temperature and limits; empty unless asked for.
        prompt_logprobs: the same for the prompts' tokens; None for each first one, which nothing precedes, and for
            image tokens, which the model does not predict.
        decode_steps: calls of the model after the prompts.
        draft: what the draft was worth; None without one.
    """

    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    texts: list[str]
    token_logprobs: list[list[float]]
    prompt_logprobs: list[list[float | None]]
    prefill_s: float
    decode_s: float
    decode_steps: int
    draft: DraftReport | None


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    images: ImageBatch | None = None,
    prefix: Prefix | None = None,
    prefill_chunk_tokens: int | None = None,
    draft: Draft | None = None,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    logprobs: bool = False,
    on_prefill: Callable[[Decoding], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Continue each prompt, as one batch; rows stop one by one.

    Args:
        prompts: token ids, one list per row; lengths may differ.
        max_new_tokens: per row; by default, as many as the cache has room for.
        images: what the prompts show, as runtimes.images.ImageProcessor.batch makes it of the same prompts.
        prefix: what every prompt begins with, such as runtimes.prefix_file.load_prefix reads; it is not computed again.
        prefill_chunk_tokens: feed at most so many tokens of each prompt in one call, which bounds the memory that long
            prompts need; by default, all at once.
        draft: a second model that proposes tokens, of which several are then checked in one call. Texts stay the same.
        sampling: how tokens are chosen; greedily by default.
        stop_ids: a row ends when it produces one of these.
        stop_strings: a row ends when the text of its new tokens holds one of these.
        decode: token ids to text, such as Tokenizer(folder).decode; stop_strings and on_text need it.
        logprobs: report log-probabilities, of the prompts too: those are then fed in chunks, so that memory stays
            bounded.
        on_prefill: called once the prompts are in the cache, before the first token is chosen.
        on_token: called with (row, token id) for each new token, in order.
        on_text: called with (row, text) as text becomes certain; the pieces of a row add up to its entry in `texts`.

    Raises:
        FeedError: the cache is too small for the prompt and max_new_tokens; something is missing or out of range.
    """
    max_new_tokens = limit_new_tokens(runner.cache_spec.max_len, prompts, max_new_tokens)
    check_stop_strings(stop_strings, decode)
    if on_text is not None and decode is None:
        raise FeedError("on_text needs text: give decode as well, such as Tokenizer(folder).decode")
    decoding = Decoding(runner)
    speculation = None if draft is None else Speculation(decoding, draft)
    start = time.perf_counter()
    logits, prompt_logprobs = prefill(
        decoding, prompts, images, prefix=prefix, chunk_tokens=prefill_chunk_tokens, logprobs=logprobs
    )
    if speculation is not None:
        speculation.prefill(prompts, logits.shape[-1], images, prefill_chunk_tokens)
    prefill_end = time.perf_counter()
    if on_prefill is not None:
        on_prefill(decoding)

    rows = Rows(
        prompts,
        logits.shape[-1],
        max_new_tokens,
        sampling=sampling or Sampling(),
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        decode=decode,
        logprobs=logprobs,
        on_token=on_token,
        on_text=on_text,
    )
    rows.choose(logits, rows.active)
    steps = 0
    while (active := rows.active).any():
        if speculation is None:
            rows.choose(decoding.decode(rows.last, active), active)
        else:
            speculation.step(rows)
        steps += 1
    return Generation(
        prompt_ids=[list(prompt) for prompt in prompts],
        token_ids=rows.token_ids,
        finish_reasons=rows.reasons,
        texts=rows.texts,
        token_logprobs=rows.logprobs,
        prompt_logprobs=prompt_logprobs,
        prefill_s=prefill_end - start,
        decode_s=time.perf_counter() - prefill_end,
        decode_steps=steps,
        draft=None if speculation is None else speculation.report,
    )


def prefill(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    images: ImageBatch | None = None,
    *,
    prefix: Prefix | None = None,
    chunk_tokens: int | None = None,
    logprobs: bool = False,
) -> tuple[np.ndarray, list[list[float | None]]]:
    """Decoding.prefill, and the prompts' log-probabilities if they are asked for.

    Raises:
        FeedError: as Decoding.prefill, or log-probabilities of prompts whose prefix is not computed.
    """
    if not logprobs:
        return decoding.prefill(prompts, images, prefix=prefix, chunk_tokens=chunk_tokens), []
    if prefix is not None:
        raise FeedError(
            "log-probabilities are of every prompt token, and those of a saved prefix are not computed again: leave out"
            " the one or the other"
        )
    return prefill_scored(decoding, prompts, images, chunk_tokens)


def prefill_scored(
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    images: ImageBatch | None = None,
    chunk_tokens: int | None = None,
) -> tuple[np.ndarray, list[list[float | None]]]:
    """Decoding.prefill, and the log-probability of each prompt token after those before it; None for the first."""
    scores: list[list[float | None]] = [[None] for _ in prompts]
    last: list[np.ndarray] = [np.empty(0)] * len(prompts)  # logits after each row's last token so far
    most = max(1, LOGITS_PER_CALL // max(1, len(prompts)))
    chunk_tokens = most if chunk_tokens is None else min(chunk_tokens, most)
    for start, logits in decoding.prefill_in_chunks(prompts, chunk_tokens, images):
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt[start : start + logits.shape[1]]):
                if start + position:
                    never = token >= logits.shape[-1]  # an image token, which the model does not predict
                    scores[row].append(None if never else float(log_softmax(last[row])[token]))
                last[row] = logits[row, position]
    return np.stack(last), scores
