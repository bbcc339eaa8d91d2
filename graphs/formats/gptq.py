"""GPTQ, arXiv:2210.17323, as AutoGPTQ, GPTQModel and transformers store it.

A layer X of N outputs and K inputs in G groups has codes X.qweight, int32 [K * bits / 32, N], whose words hold
consecutive inputs; zeros X.qzeros, int32 [G, N * bits / 32], whose words hold consecutive outputs; X.scales [G, N]; and
X.g_idx, int32 [K], each input's group.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.checkpoint import FLOAT_DTYPES, Checkpoint, StoredTensor
from graphs.errors import CheckpointError
from graphs.formats.int32 import (
    PackedLinear,
    Settings,
    ceil_div,
    check_matrix,
    check_part,
    check_symmetric,
    read_settings,
    read_words,
    split_words,
    unpack_layers,
)

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (4, 8)
LESS_ONE, AS_IS = "gptq", "gptq_v2"  # checkpoint_format: how zeros are stored


def unpack(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Checkpoint:
    """The checkpoint with its GPTQ layers' weights among `packed`, code for code.

    Args:
        quantization: config.json's quantization_config.

    Raises:
        CheckpointError: the layout is not supported, or the tensors are not what it says.
    """
    settings = read_settings(
        quantization, version_keys=("checkpoint_format", "format"), versions=(LESS_ONE, AS_IS), bits=BITS
    )
    borrows = _is_gptqmodels(quantization.get("meta"))

    def to_linear(layer: str, parts: dict[str, StoredTensor]) -> PackedLinear:
        linear = _to_linear(layer, parts, settings, borrows)
        if quantization.get("sym") is True and not settings.overridden:
            check_symmetric(linear, "sym", True, f', or checkpoint_format: "{LESS_ONE}" stores 1 less, "{AS_IS}" not')
        return linear

    return unpack_layers(checkpoint, PARTS, to_linear)


def _to_linear(layer: str, parts: dict[str, StoredTensor], settings: Settings, borrows: bool) -> PackedLinear:
    qweight, qzeros, scales, g_idx = (parts[part] for part in PARTS)
    for matrix in (qweight, scales):
        check_matrix(matrix)
    check_part(g_idx, ("I32",), (g_idx.shape or (0,))[:1], "the group of each input")
    inputs, outputs = g_idx.shape[0], scales.shape[1]
    bits, groups = settings.bits, settings.groups(inputs)
    if settings.overridden:
        bits = next((bits for bits in BITS if qweight.shape[0] == ceil_div(inputs * bits, 32)), bits)
        groups = scales.shape[0]
    legend = f"{inputs} inputs (g_idx), {outputs} outputs (scales), {bits} bits, group_size {settings.group_size}"
    check_part(qweight, ("I32",), (ceil_div(inputs * bits, 32), outputs), legend)
    check_part(qzeros, ("I32",), (groups, ceil_div(outputs * bits, 32)), legend)
    check_part(scales, tuple(FLOAT_DTYPES), (groups, outputs), legend)
    group_of_input = torch.from_numpy(read_words(g_idx).view(np.int32)).long()
    low, high = int(group_of_input.min()), int(group_of_input.max())
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{g_idx.path}: {g_idx.name} holds {low} to {high}, expected groups from 0 to {groups - 1}"
        )
    return PackedLinear(
        name=f"{layer}.weight",
        method="GPTQ",
        bits=bits,
        shape=(outputs, inputs),
        parts=parts,
        groups=group_of_input,
        read_codes=functools.partial(_codes, qweight, bits, inputs),
        read_zeros=functools.partial(_zeros, qzeros, bits, outputs, settings.version, borrows),
    )


def _codes(qweight: StoredTensor, bits: int, inputs: int) -> Tensor:
    fields = split_words(read_words(qweight), bits)  # [words, N, inputs of a word]
    return fields.transpose(1, 2).flatten(0, 1)[:inputs].t()


def _zeros(qzeros: StoredTensor, bits: int, outputs: int, version: str, borrows: bool) -> Tensor:
    words, added = read_words(qzeros), 0
    # 1 is added to whole words where it was subtracted from whole words: see _is_gptqmodels
    if version == LESS_ONE and borrows:
        words = words + np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    elif version == LESS_ONE:
        added = 1
    return split_words(words, bits).flatten(1)[:, :outputs].t().to(torch.int16) + added


def _is_gptqmodels(meta: Any) -> bool:
    """True if GPTQModel wrote the checkpoint, as quantization_config.meta says.

    Stored less one, a zero of 0 does not fit. GPTQModel subtracts from whole words and so borrows from the next zero,
    which adding to whole words undoes. What others write there is damaged, and their kernels read it as 16.
    """
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    names = writers if isinstance(writers, list) else [writers]
    return any(isinstance(name, str) and name.startswith("gptqmodel") for name in names)
