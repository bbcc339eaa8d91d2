"""AWQ, arXiv:2306.00978, as AutoAWQ and transformers store it for its `gemm` kernel.

A layer X of N outputs and K inputs in G groups has codes X.qweight, int32 [K, N / 8]; zeros X.qzeros, int32
[G, N / 8]; and X.scales [G, N]. A word holds eight consecutive outputs: the even ones first, then the odd ones.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from graphs.checkpoint import FLOAT_DTYPES, Checkpoint, StoredTensor
from graphs.errors import CheckpointError
from graphs.formats.int32 import (
    WHERE,
    PackedLinear,
    Settings,
    check_matrix,
    check_part,
    check_symmetric,
    read_settings,
    read_words,
    split_words,
    unpack_layers,
)
from graphs.keys import short

PARTS = ("qweight", "qzeros", "scales")
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # in a word, of each of its outputs


def unpack(checkpoint: Checkpoint, quantization: dict[str, Any]) -> Checkpoint:
    """The checkpoint with its AWQ layers' weights among `packed`, code for code.

    Args:
        quantization: config.json's quantization_config.

    Raises:
        CheckpointError: the layout is not supported, or the tensors are not what it says.
    """
    if quantization.get("backend") == "llm-awq":  # transformers' other way to say it
        quantization = {**quantization, "version": "llm-awq"}
    settings = read_settings(
        quantization, version_keys=("version", "format", "checkpoint_format"), versions=("gemm",), bits=(4,)
    )
    if settings.overridden:
        raise CheckpointError(f"{WHERE}: dynamic = {short(quantization['dynamic'])} is not supported for AWQ")

    def to_linear(layer: str, parts: dict[str, StoredTensor]) -> PackedLinear:
        linear = _to_linear(layer, parts, settings)
        if quantization.get("zero_point") is False:
            check_symmetric(linear, "zero_point", False)
        return linear

    return unpack_layers(checkpoint, PARTS, to_linear)


def _to_linear(layer: str, parts: dict[str, StoredTensor], settings: Settings) -> PackedLinear:
    qweight, qzeros, scales = (parts[part] for part in PARTS)
    check_matrix(qweight)
    inputs, words = qweight.shape
    outputs, groups = 8 * words, settings.groups(inputs)
    legend = f"{inputs} inputs and {outputs} outputs (qweight), group_size {settings.group_size}"
    check_part(qweight, ("I32",), qweight.shape, legend)
    check_part(qzeros, ("I32",), (groups, words), legend)
    check_part(scales, tuple(FLOAT_DTYPES), (groups, outputs), legend)
    return PackedLinear(
        name=f"{layer}.weight",
        method="AWQ",
        bits=settings.bits,
        shape=(outputs, inputs),
        parts=parts,
        groups=torch.arange(inputs) // (inputs if settings.group_size == -1 else settings.group_size),
        read_codes=functools.partial(_unpack, qweight),
        read_zeros=lambda: _unpack(qzeros).to(torch.int16),
    )


def _unpack(part: StoredTensor) -> Tensor:
    """uint8 [N, rows] of words [rows, N / 8]."""
    return split_words(read_words(part), 4)[:, :, PLACES].flatten(1).t()
