"""The parity gate: it passes what is right, and catches single subtle faults in graph, weights or runner."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.verify import verify
from graphs.checkpoint import open_checkpoint
from runtimes import onnxruntime_runner
from runtimes.artifact import Artifact
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.parity import ParityReport, ParitySummary, compare, judge_greedy, make_case, run_case
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec


def _verify(artifact: Artifact, folder: Path, checkpoint: Path, seed: int = 0, **runner_class: type) -> ParityReport:
    graph = artifact.manifest.graphs["decoder"]
    runner = runner_class.get("runner", OnnxRuntimeRunner)
    return verify(
        lambda: runner(folder / graph.file, graph.signature, artifact.manifest.cache, device="cpu"),
        open_checkpoint(checkpoint),
        layout="portable",
        signature=graph.signature,
        cache=artifact.manifest.cache,
        seed=seed,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_good_artifact_passes(
    precision: str, seed: int, tiny_artifacts: Callable[[str], Artifact], tiny_llama: Path
) -> None:
    """In every precision, for other random tokens too."""
    artifact = tiny_artifacts(precision)
    report = _verify(artifact, artifact.folder, tiny_llama, seed)
    assert report.passed, [rung for rung in report.rungs if not rung.passed]
    assert {"operator causal attention", "prefill logits", "far-end logits", "8 decode steps", "written cache"} <= {
        rung.name for rung in report.rungs
    }


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.name == name)
    return node


def _set(model: onnx.ModelProto, node: str, attribute: str, value: float) -> None:
    (found,) = (a for a in _node(model, node).attribute if a.name == attribute)
    if found.type == onnx.AttributeProto.INT:
        found.i = int(value)
    else:
        found.f = value


def _scale(model: onnx.ModelProto, factor: float) -> None:
    (attribute,) = (a for a in _node(model, "layers.1.attn/Attention").attribute if a.name == "scale")
    attribute.f *= factor


def _swap_inputs(model: onnx.ModelProto, node: str, first: int, second: int) -> None:
    inputs = _node(model, node).input
    inputs[first], inputs[second] = inputs[second], inputs[first]


def _inv_freq(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(".inv_freq"))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))


def _retype(model: onnx.ModelProto, old: str, new: str) -> None:
    (node,) = (node for node in model.graph.node if node.op_type == old)
    node.op_type = new


def _rewire(model: onnx.ModelProto, node: str, index: int, value: str) -> None:
    _node(model, node).input[index] = value


def _drop_mask(model: onnx.ModelProto) -> None:
    """The user's attention_mask is ignored: only causality is left."""
    (node,) = (node for node in model.graph.node if node.op_type == "And")
    node.op_type = "Or"
    node.input[1] = node.input[0]


def _round_to_half(model: onnx.ModelProto) -> None:
    """One layer's MLP output goes through float16."""
    node = _node(model, "layers.1.mlp.w2/MatMul")
    name = node.output[0]
    node.output[0] = f"{name}_exact"
    casts = [
        onnx.helper.make_node("Cast", [f"{name}_exact"], [f"{name}_half"], to=onnx.TensorProto.FLOAT16),
        onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT),
    ]
    at = list(model.graph.node).index(node) + 1
    nodes = [*model.graph.node[:at], *casts, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _swap_gate_and_up(model: onnx.ModelProto) -> None:
    _rewire(model, "layers.0.mlp.w1/Transpose", 0, "model.layers.0.mlp.up_proj.weight")
    _rewire(model, "layers.0.mlp.w3/Transpose", 0, "model.layers.0.mlp.gate_proj.weight")


GRAPH_FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "eps ten times too small in one norm": lambda m: _set(m, "layers.1.mlp_norm/RMSNormalization", "epsilon", 1e-6),
    "scale off by 0.1 % in one layer": lambda m: _scale(m, 1.001),
    "scale applied twice": lambda m: _scale(m, 32**-0.5),
    "rope pairs interleaved for one key": lambda m: _set(m, "layers.2.attn/RotaryEmbedding_2", "interleaved", 1),
    "rope cos and sin swapped": lambda m: _swap_inputs(m, "layers.0.attn/RotaryEmbedding", 1, 2),
    "rope frequencies off by 0.1 %": lambda m: _inv_freq(m, lambda f: f * np.float32(1.001)),
    "slowest rope frequency zero": lambda m: _inv_freq(m, lambda f: f * (f != f.min())),
    "keys read as values": lambda m: _rewire(m, "layers.1.attn/Attention", 2, "layers.1.attn/Slice"),
    "k and v swapped": lambda m: _swap_inputs(m, "layers.1.attn/Attention", 1, 2),
    "current token not seen": lambda m: _retype(m, "LessOrEqual", "Less"),
    "attention_mask ignored": _drop_mask,
    "gate and up swapped": _swap_gate_and_up,
    "a layer uses another layer's norm": lambda m: _rewire(
        m, "layers.2.sa_norm/RMSNormalization", 1, "model.layers.1.input_layernorm.weight"
    ),
    "one matrix product in half precision": _round_to_half,
}


class _InFloat32(OnnxRuntimeRunner):
    """As a float16 artifact is verified for the second time."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options, in_float32=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_a_float16_graph_passes_in_float32(
    seed: int, tiny_artifacts: Callable[[str], Artifact], tiny_llama: Path
) -> None:
    """Its weights are rounded, its arithmetic is not."""
    artifact = tiny_artifacts("fp16")
    report = _verify(artifact, artifact.folder, tiny_llama, seed, runner=_InFloat32)
    assert report.passed, [rung for rung in report.rungs if not rung.passed]
    assert "float16 computed as float32" in report.runtime


@pytest.fixture
def copy(tiny_artifact: Artifact, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_artifact.folder, folder)
    return folder


FAULTS = [(fault, "fp32", OnnxRuntimeRunner) for fault in GRAPH_FAULTS]
# rounding to half precision is no fault in a graph of half precision
FAULTS += [(fault, "fp16", _InFloat32) for fault in GRAPH_FAULTS if "half precision" not in fault]


@pytest.mark.parametrize(("fault", "precision", "runner"), FAULTS)
def test_a_fault_in_the_graph_is_caught(
    fault: str,
    precision: str,
    runner: type,
    tiny_artifacts: Callable[[str], Artifact],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """The same graph with one small change, still valid, still fluent."""
    artifact = tiny_artifacts(precision)
    shutil.copytree(artifact.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    GRAPH_FAULTS[fault](model)
    onnx.save(model, path)
    assert not _verify(artifact, path.parent, tiny_llama, runner=runner).passed


@pytest.mark.parametrize("bit", [30, 22, 14])
def test_one_flipped_bit_in_one_weight_is_caught(
    bit: int, copy: Path, tiny_artifact: Artifact, tiny_llama: Path
) -> None:
    """The bit of the largest weight of one matrix: its exponent's top, its mantissa's top, one in the middle."""
    stored = open_checkpoint(copy).tensors["model.layers.1.self_attn.o_proj.weight"]
    weights = np.memmap(stored.path, np.float32, "r+", stored.offset, (stored.nbytes // 4,))
    bits = weights.view(np.uint32)
    bits[int(np.abs(weights).argmax())] ^= np.uint32(1 << bit)
    weights.flush()
    assert not _verify(tiny_artifact, copy, tiny_llama).passed


class _ShiftedWrites(OnnxRuntimeRunner):
    """Writes each decode step's key and value one slot early."""

    def step(self, feeds: Feeds) -> np.ndarray:
        early = (
            np.maximum(feeds["write_indices"] - 1, 0) if feeds["input_ids"].shape[1] == 1 else feeds["write_indices"]
        )
        return super().step({**feeds, "write_indices": early})


class _ShiftedPositions(OnnxRuntimeRunner):
    """Counts positions of decode steps from one: rotary angles are off by one, the mask is not."""

    def step(self, feeds: Feeds) -> np.ndarray:
        step = feeds["input_ids"].shape[1] == 1
        return super().step({**feeds, "position_ids": feeds["position_ids"] + int(step)})


class _StaleTail(OnnxRuntimeRunner):
    """Sees one slot beyond what was written."""

    def step(self, feeds: Feeds) -> np.ndarray:
        total = min(feeds["attention_mask"].shape[1] + 1, self.cache_spec.max_len)
        mask = np.ones((len(feeds["attention_mask"]), total), np.int64)
        positions = feeds["position_ids"]
        return super().step({**feeds, "attention_mask": mask, "position_ids": np.minimum(positions + 1, total - 1)})


class _FirstLogits(OnnxRuntimeRunner):
    """Ignores logit_indices: answers for the last padded position of every row."""

    def step(self, feeds: Feeds) -> np.ndarray:
        last = np.full_like(feeds["logit_indices"], feeds["input_ids"].shape[1] - 1)
        return super().step({**feeds, "logit_indices": last})


def _faulty(change: Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]) -> type:
    """A runner that runs on other feeds than it was given; `change` gets them, and the capacity of the cache."""

    class Faulty(OnnxRuntimeRunner):
        def step(self, feeds: Feeds) -> np.ndarray:
            feeds = dict(feeds)
            return super().step({**feeds, **change(feeds, self.cache_spec.max_len)})

    return Faulty


def _slots(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return feeds["write_indices"][:, None] + np.arange(feeds["input_ids"].shape[1])


def _zero_late_rows(feeds: dict[str, np.ndarray], max_len: int) -> dict[str, np.ndarray]:
    return {"write_indices": np.where(np.arange(len(feeds["write_indices"])) < 3, feeds["write_indices"], 0)}


def _zero_chunks(feeds: dict[str, np.ndarray], max_len: int) -> dict[str, np.ndarray]:
    chunk = feeds["input_ids"].shape[1] > 1 and feeds["attention_mask"].shape[1] < max_len
    return {"write_indices": feeds["write_indices"] * (not chunk)}


def _collapse_positions(feeds: dict[str, np.ndarray], max_len: int) -> dict[str, np.ndarray]:
    positions = feeds["position_ids"]
    return {"position_ids": np.where((positions > 36) & (positions < max_len - 8), 36, positions)}


def _ignore_mask(feeds: dict[str, np.ndarray], max_len: int) -> dict[str, np.ndarray]:
    mask = feeds["attention_mask"]
    return {"attention_mask": np.ones_like(mask) if 36 < mask.shape[1] < max_len else mask}


RUNNER_FAULTS: dict[str, type] = {
    "writes one slot early": _ShiftedWrites,
    "positions off by one": _ShiftedPositions,
    "sees one stale slot": _StaleTail,
    "ignores logit_indices": _FirstLogits,
    "only the first of logit_indices": _faulty(
        lambda feeds, _: {"logit_indices": np.repeat(feeds["logit_indices"][:, :1], feeds["logit_indices"].shape[1], 1)}
    ),
    "every row has row 0's mask": _faulty(
        lambda feeds, _: {"attention_mask": np.repeat(feeds["attention_mask"][:1], len(feeds["attention_mask"]), 0)}
    ),
    "positions are slots": _faulty(lambda feeds, _: {"position_ids": _slots(feeds)}),
    "rows from 3 on write to slot 0": _faulty(_zero_late_rows),
    "chunks write to slot 0": _faulty(_zero_chunks),
    "middle positions collapse": _faulty(_collapse_positions),
    "mask ignored between some lengths": _faulty(_ignore_mask),
}


@pytest.mark.parametrize("fault", RUNNER_FAULTS)
def test_a_fault_in_the_runner_is_caught(
    fault: str, tiny_artifact: Artifact, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bookkeeping that is wrong in one respect, as a graph could be too: so the runner's own checks are off."""
    monkeypatch.setattr(onnxruntime_runner, "check_step", lambda *args: None)
    runner = RUNNER_FAULTS[fault]
    assert not _verify(tiny_artifact, tiny_artifact.folder, tiny_llama, runner=runner).passed


def test_an_infinite_yardstick_passes_nothing() -> None:
    """Where eager PyTorch itself overflows, nothing can be said."""
    truth, overflown = np.ones(4), np.array([1.0, np.inf, 1.0, 1.0])
    rung = compare("x", truth, truth, overflown, "float16")
    assert not rung.passed
    assert rung.note == "eager PyTorch itself overflows in float16"
    assert not compare("x", overflown, truth, overflown, "float16").passed


def test_infinite_logits_fail() -> None:
    """Not every comparison with NaN is false by itself."""
    truth = np.ones(4)
    assert not compare("x", np.array([1.0, np.nan, 1.0, 1.0]), truth, truth, "float32").passed
    assert not compare("x", np.array([1.0, np.inf, 1.0, 1.0]), truth, truth, "float32").passed
    assert compare("x", truth, truth, truth, "float32").passed


def test_a_greedy_token_must_be_the_best_unless_rounding_decides(tiny_artifact: Artifact) -> None:
    """Margins below twice the limit may go either way; larger ones may not."""
    with OnnxRuntimeRunner.open(tiny_artifact, device="cpu") as runner:
        case = make_case(100, runner.cache_spec, 1)
        target = run_case(runner, case)
    truth = [np.zeros((len(target.greedy[0]), 100))]
    truth[0][:, target.greedy[0]] = 1.0
    assert judge_greedy(case, target, truth, 0.01).passed
    other = (target.greedy[0][2] + 1) % 100
    truth[0][2, other] = truth[0][2].max() + 0.019
    assert judge_greedy(case, target, truth, 0.01).passed
    truth[0][2, other] += 0.01
    assert not judge_greedy(case, target, truth, 0.01).passed


@pytest.mark.parametrize("max_len", [1, 2, 5, 9, 36, 4096])
@pytest.mark.parametrize("max_batch", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 1, 12, 13, 30, 512, 4095, 4096, 10_000])
@pytest.mark.parametrize("free_positions", [True, False])
def test_cases_fit_the_artifact(
    max_len: int, max_batch: int, window: int | None, free_positions: bool, key_value_cache: Callable[..., CacheSpec]
) -> None:
    """However small the cache: no row runs past its end, and the far prompt ends in the last slot."""
    spec = key_value_cache(layers=1, kv_heads=1, max_len=max_len, head_dim=2)
    case = make_case(50, spec, max_batch, window=window, free_positions=free_positions)
    assert 1 <= len(case.prompts) <= max_batch
    assert all(1 <= len(case.row(row)) <= max_len for row in range(len(case.prompts)))
    assert case.far_position + len(case.far_prompt) == max_len
    assert max(map(len, case.prompts)) + case.greedy_steps - 1 <= max_len
    chunks = case.chunks
    rows, length = chunks.tokens.shape
    assert 1 <= rows <= max_batch
    assert sum(chunks.sizes) == length
    assert chunks.slots.shape == chunks.positions.shape == (rows, length)
    assert chunks.slots.min() >= 0
    assert chunks.slots.max() < max_len
    assert chunks.positions.max() < max_len
    assert (chunks.positions[:, :-1] == chunks.slots[:, :-1]).all()
    assert (chunks.positions[:, -1] >= chunks.slots[:, -1]).all()
    assert free_positions or (chunks.positions == chunks.slots).all()
    starts = np.cumsum([0, *chunks.sizes[:-1]])
    for start, size in zip(starts, chunks.sizes, strict=True):
        assert (np.diff(chunks.slots[:, start : start + size], axis=1) == 1).all()  # one call writes to neighbours
    assert (np.diff(chunks.slots, axis=1) >= 1).all()


@pytest.mark.parametrize("window", [13, 30, 300, 512, 4095])
def test_a_chunked_row_reaches_beyond_a_window(window: int, key_value_cache: Callable[..., CacheSpec]) -> None:
    """Some of its tokens see all of the first chunk, some a part of it, however long the window is."""
    spec = key_value_cache(layers=1, kv_heads=1, max_len=4096, head_dim=2)
    chunks = make_case(50, spec, 8, window=window).chunks
    first = chunks.slots[0, : chunks.sizes[0]]
    seen = [int((slot - first < window).sum()) for slot in chunks.slots[0, chunks.sizes[0] :]]
    assert seen[0] == len(first)
    assert 0 < seen[-1] < len(first)


def test_large_caches_get_fewer_rows(key_value_cache: Callable[..., CacheSpec]) -> None:
    """A cache of 100 GB a row is not made three times."""
    sizes = {"layers": 80, "kv_heads": 8, "head_dim": 128}
    assert len(make_case(50, key_value_cache(max_len=131072, **sizes), 8).prompts) == 1
    assert len(make_case(50, key_value_cache(max_len=1024, **sizes), 8).prompts) == 3


def test_a_summary_without_reports_has_not_passed() -> None:
    """Nothing checked is not the same as nothing wrong."""
    assert not ParitySummary(reports=(), not_run={"tensorrt": "no GPU"}).passed
