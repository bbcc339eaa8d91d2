"""Run a traced program in several ways at once, operator by operator.

A lane is one way: its dtype and its weights. Weights are read when an operator needs them and dropped again, so memory
does not grow with the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional as F

from exporter.diff.program import Program
from exporter.diff.weights import Weights
from exporter.reference import round_activations
from graphs.ops import ACTIVATION_FUNCTIONS

Visit = Callable[[str, list[Any]], list[Any]]

_aten = torch.ops.aten
CHECKS = ("_assert", "sym_constrain_range")  # what only checks, and would find other dtypes than were traced
VIEWS = {_aten.view.default: torch.reshape}  # memory may be laid out otherwise than where it was traced


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One way to compute the program."""

    weights: Weights
    dtype: torch.dtype | None = None  # of all floats; None: as traced

    def dtype_of(self, traced: torch.dtype) -> torch.dtype:
        """What the lane has in the place of a traced dtype."""
        return self.dtype if self.dtype is not None and traced.is_floating_point else traced


def run_lanes(
    program: Program, lanes: Sequence[Lane], feeds: Sequence[Mapping[str, Tensor]], device: torch.device, visit: Visit
) -> list[list[Tensor]]:
    """Compute the program once in each lane; the outputs of each.

    Args:
        feeds: per lane, {input of the signature: its numbers}.
        visit: called with each operator's name in the program and its result in every lane; what it returns goes on.
    """
    env = _enter(program, lanes, feeds, device)
    gone = _last_uses(program)
    results: list[list[Tensor]] = []
    for node in program.exported.graph.nodes:
        if node.op == "output":
            results = [[env[each.name][index] for each in node.args[0]] for index in range(len(lanes))]
        elif node.op == "call_function" and not any(name in str(node.target) for name in CHECKS):
            made = [_compute(program, node, lane, index, env, device) for index, lane in enumerate(lanes)]
            env[node.name] = visit(node.name, made)
        for name in gone.get(node.name, ()):
            env.pop(name, None)
    return results


def _enter(
    program: Program, lanes: Sequence[Lane], feeds: Sequence[Mapping[str, Tensor]], device: torch.device
) -> dict[str, list[Any]]:
    """Per lane, what the program's inputs and buffers hold; {node: one value for each lane}."""
    env: dict[str, list[Any]] = {name: [table.to(device)] * len(lanes) for name, table in program.buffers.items()}
    for spec, name in zip(program.signature.inputs, program.exported.graph_signature.user_inputs, strict=True):
        traced = getattr(torch, spec.dtype)
        env[str(name)] = [
            feed[spec.name].to(device, lane.dtype_of(traced)) for feed, lane in zip(feeds, lanes, strict=True)
        ]
    return env


def _last_uses(program: Program) -> dict[str, list[str]]:
    """{node: whose results nobody needs after it}."""
    last = {}
    for node in program.exported.graph.nodes:
        for used in node.all_input_nodes:
            last[used.name] = node.name
    gone: dict[str, list[str]] = {}
    for name, user in last.items():
        gone.setdefault(user, []).append(name)
    return gone


def _compute(
    program: Program, node: Node, lane: Lane, index: int, env: Mapping[str, list[Any]], device: torch.device
) -> Any:
    """The operator's result in one lane."""

    def value(used: Node) -> Any:
        ref = program.parameters.get(used.name)
        if ref is None:
            return env[used.name][index]
        return lane.weights.load(ref, lane.dtype_of(used.meta["val"].dtype))

    def translated(argument: Any) -> Any:
        if isinstance(argument, torch.dtype):
            return lane.dtype_of(argument)
        return device if isinstance(argument, torch.device) else argument

    if node.target is _aten.embedding.default:
        table, ids = node.args[:2]
        if isinstance(table, Node) and isinstance(ids, Node) and table.name in program.parameters:
            dtype = lane.dtype_of(table.meta["val"].dtype)
            return lane.weights.look_up(program.parameters[table.name], env[ids.name][index], dtype)
    args = map_aggregate(map_arg(node.args, value), translated)
    kwargs = map_aggregate(map_arg(node.kwargs, value), translated)
    if node.target in ROUNDED and (block := _rounded_block(program, node, lane)) is not None:
        return ROUNDED[node.target](block, *args, **kwargs)
    function: Callable[..., Any] = VIEWS.get(node.target, node.target)
    return function(*args, **kwargs)


def _rounded_block(program: Program, node: Node, lane: Lane) -> int | None:
    """In blocks of how many numbers the lane rounds what this operator's weights multiply; None: it does not."""
    refs = (program.parameters[used.name] for used in node.all_input_nodes if used.name in program.parameters)
    return next((block for ref in refs if (block := lane.weights.rounded_block(ref)) is not None), None)


def _rounded_linear(block: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(round_activations(x, block), weight, bias)


def _rounded_experts(
    block: int, x: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], act: str
) -> Tensor:
    """graphs.ops.experts_reference, with activations rounded."""
    out, rounded = torch.zeros_like(x, dtype=weights.dtype), round_activations(x, block)
    for index in range(len(w1)):
        h = ACTIVATION_FUNCTIONS[act](F.linear(rounded, w1[index]))
        h = round_activations(h * F.linear(rounded, w3[index]) if w3 else h, block)
        weight = weights[..., index : index + 1]
        out = out + torch.where(weight > 0, F.linear(h, w2[index]).to(weights.dtype) * weight, 0.0)
    return out.to(x.dtype)


# {operator with weights that may be quantized: the same with rounded activations}
ROUNDED: dict[Any, Callable[..., Tensor]] = {
    _aten.linear.default: _rounded_linear,
    torch.ops.export_llm.experts.default: _rounded_experts,
}
