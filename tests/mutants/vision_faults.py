"""Faults in the graphs of Llama 3.2 Vision: its cross-attention layers (1 and 3 of 5) and its vision encoder."""

import numpy as np

from tests.mutants.edits import Edit, Op, both, constant, rewire, stored, swap, text_attribute, through_ops
from tests.mutants.mutant import Mutant

LOCAL, GLOBAL = "vision_model.transformer.layers", "vision_model.global_transformer.layers"
TRANSPOSED_PATCHES = np.arange(9).reshape(3, 3).T.ravel()


def _decoder(name: str, layer: int | None, where: str, edit: Edit) -> Mutant:
    return Mutant(name=name, kind="graph", artifact="vision-fp32", apply=edit, layer=layer, where=where)


def _encoder(name: str, layer: int | None, where: str, edit: Edit) -> Mutant:
    return Mutant(
        name=name, kind="graph", artifact="vision-fp32", apply=edit, layer=layer, where=where, graph="vision_encoder"
    )


VISION_MUTANTS: tuple[Mutant, ...] = (
    _decoder("cross-attention gate dropped", 1, "layers.1.ca_scale", rewire("layers.1/Add", 1, "layers.1/Where")),
    _decoder(
        "cross-attention gate without its tanh",
        3,
        "layers.3.ca_scale",
        rewire("layers.3.ca_scale/Mul", 1, "language_model.model.layers.3.cross_attn_attn_gate"),
    ),
    _decoder(
        "gates of attention and MLP swapped",
        3,
        "layers.3",
        both(
            rewire("layers.3.ca_scale/Tanh", 0, "language_model.model.layers.3.cross_attn_mlp_gate"),
            rewire("layers.3.mlp_scale/Tanh", 0, "language_model.model.layers.3.cross_attn_attn_gate"),
        ),
    ),
    _decoder(
        "cross attention reads another layer's keys",
        3,
        "layers.3.attn",
        rewire("layers.3.attn/Attention", 1, "cross_key_values.1.key"),
    ),
    _decoder(
        "MLP of a cross-attention layer kept for text that sees nothing",
        1,
        "layers.1",
        rewire("layers.1.mlp_scale/Mul", 0, "layers.1.mlp.w2/MatMul"),
    ),
    _decoder(
        "norm of cross attention's queries missing",
        1,
        "layers.1.attn.q_norm",
        rewire("layers.1.attn/Attention", 0, "layers.1.attn/Transpose"),
    ),
    _decoder(
        "rope of long texts not scaled",
        0,
        "layers.0.attn",
        stored("layers.0.attn.pos_embeddings.inv_freq", lambda f: 10_000.0 ** -np.arange(0, 1, 1 / len(f))),
    ),
    _encoder("intermediate layers in the wrong order", None, "vision_model", swap("vision_model/Concat_15", 0, 1)),
    _encoder(
        "gate of tile positions without its tanh",
        None,
        "vision_model.pre_tile_positional_embedding",
        rewire("vision_model.pre_tile_positional_embedding/Mul", 1, "vision_model.pre_tile_positional_embedding.gate"),
    ),
    _encoder(
        "positions not reduced by their gate",
        None,
        "vision_model.gated_positional_embedding",
        through_ops("vision_model.gated_positional_embedding/Mul", 0, Op("Sqrt")),
    ),
    _encoder(
        "aspect ratio counted from 0",
        None,
        "vision_model.gated_positional_embedding",
        through_ops(
            "vision_model.gated_positional_embedding.tile_embedding/Gather",
            1,
            Op("Sub", (np.int64(1),)),
            Op("Max", (np.int64(0),)),
        ),
    ),
    _encoder(
        "patches read column by column",
        None,
        "vision_model",
        through_ops("vision_model/Transpose", 0, Op("Gather", (TRANSPOSED_PATCHES,), {"axis": 2})),
    ),
    _encoder(
        "padding of tiles one patch short", None, "vision_model", constant("vision_model/Less", 1, lambda n: n - 1)
    ),
    _encoder(
        "tanh gelu for the exact one",
        1,
        f"{LOCAL}.1.mlp.activation",
        text_attribute(f"{LOCAL}.1.mlp.activation/Gelu", "approximate", "tanh"),
    ),
    _encoder(
        "two heads of a vision layer swapped",
        2,
        f"{LOCAL}.2.self_attn",
        through_ops(f"{LOCAL}.2.self_attn/Attention", 0, Op("Gather", (np.array([0, 2, 1, 3, 4]),), {"axis": 1})),
    ),
    _encoder(
        "gate of a global layer without its tanh",
        1,
        f"{GLOBAL}.1",
        rewire(f"{GLOBAL}.1/Mul_2", 0, "vision_model.global_transformer.layers.1.gate_ffn"),
    ),
    _encoder(
        "norm of cross attention's keys from another layer",
        None,
        "cross.0.k_norm",
        rewire("cross.0.k_norm/RMSNormalization", 1, "language_model.model.layers.3.cross_attn.k_norm.weight"),
    ),
)
