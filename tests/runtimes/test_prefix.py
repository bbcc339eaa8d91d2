"""Saved prefixes: continued exactly, readable by others, and refused where they do not belong."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import Simulate

from runtimes.artifact import Artifact, Manifest, open_artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError
from runtimes.generation import generate
from runtimes.prefix import Prefix
from runtimes.prefix_file import load_prefix, save_prefix
from runtimes.runner import Feeds, Runner, open_runner

HEAD = [1, 86, 82, 85, 87, 3, 24, 21, 28]
PROMPTS = [[*HEAD, 20, 23, 32], [*HEAD, 24, 25, 26, 27, 28, 29, 32], [*HEAD, 30, 31]]


@pytest.fixture(scope="module")
def runner(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


def _take(runner: Runner, token_ids: list[int] = HEAD) -> Prefix:
    decoding = Decoding(runner)
    decoding.prefill([token_ids])
    return decoding.take_prefix(token_ids)


@pytest.fixture
def saved(runner: Runner, tiny_artifact: Artifact, tmp_path: Path) -> Path:
    """HEAD, of the fp32 artifact."""
    path = tmp_path / "head.safetensors"
    save_prefix(path, _take(runner), tiny_artifact.manifest)
    return path


class Counting:
    """A runner that notes how many tokens of a row each call was fed."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.fed = runner, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, feeds: Feeds) -> np.ndarray:
        self.fed.append(feeds["input_ids"].shape[1])
        return self._runner.step(feeds)


def _state(runner: Runner, lengths: list[int]) -> list[np.ndarray]:
    """Every row's written slots, of every tensor."""
    arrays = [runner.read_cache(index) for index in range(len(runner.cache_spec.tensors))]
    return [array[row][:, :length] for array in arrays for row, length in enumerate(lengths)]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_a_loaded_prefix_is_the_plain_run(
    tiny_artifacts: Callable[[str], Artifact], tmp_path: Path, precision: str
) -> None:
    """Bit for bit in every row of a ragged batch: logits, cache, and the tokens that follow; only the rest is fed."""
    artifact = tiny_artifacts(precision)
    lengths = [len(prompt) for prompt in PROMPTS]
    with open_runner(artifact, device="cpu") as runner:
        whole = Decoding(runner)
        expected = whole.prefill(PROMPTS)
        state = _state(runner, lengths)
        path = tmp_path / "head.safetensors"
        save_prefix(path, _take(runner), artifact.manifest)
        prefix = load_prefix(path, artifact.manifest)
        runner.reset(3)
        runner.fill_cache(60.0)
        counting: Any = Counting(runner)
        decoding = Decoding(counting)
        np.testing.assert_array_equal(decoding.prefill(PROMPTS, prefix=prefix), expected)
        assert decoding.lengths.tolist() == lengths
        assert counting.fed == [max(lengths) - len(HEAD)]
        for ours, theirs in zip(_state(runner, lengths), state, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert generate(runner, PROMPTS, 12, prefix=prefix).token_ids == generate(runner, PROMPTS, 12).token_ids
        assert beam_search(runner, PROMPTS[:2], 3, 8, prefix=prefix).hypotheses == (
            beam_search(runner, PROMPTS[:2], 3, 8).hypotheses
        )
        chunked = generate(runner, PROMPTS, 12, prefix=prefix, prefill_chunk_tokens=3)
        assert chunked.token_ids == generate(runner, PROMPTS, 12).token_ids


def test_a_prompt_that_is_the_prefix_computes_its_last_token_again(runner: Runner) -> None:
    """Up to the rounding of a call with one token; others in the batch go on as they would."""
    prefix = _take(runner)
    prompts = [HEAD, PROMPTS[1]]
    expected = Decoding(runner).prefill(prompts)
    counting: Any = Counting(runner)
    np.testing.assert_allclose(Decoding(counting).prefill([HEAD], prefix=prefix), expected[:1], atol=1e-4)
    assert counting.fed == [1]
    np.testing.assert_allclose(Decoding(runner).prefill(prompts, prefix=prefix), expected, atol=1e-4)


def test_a_prefix_of_a_longer_row_and_of_any_row(runner: Runner) -> None:
    """Slots hold what they held when the row was shorter."""
    decoding = Decoding(runner)
    decoding.prefill([[1, 5], PROMPTS[1]])
    decoding.decode(np.array([7, 8]))
    prefix = decoding.take_prefix(HEAD, row=1)
    alone = _take(runner)
    assert prefix.token_ids == alone.token_ids
    for name, array in prefix.tensors.items():
        np.testing.assert_allclose(array, alone.tensors[name], atol=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "F32"), ("fp16", "F16")])
def test_the_file_is_read_by_safetensors(
    tiny_artifacts: Callable[[str], Artifact], tmp_path: Path, precision: str, dtype: str
) -> None:
    """By the library itself: the cache's names, its dtype, the tokens' slots and no others, and their numbers."""
    safetensors = pytest.importorskip("safetensors")
    artifact = tiny_artifacts(precision)
    path = tmp_path / "head.safetensors"
    with open_runner(artifact, device="cpu") as runner:
        save_prefix(path, _take(runner), artifact.manifest)
        held = [runner.read_cache(index)[0] for index in range(len(runner.cache_spec.tensors))]
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"token_ids", *artifact.manifest.cache.past_names()}
        assert file.get_tensor("token_ids").tolist() == HEAD
        for name, array in zip(artifact.manifest.cache.past_names(), held, strict=True):
            assert file.get_slice(name).get_dtype() == dtype
            np.testing.assert_array_equal(file.get_tensor(name).astype(np.float32), array[:, : len(HEAD)])


def test_bfloat16_is_stored_as_bfloat16(
    simulate: Simulate, tiny_artifacts: Callable[[str], Artifact], tmp_path: Path
) -> None:
    """By a runner that keeps it, and as torch's reader of the file sees; ONNX Runtime keeps float32 on the CPU."""
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    artifact = tiny_artifacts("bf16")
    path = tmp_path / "head.safetensors"
    numbers = np.random.default_rng(0).normal(size=(1, 2, 128, 32)).astype(np.float32)
    kept = torch.from_numpy(numbers).to(torch.bfloat16)
    with open_runner(simulate(artifact).artifact, "tensorrt") as engine:
        engine.reset(1)
        engine.write_cache(3, kept.float().numpy())
        decoding = Decoding(engine)
        decoding.lengths = np.array([len(HEAD)])
        prefix = decoding.take_prefix(HEAD)
        save_prefix(path, prefix, artifact.manifest)
    stored = load_file(path)
    assert {tensor.dtype for name, tensor in stored.items() if name != "token_ids"} == {torch.bfloat16}
    assert torch.equal(stored["past_key_values.1.value"], kept[0, :, : len(HEAD)])
    loaded = load_prefix(path, artifact.manifest)
    for name, array in prefix.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], array)
    with (
        open_runner(artifact, device="cpu") as widened,
        pytest.raises(FeedError, match=r"holds bfloat16 numbers, but onnxruntime .* keeps float32: .* save it again"),
    ):
        Decoding(widened).prefill(PROMPTS, prefix=loaded)


def test_another_max_len_takes_the_same_prefix(
    tiny_llama: Path, tiny_artifact: Artifact, saved: Path, tmp_path: Path
) -> None:
    """As long as it fits."""
    from exporter.pipeline import ExportRequest, export

    for max_len in (16, 8):
        export(ExportRequest(checkpoint=tiny_llama, out=tmp_path / str(max_len), max_len=max_len, verify=False))
    short = open_artifact(tmp_path / "16")
    with open_runner(short, device="cpu") as runner:
        expected = generate(runner, PROMPTS, 1).token_ids
        assert generate(runner, PROMPTS, 1, prefix=load_prefix(saved, short.manifest)).token_ids == expected
    with pytest.raises(FeedError, match="holds 9 tokens, but this artifact 8: export again with a larger --max-len"):
        load_prefix(saved, open_artifact(tmp_path / "8").manifest)


# --- state without slots ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random decoder, one layer of which keeps sums, another a cache."""
    import torch
    from safetensors.torch import save_file

    from exporter.pipeline import ExportRequest, export
    from graphs.build import build_decoder
    from graphs.families import FAMILIES

    config = {
        "model_type": "transformer_decoder",
        "attention": ["aft_simple", "causal"],
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    folder = tmp_path_factory.mktemp("summing")
    torch.manual_seed(0)
    decoder = build_decoder(FAMILIES["transformer_decoder"].parse_config(config))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: each.data for name, each in decoder.named_parameters()}, folder / "model.safetensors")
    export(ExportRequest(checkpoint=folder, out=folder / "out", verify=False))
    return open_artifact(folder / "out")


def test_sums_are_saved_whole_and_continued(summing: Artifact, tmp_path: Path) -> None:
    """They hold all tokens of the prefix, so nothing less can be taken, and its last token cannot be fed again."""
    head, prompts = [3, 4, 5, 6], [[3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 9]]
    path = tmp_path / "head.safetensors"
    with open_runner(summing, device="cpu") as runner:
        expected = generate(runner, prompts, 10, logprobs=True)
        save_prefix(path, _take(runner, head), summing.manifest)
        prefix = load_prefix(path, summing.manifest)
        assert prefix.tensors["past_key_values.0.numerator"].any()
        result = generate(runner, prompts, 10, prefix=prefix)
        assert result.token_ids == expected.token_ids
        np.testing.assert_allclose(
            Decoding(runner).prefill(prompts, prefix=prefix), Decoding(runner).prefill(prompts), atol=1e-5
        )
        with pytest.raises(
            FeedError, match=r"nothing but the prefix, .*numerator sums over all tokens: let the prompt"
        ):
            generate(runner, [head], 1, prefix=prefix)
        decoding = Decoding(runner)
        decoding.prefill(prompts)
        with pytest.raises(FeedError, match=r"prefix of 4 tokens cannot be taken of a row of 6: .* sums .* all"):
            decoding.take_prefix(head)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, r"was saved with another precision \(fp32, here fp16\): save the prefix again"),
        ({"layout": "dynamic"}, r"was saved with another layout \(portable, here dynamic\)"),
        ({"config": {"model_type": "llama"}}, "was saved with another model: save the prefix again"),
        ({"files": {}}, "was saved with other weights: save the prefix again"),
    ],
)
def test_a_prefix_of_something_else_is_refused(
    saved: Path, tiny_artifact: Artifact, change: dict[str, Any], message: str
) -> None:
    """The message names what differs."""
    manifest: Manifest = dataclasses.replace(tiny_artifact.manifest, **change)
    with pytest.raises(ArtifactError, match=message):
        load_prefix(saved, manifest)


def test_prompts_that_do_not_begin_with_the_prefix_are_refused(runner: Runner) -> None:
    """With the first token that differs."""
    prefix = _take(runner)
    with pytest.raises(FeedError, match="prompt 1 does not begin with the prefix: its token 2 is 9, the prefix's 82"):
        generate(runner, [PROMPTS[0], [1, 86, 9, *HEAD]], 1, prefix=prefix)
    with pytest.raises(FeedError, match="prompt 0 has 4 tokens, fewer than the prefix, which has 9"):
        generate(runner, [HEAD[:4]], 1, prefix=prefix)
    with pytest.raises(FeedError, match="every prompt must hold at least one token"):
        generate(runner, [], 1, prefix=prefix)
    with pytest.raises(FeedError, match="those of a saved prefix are not computed again: leave out the one or the"):
        generate(runner, PROMPTS, 1, prefix=prefix, logprobs=True)
    with pytest.raises(FeedError, match="made with another model: its tensors are not those of this cache"):
        generate(FakeRunner(100, max_len=64), PROMPTS, 1, prefix=prefix)


def test_a_prefix_is_of_text_alone(tiny_vision_artifact: Artifact, tiny_vision: Path, tmp_path: Path) -> None:
    """Text before a picture reads it, so neither a prompt with one is saved nor continued; text alone is."""
    Image = pytest.importorskip("PIL.Image")
    from runtimes.images import ImageProcessor
    from runtimes.tokenizer import Tokenizer

    encode = Tokenizer(tiny_vision_artifact.folder).encode
    head, text, shown = (encode(each) for each in ("how many", "how many circles?", "<|image|>how many circles?"))
    images = ImageProcessor.of(tiny_vision_artifact).batch([shown], [[Image.open(tiny_vision / "picture.png")]])
    with open_runner(tiny_vision_artifact, device="cpu") as runner:
        decoding = Decoding(runner)
        expected = decoding.prefill([text])
        prefix = _take(runner, head)
        np.testing.assert_array_equal(decoding.prefill([text], prefix=prefix), expected)
        with pytest.raises(FeedError, match="a prefix is of text alone, and these prompts show images"):
            decoding.prefill([shown], images, prefix=prefix)
        decoding.prefill([shown], images)
        with pytest.raises(FeedError, match="a prefix is of text alone, and this prompt shows images"):
            decoding.take_prefix(shown)


def test_files_that_are_no_prefix_are_refused(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """Absent, of another kind, or not to be written."""
    for name, message in (
        (tmp_path / "absent", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a dir"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load_prefix(name, tiny_artifact.manifest)
    with pytest.raises(ArtifactError, match="is not a prefix that --save-prefix wrote"):
        load_prefix(tiny_artifact.folder / "model.safetensors", tiny_artifact.manifest)
    prefix = Prefix(token_ids=(1,), tensors={}, dtypes={})
    with pytest.raises(FeedError, match=r"prefix cannot be written to .*: No such file or directory"):
        save_prefix(tmp_path / "no" / "folder", prefix, tiny_artifact.manifest)
    assert list(tmp_path.iterdir()) == []


@settings(
    deadline=None,
    derandomize=True,
    max_examples=200,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_is_refused(data: st.DataObject, saved: Path, tiny_artifact: Artifact, tmp_path: Path) -> None:
    """A flipped bit, an end that is missing, bytes too many: an error, or what was saved; never other numbers."""
    whole = saved.read_bytes()
    expected = load_prefix(saved, tiny_artifact.manifest)
    kind = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    place = data.draw(st.one_of(st.integers(0, 1400), st.integers(0, len(whole) - 1)))
    damaged = {
        "flip": whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :],
        "cut": whole[:place],
        "longer": whole + b"\0" * (1 + place % 9),
    }[kind]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        found = load_prefix(path, tiny_artifact.manifest)
    except (ArtifactError, FeedError):
        return
    assert kind == "flip"  # in a name of the metadata that nobody reads
    assert found.token_ids == expected.token_ids
    assert found.dtypes == expected.dtypes
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
