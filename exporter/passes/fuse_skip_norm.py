"""Join each residual addition and the RMS norm behind it: ONNX Runtime's SkipSimplifiedLayerNormalization."""

import onnx_ir as ir

from exporter.passes import CONTRIB_DOMAIN


def fuse_skip_norm(model: ir.Model) -> None:
    """Replace Add + RMSNormalization by one node, whose fourth output is the sum."""
    for norm in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        hidden, weight = norm.inputs
        assert hidden is not None
        add = hidden.producer()
        if add is None or add.op_type != "Add" or not _alike(add):
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            attributes={"epsilon": norm.attributes["epsilon"].as_float()},
            domain=CONTRIB_DOMAIN,
            num_outputs=4,
            name=str(norm.name).replace("RMSNormalization", "SkipSimplifiedLayerNormalization"),
        )
        for old, new in ((norm.outputs[0], fused.outputs[0]), (hidden, fused.outputs[3])):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new)
        for unused in fused.outputs[1:3]:
            unused.name = ""
        model.graph.insert_after(add, fused)
        model.graph.remove([add, norm], safe=True)
    model.graph.sort()  # a norm's weight may be computed behind the addition
    model.opset_imports[CONTRIB_DOMAIN] = 1


def _alike(add: ir.Node) -> bool:
    """Whether both are [batch, sequence, hidden] of the same numbers: no constant that is broadcast."""
    first, second = add.inputs
    assert first is not None
    assert second is not None
    return first.shape is not None and len(first.shape) == 3 and first.shape == second.shape
