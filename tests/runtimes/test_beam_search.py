"""Beam search: against trying everything, against a search without a cache, and against transformers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.artifact import Artifact
from runtimes.beam_search import beam_search
from runtimes.errors import FeedError
from runtimes.generation import generate
from runtimes.runner import Runner, open_runner
from runtimes.tokenizer import Tokenizer

STOP = 2
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]


@pytest.fixture(scope="module")
def runner(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


# --- the same, written plainly: no cache, no rows, no early end -------------------------------------------------------


def _logprob(model: FakeRunner, ids: Sequence[int], token: int) -> float:
    logits = [float(x) for x in model.logits_after(ids)]
    return logits[token] - math.log(sum(math.exp(x) for x in logits))


def _sum(model: FakeRunner, prompt: Sequence[int], ids: Sequence[int]) -> float:
    return sum(_logprob(model, [*prompt, *ids[:n]], token) for n, token in enumerate(ids))


def _everything(
    model: FakeRunner, prompt: list[int], depth: int, penalty: float, stop_ids: Sequence[int]
) -> list[tuple[float, list[int]]]:
    """Every continuation that ends with its first stop id or at the depth, best first."""
    found = []
    for length in range(1, depth + 1):
        for ids in itertools.product(range(model.vocab_size), repeat=length):
            if any(token in stop_ids for token in ids[:-1]) or (length < depth and ids[-1] not in stop_ids):
                continue
            found.append((_sum(model, prompt, ids) / length**penalty, list(ids)))
    return sorted(found, reverse=True)


def _without_cache(
    model: FakeRunner, prompt: list[int], beams: int, depth: int, penalty: float, stop_ids: Sequence[int]
) -> list[tuple[float, list[int]]]:
    """Beam search that computes every sum anew and goes on to the last length, come what may."""
    going: list[list[int]] = [[]]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, depth + 1):
        candidates = [[*ids, token] for ids in going for token in range(model.vocab_size)]
        candidates.sort(key=lambda ids: -_sum(model, prompt, ids))
        ends = [length == depth or ids[-1] in stop_ids for ids in candidates]
        ended += [
            (_sum(model, prompt, ids) / length**penalty, ids)
            for ids, end in zip(candidates[:beams], ends, strict=False)
            if end
        ]
        going = [ids for ids, end in zip(candidates, ends, strict=True) if not end][:beams]
    return sorted(ended, reverse=True)[:beams]


def _assert_same(hypotheses: Sequence, expected: list[tuple[float, list[int]]]) -> None:
    assert [each.token_ids for each in hypotheses] == [ids for _, ids in expected]
    np.testing.assert_allclose([each.score for each in hypotheses], [score for score, _ in expected], rtol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("stop_ids", [[], [1], [0, 2]])
def test_wide_enough_it_equals_trying_everything(penalty: float, stop_ids: list[int]) -> None:
    """Three tokens, depth three, 27 beams, two ragged prompts: every continuation, in order."""
    model = FakeRunner(3, seed=5)
    prompts = [[0], [2, 1, 0, 0]]
    result = beam_search(model, prompts, 27, 3, length_penalty=penalty, stop_ids=stop_ids, early_stopping="never")
    for prompt, hypotheses in zip(prompts, result.hypotheses, strict=True):
        expected = _everything(model, prompt, 3, penalty, stop_ids)
        assert len(expected) == (27 if not stop_ids else 15 if len(stop_ids) == 1 else 7)
        _assert_same(hypotheses, expected)


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(1, 5),
    depth=st.integers(1, 5),
    penalty=st.sampled_from(PENALTIES),
    stop_ids=st.sampled_from([[], [1], [0, 3]]),
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_cache_follows_its_beams_and_the_search_ends_no_sooner_than_it_may(
    seed: int, beams: int, depth: int, penalty: float, stop_ids: list[int], prompts: list[list[int]]
) -> None:
    """A narrow search of a ragged batch finds what a search without cache, batch or early end finds."""
    model = FakeRunner(4, seed=seed)
    result = beam_search(
        model, prompts, beams, depth, length_penalty=penalty, stop_ids=stop_ids, early_stopping="never"
    )
    for prompt, hypotheses in zip(prompts, result.hypotheses, strict=True):
        _assert_same(hypotheses, _without_cache(model, prompt, beams, depth, penalty, stop_ids))


def test_no_row_moves_without_need() -> None:
    """A beam that goes on stays in its row; only its further continuations move, to rows whose beams ended."""
    model = FakeRunner(4, seed=2)
    beam_search(model, [[0], [1, 2]], 4, 8)
    moved = 0
    for rows in model.reorders:
        assert all(rows[origin] == origin for origin in rows)
        moved += sum(origin != row for row, origin in enumerate(rows))
    assert moved


def test_it_ends_as_soon_as_nothing_can_win() -> None:
    """A stop id of probability 0.99 beats whatever else could follow, if length is not rewarded; else it may not."""
    model = FakeRunner(3)
    model.changed_logits[(0,)] = [0.0, 0.0, 5.5]
    assert beam_search(model, [[0]], 1, 10, length_penalty=0.0, stop_ids=[2], early_stopping="never").decode_steps == 0
    assert beam_search(model, [[0]], 1, 10, length_penalty=-1.0, stop_ids=[2], early_stopping="never").decode_steps == 0
    assert beam_search(model, [[0]], 1, 10, length_penalty=5.0, stop_ids=[2], early_stopping="never").decode_steps > 0


def test_short_ones_are_waited_for_where_they_are_favoured() -> None:
    """Two bad ends fill the list, but the beam that goes on can still end at the next length and win."""
    model = FakeRunner(2, max_len=128)
    for length in (1, 2):
        model.changed_logits[(0,) * length] = [0.0, -3.0]
    model.changed_logits[(0, 0, 0)] = [0.0, 5.0]
    (hypotheses,) = beam_search(
        model, [[0]], 2, 100, length_penalty=-1.0, stop_ids=[1], early_stopping="never"
    ).hypotheses
    assert hypotheses[0].token_ids == [0, 0, 1]


def test_beams_go_on_however_many_candidates_end() -> None:
    """Ten of twelve tokens are stop ids: the best candidates all end, and the search looks further down."""
    model = FakeRunner(12, seed=4)
    stop_ids = list(range(10))
    (hypotheses,) = beam_search(
        model, [[11]], 2, 4, length_penalty=5.0, stop_ids=stop_ids, early_stopping="never"
    ).hypotheses
    _assert_same(hypotheses, _without_cache(model, [11], 2, 4, 5.0, stop_ids))
    assert len(hypotheses[0].token_ids) == 4


def test_fewer_continuations_than_beams() -> None:
    """Two tokens, one of them the stop id: places without a beam stay empty, and nothing comes twice."""
    model = FakeRunner(2)
    (hypotheses,) = beam_search(model, [[0, 0]], 8, 2, stop_ids=[1], early_stopping="never").hypotheses
    assert sorted(each.token_ids for each in hypotheses) == [[0, 0], [0, 1], [1]]
    assert all(math.isfinite(each.score) for each in hypotheses)
    reasons = {tuple(each.token_ids): each.finish_reason for each in hypotheses}
    assert reasons == {(0, 0): "length", (0, 1): "stop_id", (1,): "stop_id"}


def test_impossible_tokens_are_never_chosen() -> None:
    """A logit of -inf."""
    model = FakeRunner(3)
    model.changed_logits[(0,)] = [-math.inf, 1.0, -math.inf]
    (hypotheses,) = beam_search(model, [[0]], 5, 2).hypotheses
    assert [each.token_ids[0] for each in hypotheses] == [1, 1, 1]


def test_scores_are_sums_over_lengths() -> None:
    """token_logprobs are those of the model, and the score follows from them."""
    model = FakeRunner(4, seed=3)
    (hypotheses,) = beam_search(model, [[1, 2]], 3, 4, length_penalty=2.0).hypotheses
    for each in hypotheses:
        alone = [_logprob(model, [1, 2, *each.token_ids[:n]], token) for n, token in enumerate(each.token_ids)]
        np.testing.assert_allclose(each.token_logprobs, alone, rtol=1e-12)
        assert each.score == pytest.approx(sum(alone) / 4**2)


def test_stop_strings_end_a_hypothesis() -> None:
    """Found across tokens; the text ends before it, and the ids hold it."""
    model = FakeRunner(3, seed=11)
    letters = "abc"
    result = beam_search(
        model, [[0]], 27, 3, stop_strings=["bc"], decode=lambda ids: "".join(letters[i] for i in ids), logprobs=True
    )
    (hypotheses,) = result.hypotheses
    texts = {"".join(letters[i] for i in each.token_ids): each for each in hypotheses}
    every = {"".join(word) for word in itertools.product(letters, repeat=3)}
    assert texts.keys() == {word for word in every if not word.startswith("bc")} | {"bc"}
    for text, each in texts.items():
        assert each.finish_reason == ("stop_string" if "bc" in text else "length")
        assert each.text == text.partition("bc")[0]
    assert result.prompt_logprobs == [[None]]


# --- the real runner --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("penalty", "stop_ids"), [(1.0, [STOP]), (0.0, [STOP]), (1.0, []), (-1.0, [STOP])])
def test_equals_transformers(
    runner: Runner, tiny_llama: Path, penalty: float, stop_ids: list[int], early_stopping: bool | str
) -> None:
    """Its own beam search on the same checkpoint, prompt by prompt: sequences and scores."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = Tokenizer(tiny_llama)
    prompts = [tokenizer.encode(text) for text in ("27+58=", "the planet")]
    result = beam_search(
        runner, prompts, 4, 8, length_penalty=penalty, stop_ids=stop_ids, early_stopping=early_stopping
    )
    for prompt, hypotheses in zip(prompts, result.hypotheses, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=penalty,
            early_stopping=early_stopping,
            do_sample=False,
            eos_token_id=stop_ids or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = [_until(STOP if stop_ids else None, ids) for ids in theirs.sequences[:, len(prompt) :].tolist()]
        assert [each.token_ids for each in hypotheses] == expected
        np.testing.assert_allclose(
            [each.score for each in hypotheses], theirs.sequences_scores.numpy(), rtol=1e-3, atol=1e-4
        )


def _until(stop: int | None, ids: list[int]) -> list[int]:
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def test_the_best_hypothesis_is_no_less_likely_than_the_greedy_one(runner: Runner) -> None:
    """By sums, and prompts score as they do in generate."""
    prompts = [[1, 30, 40, 50], [1, 60, 70, 80, 90, 20, 21, 22]]
    greedy = generate(runner, prompts, 10, logprobs=True)
    result = beam_search(runner, prompts, 4, 10, length_penalty=0.0, logprobs=True)
    for row, hypotheses in enumerate(result.hypotheses):
        assert len(hypotheses) == 4
        assert hypotheses[0].score >= sum(greedy.token_logprobs[row]) - 1e-4
    for ours, theirs in zip(result.prompt_logprobs, greedy.prompt_logprobs, strict=True):
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-4)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "beams", "options", "message"),
    [
        ([[1], [2], [3]], 3, {}, r"prompts \(3\) times beams \(3\) are 9 rows, .* at most 8: use fewer .*--max-batch"),
        ([[1]], 0, {}, "num_beams must be a whole number of at least 1, got 0"),
        ([[1]], 2.0, {}, "num_beams must be a whole number of at least 1, got 2.0"),
        ([[1]], 2, {"length_penalty": math.nan}, "length_penalty must be a number from -10 to 10, got nan"),
        ([[1]], 2, {"length_penalty": 11}, "length_penalty must be a number from -10 to 10, got 11"),
        ([[1]], 2, {"max_new_tokens": 17}, "1 tokens and 17 new ones .* holds 16: ask for at most 16"),
        ([[1]], 2, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1] * 17], 2, {}, "a prompt has 17 tokens, this artifact holds 16"),
        ([[]], 2, {}, "every prompt must hold at least one token"),
        ([[1]], 2, {"stop_strings": ["a"]}, "stop_strings are found in text: give decode"),
    ],
)
def test_mistakes_are_refused(prompts: list, beams: int, options: dict, message: str) -> None:
    with pytest.raises(FeedError, match=message):
        beam_search(FakeRunner(4, max_batch=8), prompts, beams, **{"max_new_tokens": 2} | options)


def test_logits_that_are_no_numbers_are_refused() -> None:
    """Instead of an empty result."""
    model = FakeRunner(3)
    model.changed_logits[(0, 1)] = [math.nan] * 3
    model.changed_logits[(0,)] = [0.0, 9.0, 0.0]
    with pytest.raises(FeedError, match="logits for row 0 hold NaN or infinity"):
        beam_search(model, [[0]], 2, 4)


def test_the_cache_can_be_filled_to_the_last_slot() -> None:
    """By default as many tokens as there is room for."""
    model = FakeRunner(3, max_len=6)
    (hypotheses,) = beam_search(model, [[0, 1, 2]], 2).hypotheses
    assert [len(each.token_ids) for each in hypotheses] == [4, 4]


def test_the_search_ends_soon_after_the_answer(runner: Runner, tiny_llama: Path) -> None:
    """As many steps as transformers takes by default, though the cache has room for a hundred more."""
    tokenizer = Tokenizer(tiny_llama)
    result = beam_search(runner, [tokenizer.encode("27+58=")], 4, stop_ids=[STOP])
    assert tokenizer.decode(result.hypotheses[0][0].token_ids) == "85"
    assert result.decode_steps <= 6


def test_an_unknown_rule_to_stop_is_refused() -> None:
    with pytest.raises(FeedError, match="early_stopping must be True, False or \"never\", got 'soon'"):
        beam_search(FakeRunner(4), [[0]], 2, 2, early_stopping="soon")
