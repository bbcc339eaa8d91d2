"""Speculative decoding: whatever a draft proposes, the text is the target's own."""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulate

from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, open_artifact
from runtimes.decoding import Decoding
from runtimes.errors import FeedError
from runtimes.generation import Generation, generate
from runtimes.images import ImageProcessor
from runtimes.runner import Feeds, Runner, open_runner
from runtimes.sampling import Sampling
from runtimes.speculative import Draft, check_draft
from runtimes.tokenizer import Tokenizer

STOP = 2


class Imitator(FakeRunner):
    """Proposes what another fake would say next, except after a share of texts."""

    def __init__(self, other: FakeRunner, agreement: float, *, max_len: int | None = None) -> None:
        super().__init__(
            other.vocab_size, seed=other.seed, max_len=other.cache_spec.max_len if max_len is None else max_len
        )
        self.agreement = agreement

    def logits_after(self, ids: Sequence[int]) -> np.ndarray:
        logits = super().logits_after(ids)
        chance = zlib.crc32(repr(("agrees", tuple(map(int, ids)))).encode()) / 2**32
        return logits if chance < self.agreement else -logits


def _decode(ids: list[int]) -> str:
    return "".join("abcdef"[token] for token in ids)


def _seen(result: Generation) -> tuple[Any, ...]:
    """All that a user sees of a result, but for its speed."""
    return result.token_ids, result.finish_reasons, result.texts, result.token_logprobs, result.prompt_logprobs


@settings(deadline=None, derandomize=True, max_examples=400, database=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=3),
    proposed=st.integers(1, 7),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10_000),
    new_tokens=st.integers(1, 12),
    stop_ids=st.lists(st.integers(0, 4), max_size=1),
    stop_strings=st.lists(st.text("abcd", min_size=1, max_size=3), max_size=2),
    draft_room=st.integers(6, 12),
    sampling=st.sampled_from(
        [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(temperature=2.0, top_k=3, repetition_penalty=1.5)]
    ),
)
def test_any_draft_leaves_the_text_as_it_is(
    prompts: list[list[int]],
    proposed: int,
    agreement: float,
    seed: int,
    new_tokens: int,
    stop_ids: list[int],
    stop_strings: list[str],
    draft_room: int,
    sampling: Sampling,
) -> None:
    """Greedy or sampled, in a batch, with stop ids, stop strings and every length, beyond the draft's cache too."""
    target = FakeRunner(5, seed=seed, max_len=12)
    new_tokens = min(new_tokens, 12 - max(map(len, prompts)) + 1)
    draft = Imitator(target, agreement, max_len=draft_room)
    options: dict[str, Any] = {
        "sampling": sampling,
        "stop_ids": stop_ids,
        "stop_strings": stop_strings,
        "decode": _decode,
        "logprobs": True,
    }
    expected = generate(target, prompts, new_tokens, **options)
    target.steps.clear()
    shown: dict[int, str] = dict.fromkeys(range(len(prompts)), "")
    result = generate(
        target,
        prompts,
        new_tokens,
        draft=Draft(runner=draft, tokens=proposed),
        on_text=lambda row, text: shown.update({row: shown[row] + text}),
        **options,
    )
    assert _seen(result) == _seen(expected)
    assert list(shown.values()) == result.texts
    report = result.draft
    assert report is not None
    assert 0 <= report.accepted <= report.proposed
    assert report.target_calls == result.decode_steps <= expected.decode_steps
    emitted = sum(len(ids) - 1 for ids in result.token_ids)
    assert emitted - report.target_calls * len(prompts) <= report.accepted <= emitted
    if agreement == 1.0 and sampling.temperature == 0 and len(prompts) == 1 and draft_room == 12:
        assert report.target_calls == -(-emitted // (proposed + 1))


def test_a_perfect_draft_saves_calls_and_a_wrong_one_none() -> None:
    """Eleven tokens after the first: 4 + 4 + 3 where all are accepted; no more is proposed than may still come."""
    target = FakeRunner(5, seed=1)
    for agreement, calls, proposed, rate in ((1.0, 3, 3 + 3 + 2, 1.0), (0.0, 11, 8 * 3 + 2 + 1 + 0, 0.0)):
        report = generate(target, [[1, 2]], 12, draft=Draft(runner=Imitator(target, agreement), tokens=3)).draft
        assert report is not None
        assert (report.target_calls, report.proposed, report.acceptance_rate) == (calls, proposed, rate)


def test_nothing_proposed_has_no_rate() -> None:
    target = FakeRunner(5)
    report = generate(target, [[1]], 1, draft=Draft(runner=Imitator(target, 1.0))).draft
    assert report is not None
    assert (report.proposed, report.acceptance_rate, report.target_calls) == (0, None, 0)


class LengthDependent(FakeRunner):
    """As a rope that follows the text's length: beyond steady_len, slots remember how long their call's text was."""

    steady_len = 8

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, seed=8)
        self.cache_spec = dataclasses.replace(self.cache_spec, steady_len=self.steady_len)

    def step(self, feeds: Feeds) -> np.ndarray:
        longest = int(feeds["position_ids"].max()) + 1
        turned = feeds["input_ids"] + 1000 * max(0, longest - self.steady_len)
        return super().step({**feeds, "input_ids": turned})


def test_beyond_its_steady_length_a_target_takes_one_token_at_a_time() -> None:
    """A rejected token would have turned the others' keys."""
    target = LengthDependent(5)
    expected = generate(target, [[1, 2, 3]], 12)
    target.steps.clear()
    result = generate(target, [[1, 2, 3]], 12, draft=Draft(runner=FakeRunner(5, seed=8), tokens=3))
    assert result.token_ids == expected.token_ids
    assert [size for _, size in target.steps] == [3, 4, *[1] * 7]  # the prompt, slots up to 7, and one by one


# --- real models ------------------------------------------------------------------------------------------------------

TEXTS = ["27+58=", "reverse abcdefgh=", "sort 31=", "sort 52914=", "reverse planet="]


@pytest.fixture(scope="module")
def target(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def draft(tiny_artifacts: Callable[[str], Artifact]) -> Iterator[Runner]:
    """The same model, quantized to 4 bits."""
    with open_runner(tiny_artifacts("int4"), device="cpu") as opened:
        yield opened


def _greedy_of_transformers(checkpoint: Path, prompt: list[int], new_tokens: int) -> list[int]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    result: list[int] = ids[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("proposed", [1, 4, 9])
def test_a_text_with_a_draft_is_that_of_transformers(
    target: Runner, draft: Runner, tiny_artifact: Artifact, tiny_llama: Path, proposed: int
) -> None:
    """Each row alone, and all as one batch."""
    tokenizer = Tokenizer(tiny_artifact.folder)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    expected = [_greedy_of_transformers(tiny_llama, prompt, 24) for prompt in prompts]
    how = Draft(runner=draft, tokens=proposed)
    assert generate(target, prompts, 24, stop_ids=[STOP], draft=how).token_ids == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        result = generate(target, [prompt], 24, stop_ids=[STOP], draft=how)
        assert result.token_ids == [ids]
        assert result.draft is not None
        assert result.draft.accepted > 0


def test_a_cache_is_filled_to_the_last_slot_with_a_draft(target: Runner, draft: Runner) -> None:
    """With no limit, and up to the end of both caches."""
    expected = generate(target, [[1, 30, 40]])
    result = generate(target, [[1, 30, 40]], draft=Draft(runner=draft, tokens=5))
    assert len(result.token_ids[0]) == target.cache_spec.max_len - 3 + 1
    assert result.token_ids == expected.token_ids


def test_a_trained_story_is_the_same_with_a_draft(
    shared_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A checkpoint that is not ours, with its 4-bit self as the draft: transformers' greedy ids, and most accepted."""
    checkpoint = shared_model("stories260k-llama")
    folder = tmp_path_factory.mktemp("stories")
    for precision in ("fp32", "int4"):
        export(ExportRequest(checkpoint=checkpoint, out=folder / precision, precision=precision, verify=False))
    artifacts = [open_artifact(folder / precision) for precision in ("fp32", "int4")]
    check_draft(*artifacts)
    prompt = Tokenizer(checkpoint).encode("Once upon a time")
    with open_runner(artifacts[0], device="cpu") as story, open_runner(artifacts[1], device="cpu") as hasty:
        result = generate(story, [prompt], 100, draft=Draft(runner=hasty))
    assert result.token_ids == [_greedy_of_transformers(checkpoint, prompt, 100)]
    assert result.draft is not None
    assert result.draft.acceptance_rate is not None
    assert result.draft.acceptance_rate > 0.3
    assert result.draft.target_calls < 70


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "portable"])
def test_other_layouts_with_a_draft(
    tiny_llama: Path, tiny_artifact: Artifact, draft: Runner, tmp_path: Path, layout: str
) -> None:
    """Their caches go back too, row by row; with a chunked prompt behind a saved prefix as well."""
    export(ExportRequest(checkpoint=tiny_llama, out=tmp_path / "out", layout=layout, verify=False))
    tokenizer = Tokenizer(tiny_llama)
    head, *prompts = (tokenizer.encode(text) for text in ("reverse ", "reverse planet=", "reverse abcdefgh="))
    with open_runner(tiny_artifact, device="cpu") as portable:
        expected = generate(portable, prompts, 24, stop_ids=[STOP]).token_ids
    with open_runner(open_artifact(tmp_path / "out"), device="cpu") as runner:
        decoding = Decoding(runner)
        decoding.prefill([head])
        prefix = decoding.take_prefix(head)
        for options in ({}, {"prefix": prefix}, {"prefix": prefix, "prefill_chunk_tokens": 3}):
            result = generate(runner, prompts, 24, stop_ids=[STOP], draft=Draft(runner=draft), **options)
            assert result.token_ids == expected, options


def test_a_simulated_engine_with_a_draft(simulate: Simulate, tiny_artifact: Artifact, draft: Runner) -> None:
    """The prefill profile checks proposals, the decode profile takes single tokens: the text of ONNX Runtime."""
    prompt = Tokenizer(tiny_artifact.folder).encode("reverse planet=")
    with open_runner(tiny_artifact, device="cpu") as reference:
        expected = generate(reference, [prompt], 24, stop_ids=[STOP]).token_ids
    with open_runner(simulate(tiny_artifact).artifact, "tensorrt") as engine:
        result = generate(engine, [prompt], 24, stop_ids=[STOP], draft=Draft(runner=draft))
    assert result.token_ids == expected


def test_a_draft_that_sees(tiny_vision_artifact: Artifact, tiny_vision: Path, target: Runner) -> None:
    """Pictures are shown to both; a draft that cannot see is refused."""
    Image = pytest.importorskip("PIL.Image")
    processor = ImageProcessor.of(tiny_vision_artifact)
    tokenizer = Tokenizer(tiny_vision_artifact.folder)
    prompts = [tokenizer.encode(text) for text in ("<|image|>how many squares?", "how many circles?")]
    pictures = [[Image.open(tiny_vision / "picture.png")], []]
    images = processor.batch(prompts, pictures)
    with open_runner(tiny_vision_artifact, device="cpu") as runner, open_runner(tiny_vision_artifact) as same:
        expected = generate(runner, prompts, 6, images=images)
        result = generate(runner, prompts, 6, images=images, draft=Draft(runner=same, tokens=2))
        assert result.token_ids == expected.token_ids
        assert result.draft is not None
        assert result.draft.accepted > 0
        with pytest.raises(FeedError, match="the draft: this model reads text only"):
            generate(
                runner, prompts[:1], 6, images=processor.batch(prompts[:1], pictures[:1]), draft=Draft(runner=target)
            )


# --- what is refused --------------------------------------------------------------------------------------------------


def _with_sums(runner: FakeRunner) -> FakeRunner:
    (slots,) = runner.cache_spec.tensors
    runner.cache_spec = dataclasses.replace(
        runner.cache_spec, tensors=(slots, dataclasses.replace(slots, name="numerator", slot_axis=None))
    )
    return runner


@pytest.mark.parametrize("summing", ["target", "draft"])
def test_sums_cannot_be_rewound(summing: str) -> None:
    """Neither the target's nor the draft's."""
    runners = {"target": FakeRunner(5), "draft": FakeRunner(5)}
    _with_sums(runners[summing])
    whose = "the draft: " if summing == "draft" else "^"
    with pytest.raises(
        FeedError, match=rf"{whose}this model cannot be taken back .*: past_key_values\.0\.numerator sums"
    ):
        generate(runners["target"], [[1]], 2, draft=Draft(runner=runners["draft"]))
    decoding = Decoding(_with_sums(FakeRunner(5)))
    with pytest.raises(FeedError, match="cannot be taken back to fewer tokens"):
        decoding.rewind(np.zeros(0, np.int64))


def test_a_draft_must_fit(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """In its vocabulary and its cache, and it must propose something."""
    with pytest.raises(FeedError, match="the draft has another vocabulary: 4 tokens, the target 5"):
        generate(FakeRunner(5), [[1]], 2, draft=Draft(runner=FakeRunner(4)))
    with pytest.raises(FeedError, match="the draft: a prompt has 5 tokens, this artifact holds 4"):
        generate(FakeRunner(5), [[1] * 5], 2, draft=Draft(runner=FakeRunner(5, max_len=4)))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(FeedError, match="must propose a whole number of tokens of at least 1, got"):
            Draft(runner=FakeRunner(5), tokens=wrong)
    other = dataclasses.replace(tiny_artifact, folder=tmp_path)
    text = (tiny_artifact.folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text)
    check_draft(tiny_artifact, other)
    (tmp_path / "tokenizer.json").write_text(text.replace('"+":', '"plus":'))
    with pytest.raises(
        FeedError, match=r"another vocabulary .*: 100 tokens and 100; token \d+ is 'plus' there and '\+'"
    ):
        check_draft(tiny_artifact, other)
