"""The rows of a batch while they are generated: the token that each gets next, what it makes of them, why they end."""

from collections.abc import Callable, Sequence

import numpy as np

from runtimes.sampling import Sampler, Sampling, log_softmax
from runtimes.stopping import Decode, RowText, finish_reason


class Rows:
    """One row for each prompt. Rows are active until they end.

    Attributes:
        token_ids, texts: of each row, what it has produced; texts are empty without `decode`.
        logprobs: of each row, the log-probability of each of its tokens; empty unless asked for.
        reasons: why each row ended; empty while it is active.
        last: int64 [B], each row's last token.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        max_new_tokens: int,
        *,
        sampling: Sampling,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str],
        decode: Decode | None,
        logprobs: bool,
        on_token: Callable[[int, int], None] | None,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        """Arguments are runtimes.generation.generate's."""
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts if logprobs]
        self.reasons = [""] * len(prompts)
        self.last = np.zeros(len(prompts), np.int64)
        self._sampler = Sampler(sampling, prompts, vocab_size)
        self._texts = [RowText(decode, prompt, stop_strings) for prompt in prompts] if decode is not None else []
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        self._on_token, self._on_text = on_token, on_text

    @property
    def texts(self) -> list[str]:
        """What the tokens of each row add to its prompt's text."""
        return [text.text for text in self._texts]

    @property
    def active(self) -> np.ndarray:
        """bool [B]: rows that have not ended."""
        return np.array([not reason for reason in self.reasons])

    @property
    def most_left(self) -> int:
        """How many tokens an active row may still get, at most."""
        shortest = min(len(ids) for ids, reason in zip(self.token_ids, self.reasons, strict=True) if not reason)
        return self._max_new_tokens - shortest

    def choose(self, logits: np.ndarray, chosen: np.ndarray) -> None:
        """Give a token to each of the chosen rows, which must be active.

        Args:
            logits: [B, V], as the model gave them.
            chosen: bool [B].

        Raises:
            FeedError: a chosen row's logits hold NaN or infinity.
        """
        tokens = self._sampler.choose(logits, chosen)
        for row in map(int, np.flatnonzero(chosen)):
            if self.logprobs:
                self.logprobs[row].append(float(log_softmax(logits[row])[tokens[row]]))
            self._add(row, int(tokens[row]))

    def _add(self, row: int, token: int) -> None:
        self.last[row] = token
        self.token_ids[row].append(token)
        if self._on_token is not None:
            self._on_token(row, token)
        text = self._texts[row] if self._texts else None
        piece = text.add(token) if text else ""
        stopped = text is not None and text.stopped
        self.reasons[row] = finish_reason(self.token_ids[row], stopped, self._stop_ids, self._max_new_tokens)
        if text and self.reasons[row]:
            piece += text.rest()
        if self._on_text is not None and piece:
            self._on_text(row, piece)
