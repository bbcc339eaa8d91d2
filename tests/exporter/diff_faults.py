"""Single faults in a graph, and what should be named for each."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import numpy_helper

from runtimes.artifact import Artifact

Change = Callable[[onnx.ModelProto], None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change, and the first operator that it makes wrong."""

    change: Change
    module: str
    node: str
    weights: tuple[str, ...] = ()


def break_graph(artifact: Artifact, out: Path, change: Change, graph: str = "decoder") -> Artifact:
    """A copy of the artifact with one graph changed, opened without a look at its hashes."""
    shutil.copytree(artifact.folder, out)
    path = out / artifact.manifest.graphs[graph].file
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    return dataclasses.replace(artifact, folder=out)


def find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of that name."""
    (node,) = (node for node in model.graph.node if node.name == name)
    return node


def set_number(name: str, attribute: str, factor: float) -> Change:
    """Multiply a number that a node holds."""

    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in find(model, name).attribute if each.name == attribute)
        found.f *= factor

    return change


def set_flag(name: str, attribute: str, value: int) -> Change:
    """Set a whole number that a node holds."""

    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in find(model, name).attribute if each.name == attribute)
        found.i = value

    return change


def swap_inputs(name: str, first: int, second: int) -> Change:
    """Swap two inputs of a node."""

    def change(model: onnx.ModelProto) -> None:
        inputs = find(model, name).input
        inputs[first], inputs[second] = inputs[second], inputs[first]

    return change


def rewire(name: str, index: int, value: str) -> Change:
    """Let a node read something else."""

    def change(model: onnx.ModelProto) -> None:
        find(model, name).input[index] = value

    return change


def retype(name: str, op_type: str) -> Change:
    """Let a node be another operator."""

    def change(model: onnx.ModelProto) -> None:
        find(model, name).op_type = op_type

    return change


def scale_table(ending: str, factor: float) -> Change:
    """Multiply a table that the graph itself holds."""

    def change(model: onnx.ModelProto) -> None:
        (table,) = (each for each in model.graph.initializer if each.name.endswith(ending))
        numbers = numpy_helper.to_array(table)
        table.CopyFrom(numpy_helper.from_array((numbers * factor).astype(numbers.dtype), table.name))

    return change


def double(name: str) -> Change:
    """Let what a node makes come out twice as large, by an Add without a name."""

    def change(model: onnx.ModelProto) -> None:
        node = find(model, name)
        result, at = node.output[0], list(model.graph.node).index(node)
        node.output[0] = f"{result}/single"
        added = onnx.helper.make_node("Add", [node.output[0], node.output[0]], [result])
        nodes = [*model.graph.node[: at + 1], added, *model.graph.node[at + 1 :]]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return change


_ATTENTION = "layers.1.attn/Attention"
_NORM = "layers.1.mlp_norm/RMSNormalization"
_NORM_WEIGHT = "model.layers.1.post_attention_layernorm.weight"

# {name: fault} of tiny_llama in the portable layout
PORTABLE = {
    "eps ten times too small": Fault(set_number(_NORM, "epsilon", 0.1), "layers.1.mlp_norm", _NORM, (_NORM_WEIGHT,)),
    "scale off by 0.1 %": Fault(set_number(_ATTENTION, "scale", 1.001), "layers.1.attn", _ATTENTION),
    "keys and values swapped": Fault(swap_inputs(_ATTENTION, 1, 2), "layers.1.attn", _ATTENTION),
    "rope frequencies off by 0.1 %": Fault(scale_table(".inv_freq", 1.001), "layers.0.attn", "layers.0.attn/Mul"),
    "own token not seen": Fault(
        retype("layers.0.attn/LessOrEqual", "Less"), "layers.0.attn", "layers.0.attn/LessOrEqual"
    ),
    "another layer's norm": Fault(
        rewire("layers.2.sa_norm/RMSNormalization", 1, "model.layers.1.input_layernorm.weight"),
        "layers.2.sa_norm",
        "layers.2.sa_norm/RMSNormalization",
        ("model.layers.1.input_layernorm.weight",),
    ),
    "residual without the stream": Fault(
        rewire("layers.2/Add_2", 0, "layers.2.mlp.w2/MatMul"), "layers.2", "layers.2/Add_2"
    ),
    "a result doubled by a node without a name": Fault(
        double("layers.2.mlp.w1/MatMul"),
        "layers.2.mlp.w1",
        "layers.2.mlp.w1/MatMul",
        ("model.layers.2.mlp.gate_proj.weight",),
    ),
}

_SKIP = "layers.1.mlp_norm/SkipSimplifiedLayerNormalization"
_FUSED = "layers.2.attn/GroupQueryAttention"
_QKV = ("model.layers.2.self_attn.qkv_proj.weight",)

# {name: fault} of tiny_llama in the genai layout, int4
GENAI = {
    "eps of a fused norm": Fault(set_number(_SKIP, "epsilon", 10.0), "layers.1.mlp_norm", _SKIP, (_NORM_WEIGHT,)),
    "scale of fused attention": Fault(set_number(_FUSED, "scale", 1.01), "layers.2.attn", _FUSED, _QKV),
    "a window of fused attention": Fault(set_flag(_FUSED, "local_window_size", 5), "layers.2.attn", _FUSED, _QKV),
    "another layer's codes": Fault(
        rewire("layers.2.mlp.w2/MatMulNBits", 1, "model.layers.1.mlp.down_proj.weight"),
        "layers.2.mlp.w2",
        "layers.2.mlp.w2/MatMulNBits",
        ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight_scale"),
    ),
}
