"""Small changes to an ONNX graph. Each function makes one, to be applied to a model whose weights are not loaded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto], None]


class Op(NamedTuple):
    """A node that takes a value, and constants after it."""

    op_type: str
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = {}  # noqa: RUF012 - never changed


def cast(dtype: int) -> Op:
    """To TensorProto's dtype."""
    return Op("Cast", (), {"to": dtype})


def through(dtype: int, back: int = TensorProto.FLOAT) -> tuple[Op, Op]:
    """Rounded to a narrower type."""
    return cast(dtype), cast(back)


def heads(*order: int) -> Op:
    """[batch, heads, ..] with the heads in another order."""
    return Op("Gather", (np.array(order),), {"axis": 1})


def both(*edits: Edit) -> Edit:
    """One edit after the other."""

    def edit(model: onnx.ModelProto) -> None:
        for each in edits:
            each(model)

    return edit


def find(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of that name."""
    (node,) = (node for node in model.graph.node if node.name == name)
    return node


def attribute(node: str, name: str, change: float | Callable[[float], float]) -> Edit:
    """Another value for a number that a node holds."""

    def edit(model: onnx.ModelProto) -> None:
        (found,) = (each for each in find(model, node).attribute if each.name == name)
        whole = found.type == onnx.AttributeProto.INT
        value = change(found.i if whole else found.f) if callable(change) else change
        if whole:
            found.i = int(value)
        else:
            found.f = value

    return edit


def text_attribute(node: str, name: str, value: str) -> Edit:
    """Another value for a text that a node holds."""

    def edit(model: onnx.ModelProto) -> None:
        (found,) = (each for each in find(model, node).attribute if each.name == name)
        assert found.s.decode() != value
        found.s = value.encode()

    return edit


def retype(node: str, op_type: str) -> Edit:
    """Another operator with the same inputs."""

    def edit(model: onnx.ModelProto) -> None:
        find(model, node).op_type = op_type

    return edit


def swap(node: str, first: int, second: int) -> Edit:
    """Two inputs of a node change places."""

    def edit(model: onnx.ModelProto) -> None:
        inputs = find(model, node).input
        inputs[first], inputs[second] = inputs[second], inputs[first]

    return edit


def swap_outputs(node: str, first: int, second: int) -> Edit:
    """Two outputs of a node change places."""

    def edit(model: onnx.ModelProto) -> None:
        outputs = find(model, node).output
        outputs[first], outputs[second] = outputs[second], outputs[first]

    return edit


def rewire(node: str, index: int, value: str, *ops: Op) -> Edit:
    """An input reads another value, through `ops`."""

    def edit(model: onnx.ModelProto) -> None:
        target = find(model, node)
        known = {name for each in model.graph.node for name in each.output}
        known |= {each.name for each in (*model.graph.initializer, *model.graph.input)}
        assert value in known, f"{value} is no value of the graph"
        result, made = _chain(model, f"{node}/mutant{index}", value, ops)
        target.input[index] = result
        _insert(model, list(model.graph.node).index(target), made)

    return edit


def through_ops(node: str, index: int, *ops: Op) -> Edit:
    """An input goes through `ops` first."""

    def edit(model: onnx.ModelProto) -> None:
        rewire(node, index, find(model, node).input[index], *ops)(model)

    return edit


def after(node: str, *ops: Op) -> Edit:
    """A node's first output goes through `ops`, for all that read it."""

    def edit(model: onnx.ModelProto) -> None:
        target = find(model, node)
        name = target.output[0]
        target.output[0] = f"{name}/exact"
        result, made = _chain(model, f"{node}/mutant", f"{name}/exact", ops)
        made[-1].output[0] = name
        assert result != name
        _insert(model, list(model.graph.node).index(target) + 1, made)

    return edit


def constant(node: str, index: int, change: Callable[[np.ndarray], Any]) -> Edit:
    """An input that is a constant has another value, for this node only."""

    def edit(model: onnx.ModelProto) -> None:
        target = find(model, node)
        old = initializer(model, target.input[index])
        array = numpy_helper.to_array(old)
        new = np.asarray(change(array), array.dtype)
        assert (new != array).any(), f"input {index} of {node} is what it was"
        name = f"{node}/mutant{index}"
        model.graph.initializer.append(numpy_helper.from_array(new, name))
        target.input[index] = name

    return edit


def stored(name: str, change: Callable[[np.ndarray], Any]) -> Edit:
    """A small initializer that lies in the graph has other numbers, for all that read it."""

    def edit(model: onnx.ModelProto) -> None:
        old = initializer(model, name)
        array = numpy_helper.to_array(old)
        new = np.asarray(change(array), array.dtype)
        assert (new != array).any(), f"{name} is what it was"
        old.CopyFrom(numpy_helper.from_array(new, name))

    return edit


def nodes_before(node: str, *made: tuple[str, list[str], str, dict[str, Any]]) -> Edit:
    """New nodes (operator, inputs, output, attributes) stand before a node."""

    def edit(model: onnx.ModelProto) -> None:
        new = [helper.make_node(op, ins, [out], out, **attributes) for op, ins, out, attributes in made]
        _insert(model, list(model.graph.node).index(find(model, node)), new)

    return edit


def number(name: str, value: Any) -> Edit:
    """A new constant."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return edit


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    """A constant of the graph."""
    (found,) = (each for each in model.graph.initializer if each.name == name)
    return found


def _chain(model: onnx.ModelProto, prefix: str, value: str, ops: tuple[Op, ...]) -> tuple[str, list[onnx.NodeProto]]:
    made = []
    for step, (op_type, constants, attributes) in enumerate(ops):
        names = [f"{prefix}/{step}/constant{index}" for index in range(len(constants))]
        for name, number in zip(names, constants, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(number), name))
        result = f"{prefix}/{step}"
        made.append(helper.make_node(op_type, [value, *names], [result], result, **attributes))
        value = result
    return value, made


def _insert(model: onnx.ModelProto, at: int, made: list[onnx.NodeProto]) -> None:
    nodes = [*model.graph.node[:at], *made, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
