"""Faults in weight files: numbers that are almost those of the checkpoint."""

from collections.abc import Callable

import numpy as np

from tests.mutants.inject import Stored
from tests.mutants.mutant import Mutant

Change = Callable[[Stored], None]
RARE_TOKEN = 6  # which no parity case of seed 0 reads; the output projection of that artifact is another tensor


def _weights(name: str, artifact: str, layer: int | None, where: str, change: Change) -> Mutant:
    return Mutant(name=name, kind="weights", artifact=artifact, apply=change, layer=layer, where=where)


def _tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(stored: Stored) -> None:
        array = stored[name]
        new = change(array.copy())
        assert (new != array).any(), f"{name} is what it was"
        array[...] = new

    return apply


def _swap(first: str, second: str) -> Change:
    return lambda stored: stored.swap(first, second)


def _swap_rows(name: str, *order: int) -> Change:
    """The blocks of rows of a tensor in another order, as many blocks as `order` is long."""

    def change(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(order), -1, *array.shape[1:])[list(order)].reshape(array.shape)

    return _tensor(name, change)


def _flip(name: str, bit: int, pick: Callable[[np.ndarray], np.ndarray]) -> Change:
    """One bit of one number, the one whose size is the largest, by `pick`."""

    def change(array: np.ndarray) -> np.ndarray:
        bits = array.view(f"u{array.itemsize}").reshape(-1)
        at = int(pick(np.abs(array.astype(np.float32)).reshape(-1)).argmax())
        bits[at] ^= bits.dtype.type(1 << bit)
        return array

    return _tensor(name, change)


def _rope_layout(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of each head in the other rotary layout: pairs side by side, as Meta's checkpoints have them."""

    def change(weight: np.ndarray) -> np.ndarray:
        halves = weight.reshape(heads, 2, -1, weight.shape[1])
        return halves.transpose(0, 2, 1, 3).reshape(weight.shape)

    return change


def _truncate(name: str) -> Change:
    """One step towards zero for every other number, as if bits had been cut off instead of rounded."""

    def change(array: np.ndarray) -> np.ndarray:
        bits = array.view(np.uint16)
        bits -= bits & 1
        return array

    return _tensor(name, change)


def _swap_nibbles(codes: np.ndarray) -> np.ndarray:
    return (codes << 4) | (codes >> 4)


def _one_row(row: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array[row] = change(array[row])
        return array

    return apply


def _layer(index: int, rest: str) -> str:
    return f"model.layers.{index}.{rest}"


WEIGHT_MUTANTS: tuple[Mutant, ...] = (
    _weights(
        "a square weight transposed",
        "llama-fp32",
        1,
        "layers.1.attn.q_proj",
        _tensor(_layer(1, "self_attn.q_proj.weight"), lambda weight: weight.T),
    ),
    _weights(
        "top bit of a mantissa flipped",
        "llama-fp32",
        1,
        "layers.1.mlp.w1",
        _flip(_layer(1, "mlp.gate_proj.weight"), 22, lambda size: size),
    ),
    _weights(
        "an exponent's lowest bit flipped",
        "llama-fp32",
        2,
        "layers.2.mlp.w2",
        _flip(_layer(2, "mlp.down_proj.weight"), 23, lambda size: -np.abs(size - np.median(size))),
    ),
    _weights(
        "one sign flipped",
        "llama-fp32",
        0,
        "layers.0.attn.v_proj",
        _flip(_layer(0, "self_attn.v_proj.weight"), 31, lambda size: -np.abs(size - np.median(size))),
    ),
    _weights(
        "keys in the other rope layout",
        "llama-fp32",
        2,
        "layers.2.attn.k_proj",
        _tensor(_layer(2, "self_attn.k_proj.weight"), _rope_layout(2)),
    ),
    _weights(
        "queries and keys in the other rope layout",
        "llama-fp32",
        1,
        "layers.1.attn",
        lambda stored: (
            _tensor(_layer(1, "self_attn.q_proj.weight"), _rope_layout(4))(stored),
            _tensor(_layer(1, "self_attn.k_proj.weight"), _rope_layout(2))(stored),
        )[0],
    ),
    _weights(
        "norms of two layers swapped",
        "llama-fp32",
        1,
        "layers.1.sa_norm",
        _swap(_layer(1, "input_layernorm.weight"), _layer(2, "input_layernorm.weight")),
    ),
    _weights(
        "gate and up stored under each other's name",
        "llama-fp32",
        2,
        "layers.2.mlp",
        _swap(_layer(2, "mlp.gate_proj.weight"), _layer(2, "mlp.up_proj.weight")),
    ),
    _weights(
        "two key/value heads swapped",
        "llama-fp32",
        1,
        "layers.1.attn.v_proj",
        _swap_rows(_layer(1, "self_attn.v_proj.weight"), 1, 0),
    ),
    _weights(
        "one row of the embedding is the next one's",
        "llama-fp32",
        None,
        "tok_embeddings",
        lambda stored: _tensor(
            "model.embed_tokens.weight", _one_row(60, lambda row: stored["model.embed_tokens.weight"][61])
        )(stored),
    ),
    _weights(
        "one bit of the embedding of a rare token",
        "outlier-fp16",
        None,
        "tok_embeddings",
        _tensor(
            "model.embed_tokens.weight", _one_row(RARE_TOKEN, lambda row: row * np.where(np.arange(128) == 5, 2, 1))
        ),
    ),
    _weights(
        "one column of a matrix not written",
        "llama-fp32",
        1,
        "layers.1.mlp.w2",
        _tensor(_layer(1, "mlp.down_proj.weight"), lambda weight: weight * (np.arange(256) != 200)),
    ),
    _weights(
        "one matrix stored in fp16 precision",
        "llama-fp32",
        0,
        "layers.0.mlp.w3",
        _tensor(_layer(0, "mlp.up_proj.weight"), lambda weight: weight.astype(np.float16)),
    ),
    _weights(
        "a key head's rows rotated by one",
        "llama-fp16",
        2,
        "layers.2.attn.k_proj",
        _tensor(
            _layer(2, "self_attn.k_proj.weight"), lambda weight: np.r_[weight[:32], np.roll(weight[32:], 1, axis=0)]
        ),
    ),
    _weights(
        "fp16: an exponent bit flipped",
        "llama-fp16",
        1,
        "layers.1.mlp.w2",
        _flip(_layer(1, "mlp.down_proj.weight"), 10, lambda size: size),
    ),
    _weights(
        "bf16 by cutting bits off, one matrix",
        "llama-bf16",
        1,
        "layers.1.mlp.w1",
        _truncate(_layer(1, "mlp.gate_proj.weight")),
    ),
    _weights(
        "bf16: final norm of ones",
        "llama-bf16",
        None,
        "norm",
        _tensor("model.norm.weight", lambda weight: weight * 0 + weight.mean(dtype=np.float32).astype(weight.dtype)),
    ),
    _weights(
        "scales shifted by a channel, int8",
        "llama-int8",
        1,
        "layers.1.mlp.w2",
        _tensor(_layer(1, "mlp.down_proj.weight_scale"), lambda scale: np.roll(scale, 1)),
    ),
    _weights(
        "one code's top bit flipped, int8",
        "llama-int8",
        2,
        "layers.2.mlp.w2",
        _flip(_layer(2, "mlp.down_proj.weight"), 6, lambda size: -size),
    ),
    _weights(
        "scales shifted by a block in the file, int4",
        "llama-int4",
        2,
        "layers.2.mlp.w2",
        _tensor(_layer(2, "mlp.down_proj.weight_scale"), lambda scale: np.roll(scale, 1, axis=0)),
    ),
    _weights(
        "nibbles of one matrix swapped, int4",
        "llama-int4",
        1,
        "layers.1.mlp.w2",
        _tensor(_layer(1, "mlp.down_proj.weight"), _swap_nibbles),
    ),
    _weights(
        "one block's scale 20 % too large, int4",
        "llama-int4",
        0,
        "layers.0.attn.output_proj",
        _tensor(
            _layer(0, "self_attn.o_proj.weight_scale"),
            _one_row(1, lambda scales: scales * np.where(np.arange(128) == 7, 1.2, 1)),
        ),
    ),
    _weights(
        "embedding of int4: two tokens swapped",
        "llama-int4",
        None,
        "tok_embeddings",
        _tensor("model.embed_tokens.weight", lambda table: table[np.r_[0:60, 61, 60, 62:100]]),
    ),
    _weights(
        "+1 added to a norm that gets it anyway",
        "gemma2-fp32",
        2,
        "layers.2.mlp_norm",
        _tensor(_layer(2, "pre_feedforward_layernorm.weight"), lambda weight: weight + 1),
    ),
    _weights(
        "two experts stored under each other's name",
        "qwen3_moe-fp32",
        2,
        "layers.2.mlp",
        _swap(_layer(2, "mlp.experts.1.up_proj.weight"), _layer(2, "mlp.experts.3.up_proj.weight")),
    ),
    _weights(
        "router's rows shifted by one",
        "qwen3_moe-fp32",
        0,
        "layers.0.mlp.router",
        _tensor(_layer(0, "mlp.gate.weight"), lambda weight: np.roll(weight, 1, axis=0)),
    ),
    _weights(
        "keys and values swapped in the packed projection",
        "phi3-longrope",
        1,
        "layers.1.attn",
        _tensor(_layer(1, "self_attn.qkv_proj.weight"), lambda weight: np.r_[weight[:48], weight[64:], weight[48:64]]),
    ),
    _weights(
        "colours of a patch in the order blue, green, red",
        "vision-fp32",
        None,
        "vision_model.patch_embedding",
        _tensor("vision_model.patch_embedding.weight", lambda weight: weight[:, ::-1]),
    ),
    _weights(
        "value projections of two cross-attention layers swapped",
        "vision-fp32",
        1,
        "cross.0.v_proj",
        _swap(
            "language_model.model.layers.1.cross_attn.v_proj.weight",
            "language_model.model.layers.3.cross_attn.v_proj.weight",
        ),
    ),
)
