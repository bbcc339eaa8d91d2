"""An engine that shows its values, on a simulated GPU: fed and read as a GPU wants it."""

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import pytest
import simulated_cuda as sim
import simulation

from exporter.diff import engine
from exporter.diff.exposed import expose
from exporter.diff.run import diff_artifact
from runtimes import tensorrt_runner
from runtimes.artifact import Artifact
from runtimes.signature import GraphSignature, TensorSpec

FAULTY = "layers.1.attn/Attention"


def _shape_of(context: sim.Context, name: str) -> tuple[int, ...]:
    """IExecutionContext.get_tensor_shape: of an output, once the inputs have theirs."""
    sizes: dict[str, int] = {}
    for each, spec in context.engine.inputs.items():
        sizes |= {dim: size for dim, size in zip(spec.shape, context.shapes[each], strict=True) if isinstance(dim, str)}
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in context.engine.outputs[name].shape)


def _float_values(graph: Path, dims: Collection[str]) -> list[TensorSpec]:
    """Inner float32 values of a graph whose shapes follow from those of its inputs."""
    model = onnx.load(graph, load_external_data=False)
    found = []
    for value in model.graph.value_info:
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if (
            value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            and {d for d in shape if isinstance(d, str)} <= dims
        ):
            found.append(TensorSpec(name=value.name, dtype="float32", shape=tuple(shape)))
    return found


def test_an_engine_shows_its_values_on_a_simulated_gpu(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of its graph is named as on ONNX Runtime."""
    shutil.copytree(tiny_artifact.folder, tmp_path / "copy")
    broken = dataclasses.replace(tiny_artifact, folder=tmp_path / "copy")
    model = onnx.load(broken.path("decoder.onnx"), load_external_data=False)
    (node,) = (node for node in model.graph.node if node.name == FAULTY)
    node.input[1], node.input[2] = node.input[2], node.input[1]
    onnx.save(model, broken.path("decoder.onnx"))

    def build(
        target: str, graph: Path, path: Path, signature: GraphSignature, shown: Collection[str], **_: Any
    ) -> None:
        model = onnx.load(graph, load_external_data=False)
        specs = [spec for spec in _float_values(graph, signature.dims.keys()) if spec.name in shown]
        expose(model, {spec.name for spec in specs})
        exposed = graph.with_name(f"{len(specs)}.onnx")
        onnx.save(model, exposed)
        more = dataclasses.replace(signature, outputs=(*signature.outputs, *specs))
        sim.write_engine(path, exposed, more)

    device = simulation.install_device(monkeypatch)
    simulation.install_libraries(monkeypatch, device, tiny_artifact, tmp_path)
    monkeypatch.setattr(sim.Context, "get_tensor_shape", _shape_of, raising=False)
    monkeypatch.setattr(engine, "get_logger", tensorrt_runner.get_logger)
    monkeypatch.setattr(engine, "check", lambda *_: None)
    monkeypatch.setattr(engine, "build_engine", build)
    comparison = diff_artifact(broken, runtime="tensorrt-rtx").comparisons[1]
    assert comparison.runtime == "tensorrt-rtx 0.0.simulated"
    assert [row.node for row in comparison.rows if not row.passed and row.node] == [FAULTY]
    assert len(comparison.rows) > 40
