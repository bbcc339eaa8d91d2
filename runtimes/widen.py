"""Rewrite a bfloat16 graph to compute in float32 with the same bfloat16 weights.

ONNX Runtime has no bfloat16 kernels on the CPU. Widened, the graph and the stored weights can be run and checked
there: only the rounding of intermediate results is missing.
"""

from pathlib import Path
from typing import Any

from runtimes.errors import RuntimeMissingError


def load_onnx(path: Path) -> Any:
    """The model in `path` as an onnx.ModelProto, its external data not loaded. Needs the onnx package."""
    try:
        import onnx
    except ImportError:
        raise RuntimeMissingError(
            "running a bfloat16 artifact on the CPU needs the onnx package: pip install onnx"
        ) from None
    return onnx.load(path, load_external_data=False)


def is_bfloat16(model: Any) -> bool:
    """True when an input of the onnx.ModelProto is bfloat16."""
    import onnx

    return any(value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in model.graph.input)


def widen_bfloat16(model: Any) -> bytes:
    """The onnx.ModelProto, serialised, with every bfloat16 value made float32 (`model` itself is changed).

    Weights stay where they are, as bfloat16; each is followed by a Cast.
    """
    import onnx

    graph = model.graph
    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT

    casts = []
    renamed = {}
    for tensor in graph.initializer:
        if tensor.data_type == bfloat16:
            renamed[tensor.name] = f"{tensor.name}/float32"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [renamed[tensor.name]], to=float32))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == bfloat16:
                attribute.i = float32
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == bfloat16:
            value.type.tensor_type.elem_type = float32
    del graph.value_info[:]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    serialized: bytes = model.SerializeToString()
    return serialized
