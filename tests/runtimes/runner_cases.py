"""What every runner is held to: prompts, feeds, and the feeds it must refuse."""

from typing import Any

import numpy as np
import pytest

from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.runner import Runner

PROMPTS = [[1, 21, 26, 14, 24, 27, 32], [1, 5], [1, 85, 72, 89, 72, 85, 86, 72, 3, 83]]


def valid_feeds(**changes: Any) -> dict[str, np.ndarray]:
    """One row of three tokens at the start of the cache, with changes."""
    valid = {
        "input_ids": np.array([[1, 5, 9]]),
        "position_ids": np.array([[0, 1, 2]]),
        "write_indices": np.array([0]),
        "attention_mask": np.ones((1, 3), np.int64),
        "logit_indices": np.array([[2]]),
    }
    return valid | changes


def repeat_rows(arrays: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The same for a batch of equal rows."""
    return {name: np.repeat(array, rows, axis=0) for name, array in arrays.items()}


# (feeds, what the message must say), for a cache of 128 tokens that was reset for one row
WRONG_FEEDS: list[tuple[dict[str, Any], str]] = [
    (valid_feeds(input_ids=np.array([[1, 5, 9]], np.int32)), "input_ids must be int64, got int32"),
    (
        valid_feeds(input_ids=np.array([1, 5, 9])),
        r"input_ids must have shape \[batch_size, sequence_length\], got \[3\]",
    ),
    (valid_feeds(position_ids=np.array([[0, 1]])), "position_ids: sequence_length is 2, but another input has 3"),
    (valid_feeds(input_ids=[[1, 5, 9]]), "input_ids must be a numpy array, got list"),
    (valid_feeds(input_ids=np.array([[1, 5, 100]])), r"input_ids holds 100, outside the vocabulary \(0 to 99\)"),
    (valid_feeds(logit_indices=np.array([[3]])), r"logit_indices holds 3, outside this call's tokens \(0 to 2\)"),
    (valid_feeds(input_ids=np.zeros((1, 0), np.int64)), "sequence_length is 0, but this artifact takes 1 to 128"),
    (valid_feeds(tokens=np.array([1])), "unknown input 'tokens'"),
    ({k: v for k, v in valid_feeds().items() if k != "write_indices"}, "missing inputs: write_indices"),
    (valid_feeds(write_indices=np.array([126])), "written to slots 126 to 128, but the cache holds 128"),
    (valid_feeds(write_indices=np.array([-1])), "written to slots -1 to 1"),
    (valid_feeds(attention_mask=np.array([[0, 1, 1]])), r"rows \[0\] hold a token that sees no cache slot"),
    (valid_feeds(attention_mask=np.zeros((1, 3), np.int64)), r"rows \[0\] hold a token that sees no cache slot"),
    (valid_feeds(attention_mask=np.ones((1, 129), np.int64)), "total_sequence_length is 129, .* takes 1 to 128"),
    (repeat_rows(valid_feeds(), 2), "batch_size is 2, but reset made a cache for 1"),
]


def one_token(slot: int, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """One row's token in that slot, which sees all before it, with changes."""
    token = {
        "input_ids": np.array([[8]]),
        "position_ids": np.array([[slot]]),
        "write_indices": np.array([slot]),
        "attention_mask": np.ones((1, slot + 1), np.int64),
        "logit_indices": np.array([[0]]),
    }
    return token | changes


RAGGED = {
    "input_ids": np.array([[1, 5, 9], [1, 7, 0]]),
    "position_ids": np.array([[0, 1, 2], [0, 1, 2]]),
    "write_indices": np.array([0, 0]),
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
    "logit_indices": np.array([[2, 0], [1, 0]]),
}
BEHIND_RAGGED = {
    "input_ids": np.array([[20, 30], [40, 50]]),
    "position_ids": np.array([[3, 4], [2, 3]]),
    "write_indices": np.array([3, 2]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
    "logit_indices": np.array([[1, 0, 1], [0, 1, 1]]),
}

# Calls one after another, from reset on; what they return follows from the signature alone
STEPS: dict[str, list[dict[str, np.ndarray]]] = {
    "some logits in any order": [
        valid_feeds(logit_indices=np.array([[2, 0, 1, 1]])),
        valid_feeds(logit_indices=np.array([[1]])),
        one_token(3, logit_indices=np.array([[0, 0]])),
        one_token(3),
    ],
    "several tokens behind others": [RAGGED, BEHIND_RAGGED],
    "over what was written": [valid_feeds(), one_token(3), one_token(1), one_token(2)],
    "one token first": [one_token(0), one_token(1)],
    "hidden slots": [valid_feeds(), one_token(3, attention_mask=np.array([[1, 0, 1, 1]]))],
    "positions ahead": [valid_feeds(), one_token(3, position_ids=np.array([[7]]))],
    "a gap in the cache": [valid_feeds(), one_token(6, attention_mask=np.array([[1, 1, 1, 0, 0, 0, 1]]))],
}


def forced_logits(runner: Runner, prompts: list[list[int]], forced: np.ndarray) -> np.ndarray:
    """Logits [B, 1 + steps, V] after the prompts and after each forced token."""
    decoding = Decoding(runner)
    logits = [decoding.prefill(prompts)]
    logits += [decoding.decode(tokens) for tokens in forced.T]
    return np.stack(logits, axis=1)


def assert_only_the_next_slot_is_written(runner: Runner) -> None:
    """Slots are written from 0 on, row by row; the others keep what they held."""
    decoding = Decoding(runner)
    decoding.prefill([[1, 5, 9], [1, 7, 8]])
    runner.fill_cache(7.0)
    decoding.decode(np.array([3, 4]))
    assert {spec.name for spec in runner.cache_spec.tensors} == {"key", "value"}
    for index, spec in enumerate(runner.cache_spec.tensors):
        tensor = runner.read_cache(index)
        assert tensor.shape == spec.array_shape(2)
        assert (tensor[:, :, 3] != 7.0).all()
        assert (np.delete(tensor, 3, axis=2) == 7.0).all()


def assert_the_cache_can_be_written(runner: Runner) -> None:
    """What was read and is written back continues where it was read, bit for bit."""
    prompts = PROMPTS[:2]
    decoding = Decoding(runner)
    decoding.prefill(prompts)
    saved = whole_cache(runner)
    expected = decoding.decode(np.array([30, 31]))
    runner.reset(2)
    for index, tensor in enumerate(saved):
        runner.write_cache(index, np.swapaxes(np.swapaxes(tensor, -1, -2).copy(), -1, -2))  # not contiguous
    for tensor, was in zip(whole_cache(runner), saved, strict=True):
        np.testing.assert_array_equal(tensor, was)
    decoding.lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    np.testing.assert_array_equal(decoding.decode(np.array([30, 31])), expected)


# Rows that repeat, change places, are dropped, or stay; for a batch of three
REORDERINGS = [[0, 1, 2], [2, 0, 1], [1, 0, 2], [0, 0, 0], [2, 2, 1]]


def assert_rows_are_reordered(runner: Runner, *, atol: float = 1e-4) -> None:
    """The cache's rows move whole, and decoding goes on from them as if each had been there from the start."""
    forced = np.array([[30, 31, 32], [40, 41, 42], [50, 51, 52]])
    tokens = np.array([60, 70, 80])
    decoding = Decoding(runner)
    for order in REORDERINGS:
        rows = np.array(order)
        decoding.prefill([PROMPTS[row] for row in order])
        for step in forced[rows].T:
            decoding.decode(step)
        expected = decoding.decode(tokens)

        decoding.prefill(PROMPTS)
        for step in forced.T:
            decoding.decode(step)
        before = whole_cache(runner)
        decoding.reorder(rows)
        for tensor, was in zip(whole_cache(runner), before, strict=True):
            np.testing.assert_array_equal(tensor, was[rows])
        assert decoding.lengths.tolist() == [len(PROMPTS[row]) + 3 for row in order]
        np.testing.assert_allclose(decoding.decode(tokens), expected, atol=atol)


def whole_cache(runner: Runner) -> list[np.ndarray]:
    """Copies of all of its tensors."""
    return [runner.read_cache(index).copy() for index in range(len(runner.cache_spec.past_names()))]


# (rows, what the message must say), for a cache that was reset for two rows
WRONG_ROWS: list[tuple[np.ndarray, str]] = [
    (np.array([0, 2]), r"rows holds 2, outside the cache's rows \(0 to 1\)"),
    (np.array([-1, 0]), r"rows holds -1, outside the cache's rows \(0 to 1\)"),
    (np.array([0]), r"rows must be int64 \[2\], got int64 \[1\]"),
    (np.array([[0, 1]]), r"rows must be int64 \[2\], got int64 \[1, 2\]"),
    (np.array([0, 1], np.int32), r"rows must be int64 \[2\], got int32 \[2\]"),
]


def assert_wrong_rows_are_refused(runner: Runner) -> None:
    """Before anything is moved; `runner` was not reset yet."""
    with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called before rows are reordered"):
        runner.reorder_rows(np.array([0]))
    runner.reset(2)
    runner.fill_cache(3.0)
    for rows, message in WRONG_ROWS:
        with pytest.raises(FeedError, match=message):
            runner.reorder_rows(rows)
    assert all((tensor == 3.0).all() for tensor in whole_cache(runner))
