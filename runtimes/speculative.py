"""Speculative decoding: a draft proposes tokens, the target checks them all in one call (arXiv:2211.17192, 2302.01318).

The target chooses every token itself, from its own logits and by its own random stream: a proposal only decides whether
the logits after it are of use. So greedy texts, sampled ones and their endings are those of the target alone, up to the
rounding of a call with several tokens. (To draw first and then compare is speculative sampling for a draft that is sure
of what it proposes: a token is accepted with the target's probability, and a rejected one is drawn from the others.)

Rejected tokens stay in the caches, behind the rows' ends, until others are written over them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.artifact import Artifact
from runtimes.decoding import Decoding, check_can_rewind
from runtimes.errors import FeedError
from runtimes.images import ImageBatch
from runtimes.rows import Rows
from runtimes.runner import Runner
from runtimes.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """Another model with the target's vocabulary, and how many tokens it proposes at a time.

    Raises:
        FeedError: fewer than one token.
    """

    runner: Runner
    tokens: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise FeedError(f"a draft must propose a whole number of tokens of at least 1, got {self.tokens!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftReport:
    """What a draft was worth: proposed and accepted tokens, over all rows, and calls of the target after the prompt."""

    proposed: int
    accepted: int
    target_calls: int

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens of those proposed; None when none were."""
        return self.accepted / self.proposed if self.proposed else None


def check_draft(target: Artifact, draft: Artifact) -> None:
    """Compare the vocabularies: a proposed token must stand for the same text in both.

    Raises:
        ArtifactError: an artifact without a readable tokenizer.
        FeedError: an id stands for another token in the draft.
    """
    ours, theirs = (Tokenizer(artifact.folder).vocabulary() for artifact in (target, draft))
    if ours == theirs:
        return
    token_id = min(
        token_id
        for vocabulary, other in ((ours, theirs), (theirs, ours))
        for token_id, token in vocabulary.items()
        if other.get(token_id) != token
    )
    there, here = (repr(each[token_id]) if token_id in each else "nothing" for each in (theirs, ours))
    raise FeedError(
        f"the draft {draft.folder} has another vocabulary than {target.folder}: {len(theirs)} tokens and {len(ours)};"
        f" token {token_id} is {there} there and {here} here. A draft must have the target's tokenizer: another size or"
        " precision of the same model"
    )


class Speculation:
    """Decodes with a target and a draft; rows may agree with the draft for different lengths."""

    def __init__(self, target: Decoding, draft: Draft) -> None:
        """Raises FeedError for a model that cannot be taken back behind rejected tokens."""
        check_can_rewind(target.runner)
        with _naming_the_draft():
            check_can_rewind(draft.runner)
        self._target = target
        self._draft = Decoding(draft.runner)
        self._tokens = draft.tokens
        self._prompts: Sequence[Sequence[int]] = []
        self._proposed = self._accepted = self._calls = 0

    @property
    def report(self) -> DraftReport:
        """Of all steps so far."""
        return DraftReport(proposed=self._proposed, accepted=self._accepted, target_calls=self._calls)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        images: ImageBatch | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        """Put the prompts into the draft's cache; the target's must hold them already.

        Raises:
            FeedError: the draft does not take these prompts, or has not vocab_size tokens.
        """
        with _naming_the_draft():
            logits = self._draft.prefill(prompts, images, chunk_tokens=chunk_tokens)
        if logits.shape[-1] != vocab_size:
            raise FeedError(f"the draft has another vocabulary: {logits.shape[-1]} tokens, the target {vocab_size}")
        self._prompts = prompts

    def step(self, rows: Rows) -> None:
        """Call the target once; give every active row one token at least, and at most one more than was proposed."""
        active = rows.active
        proposals = self._propose(rows, active)
        before = self._target.lengths
        tokens = np.concatenate([rows.last[:, None], proposals], axis=1)
        logits = self._target.append(tokens, active * np.int64(tokens.shape[1]))
        got = np.zeros_like(before)
        agreeing = active
        for place in range(tokens.shape[1]):
            rows.choose(logits[:, place], agreeing)
            got += agreeing
            if place < proposals.shape[1]:
                agreeing = agreeing & (rows.last == proposals[:, place])
                self._accepted += int(agreeing.sum())
                agreeing = agreeing & rows.active
        self._calls += 1
        self._proposed += proposals.shape[1] * int(active.sum())
        self._target.rewind(before + got)  # a row's last token is not in the cache: the next call takes it there
        self._draft.rewind(np.minimum(self._draft.lengths, self._target.lengths))

    def _propose(self, rows: Rows, active: np.ndarray) -> np.ndarray:
        """What the draft would say next, greedily: int64 [B, K], K from 0 to `tokens`."""
        behind = [self._behind(rows, row) if active[row] else [] for row in range(len(active))]
        counts = np.array([len(ids) for ids in behind], np.int64)
        tokens = np.zeros((len(behind), int(counts.max())), np.int64)
        for row, ids in enumerate(behind):
            tokens[row, : len(ids)] = ids
        count = self._proposal_count(rows, active, tokens.shape[1])
        proposals = np.zeros((len(behind), count), np.int64)
        for place in range(count):
            logits = self._draft.append(tokens, counts)
            last = np.take_along_axis(logits, np.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
            proposals[:, place] = last.argmax(axis=-1)
            tokens, counts = proposals[:, place : place + 1], active.astype(np.int64)
        return proposals

    def _behind(self, rows: Rows, row: int) -> list[int]:
        """The tokens of a row that are not in the draft's cache: its last one, and any before it."""
        prompt = self._prompts[row]
        return rows.token_ids[row][int(self._draft.lengths[row]) - len(prompt) :]

    def _proposal_count(self, rows: Rows, active: np.ndarray, catching_up: int) -> int:
        """How many tokens to propose: no more than are of use, and than every row has room for in both caches."""
        target, draft = self._target, self._draft
        longest = int(target.lengths[active].max())
        if (draft.lengths[active] + catching_up > draft.max_len).any():
            return 0
        steady = target.runner.cache_spec.steady_len
        end = target.max_len if steady is None else min(target.max_len, steady)
        return max(0, min(self._tokens, rows.most_left - 1, end - longest - 1, draft.max_len - longest))


@contextlib.contextmanager
def _naming_the_draft() -> Iterator[None]:
    """Says of a FeedError that it is the draft's."""
    try:
        yield
    except FeedError as error:
        raise FeedError(f"the draft: {error}") from None
