"""Bytes of weights that an ONNX graph reads for each token."""

import math
from pathlib import Path
from typing import Any

# {operator: its input that is looked up row by row}
LOOKED_UP = {"Gather": 0, "GatherBlockQuantized": 0}


def weight_bytes(graph: Path) -> int:
    """Bytes of all initializers but those that nothing reads as a whole, such as a table of embeddings."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    whole = {
        name
        for node in model.graph.node
        for index, name in enumerate(node.input)
        if index != LOOKED_UP.get(node.op_type)
    }
    return sum(_nbytes(tensor) for tensor in model.graph.initializer if tensor.name in whole)


def _nbytes(tensor: Any) -> int:
    import onnx

    elements = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
        return (elements + 1) // 2
    return elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
