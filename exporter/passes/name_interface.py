"""Give inputs, outputs and dynamic dimensions the names that the signature promises."""

import onnx_ir as ir

from runtimes.signature import GraphSignature, TensorSpec


def name_interface(model: ir.Model, signature: GraphSignature) -> None:
    """Rename graph inputs and outputs by position, and every symbolic dimension in the graph to match."""
    graph = model.graph
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.inputs, signature.inputs, strict=True):
        assert value.shape is not None
        for dim, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                assert isinstance(dim, ir.SymbolicDim), f"{spec.name}: {wanted} was specialised to {dim}"
                assert dim.value is not None
                assert symbols.setdefault(dim.value, wanted) == wanted
    for value, spec in zip(graph.outputs, signature.outputs, strict=True):
        assert value.shape is not None
        for dim, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str) and not isinstance(dim, int):
                symbols.setdefault(str(dim.value), wanted)  # a size that follows from others
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([symbols.get(str(_plain(dim)), _plain(dim)) for dim in value.shape])
    for value, spec in zip((*graph.inputs, *graph.outputs), (*signature.inputs, *signature.outputs), strict=True):
        _check(value, spec)
        value.name = spec.name


def _plain(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim


def _values(graph: ir.Graph) -> list[ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values.extend(node.outputs)
    return values


def _check(value: ir.Value, spec: TensorSpec) -> None:
    """The traced graph must agree with what the signature promises; if it does not, the exporter has a bug."""
    assert value.dtype == ir.DataType[_ONNX_NAMES[spec.dtype]], (spec, value.dtype)
    assert value.shape is not None
    assert tuple(_plain(dim) for dim in value.shape) == spec.shape, (spec, value.shape)


_ONNX_NAMES = {"int64": "INT64", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "bool": "BOOL"}
