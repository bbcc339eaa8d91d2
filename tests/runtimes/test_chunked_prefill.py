"""Chunked prefill: a long prompt fed piece by piece leaves what it leaves as a whole, and calls stay small."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.artifact import Artifact, open_artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.generation import generate
from runtimes.images import ImageProcessor
from runtimes.runner import Feeds, Runner, open_runner
from runtimes.speculative import Draft
from runtimes.tokenizer import Tokenizer

PROMPTS = [[1, *range(20, 57)], [1, 30], [1, *range(40, 62)]]


@pytest.fixture(scope="module")
def runner(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


class Watched(FakeRunner):
    """Notes how many logits of a row each call was asked for."""

    def step(self, feeds: Feeds) -> np.ndarray:
        assert feeds["logit_indices"].shape[1] == 1
        return super().step(feeds)


@settings(deadline=None, derandomize=True, max_examples=150, database=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=16), min_size=1, max_size=4),
    chunk=st.integers(1, 18),
    head=st.integers(0, 15),
)
def test_any_chunks_are_the_whole(prompts: list[list[int]], chunk: int, head: int) -> None:
    """Logits, lengths and cache of every row, with or without a prefix, in as few calls as the chunk allows."""
    whole, fake = FakeRunner(5, seed=3), Watched(5, seed=3)
    expected = Decoding(whole).prefill(prompts)
    decoding = Decoding(fake)
    prefix = None
    if head:
        prompts = [[*prompts[0][:head], *prompt[min(head, len(prompts[0])) :]] for prompt in prompts]
        expected = Decoding(whole).prefill(prompts)
        shared = prompts[0][: min(map(len, prompts))][:head]
        decoding.prefill([shared])
        prefix = decoding.take_prefix(shared)
        fake.steps.clear()
    np.testing.assert_array_equal(decoding.prefill(prompts, prefix=prefix, chunk_tokens=chunk), expected)
    assert decoding.lengths.tolist() == [len(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        assert fake.cache[row, : len(prompt)].tolist() == prompt
    sizes = [size for _, size in fake.steps]
    left = sum(sizes)
    assert max(sizes) <= chunk
    assert len(sizes) == -(-left // chunk)
    assert min(sizes) > 1 or left == 1 or chunk < 3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_chunks_of_a_real_graph_are_the_whole(tiny_artifacts: Callable[[str], Artifact], precision: str) -> None:
    """Bit for bit in chunks of three and more. One token at a time, other kernels round otherwise."""
    with open_runner(tiny_artifacts(precision), device="cpu") as runner:
        decoding = Decoding(runner)
        expected = decoding.prefill(PROMPTS)
        tensors = range(len(runner.cache_spec.tensors))
        cache = [runner.read_cache(index) for index in tensors]
        for chunk in (3, 5, 16, 37, 38, 100):
            runner.reset(3)
            np.testing.assert_array_equal(decoding.prefill(PROMPTS, chunk_tokens=chunk), expected)
            for index in tensors:
                ours = runner.read_cache(index)
                for row, prompt in enumerate(PROMPTS):
                    np.testing.assert_array_equal(ours[row, :, : len(prompt)], cache[index][row, :, : len(prompt)])
        if precision == "fp32":
            np.testing.assert_allclose(decoding.prefill(PROMPTS, chunk_tokens=1), expected, atol=1e-4)


def test_a_chunked_text_is_that_of_transformers(runner: Runner, tiny_llama: Path, tiny_artifact: Artifact) -> None:
    """Greedy ids, in a ragged batch; sampled, scored and searched texts are those of whole prompts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompts = [Tokenizer(tiny_artifact.folder).encode(text) for text in ("reverse abcdefgh=", "sort 31=", "9+9=")]
    result = generate(runner, prompts, 16, stop_ids=[2], prefill_chunk_tokens=4)
    for prompt, ids in zip(prompts, result.token_ids, strict=True):
        with torch.no_grad():
            theirs = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert ids == theirs[0, len(prompt) :].tolist()
    whole = generate(runner, prompts, 16, logprobs=True)
    chunked = generate(runner, prompts, 16, logprobs=True, prefill_chunk_tokens=4)
    assert chunked.token_ids == whole.token_ids
    for ours, theirs in zip(chunked.prompt_logprobs, whole.prompt_logprobs, strict=True):
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-5)
    beams = beam_search(runner, prompts[:2], 3, 8, stop_ids=[2], prefill_chunk_tokens=4)
    assert beams.hypotheses == beam_search(runner, prompts[:2], 3, 8, stop_ids=[2]).hypotheses


def test_scored_prompts_and_drafts_are_chunked_too() -> None:
    """No call of either model is longer than the chunk."""
    target, draft = FakeRunner(5, max_len=300), FakeRunner(5, max_len=300)
    generate(target, [[1] * 200], 2, logprobs=True, prefill_chunk_tokens=8, draft=Draft(runner=draft, tokens=4))
    for fake in (target, draft):
        assert max(size for _, size in fake.steps) == 8


def test_pictures_are_seen_in_every_chunk(tiny_vision_artifact: Artifact, tiny_vision: Path) -> None:
    """Tokens keep what they see, wherever the prompt is cut; the pictures are encoded once."""
    Image = pytest.importorskip("PIL.Image")
    encode = Tokenizer(tiny_vision_artifact.folder).encode
    texts = ("<|image|>how many squares?", "how many circles?", "a<|image|>b<|image|>which shape is red?")
    prompts = [encode(text) for text in texts]
    picture = Image.open(tiny_vision / "picture.png")
    images = ImageProcessor.of(tiny_vision_artifact).batch(prompts, [[picture], [], [picture, picture]])
    with open_runner(tiny_vision_artifact, device="cpu") as runner:
        decoding = Decoding(runner)
        expected = decoding.prefill(prompts, images)
        following = decoding.decode(np.array([7, 8, 9]))
        for chunk in (3, 4, 7):
            # Attention to images has a row of scores for each token of the call: they may be summed in another order.
            np.testing.assert_allclose(decoding.prefill(prompts, images, chunk_tokens=chunk), expected, atol=1e-4)
            np.testing.assert_allclose(decoding.decode(np.array([7, 8, 9])), following, atol=1e-4)


def test_an_empty_chunk_is_refused() -> None:
    for chunk in (0, -3):
        with pytest.raises(FeedError, match=f"a chunk must hold at least 1 token, got {chunk}"):
            generate(FakeRunner(3), [[1]], 1, prefill_chunk_tokens=chunk)


def test_positions_that_follow_the_length_are_fed_whole(tmp_path: Path, tiny_llama: Path) -> None:
    """Beyond the length of training, dynamic RoPE turns keys by how long the text is at their call: chunks and prefixes
    would leave another cache than the whole prompt, and are refused; up to there they are the same.
    """
    import json
    import shutil

    from exporter.pipeline import ExportRequest, export

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_llama, checkpoint)
    config = json.loads((tiny_llama / "config.json").read_text())
    changes: dict[str, Any] = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    export(ExportRequest(checkpoint=checkpoint, out=tmp_path / "out", max_len=64, verify=False))
    artifact = open_artifact(tmp_path / "out")
    assert artifact.manifest.cache.steady_len == 24
    with open_runner(artifact, device="cpu") as runner:
        decoding = Decoding(runner)
        short, long = [[1, *range(20, 43)]], [[1, *range(20, 44)]]
        expected = decoding.prefill(short)
        np.testing.assert_array_equal(decoding.prefill(short, chunk_tokens=5), expected)
        prefix = decoding.take_prefix(short[0])
        decoding.prefill(long, chunk_tokens=25)
        refused: list[Callable[[], object]] = [
            lambda: decoding.prefill(long, chunk_tokens=24),
            lambda: decoding.prefill(long, prefix=prefix),
            lambda: list(decoding.prefill_in_chunks(long, 5)),
        ]
        for use in refused:
            with pytest.raises(
                FeedError, match="a prompt has 25 tokens, and beyond 24 this model's positions depend on"
            ):
                use()
