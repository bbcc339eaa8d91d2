"""Engines that show their values: what is marked when one is built."""

from pathlib import Path

import onnx
import pytest

from exporter.progress import Quiet
from exporter.targets import tensorrt as target
from runtimes.artifact import Artifact

SHOWN = {"layers.1.attn/Attention", "layers.2/Add_2", "layers.0.attn/LessOrEqual", "present.0.key", "not/there"}


def test_values_become_outputs_of_the_network(tiny_artifact: Artifact) -> None:
    """TensorRT's parser keeps the graph's names; outputs that were there stay once."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = target.get_logger("tensorrt-rtx")
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    target._parse(parser, logger, tiny_artifact.path("decoder.onnx"))
    before = [network.get_output(index).name for index in range(network.num_outputs)]
    target._mark(network, SHOWN)
    after = [network.get_output(index).name for index in range(network.num_outputs)]
    assert sorted(after) == sorted([*before, *(SHOWN - {"present.0.key", "not/there"})])


def test_an_engine_with_all_values_builds(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """TensorRT-RTX needs no GPU for that; the engine is another one than without them."""
    pytest.importorskip("tensorrt_rtx")
    model = onnx.load(tiny_artifact.path("decoder.onnx"), load_external_data=False)
    names = {node.output[0] for node in model.graph.node if node.op_type in ("MatMul", "Attention", "Add")}
    signature = tiny_artifact.manifest.graphs["decoder"].signature
    for shown, file in ((set(), "plain"), (names, "shown")):
        target.build_engine(
            "tensorrt-rtx",
            tiny_artifact.path("decoder.onnx"),
            tmp_path / file,
            signature,
            gpu_archs=(),
            progress=Quiet(),
            shown=shown,
        )
    assert (tmp_path / "plain").read_bytes() != (tmp_path / "shown").read_bytes()
    assert len(names) > 20
