"""Generation: rows of different lengths, why and where they end, log-probabilities, and never past the cache's end."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes import generation
from runtimes.artifact import Artifact
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import Runner, open_runner
from runtimes.sampling import Sampling
from runtimes.stopping import RowText
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


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_sampled_row_does_not_depend_on_its_batch(runner: Runner) -> None:
    """Each row has its own stream: alone it draws what it draws among others that end earlier."""
    prompts = [[1, 30, 40, 50], [1], [1, 60, 70, 80, 90, 20, 21, 22]]
    how = Sampling(temperature=1.5, top_k=50, top_p=0.99, repetition_penalty=1.1, seed=5)
    together = generate(runner, prompts, 24, sampling=how, stop_ids=[STOP]).token_ids
    assert together[0] == generate(runner, prompts[:1], 24, sampling=how, stop_ids=[STOP]).token_ids[0]
    assert together == generate(runner, prompts, 24, sampling=how, stop_ids=[STOP]).token_ids
    other = Sampling(temperature=1.5, top_k=50, top_p=0.99, repetition_penalty=1.1, seed=6)
    assert together != generate(runner, prompts, 24, sampling=other, stop_ids=[STOP]).token_ids


def test_repetition_penalty_equals_transformers(runner: Runner, tiny_llama: Path) -> None:
    """Greedy with a penalty on prompt and output."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompts = [[1, 30, 40, 50], [1, 86, 82, 85, 87, 3, 24, 21]]
    result = generate(runner, prompts, 16, sampling=Sampling(repetition_penalty=1.3))
    assert result.token_ids != generate(runner, prompts, 16).token_ids
    for prompt, ids in zip(prompts, result.token_ids, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.3,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == ids


# --- why a row ends ---------------------------------------------------------------------------------------------------


def test_each_row_says_why_it_ended(runner: Runner, tiny_artifact: Artifact) -> None:
    """A stop id, a stop string across tokens (each is a character here), the length. Texts are cut, ids are not."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompts = [tokenizer.encode(text) for text in ("27+58=", "reverse abcdefgh=", "reverse planet=")]
    result = generate(runner, prompts, 5, stop_ids=[STOP], stop_strings=["fe", "zz"], decode=tokenizer.decode)
    assert result.finish_reasons == ["stop_id", "stop_string", "length"]
    assert result.texts == ["85", "hg", "tenal"]
    assert [tokenizer.decode(ids) for ids in result.token_ids] == ["85", "hgfe", "tenal"]


def test_the_first_stop_string_counts(runner: Runner, tiny_artifact: Artifact) -> None:
    """Whatever their order; it comes before a length that is reached with it; and the prompt's text does not count."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompt = tokenizer.encode("reverse planet=")
    for stops in (["na", "ena"], ["ena", "na"]):
        result = generate(runner, [prompt], 4, stop_strings=[*stops, "planet", "="], decode=tokenizer.decode)
        assert (result.texts, result.finish_reasons) == (["t"], ["stop_string"])
        assert len(result.token_ids[0]) == 4


def test_text_is_reported_as_it_becomes_certain(runner: Runner, tiny_artifact: Artifact) -> None:
    """What may be the start of a stop string is kept back until it is known not to be."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompts = [tokenizer.encode(text) for text in ("reverse abcdefgh=", "reverse planet=")]
    pieces: list[tuple[int, str]] = []
    result = generate(
        runner,
        prompts,
        20,
        stop_ids=[STOP],
        stop_strings=["fex", "gfz", "na."],
        decode=tokenizer.decode,
        on_text=lambda row, text: pieces.append((row, text)),
    )
    assert [text for row, text in pieces if row == 0] == ["h", "g", "fed", "c", "b", "a"]
    assert [text for row, text in pieces if row == 1] == ["t", "e", "nal", "p"]
    assert result.texts == ["hgfedcba", "tenalp"]


def test_what_was_kept_back_is_reported_at_the_end(runner: Runner, tiny_artifact: Artifact) -> None:
    """A row that ends by its length has nothing more to wait for."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompt = tokenizer.encode("reverse planet=")
    pieces: list[str] = []
    generate(
        runner,
        [prompt],
        5,
        stop_strings=["nal!"],
        decode=tokenizer.decode,
        on_text=lambda row, text: pieces.append(text),
    )
    assert pieces == ["t", "e", "nal"]


_ALPHABET = [*b"ab\n", *"é€😀".encode(), 0xFF]
_STOPS = st.lists(st.text("ab\né€", min_size=1, max_size=4), max_size=3)


@settings(deadline=None, derandomize=True, max_examples=300, database=None)
@given(st.text("ab€", max_size=3), st.lists(st.sampled_from(_ALPHABET), max_size=20), _STOPS)
def test_shown_text_is_never_taken_back(prompt: str, ids: list[int], stops: list[str]) -> None:
    """Tokens are single bytes, half characters and broken ones among them: what is shown is always a part of the end
    result, which is all of the text before the stop string that is complete first.
    """

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    row = RowText(decode, list(prompt.encode()), stops)
    shown, fed, seen = "", [], []
    for token in ids:
        fed.append(token)
        shown += row.add(token)
        seen.append(shown)
        full = decode(fed)
        starts = [full.find(stop) for stop in stops if stop in full]
        assert row.stopped == bool(starts)
        if row.stopped:
            assert row.text == full[: min(starts)]
            break
    shown += row.rest()
    assert shown == row.text
    assert all(row.text.startswith(text) for text in seen)
    if not row.stopped:
        assert row.text == decode(fed)


def test_a_character_of_several_tokens_is_shown_once() -> None:
    """The euro sign's three bytes, one by one; at a row's end, what is there is shown."""
    row = RowText(lambda ids: bytes(ids).decode(errors="replace"), [65])
    assert [row.add(byte) for byte in "€".encode()] == ["", "", "€"]
    assert (row.add(0xE2), row.rest(), row.rest()) == ("", "\ufffd", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ["a"]}, r"stop_strings are found in text: give decode as well, such as Tokenizer"),
        ({"stop_strings": ["a", ""], "decode": str}, "a stop string must hold at least one character, got ''"),
        ({"stop_strings": "end", "decode": str}, r"must be a list of strings, got 'end': write \['end'\]"),
        ({"on_text": print}, "on_text needs text: give decode as well, such as Tokenizer"),
    ],
)
def test_stop_strings_and_text_need_what_they_need(options: dict, message: str) -> None:
    with pytest.raises(FeedError, match=message):
        generate(FakeRunner(3), [[1]], 1, **options)


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_per_call", [1, 7, 128])
def test_log_probabilities_are_those_of_transformers(
    runner: Runner, tiny_llama: Path, logits_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts and outputs, sampled ones too: log-softmax of its logits, however the prompts are cut into calls."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(generation, "LOGITS_PER_CALL", logits_per_call)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompts = [[1, 30, 40, 50], [1], [1, 60, 70, 80, 90, 20, 21, 22, 33, 44, 55]]
    how = Sampling(temperature=2.0, top_k=20, repetition_penalty=1.5)
    result = generate(runner, prompts, 12, sampling=how, stop_ids=[STOP], logprobs=True)
    for row, prompt in enumerate(prompts):
        ids = prompt + result.token_ids[row]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = [scores[i, token].item() for i, token in enumerate(ids[1:])]
        ours = result.prompt_logprobs[row] + result.token_logprobs[row]
        assert ours[0] is None
        np.testing.assert_allclose(ours[1:], expected, atol=1e-3)
        assert len(result.token_logprobs[row]) == len(result.token_ids[row])
    plain = generate(runner, prompts, 12, sampling=how, stop_ids=[STOP])
    assert plain.token_ids == result.token_ids
    assert (plain.token_logprobs, plain.prompt_logprobs) == ([], [])


def test_scored_prompts_are_fed_in_chunks() -> None:
    """No call asks for more logits than LOGITS_PER_CALL, and the cache is what a whole prefill leaves."""
    prompts = [[0] * 300, [1] * 70]
    fake, whole = (FakeRunner(3, max_len=300) for _ in range(2))
    generate(fake, prompts, 1, logprobs=True)
    generate(whole, prompts, 1)
    assert all(batch * size <= generation.LOGITS_PER_CALL for batch, size in fake.steps)
    assert sum(size for _, size in fake.steps) == 300
    for row, prompt in enumerate(prompts):
        assert (fake.cache[row, : len(prompt)] == whole.cache[row, : len(prompt)]).all()


def test_a_scored_prompt_outside_the_vocabulary_is_refused(runner: Runner) -> None:
    """As any other, although its token is looked up in logits."""
    for token in (-1, 100):
        with pytest.raises(FeedError, match=r"outside the vocabulary \(0 to 99\)"):
            generate(runner, [[1] * 128, [1, token]], 1, logprobs=True)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_the_cache_can_be_filled_to_the_last_slot(runner: Runner) -> None:
    """A prompt of n tokens leaves room for max_len - n + 1 new ones: the last is never written."""
    max_len = runner.cache_spec.max_len
    assert len(generate(runner, [[1] * 120]).token_ids[0]) == max_len - 120 + 1
    assert len(generate(runner, [[1] * max_len]).token_ids[0]) == 1
    full = generate(runner, [[1] * 120, [1] * max_len], logprobs=True)
    assert [len(ids) for ids in full.token_ids] == [1, 1]
    assert full.finish_reasons == ["length", "length"]
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


# --- stop ids and the tokenizer ---------------------------------------------------------------------------------------


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
