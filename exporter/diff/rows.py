"""Rows of a comparison, from the errors that were found."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from exporter.diff.compare import DECODER, Found
from exporter.diff.errors import Errors
from exporter.diff.exposed import NodeFailedError
from exporter.diff.nodes import read_operators
from exporter.diff.program import Program
from exporter.diff.report import Row, layer_of
from exporter.weight_choice import WeightChoice
from graphs.checkpoint import TensorRef
from runtimes.artifact import Artifact
from runtimes.parity import Rung

WHOLE = "the whole graph"


def operator_rows(artifact: Artifact, program: Program, found: Mapping[str, Found], dtype: str) -> list[Row]:
    """One for each value that was compared, in the order of execution."""
    graph = artifact.path(artifact.manifest.graphs[program.name].file)
    known = {ref.label for ref in program.parameters.values()}
    rows = []
    for operator in read_operators(graph, set(found)):
        entry, origin = found[operator.value], program.values[operator.value]
        expected = program.reads.get(origin, ())
        note = entry.note
        if expected and known & set(operator.weights) - set(expected):  # joined weights have names of their own
            note = f"it should read {' and '.join(expected)}"
        rows.append(
            _row(
                entry.total,
                entry.own if entry.own.exact.count else entry.total,
                dtype,
                graph=program.name,
                module=program.module(origin),
                operator=operator.op_type,
                computes=program.computes.get(origin, ""),
                node=operator.node or operator.value,
                value=operator.value,
                weights=operator.weights,
                behind=operator.behind,
                note=note,
                shaped=not entry.note,
            )
        )
    return rows


def module_rows(modules: Mapping[str, Errors], ends: Mapping[str, str], dtype: str) -> Iterable[Row]:
    """One for each module, in the order in which they end."""
    for path, node in ends.items():
        if path in modules:
            errors = modules[path]
            yield _row(errors, errors, dtype, module=path, operator="module", node=path, value=node)


def whole_row(found: Found, dtype: str) -> Row:
    """The graph as it is run, without values shown: a runtime may fuse operators then."""
    note = "only while no inner value is shown, and the runtime fuses operators"
    row = _row(found.total, found.total, dtype, module="", operator="all", node="", value="logits", note=note)
    return dataclasses.replace(row, layer=WHOLE)


def failed_row(error: NodeFailedError) -> Row:
    """A node that does not run at all, on shapes that it cannot have."""
    nothing, module = Errors(), error.node.rpartition("/")[0]
    nothing.ours.largest = math.inf
    operator, note = error.node.rpartition("/")[2], f"it does not run: {error.reason}"
    return _row(nothing, nothing, "float32", module=module, operator=operator, node=error.node, value="", note=note)


def weight_row(choice: WeightChoice, ref: TensorRef, rung: Rung) -> Row:
    """A stored weight; errors are root mean squares, in parts of its own."""
    module = choice.parameter.rpartition(".")[0]
    return Row(
        graph="vision_encoder" if choice.in_encoder else DECODER,
        layer=layer_of(module),
        module=module,
        operator="weight",
        computes="",
        node=choice.parameter,
        value=ref.label,
        weights=(ref.label,),
        behind=(),
        error=rung.rms_error,
        limit=rung.rms_limit,
        own_error=rung.rms_error,
        own_limit=rung.rms_limit,
        magnitude=1.0,
        passed=rung.passed,
        note="",
    )


def _row(
    total: Errors,
    own: Errors,
    dtype: str,
    *,
    module: str,
    operator: str,
    node: str,
    value: str,
    graph: str = DECODER,
    computes: str = "",
    weights: tuple[str, ...] = (),
    behind: tuple[str, ...] = (),
    note: str = "",
    shaped: bool = True,
) -> Row:
    return Row(
        graph=graph,
        layer=layer_of(module),
        module=module,
        operator=operator,
        computes=computes,
        node=node,
        value=value,
        weights=weights,
        behind=behind,
        error=total.ours.largest,
        limit=total.max_limit(dtype),
        own_error=own.ours.largest,
        own_limit=own.max_limit(dtype),
        magnitude=own.exact.largest,
        passed=own.within(dtype) and shaped,
        note=note if math.isfinite(own.eager.largest) else f"eager PyTorch itself overflows in {dtype}",
    )
