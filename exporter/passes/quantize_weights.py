"""Let the graph read weights as they are stored: quantized, or in another float dtype than it computes in."""

from collections.abc import Mapping

import onnx_ir as ir

from exporter.passes import CONTRIB_DOMAIN
from exporter.weights import QuantizedWeight
from graphs.checkpoint import StoredTensor
from graphs.formats.own import SCALE, TENSOR_SCALE, ZERO_POINT

CODES: dict[str, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: what it multiplies is rounded to 8 bits
FLOATS: dict[str, ir.DataType] = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def quantize_weights(
    model: ir.Model, quantized: Mapping[str, QuantizedWeight], placed: Mapping[str, StoredTensor]
) -> None:
    """Replace each Transpose of a quantized weight [N, K] by the DequantizeLinear of its codes [K, N], which runtimes
    fuse with the MatMul behind it; and cast what comes from floats of another dtype."""
    matrices = {label: name for name, weight in quantized.items() for label in weight.members}
    found: dict[str, list[ir.Value]] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in matrices:
            del model.graph.initializers[name]  # its codes may have the same name
            found.setdefault(matrices[name], []).append(value)
        elif name in placed and value.const_value is None and FLOATS[placed[name].dtype] != value.dtype:
            _cast(model, value, FLOATS[placed[name].dtype])
    for name, weights in found.items():
        weight = weights[0] if len(weights) == 1 else _join(model, name, weights, quantized[name])
        (_multiply if quantized[name].rows_first else _dequantize)(model, weight, quantized[name])


def _join(model: ir.Model, name: str, weights: list[ir.Value], stored: QuantizedWeight) -> ir.Value:
    """Let one product take the place of those with several weights, which multiply the same: MatMul, then Split."""
    by_label = {weight.name: weight for weight in weights}
    products = [_product(by_label[label]) for label in stored.members]
    (x,) = {product.inputs[0] for product in products}
    assert x is not None
    joined = ir.Value(name=name, shape=ir.Shape(stored.shape), type=weights[0].type)
    base = _name_of_joined(name, [str(product.name).rpartition("/")[0] for product in products])
    transpose = _node("Transpose", [joined], f"{base}/Transpose", perm=[1, 0])
    turned = _result(transpose, joined.dtype, stored.shape[::-1])
    product = _node("MatMul", [x, turned], f"{base}/MatMul")
    assert x.shape is not None
    whole = _result(product, joined.dtype, [*x.shape[:-1], stored.shape[0]])
    sizes = _constant(model, f"{base}/sizes", list(stored.members.values()))
    split = ir.node("Split", [whole, sizes], attributes={"axis": -1}, num_outputs=len(products), name=f"{base}/Split")
    first = min(products, key=list(model.graph).index)
    model.graph.insert_before(first, [transpose, product, split])
    for old, part in zip(products, split.outputs, strict=True):
        (value,) = old.outputs
        part.name, part.type, part.shape = value.name, value.type, value.shape
        ir.convenience.replace_all_uses_with(value, part)
    unused = [node for old in products for node in (old, old.inputs[1].producer())]  # type: ignore[union-attr]
    model.graph.remove([node for node in unused if node is not None], safe=True)
    return joined


def _name_of_joined(weight: str, modules: list[str]) -> str:
    """What nodes of a joined weight are called: after the module that holds those it is made of, or, where one module
    made all products (of experts), after that and the last words of the weight's name."""
    *_, owner, leaf, _ = weight.split(".")
    if len(set(modules)) == 1:
        return f"{modules[0]}.{owner}.{leaf}"
    return f"{modules[0].rpartition('.')[0]}.{leaf}"


def _product(weight: ir.Value) -> ir.Node:
    """The one MatMul that multiplies by the transposed weight."""
    (transpose,) = weight.consumers()
    (product,) = transpose.outputs[0].consumers()
    assert (transpose.op_type, product.op_type) == ("Transpose", "MatMul")
    return product


def _constant(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(numbers, dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers[name] = value
    return value


def _multiply(model: ir.Model, weight: ir.Value, stored: QuantizedWeight) -> None:
    """com.microsoft.MatMulNBits in the place of each Transpose of the weight and the MatMul behind it."""
    parts = {suffix: _initializer(model, tensor) for suffix, tensor in stored.parts.items()}
    for suffix, part in parts.items():
        part.shape = ir.Shape(stored.parts[suffix].shape)
        if suffix != SCALE:
            part.dtype = ir.DataType.UINT8
    outputs, inputs = stored.shape
    for transpose in weight.consumers():
        for product in transpose.outputs[0].consumers():
            assert (transpose.op_type, product.op_type) == ("Transpose", "MatMul")
            given = [product.inputs[0], parts[""], parts[SCALE], *([parts[ZERO_POINT]] if ZERO_POINT in parts else [])]
            fused = ir.node(
                "MatMulNBits",
                given,
                attributes={
                    "K": inputs,
                    "N": outputs,
                    "bits": stored.format.grid.bits,
                    "block_size": stored.format.block,
                    "accuracy_level": INT8_ACTIVATIONS,
                },
                domain=CONTRIB_DOMAIN,
                name=str(product.name).removesuffix("MatMul") + "MatMulNBits",
            )
            result = fused.outputs[0]
            old = product.outputs[0]
            result.name, result.type, result.shape = old.name, old.type, old.shape
            _replace(model, product, [fused])
        model.graph.remove(transpose, safe=True)
    model.opset_imports[CONTRIB_DOMAIN] = 1


def _dequantize(model: ir.Model, weight: ir.Value, stored: QuantizedWeight) -> None:
    """DequantizeLinear-23 of the weight's parts, in the place of its transposed value."""
    users = [node for node, _ in weight.uses()]
    assert all(node.op_type == "Transpose" for node in users), (weight.name, [node.op_type for node in users])
    outputs, inputs = stored.shape
    groups = [stored.format.scales_of(inputs), outputs] if stored.format.block else [outputs]
    parts = {suffix: _initializer(model, tensor) for suffix, tensor in stored.parts.items()}
    codes, scales = parts[""], parts[SCALE]
    code_dtype = CODES[stored.format.name]
    codes.dtype, codes.shape = code_dtype, ir.Shape([inputs, outputs])
    scales.shape = ir.Shape(groups)
    if ZERO_POINT in parts:
        parts[ZERO_POINT].dtype, parts[ZERO_POINT].shape = code_dtype, ir.Shape(groups)
    blocks = {"axis": 0, "block_size": stored.format.block} if stored.format.block else {"axis": 1}
    for node in users:
        base = str(node.name).removesuffix("/Transpose")
        made, scale = [], scales
        if TENSOR_SCALE in parts:  # scales that are themselves float8
            made.append(_node("DequantizeLinear", [scales, parts[TENSOR_SCALE]], f"{base}/scales"))
            scale = _result(made[-1], ir.DataType.FLOAT, groups)
        given = [codes, scale, *([parts[ZERO_POINT]] if ZERO_POINT in parts else [])]
        made.append(_node("DequantizeLinear", given, f"{base}/DequantizeLinear", **blocks))
        result = _result(made[-1], scale.dtype, [inputs, outputs])
        assert weight.dtype is not None
        if result.dtype != weight.dtype:
            made.append(_node("Cast", [result], f"{base}/Cast", to=weight.dtype))
            result = _result(made[-1], weight.dtype, [inputs, outputs])
        _replace(model, node, made)


def _cast(model: ir.Model, weight: ir.Value, stored: ir.DataType) -> None:
    """Cast the result of looking rows up, or else the weight itself."""
    wanted, weight.type = weight.dtype, ir.TensorType(stored)  # a type of its own: values may share theirs
    assert wanted is not None
    for node, index in list(weight.uses()):
        looked_up = node.op_type == "Gather"
        source = node.outputs[0] if looked_up else weight
        cast = _node("Cast", [source], f"{node.name}/Cast", to=wanted)
        _result(cast, wanted, source.shape)
        if looked_up:
            source.type = ir.TensorType(stored)
            for user, at in [(user, at) for user, at in source.uses() if user is not cast]:
                user.replace_input_with(at, cast.outputs[0])
            model.graph.insert_after(node, cast)
        else:
            node.replace_input_with(index, cast.outputs[0])
            model.graph.insert_before(node, cast)


def _initializer(model: ir.Model, tensor: StoredTensor) -> ir.Value:
    """An initializer without a value yet, as exporter/weights.py fills in."""
    dtype = FLOATS.get(tensor.dtype, ir.DataType.FLOAT8E4M3FN)  # codes get theirs from the format
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype))
    model.graph.initializers[tensor.name] = value
    return value


def _node(op_type: str, inputs: list[ir.Value], name: str, **attributes: int | list[int]) -> ir.Node:
    return ir.node(op_type, inputs, attributes=attributes, name=name)


def _result(node: ir.Node, dtype: ir.DataType | None, shape: object) -> ir.Value:
    (value,) = node.outputs
    assert dtype is not None
    value.name, value.type, value.shape = node.name, ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]
    return value


def _replace(model: ir.Model, node: ir.Node, made: list[ir.Node]) -> None:
    """Put `made` where `node` is; the last one's result takes the place of node's."""
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], made[-1].outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
