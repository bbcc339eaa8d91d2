"""Lowering: a torch.export program becomes an ONNX graph with the layout's operators and the signature's names.

Weights are not in the graph yet: each initializer has the name, dtype and shape of a checkpoint tensor and no value.
exporter/weights.py points them at safetensors files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import torch
from torch import Tensor
from torch.export import ExportedProgram

from exporter.layouts.layout import WRAPPED, Layout
from exporter.passes.name_interface import name_interface
from exporter.passes.name_nodes import name_nodes
from exporter.passes.strip_metadata import strip_metadata
from exporter.quiet import quiet_torch
from graphs.checkpoint import TensorRef
from runtimes.signature import GraphSignature


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A graph, and where its values come from."""

    model: ir.Model
    program: ExportedProgram  # of the operators that were lowered one by one
    # {value of the graph: what it was called before, after the program's node if it is one's}. Graph outputs have none:
    # they are the program's, in order.
    origins: Mapping[str, str]


def lower(
    program: ExportedProgram,
    layout: Layout,
    signature: GraphSignature,
    tensor_names: Mapping[str, TensorRef],
    buffers: Mapping[str, Tensor],
    *,
    name: str,
) -> Lowered:
    """Build the ONNX graph.

    Args:
        tensor_names: {parameter name: where it is in the checkpoint}.
        buffers: values of the module's buffers, which are stored in the graph itself (rotary frequencies).
        name: of the graph.
    """
    with quiet_torch():
        onnx_program = torch.onnx.export(
            program,
            opset_version=layout.opset,
            custom_translation_table=dict(layout.lowerings),
            optimize=False,  # folding would read the weights; see below
            verbose=False,
        )
        assert onnx_program is not None
        model = onnx_program.model
        _bind_initializers(model, tensor_names, buffers)
        _optimize(model)
    name_interface(model, signature)
    origins = name_nodes(model)
    strip_metadata(model)
    model.ir_version = layout.ir_version
    model.producer_name = "export-llm"
    model.producer_version = None
    model.graph.name = name
    assert onnx_program.exported_program is not None
    return Lowered(model=model, program=onnx_program.exported_program, origins=origins)


def _bind_initializers(model: ir.Model, tensor_names: Mapping[str, TensorRef], buffers: Mapping[str, Tensor]) -> None:
    """Give parameters their checkpoint names and no value (so that no pass can look inside), buffers their values."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        inner = name.removeprefix(f"{WRAPPED}.")
        if not value.uses():
            del initializers[name]
        elif inner in tensor_names:
            value.const_value = None
            value.name = tensor_names[inner].label
        elif (shared := _first_name(inner, buffers)) in initializers:
            ir.convenience.replace_all_uses_with(value, initializers[shared])
            del initializers[name]
        else:
            value.name = shared
            value.const_value = ir.tensor(buffers[inner].numpy(), name=shared)


def _optimize(model: ir.Model) -> None:
    """Fold what is constant, and drop what is unused or computed twice.

    onnxscript's own optimize_ir also tries its rewrite rules on every node, in time that grows with the square of
    their number; the lowerings leave those rules nothing to do.
    """
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=False, should_fold=_should_fold)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _should_fold(node: ir.Node) -> bool | None:
    """False for tables of every position (rotary cosines), which a session computes when it loads the graph: they would
    be as long as the cache, and rounded where a graph of 16 bits is computed in float32."""
    return False if node.op_type == "Range" else None


def _first_name(name: str, buffers: Mapping[str, Tensor]) -> str:
    """The name in the first layer of a buffer that layers share, so that it does not change with their number."""
    leaf = name.rpartition(".")[2]
    same = (other for other in buffers if other.endswith(leaf) and torch.equal(buffers[other], buffers[name]))
    return next(same)
