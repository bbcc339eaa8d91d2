"""Name nodes and values after the module that made them: `layers.0.attn.q_proj/MatMul`."""

import ast
from collections import Counter

import onnx_ir as ir

from exporter.layouts.layout import WRAPPED

SCOPES_KEY = "pkg.torch.onnx.name_scopes"  # written by torch.onnx: a list of module paths, the operator's name last


def name_nodes(model: ir.Model) -> dict[str, str]:
    """Rename every node, and its outputs unless they are graph outputs; graph inputs and initializers are kept.

    Returns:
        {new name of a value: its name before}.
    """
    used: Counter[str] = Counter()
    before: dict[str, str] = {}
    interface = set(model.graph.outputs)
    for node in model.graph:
        base = f"{_module_path(node)}/{node.op_type}"
        used[base] += 1
        node.name = base if used[base] == 1 else f"{base}_{used[base]}"
        for index, value in enumerate(node.outputs):
            if value not in interface:
                old, value.name = value.name, node.name if index == 0 else f"{node.name}:{index}"
                before[str(value.name)] = str(old)
    return before


def _module_path(node: ir.Node) -> str:
    """Of a node that folding put in, which says nothing of itself: the module of what it reads."""
    if SCOPES_KEY not in node.metadata_props:
        made_by = (value.producer() for value in node.inputs if value is not None)
        return next((_module_path(other) for other in made_by if other is not None), "")
    scopes = ast.literal_eval(node.metadata_props[SCOPES_KEY])
    ours = [scope for scope in scopes[:-1] if scope.partition(".")[0] == WRAPPED]
    return ours[-1].removeprefix(WRAPPED).lstrip(".") if ours else ""
