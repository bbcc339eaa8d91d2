"""TensorRT-RTX engines, built without a GPU; what the parser would get wrong fails the build."""

import dataclasses
import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.progress import Quiet
from exporter.targets import TARGETS
from exporter.targets.target import Job
from exporter.targets.tensorrt import build_engine, check
from runtimes.artifact import EngineEntry, open_artifact
from runtimes.errors import EngineLoadError
from runtimes.signature import DimRange, GraphSignature, TensorSpec
from runtimes.tensorrt_api import get_logger

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

TARGET = "tensorrt-rtx"


class Recorded(Quiet):
    """A progress display that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps = 0

    def start(self, stage: str, total: int | None = None) -> None:
        self.stages.append((stage, total))

    def advance(self, amount: int) -> None:
        self.steps += amount


def build(artifact: Path, engine: Path, *archs: str, progress: Quiet | None = None) -> EngineEntry:
    """Build an exported artifact's engine."""
    signature = open_artifact(artifact).manifest.graphs["decoder"].signature
    graph = artifact / "decoder.onnx"
    return build_engine(TARGET, graph, engine, signature, gpu_archs=archs, progress=progress or Quiet())


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_decoder_builds(x_graphs: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    """Every precision becomes an engine with a weight file's worth of bytes in it, and progress is told."""
    progress = Recorded()
    entry = build(x_graphs(precision), tmp_path / "decoder.engine", progress=progress)
    assert entry == EngineEntry(
        file="decoder.engine", graph="decoder", target=TARGET, library_version=trt.__version__, gpu_archs=()
    )
    weights = (x_graphs(precision) / "model.safetensors").stat().st_size
    assert (tmp_path / "decoder.engine").stat().st_size > weights
    assert [stage for stage, _ in progress.stages] == ["parse", "build"]
    total = progress.stages[-1][1]
    assert total
    assert 0 < progress.steps <= total


def test_an_export_with_an_engine(x_export: Any) -> None:
    """The command's --target tensorrt-rtx: the engine lies beside the graph, listed and hashed in the manifest."""
    manifest = json.loads((x_export.folder / "manifest.json").read_text())
    name = "decoder.tensorrt-rtx.engine"
    data = (x_export.folder / name).read_bytes()
    assert manifest["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    entry = manifest["engines"].pop(TARGET)
    assert entry == {
        **{"file": name, "decode_file": None, "graph": "decoder", "target": TARGET},
        **{"library_version": trt.__version__, "gpu_archs": []},
    }
    assert not manifest["engines"]
    assert manifest["tools"]["tensorrt-rtx"]
    parity = manifest["parity"]
    ran = [runtime for runtime in parity["runtimes"] if runtime.startswith(TARGET)]
    assert ran or "needs a CUDA GPU" in parity["not_run"][TARGET]


@pytest.mark.parametrize(("given", "name"), [("89", "SM89"), ("sm_120", "SM120"), ("8.6", "SM86"), ("SM75", "SM75")])
def test_architectures_are_read(given: str, name: str) -> None:
    """The usual spellings are accepted, before any work is done."""
    check(TARGET, (given,))
    assert name in trt.ComputeCapability.__members__


@pytest.mark.parametrize("given", ["90", "sm_90", "", "89;120", "hopper", "CURRENT", "NONE"])
def test_unknown_architectures_are_refused(given: str) -> None:
    """The message repeats what was given and lists what the library builds for."""
    with pytest.raises(ExportError) as error:
        check(TARGET, (given,))
    assert f"--gpu-arch {given}" in str(error.value)
    for known in ("SM75", "SM80", "SM86", "SM89", "SM120"):
        assert known in str(error.value)


def test_engines_for_architectures(x_one_layer_export: Path, tmp_path: Path) -> None:
    """--gpu-arch changes what is built: one architecture, another, or both; the entry says which."""
    given = [("89",), ("sm_120",), ("sm_120", "8.9")]
    entries = [build(x_one_layer_export, tmp_path / "-".join(archs), *archs) for archs in given]
    assert [entry.gpu_archs for entry in entries] == [("SM89",), ("SM120",), ("SM120", "SM89")]
    sizes = [(tmp_path / entry.file).stat().st_size for entry in entries]
    assert len(set(sizes)) == len(given), sizes  # the bytes would differ anyway: see test_cli.py


def test_the_default_architectures_are_not_overstated(
    x_run: Callable[..., Any], x_export: Any, x_graphs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without --gpu-arch the library leaves Turing (SM75) out, which needs a larger engine; the command may not claim
    every architecture. https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html"""
    build(x_graphs("fp16"), tmp_path / "default")
    build(x_graphs("fp16"), tmp_path / "turing", "75")
    assert (tmp_path / "default").stat().st_size < (tmp_path / "turing").stat().st_size
    shown = x_run("inspect", x_export.folder).out
    assert f"version {trt.__version__}" in shown
    assert "every architecture" not in shown


def test_both_profiles_reach_the_builder(
    x_graphs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profile 0 is prefill, up to the artifact's limits; profile 1 is decode, one token a row."""
    profiles: list[Any] = []
    configs: list[Any] = []

    class Builder(trt.Builder):  # type: ignore[misc, name-defined]
        def create_optimization_profile(self) -> Any:
            profiles.append(super().create_optimization_profile())
            return profiles[-1]

        def create_builder_config(self) -> Any:
            configs.append(super().create_builder_config())
            return configs[-1]

    monkeypatch.setattr(trt, "Builder", Builder)
    build(x_graphs("fp16"), tmp_path / "engine")
    assert [config.num_optimization_profiles for config in configs] == [2]
    shapes = [
        {
            name: [tuple(shape) for shape in profile.get_shape(name)]
            for name in ("input_ids", "write_indices", "attention_mask", "logit_indices", "past_key_values.2.value")
        }
        for profile in profiles
    ]
    cache = [(1, 2, 128, 32), (1, 2, 128, 32), (8, 2, 128, 32)]
    same = {
        "write_indices": [(1,), (1,), (8,)],
        "attention_mask": [(1, 1), (1, 128), (8, 128)],
        "past_key_values.2.value": cache,
    }
    assert shapes == [
        same | {"input_ids": [(1, 1), (1, 128), (8, 128)], "logit_indices": [(1, 1), (1, 1), (8, 128)]},
        same | {"input_ids": [(1, 1), (1, 1), (8, 1)], "logit_indices": [(1, 1), (1, 1), (8, 1)]},
    ]


def test_the_cache_is_updated_in_place(x_graphs: Callable[[str], Path]) -> None:
    """In the parsed network every present comes from a cache-update layer, and every attention may be decomposed."""
    from exporter.targets.tensorrt import _allow_decomposition, _parse
    from runtimes.tensorrt_api import get_logger

    logger = get_logger(TARGET)
    logger.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, logger, x_graphs("fp32") / "decoder.onnx")
    _allow_decomposition(trt, network)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    presents = {network.get_output(index).name for index in range(network.num_outputs)} - {"logits"}
    assert {layer.get_output(0).name for layer in updates} == presents
    attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(attentions) == 3
    for layer in attentions:
        layer.__class__ = trt.IAttentionInputLayer
        assert layer.attention.decomposable


# --- graphs that must not become engines ------------------------------------------------------------------------------


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> GraphSignature:
    """Write a model that onnx's own checker accepts; its signature, all shapes constant."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)

    def specs(values: list[Any]) -> tuple[TensorSpec, ...]:
        shapes = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values]
        return tuple(
            TensorSpec(name=value.name, dtype="float16", shape=shape)
            for value, shape in zip(values, shapes, strict=True)
        )

    one = DimRange(min=1, opt=1, max=1)
    dims = {"batch_size": one, "sequence_length": one, "n": one}
    return GraphSignature(inputs=specs(inputs), outputs=specs(outputs), dims=dims, aliases={}, limits={})


def value(name: str, *shape: int, dtype: int = TensorProto.FLOAT16) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def attempt(tmp_path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> str:
    """The message with which the graph is refused."""
    signature = save(tmp_path / "graph.onnx", nodes, inputs, outputs)
    with pytest.raises(ExportError) as error:
        build_engine(TARGET, tmp_path / "graph.onnx", tmp_path / "e", signature, gpu_archs=(), progress=Quiet())
    return str(error.value)


def test_a_refused_graph_names_node_and_operator(tmp_path: Path) -> None:
    """Every error of the parser is listed, with the node's name, its operator and the reason."""
    nodes = [
        helper.make_node("Det", ["x"], ["a"], name="layers.0/first"),
        helper.make_node("Det", ["x"], ["b"], name="layers.1/second"),
    ]
    message = attempt(tmp_path, nodes, [value("x", 2, 3, 3)], [value("a", 2), value("b", 2)])
    assert message.startswith("the TensorRT parser refuses graph.onnx:")
    assert "layers.0/first (Det): " in message
    assert "layers.1/second (Det): " in message


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    """The library's own words."""
    (tmp_path / "graph.onnx").write_bytes(b"this is no protobuf")
    signature = GraphSignature(inputs=(), outputs=(), dims={}, aliases={}, limits={})
    with pytest.raises(ExportError, match=r"graph\.onnx: .*[Nn]etwork must have at least one output"):
        build_engine(TARGET, tmp_path / "graph.onnx", tmp_path / "e", signature, gpu_archs=(), progress=Quiet())


@pytest.mark.parametrize("computed", [False, True])
def test_an_input_that_the_parser_ignores_fails_the_build(tmp_path: Path, computed: bool) -> None:
    """Attention's nonpad_kv_seqlen: it is dropped with a mere warning, and the engine would compute something else."""
    inputs = [value(name, 1, 2, 8, 64) for name in "qkv"] + [value("valid", 1, dtype=TensorProto.INT64)]
    lengths = "lengths" if computed else "valid"
    nodes = [helper.make_node("Attention", ["q", "k", "v", "", "", "", lengths], ["y"], name="attn/Attention")]
    if computed:
        nodes.insert(0, helper.make_node("Abs", ["valid"], ["lengths"], name="lengths/Abs"))
    message = attempt(tmp_path, nodes, inputs, [value("y", 1, 2, 8, 64)])
    assert "ignore" in message
    assert "valid" in message


def test_the_same_graph_without_that_input_builds(tmp_path: Path) -> None:
    """So it was the ignored input that failed the build above."""
    inputs = [value(name, 1, 2, 8, 64) for name in "qkv"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="layers.0.attn/Attention")
    signature = save(tmp_path / "graph.onnx", [node], inputs, [value("y", 1, 2, 8, 64)])
    engine = tmp_path / "graph.engine"
    build_engine(TARGET, tmp_path / "graph.onnx", engine, signature, gpu_archs=(), progress=Quiet())
    assert engine.stat().st_size > 0


def test_an_earlier_failure_does_not_spoil_the_next_build(tmp_path: Path) -> None:
    """Messages are those of this build: the library has one logger for the whole process."""
    test_a_refused_graph_names_node_and_operator(tmp_path)
    test_the_same_graph_without_that_input_builds(tmp_path)


@pytest.mark.parametrize(("stage", "number"), [("parse", signal.SIGINT), ("build", signal.SIGTERM)])
def test_a_signal_inside_the_library_is_not_lost(
    x_one_layer_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: signal.Signals
) -> None:
    """A signal that arrives while the library's C++ calls back into Python ends the build: C++ swallows exceptions."""

    class StoppedError(BaseException):
        pass

    def stop(received: int, frame: Any) -> None:
        raise StoppedError

    progress = Recorded()
    logger = get_logger(TARGET)
    original = type(logger).log
    sent: list[str] = []

    def log(self: Any, severity: Any, message: str) -> None:
        if not sent and progress.stages[-1:] and progress.stages[-1][0] == stage:
            sent.append(message)
            signal.raise_signal(number)
        original(self, severity, message)

    monkeypatch.setattr(type(logger), "log", log)
    previous = signal.signal(number, stop)
    try:
        with pytest.raises(StoppedError):
            build(x_one_layer_export, tmp_path / "engine", progress=progress)
    finally:
        signal.signal(number, previous)
    assert sent


def test_a_failed_build_leaves_no_artifact(
    x_one_layer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the engine cannot be built, the whole export is undone."""

    def fail(*args: Any, **kwargs: Any) -> EngineEntry:
        raise ExportError("tensorrt-rtx could not build an engine")

    monkeypatch.setitem(TARGETS, TARGET, dataclasses.replace(TARGETS[TARGET], finish=fail))
    with pytest.raises(ExportError, match="could not build"):
        export(ExportRequest(checkpoint=x_one_layer(), out=tmp_path / "out", targets=(TARGET,)))
    assert [path.name for path in tmp_path.iterdir()] == ["one-layer"]


def test_an_engine_for_other_gpus_is_not_a_failed_export(
    x_one_layer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built on a machine whose GPU cannot load it (an H100, or --gpu-arch 120 on an RTX 4090): that engine is recorded
    as not verified, with the reason, and the artifact is published."""
    from exporter import pipeline

    def finish(job: Job) -> EngineEntry:
        job.path("engine").write_bytes(b"for another GPU")
        return EngineEntry(file="engine", graph="decoder", target=TARGET, library_version="1", gpu_archs=())

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise EngineLoadError("decoder.tensorrt-rtx.engine cannot be loaded: it was made for another GPU")

    monkeypatch.setitem(TARGETS, TARGET, dataclasses.replace(TARGETS[TARGET], finish=finish))
    monkeypatch.setitem(pipeline.ENGINE_RUNNERS, TARGET, refuse)
    result = export(ExportRequest(checkpoint=x_one_layer(), out=tmp_path / "out", targets=(TARGET,)))
    assert result.parity is not None
    assert result.parity.passed
    assert "made for another GPU" in result.parity.not_run[TARGET]
    assert open_artifact(tmp_path / "out").manifest.parity is not None
