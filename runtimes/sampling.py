"""Which token comes next: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Functions take logits [..., V] of any float dtype, compute in float64, and return new logits; what is not kept is -inf.
Order and meaning are those of Hugging Face transformers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from runtimes.errors import FeedError

# {field of Sampling: (type, what is allowed, in words)}; a value must be finite as well
_ALLOWED: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda value: value >= 0, "a number of at least 0 (0 is greedy)"),
    "top_k": (Integral, lambda value: value >= 0, "a whole number of at least 0 (0 keeps all)"),
    "top_p": (Real, lambda value: 0 < value <= 1, "a number above 0 and at most 1 (1 keeps all)"),
    "min_p": (Real, lambda value: 0 <= value <= 1, "a number from 0 to 1 (0 keeps all)"),
    "repetition_penalty": (Real, lambda value: value > 0, "a number above 0 (1 is none)"),
    "seed": (Integral, lambda value: value >= 0, "a whole number of at least 0"),
}
_KEEP_ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default is greedy; the same seed and logits give the same tokens.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k, top_p, min_p: what keep_top_k, keep_top_p and keep_min_p leave, in this order.
        repetition_penalty: see penalize_repetition; prompt and output count.
        seed: of the random streams, one per row.

    Raises:
        FeedError: a value outside its range, or a limit on what is drawn where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, allowed, words) in _ALLOWED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or not allowed(value):
                raise FeedError(f"{name} must be {words}, got {value!r}")
        idle = [
            f"{name} {getattr(self, name)}" for name, neutral in _KEEP_ALL.items() if getattr(self, name) != neutral
        ]
        if idle and self.temperature == 0:
            raise FeedError(f"{', '.join(idle)} changes nothing at temperature 0 (greedy): set a temperature above 0")


class Sampler:
    """Chooses tokens for a batch. Each row draws from a stream of its own, whatever its neighbours do."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """`prompts` hold one list of ids per row; those from vocab_size on (of images) are never chosen."""
        self._sampling = sampling
        self._streams = [np.random.default_rng([sampling.seed, row]) for row in range(len(prompts))]
        self._seen = np.zeros((len(prompts), vocab_size), bool)
        for row, prompt in enumerate(prompts):
            self._seen[row, [token for token in prompt if token < vocab_size]] = True

    def choose(self, logits: np.ndarray, active: np.ndarray) -> np.ndarray:
        """The next token of each active row, int64 [B]; 0 for the others.

        Args:
            logits: [B, V], as the model gave them.
            active: bool [B].

        Raises:
            FeedError: an active row's logits hold NaN or infinity.
        """
        tokens = np.zeros(len(logits), np.int64)
        check_logits(logits, active)
        for row in np.flatnonzero(active):
            tokens[row] = self._choose(logits[row], int(row))
            self._seen[row, tokens[row]] = True
        return tokens

    def _choose(self, logits: np.ndarray, row: int) -> int:
        if self._sampling.temperature == 0:
            return int(penalize_repetition(logits, self._seen[row], self._sampling.repetition_penalty).argmax())
        return int(self._streams[row].choice(len(logits), p=token_probs(logits, self._seen[row], self._sampling)))


def token_probs(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probability of each token to be drawn at a temperature above 0, float64 [..., V]; see penalize_repetition."""
    logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    logits = apply_temperature(logits, sampling.temperature)
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    logits = keep_min_p(logits, sampling.min_p)
    return np.exp(log_softmax(logits))


def check_logits(logits: np.ndarray, active: np.ndarray) -> None:
    """FeedError when an active row of logits [B, V] holds NaN or infinity, or -inf only: they choose nothing."""
    for row in np.flatnonzero(active):
        if not np.isfinite(logits[row].max()):
            raise FeedError(
                f"the model's logits for row {row} hold NaN or infinity: the artifact computes wrongly or its precision"
                " overflows: verify it, or export again with --precision fp32"
            )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64 [..., V]; -inf stays -inf."""
    logits = _shifted(logits)
    result: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return result


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide the positive logits of tokens that were seen by `penalty`, and multiply the negative ones.

    CTRL, arXiv:1909.05858 section 4.1, divides only; as transformers does it, a penalty above 1 makes a token less
    likely whatever its sign. How often a token was seen does not matter.

    Args:
        seen: bool [..., V].
        penalty: above 0; 1 changes nothing.
    """
    logits = np.asarray(logits, np.float64)
    return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logits over `temperature` (above 0), shifted so that the largest is 0: then none overflows."""
    with np.errstate(over="ignore"):  # to -inf, as it should
        return _shifted(logits) / temperature


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the k likeliest tokens; of equals, those of lower ids. 0 keeps all, and so does k >= V."""
    logits = np.asarray(logits, np.float64)
    if not 0 < k < logits.shape[-1]:
        return logits
    last = np.partition(logits, -k, axis=-1)[..., -k, None]  # the k-th largest
    above, equal = logits > last, logits == last
    room = k - above.sum(axis=-1, keepdims=True)
    return np.where(above | (equal & (equal.cumsum(axis=-1) <= room)), logits, -np.inf)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv:1904.09751 section 3.1).

    The token with which the sum crosses p belongs to the set, which is thus never empty. (A well-known listing masks
    `cumulative > p` and so drops that token, and with it everything when the first one exceeds p.) Of equally likely
    tokens, lower ids come first. 1 keeps all.
    """
    logits = np.asarray(logits, np.float64)
    if p >= 1:
        return logits
    order = np.argsort(-logits, axis=-1, kind="stable")
    sorted_probs = np.exp(log_softmax(np.take_along_axis(logits, order, axis=-1)))
    before = np.zeros_like(sorted_probs)  # probability of all that come before
    before[..., 1:] = sorted_probs.cumsum(axis=-1)[..., :-1]
    keep = np.zeros(logits.shape, bool)
    np.put_along_axis(keep, order, before < p, axis=-1)
    return np.where(keep, logits, -np.inf)


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    """Keep tokens whose probability is at least min_p times the likeliest one's (arXiv:2407.01082). 0 keeps all."""
    logits = np.asarray(logits, np.float64)
    if min_p <= 0:
        return logits
    return np.where(_shifted(logits) >= math.log(min_p), logits, -np.inf)


def _shifted(logits: np.ndarray) -> np.ndarray:
    """The same distribution with its largest logit at 0, float64."""
    logits = np.asarray(logits, np.float64)
    result: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    return result
