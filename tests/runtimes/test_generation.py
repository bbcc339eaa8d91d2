"""Generation: rows of different lengths, stop ids, and never past the end of the cache."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import Runner, open_runner
from runtimes.tokenizer import Tokenizer

STOP = 2


@pytest.fixture(scope="module")
def runner(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


def test_rows_stop_one_by_one(runner: Runner, tiny_artifact: Artifact) -> None:
    """Each row ends with its stop id; a finished row does not disturb the others."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompts = [tokenizer.encode(text) for text in ("27+58=", "reverse abcdefgh=", "sort 31=", "9+9=")]
    result = generate(runner, prompts, 20, stop_ids=[STOP])
    assert [tokenizer.decode(ids) for ids in result.token_ids] == ["85", "hgfedcba", "13", "18"]
    assert all(ids[-1] == STOP and STOP not in ids[:-1] for ids in result.token_ids)
    assert result.decode_steps == max(len(ids) for ids in result.token_ids) - 1


def test_a_batch_equals_its_rows(runner: Runner) -> None:
    """Greedy ids of a ragged batch are those of each prompt alone."""
    prompts = [[1, 30, 40, 50], [1], [1, 60, 70, 80, 90, 20, 21, 22]]
    together = generate(runner, prompts, 24).token_ids
    assert together == [generate(runner, [prompt], 24).token_ids[0] for prompt in prompts]


def test_tokens_are_reported_as_they_come(runner: Runner) -> None:
    """on_token sees every token of every row, in order."""
    seen: list[tuple[int, int]] = []
    result = generate(runner, [[1, 30], [1, 31, 32]], 5, on_token=lambda row, token: seen.append((row, token)))
    for row, ids in enumerate(result.token_ids):
        assert [token for r, token in seen if r == row] == ids


def test_the_cache_can_be_filled_to_the_last_slot(runner: Runner) -> None:
    """A prompt of n tokens leaves room for max_len - n + 1 new ones: the last is never written."""
    max_len = runner.cache_spec.max_len
    assert len(generate(runner, [[1] * 120]).token_ids[0]) == max_len - 120 + 1
    assert len(generate(runner, [[1] * max_len]).token_ids[0]) == 1
    with pytest.raises(FeedError, match=f"120 tokens and 10 new .* holds {max_len}: ask for at most 9"):
        generate(runner, [[1] * 120], 10)
    with pytest.raises(FeedError, match=f"{max_len + 1} tokens, this artifact holds {max_len}"):
        generate(runner, [[1] * (max_len + 1)], 1)


def test_a_full_row_refuses_another_token(runner: Runner) -> None:
    """Unless it is idle."""
    decoding = Decoding(runner)
    decoding.prefill([[1] * runner.cache_spec.max_len, [1, 2]])
    with pytest.raises(FeedError, match=r"rows \[0\] are full"):
        decoding.decode(np.array([3, 4]))
    decoding.decode(np.array([3, 4]), active=np.array([False, True]))
    assert decoding.lengths.tolist() == [runner.cache_spec.max_len, 3]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "at least one token"), ([[1], []], "at least one token"), ([[1]] * 9, "takes 1 to 8 rows")],
)
def test_impossible_prompts_are_refused(runner: Runner, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        generate(runner, prompts, 1)


def test_no_new_tokens_is_a_mistake(runner: Runner) -> None:
    with pytest.raises(FeedError, match="max_new_tokens must be at least 1, got 0"):
        generate(runner, [[1]], 0)


@pytest.mark.parametrize("ids", [[-1], [100], [10**12]])
def test_token_ids_outside_the_vocabulary_are_refused(runner: Runner, ids: list[int]) -> None:
    """They would be read beyond the embedding table."""
    with pytest.raises(FeedError, match=r"outside the vocabulary \(0 to 99\)"):
        generate(runner, [[1, *ids]], 1)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 9}, [2]),
        ({"eos_token_id": [2, 1]}, {}, [2, 1]),
        ({}, {"eos_token_id": 7}, [7]),
        (None, {"eos_token_id": [7, 8]}, [7, 8]),
        ({"eos_token_id": None}, {}, []),
        (None, None, []),
    ],
)
def test_stop_ids(tmp_path: Path, generation: dict | None, config: dict | None, expected: list[int]) -> None:
    """generation_config.json first, then config.json."""
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert read_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("text", ['{"eos_token_id": "</s>"}', "not json", "[1]", '{"eos_token_id": [true]}'])
def test_damaged_stop_ids_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"generation_config\.json"):
        read_stop_ids(tmp_path)


def test_the_tokenizer_round_trips_and_names_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_llama)
    ids = tokenizer.encode("sort 52914=")
    assert ids == [1, 86, 82, 85, 87, 3, 24, 21, 28, 20, 23, 32]
    assert tokenizer.decode(ids) == "sort 52914="
    with pytest.raises(ArtifactError, match=r"holds no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        Tokenizer(tmp_path)
