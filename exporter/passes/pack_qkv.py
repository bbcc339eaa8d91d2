"""Give GroupQueryAttention queries, keys and values in one tensor, where one product made them."""

import onnx_ir as ir


def pack_qkv(model: ir.Model) -> None:
    """Let each GroupQueryAttention read what a Split would take apart for it alone."""
    for attention in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        query, key, value = attention.inputs[:3]
        split = query.producer() if query is not None else None
        if split is None or split.op_type != "Split" or list(split.outputs) != [query, key, value]:
            continue
        if any(len(part.uses()) != 1 for part in split.outputs):
            continue
        attention.replace_input_with(0, split.inputs[0])
        attention.replace_input_with(1, None)
        attention.replace_input_with(2, None)
        model.graph.remove(split, safe=True)
