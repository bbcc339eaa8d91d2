"""GGUF files, llama.cpp's format: one file with all in it, read as the Hugging Face checkpoint it was made from.

config.json is made from the metadata (gguf_config.py). Tensors get their Hugging Face names back. Quantized blocks
(gguf_blocks.py) are taken over number for number where a weight format can express them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphs.checkpoint import Checkpoint, PackedTensor, StoredTensor, load_tensor
from graphs.errors import CheckpointError
from graphs.formats.gguf_blocks import GGML_TYPES, GgmlType, read_codes, read_numbers
from graphs.formats.gguf_config import find_architecture, read_config
from graphs.formats.gguf_header import Header, TensorInfo, read_header

ROPE_FACTORS = "rope_freqs.weight"
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file and read its header; tensors are read when they are asked for.

    Raises:
        CheckpointError: it is damaged, or its architecture, a tensor's type or anything else of it is not supported.
    """
    gguf = import_gguf()
    header = read_header(path)
    where = str(path)
    architecture = find_architecture(header.metadata, where)
    located = {info.name: _locate(header, info, gguf) for info in header.tensors}
    _check_overlaps(header, [stored for stored, _ in located.values()])
    factors = located.pop(ROPE_FACTORS, None)
    shapes = {name: stored.shape for name, (stored, _) in located.items()}
    config = read_config(header.metadata, shapes, None if factors is None else _load(*factors), where)
    names = _huggingface_names(gguf, architecture, config, where)

    tensors: dict[str, StoredTensor] = {}
    packed: dict[str, PackedTensor] = {}
    for gguf_name, (stored, kind) in located.items():
        name = names.get(gguf_name, gguf_name)  # one that has no place in the model is refused as unexpected
        rows = None
        if architecture == "llama" and ".attn_q." in gguf_name:
            rows = _rotary_rows(stored, config["num_attention_heads"], config["head_dim"])
        if architecture == "llama" and ".attn_k." in gguf_name:
            rows = _rotary_rows(stored, config["num_key_value_heads"], config["head_dim"])
        if kind.block == 1 and rows is None:
            tensors[name] = StoredTensor(
                name=name,
                dtype=kind.name,
                shape=stored.shape,
                path=path,
                offset=stored.offset,
                nbytes=stored.nbytes,
            )
        else:
            packed[name] = _pack(name, stored, kind, rows)
    if len(tensors) + len(packed) < len(located):
        raise CheckpointError(f"{path} is damaged: it holds tensors under both llama.cpp's and Hugging Face's names")
    checkpoint = Checkpoint(folder=path, config=config, tensors=tensors, packed=packed)
    return dataclasses.replace(checkpoint, config={**config, "torch_dtype": TORCH_DTYPES[checkpoint.dtype]})


def import_gguf() -> ModuleType:
    """The gguf package, which knows what llama.cpp calls things; CheckpointError when it is missing."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("reading GGUF files needs the gguf package: pip install 'export-llm[gguf]'") from None
    return gguf


def _locate(header: Header, info: TensorInfo, gguf: ModuleType) -> tuple[StoredTensor, GgmlType]:
    """Where a tensor lies, and its type; CheckpointError when it does not fit into the file, or is not supported."""
    kind = GGML_TYPES.get(info.type_id)
    if kind is None:
        known = {member.value: member.name for member in gguf.GGMLQuantizationType}
        raise CheckpointError(
            f"{header.path}: tensor {info.name} has the type {known.get(info.type_id, info.type_id)}, which is not"
            f" supported; supported: {', '.join(kind.name for kind in GGML_TYPES.values())}. Choose a file of another"
            " quantization"
        )
    if info.shape[-1] % kind.block or (kind.block > 1 and len(info.shape) != 2):
        raise CheckpointError(
            f"{header.path}: tensor {info.name} {list(info.shape)} cannot be {kind.name}: rows of blocks of"
            f" {kind.block} were expected"
        )
    nbytes = math.prod(info.shape) // kind.block * kind.block_bytes
    if info.offset + nbytes > header.file_bytes:
        raise CheckpointError(
            f"{header.path} is damaged (truncated download?): tensor {info.name} would end at byte"
            f" {info.offset + nbytes} of {header.file_bytes}"
        )
    stored = StoredTensor(
        name=info.name, dtype=kind.dtype, shape=info.shape, path=header.path, offset=info.offset, nbytes=nbytes
    )
    return stored, kind


def _check_overlaps(header: Header, tensors: list[StoredTensor]) -> None:
    tensors = sorted(tensors, key=lambda tensor: tensor.offset)
    for first, second in itertools.pairwise(tensors):
        if first.offset + first.nbytes > second.offset:
            raise CheckpointError(f"{header.path} is damaged: tensors {first.name} and {second.name} overlap")


def _huggingface_names(gguf: ModuleType, architecture: str, config: Mapping[str, Any], where: str) -> dict[str, str]:
    """{GGUF's name: Hugging Face's} of all tensors that the family asks for."""
    from graphs.families import find_family  # they are read with the help of graphs.checkpoint, which needs this module

    try:
        family = find_family(config)
        refs = family.all_refs(family.parse_config(config))
    except CheckpointError as error:
        raise CheckpointError(f"{where}, read as a Hugging Face checkpoint: {error}") from None
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    names = {table.get_name(ref.name, try_suffixes=(".weight", ".bias")): ref.name for ref in refs}
    assert None not in names
    return names


def _rotary_rows(stored: StoredTensor, heads: int, head_dim: int) -> Tensor:
    """The order of GGUF's rows that gives Hugging Face's.

    llama.cpp rotates neighbours, (0, 1), (2, 3), .., and its converter moves the rows of queries and keys there from
    (0, D/2), (1, D/2 + 1), ... Whole rows move, so that quantized blocks stay as they are.
    """
    if stored.shape[0] != heads * head_dim or head_dim % 2:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} has {stored.shape[0]} rows, expected {heads} heads of {head_dim}, an"
            " even number"
        )
    return torch.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).transpose(1, 2).flatten()


def _load(stored: StoredTensor, kind: GgmlType) -> Tensor:
    if kind.block > 1:
        raise CheckpointError(f"{stored.path}: tensor {stored.name} is {kind.name}, expected F32")
    return load_tensor(stored).float()


def _pack(name: str, stored: StoredTensor, kind: GgmlType, rows: Tensor | None) -> PackedTensor:
    """A quantized tensor, or one whose rows are to be put into another order."""
    if kind.block == 1:
        assert rows is not None
        return PackedTensor(
            name=name,
            shape=stored.shape,
            kind=f"GGUF {kind.name}, rows in another order",
            nbytes=stored.nbytes,
            format=None,
            floats=True,
            dtype=kind.dtype,
            numbers=functools.partial(_reordered, stored, rows),
        )
    outputs, inputs = stored.shape
    where: dict[str, Any] = {
        "kind": kind,
        "path": stored.path,
        "offset": stored.offset,
        "shape": (outputs, inputs),
        "rows": rows,
    }
    return PackedTensor(
        name=name,
        shape=stored.shape,
        kind=f"GGUF {kind.name}",
        nbytes=stored.nbytes,
        format=kind.format,
        negative_scales=kind.negative_scales,
        reason=kind.reason,
        dtype=kind.dtype,
        read=None if kind.codes is None else functools.partial(read_codes, **where),
        numbers=None if kind.numbers is None else functools.partial(read_numbers, **where),
    )


def _reordered(stored: StoredTensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return load_tensor(stored)[rows].to(dtype)
