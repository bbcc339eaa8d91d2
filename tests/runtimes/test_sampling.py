"""Sampling: definitions in words as plain loops, properties, and transformers' own processors."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtimes.errors import FeedError
from runtimes.sampling import (
    Sampler,
    Sampling,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalize_repetition,
    token_probs,
)

repeatable = settings(deadline=None, derandomize=True, max_examples=150, database=None)

_NUMBERS = st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float))  # integers: ties
LOGITS = st.lists(_NUMBERS, min_size=1, max_size=12).map(lambda values: np.array(values, np.float32))
DISTINCT = st.lists(st.integers(-400, 400), min_size=2, max_size=12, unique=True).map(
    lambda values: np.array(values, np.float64) / 37
)
TOP_P = st.floats(0.01, 0.999)
SHIFTS = st.integers(0, 10**6)


def _probs(logits: np.ndarray) -> list[float]:
    """Softmax, as a loop."""
    largest = max(float(x) for x in logits)
    weights = [math.exp(float(x) - largest) for x in logits]
    return [weight / sum(weights) for weight in weights]


def _kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(logits > -np.inf).tolist())


def _by_likelihood(logits: np.ndarray) -> list[int]:
    """Token ids, likeliest first; of equals the lower id."""
    return sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))


def _assert_values_stay(before: np.ndarray, after: np.ndarray) -> None:
    kept = after > -np.inf
    np.testing.assert_array_equal(after[kept], before[kept].astype(np.float64))


# --- definitions ------------------------------------------------------------------------------------------------------


@repeatable
@given(LOGITS)
def test_log_softmax(logits: np.ndarray) -> None:
    np.testing.assert_allclose(np.exp(log_softmax(logits)), _probs(logits), rtol=1e-12, atol=1e-300)


def test_log_softmax_of_extremes() -> None:
    """No overflow, and what is impossible stays so."""
    np.testing.assert_array_equal(log_softmax(np.array([1e30, 0.0, -np.inf])), [0.0, -1e30, -np.inf])


@repeatable
@given(LOGITS, st.integers(0, 15))
def test_top_k_keeps_the_k_likeliest(logits: np.ndarray, k: int) -> None:
    """By a plain sort, lower ids first among equals; 0 and k >= V keep all; twice is once."""
    kept = keep_top_k(logits, k)
    assert _kept(kept) == set(_by_likelihood(logits)[: k or len(logits)])
    _assert_values_stay(logits, kept)
    np.testing.assert_array_equal(keep_top_k(kept, k), kept)


@repeatable
@given(LOGITS, TOP_P)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    """The article's words: the likeliest tokens until their sum reaches p. The one that crosses p is kept."""
    probs, expected, total = _probs(logits), set(), 0.0
    for token in _by_likelihood(logits):
        expected.add(token)
        total += probs[token]
        if total >= p:
            break
    kept = keep_top_p(logits, p)
    if abs(total - p) > 1e-9:  # a sum that hits p exactly may round either way
        assert _kept(kept) == expected
    _assert_values_stay(logits, kept)


@repeatable
@given(LOGITS, TOP_P)
def test_top_p_is_minimal_and_holds_the_likeliest(logits: np.ndarray, p: float) -> None:
    """Its mass is at least p, and without its least likely member it is not."""
    probs, kept = _probs(logits), _kept(keep_top_p(logits, p))
    assert int(np.argmax(logits)) in kept
    mass = math.fsum(probs[i] for i in kept)
    assert mass >= p - 1e-9
    assert mass - min(probs[i] for i in kept) < p + 1e-9


@repeatable
@given(LOGITS, TOP_P, TOP_P)
def test_a_larger_p_keeps_no_less(logits: np.ndarray, one: float, other: float) -> None:
    assert _kept(keep_top_p(logits, min(one, other))) <= _kept(keep_top_p(logits, max(one, other)))


def test_the_token_that_crosses_p_is_kept() -> None:
    """By hand: 0.5, 0.3, 0.2. A mask of `cumulative > p` would keep nothing, one and two."""
    logits = np.log(np.array([0.3, 0.5, 0.2]))
    assert [_kept(keep_top_p(logits, p)) for p in (0.4, 0.6, 0.9)] == [{1}, {0, 1}, {0, 1, 2}]


def test_a_sum_of_exactly_p_is_enough() -> None:
    """Four tokens of 0.25 each, which are exact."""
    assert [_kept(keep_top_p(np.zeros(4), p)) for p in (0.25, 0.5, 0.75)] == [{0}, {0, 1}, {0, 1, 2}]


@repeatable
@given(LOGITS, st.floats(0, 1))
def test_min_p_keeps_what_is_near_the_likeliest(logits: np.ndarray, min_p: float) -> None:
    """p >= min_p times the largest p; the likeliest always; twice is once."""
    probs, kept = _probs(logits), keep_min_p(logits, min_p)
    sure = {i for i, prob in enumerate(probs) if prob >= min_p * max(probs) * (1 + 1e-9)}
    perhaps = {i for i, prob in enumerate(probs) if prob >= min_p * max(probs) * (1 - 1e-9)}
    assert sure <= _kept(kept) <= perhaps
    assert int(np.argmax(logits)) in _kept(kept)
    np.testing.assert_array_equal(keep_min_p(kept, min_p), kept)


@repeatable
@given(LOGITS)
def test_neutral_values_change_nothing(logits: np.ndarray) -> None:
    for same in (keep_top_k(logits, 0), keep_top_k(logits, len(logits)), keep_top_p(logits, 1.0)):
        np.testing.assert_array_equal(same, logits)
    np.testing.assert_array_equal(keep_min_p(logits, 0.0), logits)
    np.testing.assert_array_equal(penalize_repetition(logits, np.ones(len(logits), bool), 1.0), logits)


@repeatable
@given(DISTINCT, st.integers(1, 15), TOP_P, st.floats(0.001, 1), st.randoms(use_true_random=False))
def test_names_of_tokens_do_not_matter(logits: np.ndarray, k: int, p: float, min_p: float, random: Any) -> None:
    """Permuted logits give permuted results, where no two are equal."""
    order = list(range(len(logits)))
    random.shuffle(order)
    for keep in (lambda x: keep_top_k(x, k), lambda x: keep_top_p(x, p), lambda x: keep_min_p(x, min_p)):
        np.testing.assert_array_equal(keep(logits[order]), keep(logits)[order])


@repeatable
@given(st.lists(DISTINCT.filter(lambda x: len(x) >= 4), min_size=1, max_size=4), st.integers(0, 6), TOP_P)
def test_leading_dimensions_are_rows(rows: list[np.ndarray], k: int, p: float) -> None:
    """A batch is its rows."""
    batch = np.stack([row[:4] for row in rows])
    for keep in (lambda x: keep_top_k(x, k), lambda x: keep_top_p(x, p), lambda x: keep_min_p(x, p), log_softmax):
        np.testing.assert_array_equal(keep(batch), np.stack([keep(row) for row in batch]))


@repeatable
@given(LOGITS, st.floats(0.05, 20))
def test_temperature(logits: np.ndarray, temperature: float) -> None:
    """Probabilities to the power of 1 / temperature, normalised."""
    expected = _probs(np.asarray(logits, np.float64) / temperature)
    np.testing.assert_allclose(np.exp(log_softmax(apply_temperature(logits, temperature))), expected, rtol=1e-9)


def test_a_temperature_near_zero_is_greedy() -> None:
    """And overflows nowhere."""
    logits = log_softmax(apply_temperature(np.array([1e4, 3e4, -2e4]), 1e-308))
    np.testing.assert_array_equal(np.exp(logits), [0, 1, 0])


def test_top_k_comes_before_top_p() -> None:
    """0.4 of all is 0.57 of the two that top-k leaves, and so enough for 0.5."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    probs = token_probs(logits, np.zeros(4, bool), Sampling(temperature=1.0, top_k=2, top_p=0.5))
    np.testing.assert_allclose(probs, [1, 0, 0, 0])


# --- transformers -----------------------------------------------------------------------------------------------------


@repeatable
@given(
    logits=st.lists(DISTINCT.filter(lambda x: len(x) >= 6), min_size=1, max_size=3),
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    penalty=st.sampled_from([0.5, 1.0, 1.3, 5.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    k=st.integers(1, 6),
    p=st.floats(0.05, 0.97),
    min_p=st.floats(0.001, 0.9),
)
def test_the_whole_chain_is_that_of_transformers(
    logits: list[np.ndarray], ids: list[int], penalty: float, temperature: float, k: int, p: float, min_p: float
) -> None:
    """The same processors in the order in which its generate() applies them, in float64."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    batch = np.stack([row[:6] for row in logits])
    seen = np.zeros(batch.shape, bool)
    seen[:, ids] = True
    chain = [
        process.RepetitionPenaltyLogitsProcessor(penalty),
        process.TemperatureLogitsWarper(temperature),
        process.TopKLogitsWarper(k),
        process.TopPLogitsWarper(p),
        process.MinPLogitsWarper(min_p),
    ]
    input_ids, scores = torch.tensor([ids] * len(batch)), torch.from_numpy(batch.copy())
    for processor in chain:
        scores = processor(input_ids, scores)
        if processor is chain[0]:  # a penalty can make two logits equal, and of equals each may keep another
            assume(all(len(set(row.tolist())) == len(row) for row in scores.round(decimals=9)))
    how = Sampling(temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty)
    np.testing.assert_allclose(token_probs(batch, seen, how), scores.softmax(-1).numpy(), rtol=1e-9, atol=1e-12)


# --- the sampler ------------------------------------------------------------------------------------------------------

LOGITS_OF_FIVE = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))


def _draw(sampling: Sampling, logits: np.ndarray, steps: int, rows: int = 1) -> np.ndarray:
    """Tokens [steps, rows] from the same logits again and again."""
    sampler = Sampler(sampling, [[0]] * rows, logits.shape[-1])
    active = np.ones(rows, bool)
    return np.stack([sampler.choose(np.tile(logits, (rows, 1)), active) for _ in range(steps)])


def test_frequencies_are_the_probabilities() -> None:
    """Of 20,000 draws, within four standard deviations; what is not kept never comes."""
    how = Sampling(temperature=0.7, top_k=4, top_p=0.95, seed=1)
    expected = token_probs(LOGITS_OF_FIVE, np.zeros(5, bool), how)
    drawn = np.bincount(_draw(how, LOGITS_OF_FIVE, 2500, rows=8).reshape(-1), minlength=5) / 20_000
    assert (np.abs(drawn - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000)).all()
    assert drawn[4] == 0


@repeatable
@given(LOGITS, st.integers(0, 5), TOP_P, st.floats(0, 1), SHIFTS)
def test_only_what_is_kept_is_drawn(logits: np.ndarray, k: int, p: float, min_p: float, seed: int) -> None:
    how = Sampling(temperature=1.0, top_k=k, top_p=p, min_p=min_p, seed=seed)
    shifted = apply_temperature(logits, 1.0)  # comes first, and rounds: two logits may be equal after it
    kept = _kept(keep_min_p(keep_top_p(keep_top_k(shifted, k), p), min_p))
    assert set(_draw(how, logits, 5, rows=2).reshape(-1).tolist()) <= kept


def test_a_seed_repeats_and_rows_differ() -> None:
    """The same seed gives the same tokens, another seed others; each row has a stream of its own."""
    first, again, other = (
        _draw(Sampling(temperature=1.0, seed=seed), LOGITS_OF_FIVE, 30, rows=2) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:, 0] != first[:, 1]).any()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Neither on how many there are nor on whether they have ended."""
    how = Sampling(temperature=1.0, seed=3, repetition_penalty=1.2)
    alone = _draw(how, LOGITS_OF_FIVE, 20)[:, 0]
    sampler = Sampler(how, [[0], [1], [2]], 5)
    for step, expected in enumerate(alone):
        active = np.array([True, step % 2 == 0, False])
        tokens = sampler.choose(np.tile(LOGITS_OF_FIVE, (3, 1)), active)
        assert tokens[0] == expected
        assert tokens[2] == 0


def test_prompt_and_output_are_penalised() -> None:
    """Greedy, with a penalty that rules out whatever was seen: every token once, the prompt's never first."""
    logits = np.array([5.0, 4.0, 3.0, -1.0, -2.0])
    sampler = Sampler(Sampling(repetition_penalty=100.0), [[0, 0]], 5)
    tokens = [int(sampler.choose(logits[None], np.array([True]))[0]) for _ in range(4)]
    assert tokens == [1, 2, 0, 0]  # 4, 3, and then 5 / 100 is the largest, again and again


@pytest.mark.parametrize("value", [[math.nan, 0.0], [0.0, math.inf], [-math.inf, -math.inf]])
def test_logits_that_are_no_numbers_are_refused(value: list[float]) -> None:
    """In active rows only: others hold anything."""
    sampler = Sampler(Sampling(), [[0], [0]], 2)
    logits = np.array([[1.0, 2.0], value])
    assert sampler.choose(logits, np.array([True, False])).tolist() == [1, 0]
    with pytest.raises(FeedError, match=r"logits for row 1 hold NaN or infinity: .* --precision fp32"):
        sampler.choose(logits, np.array([True, True]))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True], r"a number of at least 0 \(0 is greedy\), got"),
        ("top_k", [-1, 2.5, True], r"a whole number of at least 0 \(0 keeps all\), got"),
        ("top_p", [0, -0.5, 1.5, math.nan], r"a number above 0 and at most 1 \(1 keeps all\), got"),
        ("min_p", [-0.1, 1.1, math.nan], r"a number from 0 to 1 \(0 keeps all\), got"),
        ("repetition_penalty", [0, -1, math.inf], r"a number above 0 \(1 is none\), got"),
        ("seed", [-1, 0.5], "a whole number of at least 0, got"),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: list, message: str) -> None:
    """With the field, its range and the value."""
    for value in values:
        with pytest.raises(FeedError, match=f"^{name} must be {message} {value!r}$"):
            Sampling(**{"temperature": 1.0} | {name: value})


@pytest.mark.parametrize("limits", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "min_p": 0.1}])
def test_limits_without_a_temperature_are_refused(limits: dict[str, Any]) -> None:
    """They would change nothing, and whoever sets them expects otherwise."""
    words = ", ".join(f"{name} {value}" for name, value in limits.items())
    with pytest.raises(FeedError, match=rf"^{words} changes nothing at temperature 0 \(greedy\): set a temperature"):
        Sampling(**limits)
