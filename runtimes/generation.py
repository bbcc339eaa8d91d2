"""Generation over any runner, one token at a time: greedy or sampled, until a stop id, a stop string or a length."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from runtimes.decoding import Decoding, limit_new_tokens
from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.runner import Runner
from runtimes.sampling import Sampler, Sampling, log_softmax
from runtimes.stopping import Decode, RowText, check_stop_strings, finish_reason, read_stop_ids

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


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    images: ImageBatch | None = None,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    logprobs: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Continue each prompt, as one batch; rows stop one by one.

    Args:
        prompts: token ids, one list per row; lengths may differ.
        max_new_tokens: per row; by default, as many as the cache has room for.
        images: what the prompts show, as runtimes.images.ImageProcessor.batch makes it of the same prompts.
        sampling: how tokens are chosen; greedily by default.
        stop_ids: a row ends when it produces one of these.
        stop_strings: a row ends when the text of its new tokens holds one of these.
        decode: token ids to text, such as Tokenizer(folder).decode; stop_strings and on_text need it.
        logprobs: report log-probabilities, of the prompts too: those are then fed in chunks, so that memory stays
            bounded.
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
    start = time.perf_counter()
    prompt_logprobs: list[list[float | None]] = []
    if logprobs:
        logits, prompt_logprobs = prefill_scored(decoding, prompts, images)
    else:
        logits = decoding.prefill(prompts, images)
    prefill_end = time.perf_counter()

    sampler = Sampler(sampling or Sampling(), prompts, logits.shape[-1])
    texts = [RowText(decode, prompt, stop_strings) for prompt in prompts] if decode is not None else []
    outputs: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts if logprobs]
    reasons = [""] * len(prompts)
    steps = 0
    while True:
        active = np.array([not reason for reason in reasons])
        tokens = sampler.choose(logits, active)
        for row in map(int, np.flatnonzero(active)):
            token = int(tokens[row])
            outputs[row].append(token)
            if logprobs:
                scores[row].append(float(log_softmax(logits[row])[token]))
            if on_token is not None:
                on_token(row, token)
            piece = texts[row].add(token) if texts else ""
            reasons[row] = finish_reason(outputs[row], bool(texts) and texts[row].stopped, stop_ids, max_new_tokens)
            if texts and reasons[row]:
                piece += texts[row].rest()
            if on_text is not None and piece:
                on_text(row, piece)
        active &= [not reason for reason in reasons]
        if not active.any():
            break
        logits = decoding.decode(tokens, active)
        steps += 1
    return Generation(
        prompt_ids=[list(prompt) for prompt in prompts],
        token_ids=outputs,
        finish_reasons=reasons,
        texts=[text.text for text in texts],
        token_logprobs=scores,
        prompt_logprobs=prompt_logprobs,
        prefill_s=prefill_end - start,
        decode_s=time.perf_counter() - prefill_end,
        decode_steps=steps,
    )


def prefill_scored(
    decoding: Decoding, prompts: Sequence[Sequence[int]], images: ImageBatch | None = None
) -> tuple[np.ndarray, list[list[float | None]]]:
    """Decoding.prefill, and the log-probability of each prompt token after those before it; None for the first."""
    scores: list[list[float | None]] = [[None] for _ in prompts]
    last: list[np.ndarray] = [np.empty(0)] * len(prompts)  # logits after each row's last token so far
    chunk_tokens = max(1, LOGITS_PER_CALL // max(1, len(prompts)))
    for start, logits in decoding.prefill_in_chunks(prompts, chunk_tokens, images):
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt[start : start + logits.shape[1]]):
                if start + position:
                    never = token >= logits.shape[-1]  # an image token, which the model does not predict
                    scores[row].append(None if never else float(log_softmax(last[row])[token]))
                last[row] = logits[row, position]
    return np.stack(last), scores
