"""The operators of an ONNX graph, in order, each with the weights it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from runtimes.widen import load_onnx


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A node that makes a value which can be compared, with the nodes before it whose values cannot."""

    value: str
    node: str
    op_type: str
    weights: tuple[str, ...]  # that it reads itself, or through nodes of `behind`
    behind: tuple[str, ...]  # nodes between it and the values before it that can be compared, in order


def read_operators(graph: Path, comparable: set[str]) -> list[Operator]:
    """Every value of the graph that is in `comparable`, in the order of execution."""
    model = load_onnx(graph)
    makers = {name: (index, node) for index, node in enumerate(model.graph.node) for name in node.output if name}
    stored = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    operators = []
    for node in model.graph.node:
        for value in node.output:
            if value in comparable:
                region = _region(value, makers, comparable)
                read = [name for each in region for name in each.input if name in stored]
                operators.append(
                    Operator(
                        value=value,
                        node=node.name,
                        op_type=node.op_type,
                        weights=_whole(list(dict.fromkeys(read))),
                        behind=tuple(each.name for each in region[:-1]),
                    )
                )
    return operators


def _whole(names: list[str]) -> tuple[str, ...]:
    """Without the scales and zero points of weights that are named themselves: they are called after them."""
    return tuple(name for name in names if not any(name.startswith(f"{weight}_") for weight in names))


def _region(value: str, makers: Mapping[str, tuple[int, onnx.NodeProto]], comparable: set[str]) -> list[onnx.NodeProto]:
    """The nodes that make a value from comparable ones, in order; its own is the last."""
    waiting, found = [value], dict[int, onnx.NodeProto]()
    while waiting:
        index, node = makers[waiting.pop()]
        if index not in found:
            found[index] = node
            waiting += [name for name in node.input if name in makers and name not in comparable]
    return [found[index] for index in sorted(found)]
