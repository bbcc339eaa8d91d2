"""`export-llm generate` with options: sampling, beams, stop strings, log-probabilities, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

SAMPLED = ["--temperature", "3", "--top-k", "40", "--top-p", "0.99", "--min-p", "0.001", "--repetition-penalty", "1.1"]


@pytest.fixture
def generate(x_run: Run, x_graphs: Callable[[str], Path]) -> Run:
    """Runs the command on the shipped model; the prompt is "reverse planet=" unless another is given."""
    return lambda *args: x_run("generate", x_graphs("fp32"), "--prompt", "reverse planet=", *args)


def _json(ran: Any) -> dict[str, Any]:
    assert (ran.code, ran.err) == (0, "")
    result: dict[str, Any] = json.loads(ran.out)
    return result


def test_a_seed_repeats_a_sampled_text(generate: Run) -> None:
    """The same seed, the same tokens, streamed or as JSON; the default is 0; another seed gives others."""
    command = [*SAMPLED, "--max-new-tokens", "30", "--json", "--seed"]
    zero, one = _json(generate(*command, "0")), _json(generate(*command, "1"))
    assert zero["token_ids"] != one["token_ids"]
    assert _json(generate(*command[:-1]))["token_ids"] == zero["token_ids"]
    assert generate(*SAMPLED, "--max-new-tokens", "30", "--seed", "1").out == one["text"] + "\n"


def test_each_limit_alone_leaves_the_likeliest_token(generate: Run) -> None:
    """At their tightest, the answer is the greedy one at any temperature."""
    for limit in (["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]):
        assert generate("--temperature", "50", *limit).out == "tenalp\n", limit
    assert generate("--temperature", "50", "--max-new-tokens", "6").out != "tenalp\n"


def test_a_repetition_penalty_changes_a_greedy_text(generate: Run) -> None:
    """Every letter of the answer was in the prompt."""
    assert generate("--repetition-penalty", "50", "--max-new-tokens", "6").out != "tenalp\n"


def test_generation_ends_before_a_stop_text(generate: Run) -> None:
    """Which is not printed, not even its beginning; JSON says why it ended, and its ids hold the stop text's."""
    command = ["--stop", "zzz", "--stop", "nal"]
    assert generate(*command).out == "te\n"
    result = _json(generate(*command, "--json"))
    assert (result["text"], result["finish_reason"], len(result["token_ids"])) == ("te", "stop_string", 5)
    assert _json(generate("--json"))["finish_reason"] == "stop_id"
    assert _json(generate("--json", "--max-new-tokens", "2"))["finish_reason"] == "length"


def test_log_probabilities(generate: Run) -> None:
    """One for each token, and null for the first of the prompt."""
    result = _json(generate("--json", "--logprobs"))
    assert len(result["prompt_logprobs"]) == len(result["prompt_ids"])
    assert result["prompt_logprobs"][0] is None
    assert all(score < 0 for score in result["prompt_logprobs"][1:])
    assert len(result["token_logprobs"]) == len(result["token_ids"])
    assert all(-0.1 < score <= 0 for score in result["token_logprobs"])  # it is sure of its answers
    assert not {"token_logprobs", "prompt_logprobs", "beams"} & _json(generate("--json")).keys()


def test_beam_search(generate: Run) -> None:
    """The best first, scores falling; text alone is the best one's. --length-penalty divides the sums."""
    result = _json(generate("--num-beams", "4", "--json", "--logprobs"))
    assert (result["text"], result["finish_reason"]) == ("tenalp", "stop_id")
    assert result["beams"][0]["token_ids"] == result["token_ids"]
    scores = [beam["score"] for beam in result["beams"]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    mean = sum(result["token_logprobs"]) / len(result["token_ids"])
    assert scores[0] == pytest.approx(mean)
    assert len(result["prompt_logprobs"]) == len(result["prompt_ids"])
    squared = _json(generate("--num-beams", "4", "--json", "--length-penalty", "2"))
    assert squared["beams"][0]["score"] == pytest.approx(mean / len(result["token_ids"]))
    assert generate("--num-beams", "4").out == "tenalp\n"
    assert generate("--num-beams", "4", "--stop", "al").out == "ten\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be a number of at least 0 (0 is greedy), got -1.0"),
        (["--temperature", "nan"], "temperature must be a number of at least 0 (0 is greedy), got nan"),
        (["--temperature", "1", "--top-k", "-3"], "top_k must be a whole number of at least 0 (0 keeps all), got -3"),
        (
            ["--temperature", "1", "--top-p", "1.5"],
            "top_p must be a number above 0 and at most 1 (1 keeps all), got 1.5",
        ),
        (["--temperature", "1", "--top-p", "0"], "top_p must be a number above 0 and at most 1 (1 keeps all), got 0.0"),
        (["--temperature", "1", "--min-p", "2"], "min_p must be a number from 0 to 1 (0 keeps all), got 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a number above 0 (1 is none), got 0.0"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        (["--top-k", "5"], "top_k 5 changes nothing at temperature 0 (greedy): set a temperature above 0"),
        (["--num-beams", "0"], "num_beams must be a whole number of at least 1, got 0"),
        (["--num-beams", "9"], "are 9 rows, but this artifact takes at most 8: use fewer beams"),
        (["--num-beams", "2", "--length-penalty", "99"], "length_penalty must be a number from -10 to 10, got 99.0"),
        (
            ["--num-beams", "2", "--temperature", "0.5", "--top-k", "4"],
            "--temperature 0.5, --top-k 4 cannot go with --num-beams 2: beam search draws nothing by chance",
        ),
        (["--num-beams", "2", "--seed", "0"], "--seed 0 cannot go with --num-beams 2"),
        (["--length-penalty", "2"], "--length-penalty 2.0 is for beam search: set --num-beams above 1 as well"),
        (["--stop", ""], "a stop string must hold at least one character, got ''"),
        (["--logprobs"], "--logprobs is for --json: give both"),
        (["--num-beams", "two"], "Invalid value for '--num-beams': 'two' is not a valid integer"),
    ],
)
def test_wrong_options_are_refused(generate: Run, options: list[str], message: str) -> None:
    """Exit 2 and one message, before anything is generated."""
    generate(*options).refused(message)
