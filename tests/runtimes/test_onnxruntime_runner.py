"""The ONNX Runtime runner: in-place caches, checks, and every precision."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runner_cases import (
    PROMPTS,
    WRONG_FEEDS,
    assert_only_the_next_slot_is_written,
    assert_rows_are_reordered,
    assert_wrong_rows_are_refused,
    forced_logits,
    valid_feeds,
)

from exporter.layouts import LAYOUTS
from graphs.checkpoint import open_checkpoint
from graphs.families import find_family
from graphs.loading import load_decoder
from runtimes.artifact import Artifact
from runtimes.eager_runner import EagerRunner
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import Runner, open_runner


@pytest.fixture
def runner(tiny_artifact: Artifact):
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


def _eager(checkpoint_folder: Path, artifact: Artifact) -> EagerRunner:
    checkpoint = open_checkpoint(checkpoint_folder)
    family = find_family(checkpoint.config)
    decoder = load_decoder(family, family.parse_config(checkpoint.config), checkpoint)
    wrapped = LAYOUTS["portable"].wrap(decoder)
    return EagerRunner(wrapped, artifact.manifest.graphs["decoder"].signature, artifact.manifest.cache)


def test_equals_the_eager_runner_on_a_ragged_batch(runner: Runner, tiny_llama: Path, tiny_artifact: Artifact) -> None:
    """Same feeds, same logits, through prefill and 20 decode steps."""
    forced = np.random.default_rng(0).integers(3, 98, (len(PROMPTS), 20))
    with _eager(tiny_llama, tiny_artifact) as eager:
        np.testing.assert_allclose(
            forced_logits(runner, PROMPTS, forced), forced_logits(eager, PROMPTS, forced), atol=2e-4
        )


def test_each_row_of_a_ragged_batch_equals_the_row_alone(runner: Runner) -> None:
    """Padding and neighbours change nothing."""
    forced = np.random.default_rng(1).integers(3, 98, (len(PROMPTS), 20))
    together = forced_logits(runner, PROMPTS, forced)
    for row, prompt in enumerate(PROMPTS):
        alone = forced_logits(runner, [prompt], forced[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 0.15), ("bf16", 0.8)])
def test_lower_precisions_stay_near_fp32(
    tiny_artifacts: Callable[[str], Artifact], runner: Runner, precision: str, atol: float
) -> None:
    """Loose by design (parity is strict): a wrong cast or a shifted weight would be off by tens."""
    forced = np.random.default_rng(2).integers(3, 98, (len(PROMPTS), 5))
    with open_runner(tiny_artifacts(precision), device="cpu") as lower:
        np.testing.assert_allclose(
            forced_logits(lower, PROMPTS, forced), forced_logits(runner, PROMPTS, forced), atol=atol
        )


def test_bfloat16_on_the_cpu_says_that_it_computes_in_float32(tiny_artifacts: Callable[[str], Artifact]) -> None:
    """ONNX Runtime has no bfloat16 kernels there: the runner must say what it does instead."""
    with open_runner(tiny_artifacts("bf16"), device="cpu") as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert runner.computes_in == "float32"
        assert "bfloat16 computed as float32" in runner.description


def test_the_cache_is_updated_in_place(tiny_artifact: Artifact) -> None:
    """ONNX Runtime warns on stderr when TensorScatter has to copy its cache; it must have no reason to."""
    program = (
        "import sys; from runtimes.runner import open_runner; from runtimes.decoding import Decoding\n"
        "import onnxruntime; onnxruntime.set_default_logger_severity(0)\n"
        "with open_runner(sys.argv[1], device='cpu') as runner:\n"
        "    decoding = Decoding(runner); decoding.prefill([[1, 5, 9], [1, 7]])\n"
        "    for _ in range(3): decoding.decode([3, 4])\n"
    )
    command = [sys.executable, "-c", program, str(tiny_artifact.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stderr  # the log is on, so that silence about copies means something
    assert "in-place optimization not activated" not in done.stderr


def test_the_cache_holds_what_was_written_and_nothing_else(runner: Runner) -> None:
    """In place, and only there."""
    assert_only_the_next_slot_is_written(runner)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_rows_are_reordered(tiny_artifacts: Callable[[str], Artifact], precision: str) -> None:
    """In every precision of the cache."""
    with open_runner(tiny_artifacts(precision), device="cpu") as runner:
        assert_wrong_rows_are_refused(runner)
        assert_rows_are_reordered(runner)


def test_reordering_keeps_the_cache_where_it_is(runner: Runner) -> None:
    """The session is bound to these addresses."""
    assert isinstance(runner, OnnxRuntimeRunner)
    runner.reset(2)
    before = [buffer.data_ptr() for buffer in runner._cache]
    runner.reorder_rows(np.array([1, 1]))
    assert [buffer.data_ptr() for buffer in runner._cache] == before


def test_bfloat16_rows_are_reordered_as_bits(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, here with a tensor on the host, between which copy_tensors does not copy."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "copy_tensors", lambda sources, targets: targets[0].update_inplace(sources[0]))

    assert isinstance(runner, OnnxRuntimeRunner)
    runner.reset(3)
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    expected = bits[[2, 2, 0]]
    bfloat16 = 16
    runner._cache = [onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, bfloat16)]
    runner.reorder_rows(np.array([2, 2, 0]))
    np.testing.assert_array_equal(bits, expected)


def test_the_eager_runner_reorders_rows(tiny_llama: Path, tiny_artifact: Artifact) -> None:
    """By the same cases."""
    with _eager(tiny_llama, tiny_artifact) as eager:
        assert_wrong_rows_are_refused(eager)
        assert_rows_are_reordered(eager)


@pytest.mark.parametrize(("wrong", "message"), WRONG_FEEDS)
def test_wrong_feeds_are_refused(runner: Runner, wrong: dict[str, np.ndarray], message: str) -> None:
    """Before anything runs, with what was expected and what was found."""
    runner.reset(1)
    with pytest.raises(FeedError, match=message):
        runner.step(wrong)
    runner.step(valid_feeds())  # and the runner still works


def test_a_step_before_reset_and_after_close_is_refused(tiny_artifact: Artifact) -> None:
    """Instead of a crash inside the library."""
    runner = open_runner(tiny_artifact, device="cpu")
    with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called"):
        runner.step(valid_feeds())
    with pytest.raises(FeedError, match="batch_size 9: this artifact takes 1 to 8 rows"):
        runner.reset(9)
    runner.reset(1)
    runner.close()
    runner.close()
    for use in (lambda: runner.step(valid_feeds()), lambda: runner.reorder_rows(np.array([0]))):
        with pytest.raises(FeedError, match="closed"):
            use()


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_missing_provider_is_named(tiny_artifact: Artifact, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what this build offers and what to install."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    expected = r"CUDAExecutionProvider, but .* only CPUExecutionProvider.*\[gpu\]" if device == "cuda" else "cpu, cuda"
    with pytest.raises(RuntimeMissingError, match=expected):
        open_runner(tiny_artifact, device=device)


def test_missing_onnxruntime_says_how_to_install_it(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'export-llm\[cpu\]'"):
        open_runner(tiny_artifact, device="cpu")


def test_unknown_runtimes_and_absent_engines_are_named(tiny_artifact: Artifact) -> None:
    """The message lists what there is."""
    with pytest.raises(RuntimeMissingError, match="unknown runtime 'tflite'; known: onnxruntime, tensorrt"):
        open_runner(tiny_artifact, "tflite")
    with pytest.raises(ArtifactError, match=r"holds no tensorrt-rtx engine \(engines: none\).*--target tensorrt-rtx"):
        open_runner(tiny_artifact, "tensorrt-rtx")


@pytest.mark.cuda
def test_cuda_equals_the_cpu(tiny_artifacts: Callable[[str], Artifact]) -> None:
    """The same file on CUDA, in every precision."""
    forced = np.random.default_rng(3).integers(3, 98, (len(PROMPTS), 8))
    with open_runner(tiny_artifacts("fp32"), device="cpu") as cpu:
        expected = forced_logits(cpu, PROMPTS, forced)
    for precision, atol in (("fp32", 1e-2), ("fp16", 0.15), ("bf16", 0.8)):
        with open_runner(tiny_artifacts(precision), device="cuda") as cuda:
            np.testing.assert_allclose(forced_logits(cuda, PROMPTS, forced), expected, atol=atol)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_rows_are_reordered(tiny_artifacts: Callable[[str], Artifact], precision: str) -> None:
    """By way of the host, bfloat16 as bits. A batch of other rows may round elsewhere: only the moves are exact."""
    with open_runner(tiny_artifacts(precision), device="cuda") as runner:
        assert_wrong_rows_are_refused(runner)
        assert_rows_are_reordered(runner, atol=1.0)
