"""What every client is held to: the ids of our own runner."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pytest

from runtimes.artifact import Artifact
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer

Drive = Callable[..., dict[str, Any]]  # a client: takes an artifact and a request, returns an answer; see conftest.py

REQUIRE = "EXPORT_LLM_REQUIRE_CLIENTS"  # `make test-clients` sets it
NEW_TOKENS = 48
# Greedy choices are clear here: the best logit leads by 0.16 in every precision of tiny_llama, by 0.01 in fp32 and int4
# of stories15m-llama, so that another processor's rounding does not decide.
PROMPTS = {
    "tiny_llama": ("45+54=", "reverse planet=", "sort 987654=", "9+9="),
    "stories15m-llama": ("Tom and his mom went to the park to", "Sara and Mia are friends.", "The dog", "The sun was"),
}
TEXTS = {
    "tiny_llama": ("45+54=", "reverse planet="),
    "stories15m-llama": ("Once upon a time", "Lily saw a  big dög."),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
MESSAGES = [{"role": "user", "content": "27+58"}]
CHAT = "27+58="

Batches = list[list[list[int]]]
Batched = Callable[[list[list[int]]], Batches]


def absent(client: str) -> NoReturn:
    """Skip the test, or fail it where clients are required."""
    reason = f"{client} is not installed: make test-clients installs it"
    if os.environ.get(REQUIRE):
        pytest.fail(reason)
    pytest.skip(reason)


def alone(rows: list[list[int]]) -> Batches:
    """Each row as a batch of its own."""
    return [[row] for row in rows]


def together(rows: list[list[int]]) -> Batches:
    """All rows as one batch."""
    return [rows]


def both(rows: list[list[int]]) -> Batches:
    """Each row as a batch of its own, and all rows as one."""
    return alone(rows) + together(rows)


# (precision, in float32, which batches). ONNX Runtime rounds to 8 bits what weights of 4 bits multiply, unless told to
# stay in float32. Such rounding shows in which order something was summed, and a batch that is padded on the other side
# is summed in another.
TRAINED_CASES = [("fp32", False, both), ("int4", False, alone), ("int4", True, together)]


def prompt_ids(artifact: Artifact, model: str) -> list[list[int]]:
    """The model's prompts in token ids, of different lengths."""
    tokenizer = Tokenizer(artifact.folder)
    rows = [tokenizer.encode(text) for text in PROMPTS[model]]
    assert len({len(row) for row in rows}) > 1
    return rows


def our_ids(artifact: Artifact, batches: Batches, *, in_float32: bool = False, stop_ids: Sequence[int] = ()) -> Batches:
    """What our own runner adds to each batch, greedily."""
    with open_runner(artifact, in_float32=in_float32, threads=1) as runner:
        return [generate(runner, rows, NEW_TOKENS, stop_ids=stop_ids).token_ids for rows in batches]


def ask(drive: Drive, artifact: Artifact, batches: Batches, **request: Any) -> dict[str, Any]:
    """The client's answer; rows are padded with a stop id, as these models have no other token for it."""
    pad_id = read_stop_ids(artifact.folder)[0]
    return drive(artifact, batches=batches, max_new_tokens=NEW_TOKENS, pad_id=pad_id, **request)


def before_stop(batches: Batches, stop_ids: Sequence[int]) -> Batches:
    """The tokens in front of each row's first stop id; clients differ in whether they return it, and pad with it."""

    def cut(ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
        assert set(ids[end:]) <= set(stop_ids)
        return ids[:end]

    return [[cut(row) for row in rows] for rows in batches]


def unused_id(artifact: Artifact, batches: Batches) -> int:
    """The last id of the vocabulary, which none of the rows holds: a stop id that never stops them."""
    vocab_size: int = json.loads((artifact.folder / "config.json").read_text())["vocab_size"]
    assert all(vocab_size - 1 not in row for rows in batches for row in rows)
    return vocab_size - 1


def assert_same_texts(
    drive: Drive, artifact: Artifact, model: str, texts: Sequence[str], **request: Any
) -> dict[str, Any]:
    """Stop ids end the client's texts where ours end, and it reads texts and chats as we do; return its answer."""
    stop_ids = read_stop_ids(artifact.folder)
    prompts = prompt_ids(artifact, model)
    expected = our_ids(artifact, both(prompts), stop_ids=stop_ids)
    answer = ask(drive, artifact, both(prompts), texts=texts, rows=prompts, messages=MESSAGES, **request)
    assert before_stop(answer["new"], stop_ids) == before_stop(expected, stop_ids)
    tokenizer = Tokenizer(artifact.folder)
    assert answer["encoded"] == [tokenizer.encode(text) for text in texts]
    assert [text.lstrip() for text in answer["decoded"]] == list(PROMPTS[model])
    assert answer["chat"] == CHAT
    return answer


def assert_same_ids(
    drive: Drive,
    artifact: Artifact,
    model: str,
    batched: Batched = both,
    *,
    in_float32: bool = False,
    **request: Any,
) -> None:
    """NEW_TOKENS greedy ids of every prompt, beyond the model's stop ids."""
    batches = batched(prompt_ids(artifact, model))
    expected = our_ids(artifact, batches, in_float32=in_float32)
    assert {len(row) for rows in expected for row in rows} == {NEW_TOKENS}
    answer = ask(drive, artifact, batches, stop_id=unused_id(artifact, expected), in_float32=in_float32, **request)
    assert answer["new"] == expected
