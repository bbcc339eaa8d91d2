"""Rewrite a float16 or bfloat16 graph to compute in float32 with the same weights.

ONNX Runtime has no bfloat16 kernels on the CPU: widened, such a graph can be run there. And a widened graph can be
checked to float32 accuracy: only the rounding of intermediate results is missing, behind which a mistake might hide.
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
            "computing a 16-bit graph in float32 on the CPU needs the onnx package: pip install onnx"
        ) from None
    return onnx.load(path, load_external_data=False)


def widen(model: Any) -> bytes:
    """The onnx.ModelProto, serialised, with every 16-bit float made float32 (`model` itself is changed).

    Weights stay where they are, as they are; each is followed by a Cast.
    """
    import onnx

    graph = model.graph
    float32, narrow = onnx.TensorProto.FLOAT, (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

    casts = []
    renamed = {}
    for tensor in graph.initializer:
        if tensor.data_type in narrow:
            renamed[tensor.name] = f"{tensor.name}/float32"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [renamed[tensor.name]], to=float32))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = float32
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = float32
    del graph.value_info[:]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    serialized: bytes = model.SerializeToString()
    return serialized
