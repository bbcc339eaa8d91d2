"""The TensorRT runner: on a simulated GPU and library everywhere, on real ones where there is a GPU.

The simulation (simulated_cuda.py) computes with ONNX Runtime, so what is proven without a GPU is the runner's own
part: shapes, profiles, addresses, order, lifetimes, CUDA graphs, errors.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simulated_cuda as sim
from runner_cases import (
    PROMPTS,
    WRONG_FEEDS,
    forced_logits,
    repeat_rows,
    valid_feeds,
)
from safetensors.numpy import save_file
from simulation import Simulate, Simulation, export_for_this_gpu

from exporter.pipeline import ExportRequest, export
from graphs.families import find_family
from graphs.loading import expected_shapes
from runtimes import tensorrt_runner
from runtimes.artifact import Artifact, open_artifact
from runtimes.beam_search import beam_search
from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from runtimes.generation import generate
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import Runner, open_runner
from runtimes.tensorrt_api import FLAVORS
from runtimes.tensorrt_runner import TENSORRT_RUNNERS, TensorRTRunner

TARGETS = list(FLAVORS)
ATOL = 1e-4  # logits are around 10; the same graph and kernels, over more masked slots


@pytest.fixture
def simulation(simulate: Simulate, tiny_artifact: Artifact) -> Simulation:
    """The device with both libraries and an artifact for them."""
    return simulate(tiny_artifact)


@pytest.fixture
def runner(simulation: Simulation) -> Iterator[Runner]:
    """On the simulated TensorRT; whatever the test does, nothing may be left on the device."""
    with open_runner(simulation.artifact, "tensorrt") as opened:
        yield opened
    # A failed test's traceback keeps Python objects alive, but no memory, stream or graph.
    assert not simulation.device.alive().keys() - {"TensorRT objects"}


@pytest.fixture(scope="module")
def reference(tiny_artifact: Artifact) -> Iterator[Runner]:
    with open_runner(tiny_artifact, device="cpu") as opened:
        yield opened


def _steps(runner: Runner, prompts: list[list[int]], steps: int, seed: int = 0) -> np.ndarray:
    """Logits [B, 1 + steps, V] after the prompts and after each of some random tokens."""
    forced = np.random.default_rng(seed).integers(3, 98, (len(prompts), steps))
    return forced_logits(runner, prompts, forced)


def _assert_equal(runner: Runner, reference: Runner, prompts: list[list[int]], steps: int, seed: int = 0) -> None:
    expected = _steps(reference, prompts, steps, seed)
    np.testing.assert_allclose(_steps(runner, prompts, steps, seed), expected, atol=ATOL)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_equals_onnxruntime_on_a_ragged_batch(
    simulation: Simulation, reference: Runner, target: str, cuda_graphs: bool
) -> None:
    """Same feeds, same logits, through prefill and decode, with and without CUDA graphs, for both libraries."""
    with open_runner(simulation.artifact, target, cuda_graphs=cuda_graphs) as runner:
        assert runner.description.startswith(f"{target} 0.0.simulated")
        _assert_equal(runner, reference, PROMPTS, 12)
    assert simulation.device.alive() == {}


def test_generates_the_tokens_of_onnxruntime(runner: Runner, reference: Runner) -> None:
    """Greedy ids of a ragged batch, until the longest row has filled the cache."""
    assert generate(runner, PROMPTS).token_ids == generate(reference, PROMPTS).token_ids


@pytest.mark.parametrize("bucket", [16, 48, 1000])
def test_the_mask_crosses_buckets_and_ends_at_the_last_slot(
    runner: Runner, reference: Runner, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is padded to a bucket's edge, or to max_len where that comes first (128 is no multiple of 48)."""
    monkeypatch.setattr(tensorrt_runner, "MASK_BUCKET", bucket)
    _assert_equal(runner, reference, [[1, 30, 40], [1]], runner.cache_spec.max_len - 3)


def test_a_prompt_as_long_as_the_cache(runner: Runner, reference: Runner) -> None:
    """The largest shapes that the prefill profile takes."""
    _assert_equal(runner, reference, [[1] * runner.cache_spec.max_len] * 8, 0)


def test_a_prompt_of_one_token(simulation: Simulation, runner: Runner, reference: Runner) -> None:
    """It has a decode step's shapes, and the decode profile takes it from the first call on."""
    _assert_equal(runner, reference, [[7], [9]], 5)
    assert not simulation.count("profile 0")


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cache_is_read_and_filled_in_its_own_dtype(simulation: Simulation, dtype: str) -> None:
    """And is zero after a reset, whatever it held before."""
    graph = simulation.artifact.manifest.graphs["decoder"].signature
    cache = simulation.artifact.manifest.cache
    tensors = tuple(dataclasses.replace(tensor, dtype=dtype) for tensor in cache.tensors)
    cache = dataclasses.replace(cache, dtype=dtype, tensors=tensors)
    specs = {
        side: tuple(dataclasses.replace(s, dtype=dtype) if ".key" in s.name or ".value" in s.name else s for s in specs)
        for side, specs in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    signature = dataclasses.replace(graph, **specs)
    file = simulation.engine_file()
    sim.write_engine(file, Path("unused"), signature)
    with TensorRTRunner(file, signature, cache) as runner:
        for batch in (1, 3, 2):
            runner.reset(batch)
            assert not runner.read_cache(0).any()
            runner.fill_cache(64.0)
            for index, tensor in enumerate(cache.tensors):
                array = runner.read_cache(index)
                assert array.dtype == np.float32
                assert array.shape == tensor.array_shape(batch)
                assert (array == 64.0).all()
    assert simulation.device.alive() == {}


@pytest.fixture(scope="module")
def summing_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A layer with a cache, then one whose state is sums, which no engine can update in place."""
    folder = tmp_path_factory.mktemp("sums")
    config = {
        "model_type": "transformer_decoder",
        "attention": ["causal", "aft_simple"],
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(find_family(config), find_family(config).parse_config(config))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    export(ExportRequest(checkpoint=folder, out=folder / "artifact", verify=False))
    return open_artifact(folder / "artifact")


def test_sums_are_carried_from_step_to_step(simulation: Simulation, summing_artifact: Artifact, tmp_path: Path) -> None:
    """With CUDA graphs and without; zero after a reset, and spared when a cache is filled."""
    graph, cache = summing_artifact.manifest.graphs["decoder"], summing_artifact.manifest.cache
    assert {tensor.slot_axis for tensor in cache.tensors} == {1, None}
    file = tmp_path / "sums.engine"
    sim.write_engine(file, summing_artifact.path(graph.file), graph.signature)
    for cuda_graphs in (True, False):
        with (
            open_runner(summing_artifact, device="cpu") as expected,
            TensorRTRunner(file, graph.signature, cache, cuda_graphs=cuda_graphs) as runner,
        ):
            for seed, rows in enumerate((1, 3, 2)):
                _assert_equal(runner, expected, PROMPTS[:rows], 12, seed)
                for index, tensor in enumerate(cache.tensors):
                    if tensor.slot_axis is None:
                        sums = runner.read_cache(index)
                        assert sums.shape == tensor.array_shape(rows)
                        assert sums.any()
                        np.testing.assert_allclose(sums, expected.read_cache(index), rtol=1e-4, atol=1e-4)
                        runner.fill_cache(7.0)
                        np.testing.assert_array_equal(runner.read_cache(index), sums)
                runner.reset(rows)
                assert not any(runner.read_cache(index).any() for index in range(len(cache.tensors)))
    assert simulation.count("graph engine")
    assert simulation.device.alive() == {}


def test_reset_to_larger_and_smaller_batches(simulation: Simulation, runner: Runner, reference: Runner) -> None:
    """Buffers grow, and no graph that refers to the old ones or to another batch is replayed."""
    for seed, rows in enumerate((1, 3, 2, 3, 8, 1, 8)):
        prompts = [PROMPTS[row % 3][: 2 + row] for row in range(rows)]
        _assert_equal(runner, reference, prompts, 4, seed)
    assert simulation.count("graph engine")


def test_longer_prompts_between_decode_steps(runner: Runner, reference: Runner) -> None:
    """Inputs outgrow their buffers while graphs of the same batch and bucket exist."""
    for seed, length in enumerate((3, 10, 3, 40, 5, 100)):
        _assert_equal(runner, reference, [list(range(3, 3 + length % 90 + 1))], 4, seed)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_decode_steps_are_replayed(simulation: Simulation, runner: Runner, reference: Runner) -> None:
    """At most two steps of a bucket run without its graph; each step runs once."""
    steps = 40
    _assert_equal(runner, reference, PROMPTS, steps)
    replayed = simulation.count("graph engine, profile 1")
    assert replayed >= steps - 2
    assert simulation.count("engine, profile 1") == steps  # a capture does not run what it captures
    assert simulation.count("engine, profile 0") == 1


def test_without_cuda_graphs_nothing_is_replayed(simulation: Simulation) -> None:
    """cuda_graphs=False is the way out where a driver or library has trouble with them."""
    with open_runner(simulation.artifact, "tensorrt", cuda_graphs=False) as runner:
        _steps(runner, PROMPTS, 5)
    assert not simulation.count("graph engine")
    assert simulation.count("engine, profile 1") == 5


def test_a_graph_is_void_once_its_context_was_changed(
    simulation: Simulation, runner: Runner, reference: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's guide: best one context per captured graph; a context that was given other shapes is captured anew."""
    monkeypatch.setattr(tensorrt_runner, "MASK_BUCKET", 16)
    simulation.libraries["tensorrt"].one_graph_per_context = True
    for seed, rows in enumerate((1, 1, 2, 1)):  # each crosses the edges at 16 and 32
        _assert_equal(runner, reference, PROMPTS[:rows], 30, seed)
    for seed in range(2):
        _assert_equal(runner, reference, PROMPTS[:1], 4, seed)
        runner.reset(2)  # and back: the context of the graph has had another batch, even without a step
    assert simulation.count("graph engine")


def test_graphs_of_freed_buffers_are_destroyed(simulation: Simulation, runner: Runner) -> None:
    """They can never run again, so they must not pile up while prompts and batches grow."""
    for rows in range(1, 9):
        _steps(runner, [[1] * (10 * rows)] * rows, 3)
    assert simulation.device.executable_graphs() <= 2


@pytest.mark.parametrize("target", TARGETS)
def test_where_nothing_can_be_captured_steps_run_without_graphs(
    simulation: Simulation, reference: Runner, target: str
) -> None:
    """A failed capture leaves a context that still works; the stream must be usable again."""
    simulation.libraries[target].capturable = False
    with open_runner(simulation.artifact, target) as runner:
        _assert_equal(runner, reference, PROMPTS, 6)
    assert simulation.device.alive() == {}


# --- closing ----------------------------------------------------------------------------------------------------------


def test_close_frees_everything_and_may_be_repeated(simulation: Simulation) -> None:
    """Memory, graphs, stream, contexts, engine and runtime."""
    runner = open_runner(simulation.artifact, "tensorrt")
    _steps(runner, PROMPTS, 5)
    assert {"allocations", "streams", "TensorRT objects"} <= simulation.device.alive().keys()
    runner.close()
    assert simulation.device.alive() == {}
    runner.close()
    assert simulation.device.alive() == {}


def _opened(simulation: Simulation) -> Runner:
    return open_runner(simulation.artifact, "tensorrt")


def test_two_runners_do_not_share_anything(simulation: Simulation, reference: Runner) -> None:
    """One may be closed while the other works."""
    first, second = (open_runner(simulation.artifact, "tensorrt") for _ in range(2))
    _steps(first, PROMPTS, 3)
    _assert_equal(second, reference, PROMPTS, 3)
    first.close()
    _assert_equal(second, reference, PROMPTS, 3, seed=1)
    second.close()
    assert simulation.device.alive() == {}


@pytest.mark.parametrize(("rows", "copies"), [([1, 0, 2], 3), ([1, 1, 2], 1), ([0, 1, 2], 0)])
def test_reordering_leaves_graphs_valid_and_the_host_alone(
    simulation: Simulation, runner: Runner, rows: list[int], copies: int
) -> None:
    """Only copies on the device: of each row that moves, and of the whole tensor first where rows change places. The
    next decode steps are replayed from the same graph.
    """
    decoding = Decoding(runner)
    decoding.prefill(PROMPTS)
    for _ in range(2):
        decoding.decode(np.array([3, 4, 5]))
    start = len(simulation.device.log)
    decoding.reorder(np.array(rows))
    runner.read_cache(0)
    tensors = len(runner.cache_spec.past_names())
    on_device = ["cudaMemcpyDeviceToDevice"] * tensors * copies
    assert simulation.device.log[start:] == [*on_device, "cudaMemcpyDeviceToHost"]
    replayed = simulation.count("graph engine")
    decoding.decode(np.array([3, 4, 5]))
    assert simulation.count("graph engine") == replayed + 1
    assert simulation.device.executable_graphs() == 1


def test_beam_search_finds_what_it_finds_on_onnxruntime(runner: Runner, reference: Runner) -> None:
    """Rows of the cache move between steps that are replayed from graphs."""
    found, expected = (beam_search(each, PROMPTS[:2], 4, 20, stop_ids=[2]) for each in (runner, reference))
    for ours, theirs in zip(found.hypotheses, expected.hypotheses, strict=True):
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]


def test_no_memory_to_reorder_rows(simulation: Simulation, runner: Runner) -> None:
    """An error, and a cache that is as it was."""
    runner.reset(2)
    runner.fill_cache(2.0)
    simulation.device.failing["cudaMalloc"] = sim.Error.cudaErrorMemoryAllocation
    with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation"):
        runner.reorder_rows(np.array([1, 0]))
    assert (runner.read_cache(0) == 2.0).all()
    runner.reorder_rows(np.array([1, 0]))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "message"), WRONG_FEEDS)
def test_wrong_feeds_are_refused(
    simulation: Simulation, runner: Runner, wrong: dict[str, np.ndarray], message: str
) -> None:
    """Before anything reaches the device, with what was expected and what was found."""
    runner.reset(1)
    log = list(simulation.device.log)
    with pytest.raises(FeedError, match=message):
        runner.step(wrong)
    assert simulation.device.log == log
    runner.step(valid_feeds())  # and the runner still works


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_that_cannot_be_loaded(simulation: Simulation, target: str) -> None:
    """The message gives the library's own reason, and what to do."""
    simulation.engine_file(target).write_bytes(b"of another version")
    expected = (
        rf"decoder\.{target}\.engine cannot be loaded by {target} 0\.0\.simulated: .*another GPU or library version,"
        r" or is damaged \(.*header\.magicTag.*\): export again"
    )
    with pytest.raises(ArtifactError, match=expected):
        open_runner(simulation.artifact, target)


def test_the_real_library_says_why_it_does_not_load_an_engine(
    device: sim.Device, tiny_artifact: Artifact, tmp_path: Path
) -> None:
    """Its logger is heard: TensorRT-RTX can be asked without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    graph = tiny_artifact.manifest.graphs["decoder"]
    (tmp_path / "decoder.engine").write_bytes(b"garbage" * 100)
    with pytest.raises(ArtifactError, match=r"decoder\.engine cannot be loaded by tensorrt-rtx \d.*\(.*Serialization"):
        TENSORRT_RUNNERS["tensorrt-rtx"](tmp_path / "decoder.engine", graph.signature, tiny_artifact.manifest.cache)


def _rewrite_engine(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_bytes().removeprefix(sim.MAGIC))
    change(data)
    path.write_bytes(sim.MAGIC + json.dumps(data).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda engine: engine["signature"]["inputs"][1].update(name="positions"),
            r"tensors differ from the manifest's: \['position_ids', 'positions'\]",
        ),
        (
            lambda engine: engine["signature"]["aliases"].pop("present.1.key"),
            r"does not update past_key_values\.1\.key in place \(present\.1\.key aliases None\)",
        ),
        (
            lambda engine: engine["signature"]["aliases"].update({"present.0.key": "past_key_values.0.value"}),
            r"does not update past_key_values\.0\.key in place \(present\.0\.key aliases 'past_key_values\.0\.value'\)",
        ),
        (lambda engine: engine["signature"]["inputs"][5].update(dtype="float16"), r"past_key_values\.0\.key"),
        (lambda engine: engine["signature"]["outputs"][0].update(dtype="float16"), "logits"),
        (lambda engine: engine["signature"]["inputs"][5]["shape"].__setitem__(2, 64), r"past_key_values\.0\.key"),
        (lambda engine: engine.update(profiles=1), "profile"),
    ],
    ids=["names", "no alias", "other alias", "cache dtype", "logits dtype", "cache shape", "profiles"],
)
def test_an_engine_that_is_not_what_the_manifest_says(
    simulation: Simulation, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Refused when it is opened: run, it would write past its buffers or into the wrong ones."""
    _rewrite_engine(simulation.engine_file(), change)
    with pytest.raises(ArtifactError, match=message):
        open_runner(simulation.artifact, "tensorrt")


@pytest.mark.parametrize("what", ["engine", "interface", "profile", "context"])
def test_a_failed_opening_leaves_nothing_on_the_device(simulation: Simulation, what: str) -> None:
    """Wherever it fails."""
    if what == "engine":
        simulation.engine_file().write_bytes(b"damaged")
    elif what == "interface":
        _rewrite_engine(simulation.engine_file(), lambda engine: engine["signature"]["aliases"].popitem())
    elif what == "profile":
        _rewrite_engine(simulation.engine_file(), lambda engine: engine.update(profiles=1))
    else:
        simulation.libraries["tensorrt"].contexts_left = 1
    with pytest.raises((ArtifactError, RuntimeError)):
        open_runner(simulation.artifact, "tensorrt")
    assert simulation.device.alive() == {}


def test_no_engine_for_this_library(tiny_artifact: Artifact) -> None:
    """What the artifact holds, and how to get the engine."""
    with pytest.raises(ArtifactError, match=r"holds no tensorrt engine \(engines: none\): export with --target tensor"):
        open_runner(tiny_artifact, "tensorrt")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", [None, ModuleType("tensorrt")], ids=["absent", "placeholder"])
def test_a_missing_library(
    simulation: Simulation, target: str, module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's tensorrt may be installed and empty. The message says what to install."""
    monkeypatch.setitem(sys.modules, FLAVORS[target].module, module)
    expected = rf"target {target} needs the {FLAVORS[target].module} library, .*pip install 'export-llm\[{target}\]'"
    with pytest.raises(RuntimeMissingError, match=expected):
        open_runner(simulation.artifact, target)


def test_no_gpu(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the bindings are asked for."""
    monkeypatch.setattr(tensorrt_runner, "cuda_device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeMissingError, match="needs a CUDA GPU, and there is none here"):
        open_runner(simulation.artifact, "tensorrt")


@pytest.mark.parametrize("name", ["cuda", "cuda.bindings"])
def test_no_cuda_bindings(simulation: Simulation, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    for module in ("cuda.bindings.runtime", "cuda.bindings"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeMissingError, match=r"CUDA's Python bindings .*: pip install cuda-bindings"):
        open_runner(simulation.artifact, "tensorrt")


def test_a_driver_that_is_too_old(simulation: Simulation) -> None:
    """cuda-bindings 13 with a driver for CUDA 12: an export must go on without this runtime, so it is "missing"."""
    simulation.device.failing["cudaSetDevice"] = sim.Error.cudaErrorInsufficientDriver
    with pytest.raises(RuntimeMissingError, match="cudaErrorInsufficientDriver"):
        open_runner(simulation.artifact, "tensorrt")


def test_an_unknown_device(simulation: Simulation) -> None:
    """The user's mistake."""
    with pytest.raises(RuntimeMissingError, match=r"device.*7.*cudaErrorInvalidDevice"):
        open_runner(simulation.artifact, "tensorrt", device_id=7)


# --- what may go wrong on the device ----------------------------------------------------------------------------------


def test_out_of_memory_in_reset(simulation: Simulation, runner: Runner, reference: Runner) -> None:
    """The call and its error are named, the half-made cache cannot be used, and a smaller one still can."""
    _steps(runner, PROMPTS[:2], 3)
    simulation.device.memory_bytes = runner.cache_spec.nbytes(4)
    with pytest.raises(RuntimeError, match=r"cudaMalloc.*cudaErrorMemoryAllocation"):
        runner.reset(8)
    for rows in (2, 8):
        with pytest.raises(FeedError, match=r"reset\(batch_size\) must be called"):
            runner.step(repeat_rows(valid_feeds(), rows))
    for rows in (1, 2, 3):
        _assert_equal(runner, reference, PROMPTS[:rows], 3)


def test_no_memory_for_a_context(simulation: Simulation) -> None:
    """create_execution_context returns None then."""
    simulation.libraries["tensorrt"].contexts_left = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        open_runner(simulation.artifact, "tensorrt")


def test_an_engine_that_does_not_run(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's log is in the message."""
    monkeypatch.setattr(sim.Context, "_problem", lambda self: "no kernel image is available")
    with open_runner(simulation.artifact, "tensorrt") as runner:
        runner.reset(1)
        with pytest.raises(RuntimeError, match=r"tensorrt could not run the engine.*no kernel image is available"):
            runner.step(valid_feeds())
    assert simulation.device.alive() == {}


def test_a_fault_on_the_device_does_not_hide_in_close(simulation: Simulation) -> None:
    """After a fault every CUDA call fails: closing must come to its end, without an error of its own."""

    def fail() -> None:
        with _opened(simulation) as runner:
            runners.append(runner)
            runner.reset(1)
            simulation.device.fault = sim.Error.cudaErrorIllegalAddress
            raise KeyError("mine")

    runners: list[Runner] = []
    with pytest.raises(KeyError, match="mine"):
        fail()
    runners[0].close()
    assert "TensorRT objects" not in simulation.device.alive()


# --- on a real GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_for_this_gpu(tiny_llama, tmp_path_factory.mktemp("gpu") / "artifact")


def _on_gpu(artifact: Artifact, **options: Any) -> Runner:
    (target,) = artifact.manifest.engines
    return open_runner(artifact, target, **options)


@pytest.mark.cuda
def test_gpu_generates_the_tokens_of_onnxruntime(gpu_artifact: Artifact) -> None:
    """Until the cache is full, across the edge of a mask bucket, with and without CUDA graphs."""
    graph = gpu_artifact.manifest.graphs["decoder"]
    with OnnxRuntimeRunner(
        gpu_artifact.path(graph.file), graph.signature, gpu_artifact.manifest.cache, device="cpu"
    ) as cpu:
        expected = generate(cpu, PROMPTS).token_ids
    for cuda_graphs in (True, False):
        with _on_gpu(gpu_artifact, cuda_graphs=cuda_graphs) as runner:
            assert generate(runner, PROMPTS).token_ids == expected


@pytest.mark.cuda
def test_gpu_graphs_change_nothing(gpu_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits with and without CUDA graphs, while buckets, batches and prompt lengths change and come back."""
    monkeypatch.setattr(tensorrt_runner, "MASK_BUCKET", 16)
    batches = [PROMPTS[:1], PROMPTS, PROMPTS[:2], PROMPTS[:1], [[1] * 60] * 8, PROMPTS]
    traces = []
    for cuda_graphs in (True, False):
        with _on_gpu(gpu_artifact, cuda_graphs=cuda_graphs) as runner:
            traces.append([_steps(runner, prompts, 30, seed) for seed, prompts in enumerate(batches)])
    for with_graphs, without in zip(*traces, strict=True):
        np.testing.assert_allclose(with_graphs, without, atol=1e-3)


@pytest.mark.cuda
def test_gpu_refuses_a_damaged_engine(gpu_artifact: Artifact, tmp_path: Path) -> None:
    """With the library's own reason, as in the simulation."""
    (target,) = gpu_artifact.manifest.engines
    entry = gpu_artifact.manifest.engines[target]
    (tmp_path / entry.file).write_bytes(b"garbage" * 100)
    damaged = Artifact(folder=tmp_path, manifest=gpu_artifact.manifest)
    with pytest.raises(ArtifactError, match=rf"cannot be loaded by {target}.*\(.*[Ss]erialization.*\): export again"):
        open_runner(damaged, target)
