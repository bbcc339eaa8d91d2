"""`export-llm generate` with saved prefixes, chunked prompts and drafts: the same texts, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtimes.artifact import file_entry, open_artifact

Run = Callable[..., Any]


@pytest.fixture
def generate(x_run: Run, x_graphs: Callable[[str], Path]) -> Run:
    """Runs the command on the shipped model; the prompt is "reverse planet=" unless another is given."""

    def run(*args: object, prompt: str = "reverse planet=", precision: str = "fp32") -> Any:
        return x_run("generate", x_graphs(precision), "--prompt", prompt, *args)

    return run


def _json(ran: Any) -> dict[str, Any]:
    assert (ran.code, ran.err) == (0, "")
    result: dict[str, Any] = json.loads(ran.out)
    return result


def test_a_prefix_is_saved_and_continued(generate: Run, tmp_path: Path) -> None:
    """--save-prefix changes no text; --prefix gives that of the whole prompt and says how much was there already."""
    file = tmp_path / "reverse.safetensors"
    saved = _json(generate("--save-prefix", file, "--json", "--max-new-tokens", "3", prompt="reverse pl"))
    assert saved["token_ids"] == _json(generate("--json", "--max-new-tokens", "3", prompt="reverse pl"))["token_ids"]
    plain, continued = _json(generate("--json")), _json(generate("--prefix", file, "--json"))
    assert continued["prefix_tokens"] == len(saved["prompt_ids"])
    assert continued["token_ids"] == plain["token_ids"]
    assert "prefix_tokens" not in plain
    assert generate("--prefix", file).out == "tenalp\n"
    assert generate("--prefix", file, "--num-beams", "4").out == "tenalp\n"
    # a longer one, from the shorter one
    assert generate("--prefix", file, "--save-prefix", file, prompt="reverse planet").code == 0
    assert _json(generate("--prefix", file, "--json"))["prefix_tokens"] == len(plain["prompt_ids"]) - 1


def test_prefixes_that_do_not_belong_are_refused(generate: Run, tmp_path: Path) -> None:
    """Other text, another precision, a damaged file, none; and options that cannot go with one."""
    file = tmp_path / "reverse.safetensors"
    assert generate("--save-prefix", file, "--max-new-tokens", "1", prompt="reverse ").code == 0
    generate("--prefix", file, prompt="sort 31=").refused("prompt 0 does not begin with the prefix: its token 1 is")
    generate("--prefix", file, precision="fp16").refused("saved with another precision (fp32, here fp16)")
    generate("--prefix", file, "--logprobs", "--json").refused("those of a saved prefix are not computed again")
    generate("--prefix", tmp_path / "none").refused("the prefix", "cannot be read: No such file or directory")
    generate("--save-prefix", tmp_path / "no" / "f").refused("prefix cannot be written to", "No such file or directory")
    generate("--save-prefix", file, "--num-beams", "2").refused("--save-prefix cannot go with --num-beams 2")
    file.write_bytes(file.read_bytes()[:-1])
    generate("--prefix", file).refused("is damaged, save the prefix again: SHA-256 differs")


def test_a_chunked_prompt(generate: Run) -> None:
    """The same text, beams included."""
    assert generate("--prefill-chunk", "4").out == "tenalp\n"
    assert generate("--prefill-chunk", "4", "--num-beams", "3").out == "tenalp\n"
    generate("--prefill-chunk", "0").refused("a chunk must hold at least 1 token, got 0")


def test_a_draft(generate: Run, x_graphs: Callable[[str], Path]) -> None:
    """The same text in fewer calls, with what was accepted on stderr, or in the JSON."""
    draft = x_graphs("int4")
    ran = generate("--draft", draft)
    assert (ran.code, ran.out) == (0, "tenalp\n")
    result = _json(generate("--draft", draft, "--draft-tokens", "3", "--json"))
    assert result["token_ids"] == _json(generate("--json"))["token_ids"]
    facts = result["draft"]
    assert facts["acceptance_rate"] == facts["accepted"] / facts["proposed"]
    assert 0 < facts["accepted"] <= facts["proposed"]
    assert facts["target_calls"] < len(result["token_ids"]) - 1
    four = _json(generate("--draft", draft, "--json"))["draft"]
    assert ran.err == (
        f"draft: {four['accepted']} of {four['proposed']} proposed tokens accepted"
        f" ({100 * four['acceptance_rate']:.1f} %); 7 tokens in {four['target_calls']} calls after the prompt's\n"
    )
    assert generate("--draft", draft, "--max-new-tokens", "1").err.startswith("draft: 0 of 0 proposed tokens accepted;")
    sampled = ["--temperature", "2", "--seed", "5", "--max-new-tokens", "12"]
    assert generate("--draft", draft, *sampled).out == generate(*sampled).out


def test_drafts_that_do_not_fit_are_refused(generate: Run, x_graphs: Callable[[str], Path], tmp_path: Path) -> None:
    draft = x_graphs("fp16")
    generate("--draft", draft, "--num-beams", "2").refused("--draft cannot go with --num-beams 2: leave out the one")
    generate("--draft-tokens", "3").refused("--draft-tokens 3 is how many tokens a draft proposes: give --draft too")
    generate("--draft", draft, "--draft-tokens", "0").refused("must propose a whole number of tokens of at least 1")
    generate("--draft", tmp_path / "none").refused("none does not exist: pass the folder that `export-llm export`")
    other = tmp_path / "other"
    other.mkdir()
    for file in draft.iterdir():
        shutil.copy(file, other)
    for name in ("tokenizer.json", "manifest.json"):
        (other / name).unlink()
    (other / "tokenizer.json").write_text((draft / "tokenizer.json").read_text().replace('"+":', '"plus":'))
    manifest = open_artifact(draft).manifest
    files = {**manifest.files, "tokenizer.json": file_entry(other / "tokenizer.json")}
    (other / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    generate("--draft", other).refused("has another vocabulary than", "'plus' there and '+' here", "target's tokenizer")
