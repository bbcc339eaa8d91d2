"""One suite for every runner (runner_table.py): what they compute, and what they do with memory.

Numbers are compared with the eager runner, and greedy ids with transformers' own model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner_cases import (
    PROMPTS,
    STEPS,
    assert_only_the_next_slot_is_written,
    assert_rows_are_reordered,
    assert_the_cache_can_be_written,
    forced_logits,
    repeat_rows,
    valid_feeds,
    whole_cache,
)
from runner_table import PARAMS, Subject, opened_subject

from exporter.torch_runners import open_eager
from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.generation import generate
from runtimes.runner import Runner

ATOL = 1e-3  # logits are around 10; other kernels round otherwise


@pytest.fixture(scope="module", params=PARAMS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each runner in turn."""
    with opened_subject(request, tmp_path_factory) as opened:
        yield opened


@pytest.fixture(scope="module")
def runner(subject: Subject) -> Iterator[Runner]:
    """It is opened once: every test begins with a reset, whatever was before."""
    with subject.open() as opened:
        yield opened


@pytest.fixture(scope="module")
def checkpoint(subject: Subject, request: pytest.FixtureRequest) -> Path:
    """What the artifact was made of."""
    is_cut = len(subject.artifact.manifest.cache.tensors) == 2
    path: Path = request.getfixturevalue("one_layer_llama" if is_cut else "tiny_llama")
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    """Eager PyTorch on the same weights."""
    name = "torch_artifact" if checkpoint.name == "checkpoint" else "tiny_artifact"
    with open_eager(request.getfixturevalue(name), "cpu") as opened:
        yield opened


def test_greedy_ids_are_those_of_transformers(runner: Runner, checkpoint: Path) -> None:
    """Of a ragged batch, against each prompt alone."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = generate(runner, PROMPTS, 20).token_ids
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert made[0, len(prompt) :].tolist() == ids


def test_batches_of_all_sizes_one_after_another(runner: Runner, reference: Runner) -> None:
    """Ragged prefills and decode steps; buffers grow and shrink, and nothing of the batch before is left."""
    rng = np.random.default_rng(0)
    for rows in (1, 3, 2, 8, 1, 3):
        prompts = [PROMPTS[row % 3][: 2 + row] for row in range(rows)]
        forced = rng.integers(3, 98, (rows, 5))
        expected = forced_logits(reference, prompts, forced)
        np.testing.assert_allclose(forced_logits(runner, prompts, forced), expected, atol=ATOL)


def test_each_row_of_a_batch_equals_the_row_alone(runner: Runner) -> None:
    """Padding and neighbours change nothing."""
    forced = np.random.default_rng(1).integers(3, 98, (len(PROMPTS), 8))
    together = forced_logits(runner, PROMPTS, forced)
    for row, prompt in enumerate(PROMPTS):
        alone = forced_logits(runner, [prompt], forced[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=ATOL)


def test_a_cache_filled_to_its_last_slot(runner: Runner, reference: Runner) -> None:
    """A prompt as long as the cache; and steps up to its end, after which a row is full."""
    longest = runner.cache_spec.max_len
    prompt = [1 + at % 90 for at in range(longest)]
    found = [forced_logits(each, [prompt, prompt[:5]], np.zeros((2, 0), np.int64)) for each in (runner, reference)]
    np.testing.assert_allclose(found[0], found[1], atol=ATOL)
    forced = np.array([[30, 31, 32]])
    found = [forced_logits(each, [prompt[:-3]], forced) for each in (runner, reference)]
    np.testing.assert_allclose(found[0], found[1], atol=ATOL)
    decoding = Decoding(runner)
    decoding.prefill([prompt])
    with pytest.raises(FeedError, match=rf"rows \[0\] are full: this artifact holds {longest} tokens"):
        decoding.decode(np.array([3]))


def test_a_prompt_in_chunks(runner: Runner, reference: Runner) -> None:
    """Each row's logits come from the chunk that it ends in, and decoding goes on from there."""
    expected, found = Decoding(reference), Decoding(runner)
    whole = expected.prefill(PROMPTS)
    np.testing.assert_allclose(found.prefill(PROMPTS, chunk_tokens=3), whole, atol=ATOL)
    tokens = np.array([9, 10, 11])
    np.testing.assert_allclose(found.decode(tokens), expected.decode(tokens), atol=ATOL)


@pytest.mark.parametrize("case", STEPS)
def test_steps(subject: Subject, runner: Runner, reference: Runner, case: str) -> None:
    """Whatever the signature allows, or what the runner says that it does not do."""
    *before, last = STEPS[case]
    for each in (runner, reference):
        each.reset(len(last["input_ids"]))
    for feeds in before:
        np.testing.assert_allclose(runner.step(feeds), reference.step(feeds), atol=ATOL)
    if case in subject.entry.refuses:
        with pytest.raises(FeedError, match=subject.entry.refuses[case]):
            runner.step(last)
    else:
        np.testing.assert_allclose(runner.step(last), reference.step(last), atol=ATOL)


def test_idle_rows_stay_as_they_are(runner: Runner, reference: Runner) -> None:
    """While others go on, and to the end of the cache; then they continue as if nothing had been."""
    decoding, alone = Decoding(runner), Decoding(reference)
    decoding.prefill(PROMPTS)
    alone.prefill(PROMPTS)
    for step in range(4):
        tokens = np.array([20 + step, 30, 40 + step])
        active = np.array([True, False, step < 2])
        found = decoding.decode(tokens, active)
        np.testing.assert_allclose(found[active], alone.decode(tokens, active)[active], atol=ATOL)
    assert decoding.lengths.tolist() == [11, 2, 12]
    tokens = np.array([50, 60, 70])
    expected = forced_logits(reference, [PROMPTS[1]], tokens[1:2, None])[0, -1]
    np.testing.assert_allclose(decoding.decode(tokens)[1], expected, atol=ATOL)


def test_rows_are_reordered(runner: Runner) -> None:
    """They repeat, change places, are dropped, or stay."""
    assert_rows_are_reordered(runner, atol=ATOL)


def test_the_cache_is_read_written_and_filled(runner: Runner) -> None:
    """Exactly, and only where it should; zeros after a reset."""
    assert_the_cache_can_be_written(runner)
    assert_only_the_next_slot_is_written(runner)
    runner.reset(3)
    assert not any(tensor.any() for tensor in whole_cache(runner))
    runner.fill_cache(0.5)
    for spec, tensor in zip(runner.cache_spec.tensors, whole_cache(runner), strict=True):
        assert tensor.dtype == np.float32
        assert tensor.shape == spec.array_shape(3)
        assert (tensor == 0.5).all()


@pytest.mark.parametrize("to_reference", [True, False])
def test_a_cache_moves_from_one_runner_to_another(runner: Runner, reference: Runner, to_reference: bool) -> None:
    """And is continued there with the same logits."""
    source, target = (runner, reference) if to_reference else (reference, runner)
    began, continued = Decoding(source), Decoding(target)
    began.prefill(PROMPTS)
    target.reset(len(PROMPTS))
    for index, tensor in enumerate(whole_cache(source)):
        target.write_cache(index, tensor)
    continued.lengths = began.lengths
    for tokens in np.array([[9, 10, 11], [12, 13, 14]]):
        np.testing.assert_allclose(continued.decode(tokens), began.decode(tokens), atol=ATOL)


def test_results_are_the_callers_own(runner: Runner) -> None:
    """Logits and caches that were handed out do not change afterwards, and may be changed."""
    decoding = Decoding(runner)
    handed_out = [decoding.prefill([[1, 5, 9]])]
    handed_out += [decoding.decode(np.array([token])) for token in (3, 4)]
    handed_out += whole_cache(runner)
    kept = [array.copy() for array in handed_out]
    last = decoding.decode(np.array([5]))
    runner.fill_cache(2.0)
    runner.reset(1)
    for array, was in zip(handed_out, kept, strict=True):
        np.testing.assert_array_equal(array, was)
        array[...] = 7.0
    repeated = Decoding(runner)
    repeated.prefill([[1, 5, 9]])
    for token in (3, 4):
        repeated.decode(np.array([token]))
    np.testing.assert_array_equal(repeated.decode(np.array([5])), last)


def test_inputs_stay_the_callers_own(runner: Runner) -> None:
    """They are left alone, may be changed as soon as the call returns, and need not be contiguous."""
    calls = [repeat_rows(feeds, 2) for feeds in STEPS["over what was written"]]
    runner.reset(2)
    expected = [runner.step(feeds) for feeds in calls]
    runner.reset(2)
    for feeds, logits in zip(calls, expected, strict=True):
        views = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in feeds.items()}
        np.testing.assert_array_equal(runner.step(views), logits)
        for name, view in views.items():
            np.testing.assert_array_equal(view, feeds[name])
            view[...] = -1
    saved = whole_cache(runner)
    for index, tensor in enumerate(saved):
        given = tensor.copy()
        runner.write_cache(index, given)
        given[...] = -1
    rows = np.array([1, 1])
    runner.reorder_rows(rows)
    rows[...] = 0
    for tensor, was in zip(whole_cache(runner), saved, strict=True):
        np.testing.assert_array_equal(tensor, was[[1, 1]])


def test_the_cache_stays_where_it_is(subject: Subject, runner: Runner) -> None:
    """Nothing makes a new one but a reset."""
    find: Any = subject.entry.addresses
    if find is None:
        pytest.skip("it makes a new cache with every step")
    decoding = Decoding(runner)
    decoding.prefill(PROMPTS)
    before = find(runner)
    assert len(set(before)) == len(runner.cache_spec.tensors)
    decoding.decode(np.array([3, 4, 5]))
    decoding.reorder(np.array([2, 0, 0]))
    runner.write_cache(0, runner.read_cache(0))
    runner.fill_cache(1.0)
    for _ in range(3):
        decoding.decode(np.array([3, 4, 5]))
    assert find(runner) == before


def test_it_says_what_it_is(runner: Runner) -> None:
    """For reports; and its signature names what a step takes."""
    assert runner.description
    assert runner.computes_in == runner.cache_spec.dtype == "float32"
    assert valid_feeds().keys() | set(runner.cache_spec.past_names()) == {s.name for s in runner.signature.inputs}
