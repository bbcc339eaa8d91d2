"""Changes that speak of a text decoder: its masks, heads, norms and rotary tables."""

import numpy as np
import onnx
from onnx import TensorProto

from tests.mutants.edits import (
    Edit,
    Op,
    after,
    both,
    find,
    heads,
    nodes_before,
    number,
    rewire,
    stored,
    through_ops,
)
from tests.mutants.mutant import Mutant

BF16, FP16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
INV_FREQ = "layers.0.attn.pos_embeddings.inv_freq"  # all layers read it
FIRST, SEQ_AXIS = np.array([0]), np.array([1])


def graph(name: str, artifact: str, layer: int | None, where: str, edit: Edit) -> Mutant:
    return Mutant(name=name, kind="graph", artifact=artifact, apply=edit, layer=layer, where=where)


def theta(old: float, new: float) -> Edit:
    """Rotary frequencies of another base."""
    return stored(INV_FREQ, lambda freq: freq.astype(np.float64) ** (np.log(new) / np.log(old)))


def expand(*axes: int) -> Op:
    return Op("Unsqueeze", (np.array(axes),))


def minus(count: int) -> tuple[Op, Op]:
    """So many less, but not below 0."""
    return Op("Sub", (np.int64(count),)), Op("Max", (np.int64(0),))


def column(name: str, value: str) -> tuple[str, list[str], str, dict[str, int]]:
    """The first number of each row, [B, 1]."""
    return "Slice", [value, "mutant/zero", "mutant/one", "mutant/one"], name, {}


ONE_AND_ZERO = both(number("mutant/zero", FIRST), number("mutant/one", SEQ_AXIS))


def upper_left(layer: int) -> Edit:
    """A query sees as many keys as it has predecessors in this call, counted from slot 0."""
    return both(
        ONE_AND_ZERO,
        nodes_before(
            f"layers.{layer}.attn/Attention",
            column("mutant/first", "position_ids"),
            ("Sub", ["position_ids", "mutant/first"], "mutant/index", {}),
            ("Unsqueeze", ["mutant/index", "val_10"], "mutant/indices", {}),
            ("LessOrEqual", ["layers.0.attn/Range", "mutant/indices"], "mutant/causal", {}),
            ("And", ["mutant/causal", "layers.0.attn/Unsqueeze_3"], "mutant/seen", {}),
            ("Unsqueeze", ["mutant/seen", "val_17"], "mutant/mask", {}),
        ),
        rewire(f"layers.{layer}.attn/Attention", 3, "mutant/mask"),
    )


def masked_by(layer: int, join: str, *sides: str) -> Edit:
    """A layer's mask is the user's and what `sides` give together; "mutant/later" are slots from the position on."""
    return both(
        nodes_before(
            f"layers.{layer}.attn/Attention",
            ("GreaterOrEqual", ["layers.0.attn/Range", "layers.0.attn/Unsqueeze_2"], "mutant/later", {}),
            (join, list(sides), "mutant/causal", {}),
            ("And", ["mutant/causal", "layers.0.attn/Unsqueeze_3"], "mutant/seen", {}),
            ("Unsqueeze", ["mutant/seen", "val_17"], "mutant/mask", {}),
        ),
        rewire(f"layers.{layer}.attn/Attention", 3, "mutant/mask"),
    )


def slots_as_positions() -> Edit:
    """Rotary angles by cache slot, as where the graph counts positions by itself."""
    return both(
        ONE_AND_ZERO,
        nodes_before(
            "layers.0.attn/Cast",
            column("mutant/first", "position_ids"),
            ("Sub", ["position_ids", "mutant/first"], "mutant/index", {}),
            ("Unsqueeze", ["write_indices", "mutant/one"], "mutant/start", {}),
            ("Add", ["mutant/start", "mutant/index"], "mutant/slots", {}),
        ),
        rewire("layers.0.attn/Cast", 0, "mutant/slots"),
    )


def grouped_as_interleaved(layer: int, count: int, groups: int) -> Edit:
    """Query head h reads key/value head h modulo `groups`, as where keys are tiled and not repeated."""
    order = [int(head) for head in np.argsort(np.arange(count) % groups, kind="stable")]
    back = [int(head) for head in np.argsort(order)]
    node = f"layers.{layer}.attn/Attention"
    return both(through_ops(node, 0, heads(*order)), after(node, heads(*back)))


def quick_gelu(layer: int) -> Edit:
    """x * sigmoid(1.702 x), another model's activation."""
    return through_ops(f"layers.{layer}.mlp.activation/Sigmoid", 0, Op("Mul", (np.float32(1.702),)))


def swap_gate_and_up(layer: int) -> Edit:
    mlp = f"layers.{layer}.mlp"
    return both(
        rewire(f"{mlp}.activation/Sigmoid", 0, f"{mlp}.w3/MatMul"),
        rewire(f"{mlp}.activation/Mul", 0, f"{mlp}.w3/MatMul"),
        rewire(f"{mlp}/Mul", 1, f"{mlp}.w1/MatMul"),
    )


def norm_in_half(model: onnx.ModelProto) -> None:
    """The square of each number in float16, which ends at 65504; the rest of the norm as it should be."""
    name = "layers.1.mlp_norm/RMSNormalization"
    x, weight = find(model, name).input
    both(
        number("mutant/last", np.array([-1])),
        number("mutant/eps", np.array(1e-5, np.float32)),
        nodes_before(
            name,
            ("Cast", [x], "mutant/wide", {"to": FP32}),
            ("Mul", ["mutant/wide", "mutant/wide"], "mutant/squares", {}),
            ("Cast", ["mutant/squares"], "mutant/half", {"to": FP16}),
            ("Cast", ["mutant/half"], "mutant/back", {"to": FP32}),
            ("ReduceMean", ["mutant/back", "mutant/last"], "mutant/mean", {"keepdims": 1}),
            ("Add", ["mutant/mean", "mutant/eps"], "mutant/safe", {}),
            ("Sqrt", ["mutant/safe"], "mutant/root", {}),
            ("Div", ["mutant/wide", "mutant/root"], "mutant/normal", {}),
            ("Cast", ["mutant/normal"], "mutant/result", {"to": FP16}),
        ),
    )(model)
    norm = find(model, name)
    norm.op_type = "Mul"
    norm.input[0], norm.input[1] = "mutant/result", weight
    del norm.attribute[:]


def rotate_layer(layer: int) -> Edit:
    """Rotary embedding where this layer has none."""
    tables = ["layers.0.attn/Cos", "layers.0.attn/Sin"]
    attn = f"layers.{layer}.attn"
    return both(
        nodes_before(
            f"{attn}/TensorScatter",
            ("RotaryEmbedding", [f"{attn}/Transpose", *tables], "mutant/q", {}),
            ("RotaryEmbedding", [f"{attn}/Transpose_2", *tables], "mutant/k", {}),
        ),
        rewire(f"{attn}/Attention", 0, "mutant/q"),
        rewire(f"{attn}/TensorScatter", 1, "mutant/k"),
    )
