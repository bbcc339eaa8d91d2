"""What the checkpoints of GPTQ and AWQ have in common: linear layers as codes packed into words of 32 bits.

weight = scale * (code - zero), with one scale and one zero for each output and each group of inputs. The codes count
from 0; graphs/quantization.py's count from the middle of their range, and so do its zero points. Subtracting the middle
from both changes no weight.

N outputs, K inputs, G groups of inputs.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.checkpoint import Checkpoint, PackedTensor, StoredTensor, load_tensor
from graphs.errors import CheckpointError, legible
from graphs.keys import Keys, short
from graphs.quantization import GRIDS, QuantizedTensor, WeightFormat

log = logging.getLogger(__name__)

WHERE = "config.json: quantization_config"

# Keys that would change what the tensors mean, and the values with which they do not; absent and null are fine.
MEANING_KEYS: dict[str, tuple[Any, ...]] = {
    "activation": (),
    "adapter": (),
    "is_marlin_format": (False,),
    "pack_dtype": ("int32",),
    "rotation": (),
}
# Keys that say how the codes were found, which kernel is to be used, or what the tensors themselves tell.
OTHER_KEYS = frozenset(
    """
    act_group_aware actorder awq_gemm_checkpoint backend batch_size block_name_to_quantize cache_block_outputs
    cache_examples_on_gpu damp_auto_increment damp_percent dataset desc_act disable_exllama do_fuse exllama_config
    fuse_max_seq_len groupsize lm_head max_input_length meta method model_file_base_name model_name_or_path
    model_seqlen module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse modules_to_not_convert
    mse pad_token_id quant_method static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama zero_point
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What quantization_config says of all layers."""

    version: str  # which of the method's layouts the tensors have
    bits: int
    group_size: int  # inputs that share a scale; -1: all of them
    overridden: bool  # some layers have other settings; their shapes tell which

    def groups(self, inputs: int) -> int:
        """G."""
        return 1 if self.group_size == -1 else ceil_div(inputs, self.group_size)


def read_settings(
    quantization: Mapping[str, Any], *, version_keys: tuple[str, ...], versions: tuple[str, ...], bits: tuple[int, ...]
) -> Settings:
    """Read quantization_config; CheckpointError names the first key that is missing, wrong or not supported.

    Args:
        version_keys: where the version may be written.
        versions, bits: those supported; the first version is that of a config.json that gives none.
    """
    keys = Keys(quantization, WHERE)
    given = {key: quantization[key] for key in version_keys if keys.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str) or value.lower() not in versions:
            raise CheckpointError(f"{WHERE}.{key} {short(value)} is not supported; supported: {', '.join(versions)}")
    if len({value.lower() for value in given.values()}) > 1:
        raise CheckpointError(f"{WHERE}: {' and '.join(given)} contradict each other: {short(given)}")
    dynamic = keys.get("dynamic", {})
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"{WHERE}: dynamic must be an object, found {short(dynamic)}")
    settings = Settings(
        version=next(iter(given.values()), versions[0]).lower(),
        bits=int(keys.one_of("bits", bits, bits[0] if len(bits) == 1 else None)),
        group_size=keys.integer("group_size", 128, minimum=-1),
        overridden=any(not pattern.startswith("-") for pattern in dynamic),  # "-:pattern" leaves layers as they were
    )
    if settings.group_size == 0:
        raise CheckpointError(f"{WHERE}: group_size must be a number of inputs or -1 (all of them), found 0")
    for key, harmless in MEANING_KEYS.items():
        keys.one_of(key, (None, *harmless))
    unknown = sorted(quantization.keys() - keys.used - OTHER_KEYS)
    if unknown:
        log.warning("%s: unknown keys are ignored: %s", WHERE, legible(", ".join(unknown)))
    return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """A layer's weight, checked but for its codes, which are read when they are asked for."""

    name: str  # of the weight
    method: str  # in words
    bits: int
    shape: tuple[int, int]  # (N, K)
    parts: Mapping[str, StoredTensor]  # qweight, scales, ..
    groups: Tensor  # int64 [K]: the group of each input
    read_codes: Callable[[], Tensor]  # uint8 [N, K], from 0
    read_zeros: Callable[[], Tensor]  # int16 [N, G]: the codes of 0, which may lie just above all codes

    def read_scales(self) -> Tensor:
        """[N, G], in their stored dtype."""
        return load_tensor(self.parts["scales"]).t()


def unpack_layers(
    checkpoint: Checkpoint,
    part_names: tuple[str, ...],
    to_linear: Callable[[str, dict[str, StoredTensor]], PackedLinear],
) -> Checkpoint:
    """The checkpoint with each layer's parts replaced by its weight, among `packed`.

    Args:
        part_names: of a layer's tensors; each but `scales` tells that a layer is quantized.
        to_linear: makes a layer from its name and its parts.

    Raises:
        CheckpointError: no layer is quantized, or a layer lacks parts or has its weight twice.
    """
    tensors, packed = dict(checkpoint.tensors), dict(checkpoint.packed)
    telling = [f".{part}" for part in part_names if part != "scales"]  # others have `scales` as well
    layers = sorted({name.removesuffix(end) for name in tensors for end in telling if name.endswith(end)})
    if not layers:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is called *.qweight, but config.json has a quantization_config: remove it"
            " if the weights are plain numbers"
        )
    for layer in layers:
        parts = {part: tensors.pop(f"{layer}.{part}") for part in part_names if f"{layer}.{part}" in tensors}
        missing = [part for part in part_names if part not in parts]
        if missing:
            raise CheckpointError(f"{checkpoint.folder}: {layer} has {', '.join(parts)}, but no {', '.join(missing)}")
        if f"{layer}.weight" in tensors or f"{layer}.weight" in packed:
            raise CheckpointError(f"{checkpoint.folder} holds both {layer}.weight and {layer}.qweight: remove one")
        packed[f"{layer}.weight"] = _to_packed(to_linear(layer, parts))
    return dataclasses.replace(checkpoint, tensors=tensors, packed=packed)


def check_part(part: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], legend: str) -> None:
    """CheckpointError where a part has another dtype or shape, or holds nothing.

    Args:
        legend: where the expected shape comes from.
    """
    if not all(part.shape):
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.dtype} {list(part.shape)}, expected no dimension of 0"
        )
    if part.dtype not in dtypes or part.shape != shape:
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.dtype} {list(part.shape)}, expected {' or '.join(dtypes)}"
            f" {list(shape)}: {legend}"
        )


def check_matrix(part: StoredTensor) -> None:
    """CheckpointError where a part does not have two dimensions, from which others' shapes follow."""
    if len(part.shape) != 2:
        raise CheckpointError(f"{part.path}: {part.name} is {part.dtype} {list(part.shape)}, expected two dimensions")


def check_symmetric(linear: PackedLinear, key: str, value: bool, hint: str = "") -> None:
    """CheckpointError where a zero is not the middle code, as `key` says they all are."""
    zeros, qzeros = linear.read_zeros(), linear.parts["qzeros"]
    low, high = int(zeros.min()), int(zeros.max())
    if {low, high} != {_middle(linear.bits)}:
        found = f"of {low}" if low == high else f"from {low} to {high}"
        raise CheckpointError(
            f"{qzeros.path}: {qzeros.name} holds zero points {found}, expected {_middle(linear.bits)}, because"
            f" {WHERE}.{key} is {short(value)}: correct {key}{hint}"
        )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def read_words(part: StoredTensor) -> np.ndarray:
    """An int32 part as uint32."""
    count = part.nbytes // 4
    return np.fromfile(part.path, "<u4", count, offset=part.offset).reshape(part.shape)


def split_words(words: np.ndarray, bits: int) -> Tensor:
    """The numbers of 4 or 8 bits in words [R, C], lowest bits first: uint8 [R, C, 32 / bits]."""
    octets = torch.from_numpy(words.view(np.uint8)).unflatten(1, (-1, 4))
    if bits == 8:
        return octets
    return torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(2)


def _to_packed(linear: PackedLinear) -> PackedTensor:
    zeros = linear.read_zeros()
    beyond = _is_beyond(zeros, linear.bits)
    name = "int8" if linear.bits == 8 or beyond else "int4"
    block = _common_block(linear.groups, GRIDS[name].blocks)
    reason = ""
    if linear.bits == 8 and beyond:
        reason = "it has zero points of 256, which 8 bits cannot express"
    elif block is None:
        reason = _why_no_block(linear.groups, GRIDS[name].blocks)
    format = None if reason or block is None else WeightFormat(name=name, block=block)
    group = int((linear.groups == linear.groups[0]).sum())
    scales = "one scale an output" if group == linear.shape[1] else f"blocks of {group}"
    return PackedTensor(
        name=linear.name,
        shape=linear.shape,
        kind=f"{linear.method}, {linear.bits} bits, {scales}",
        nbytes=sum(part.nbytes for part in linear.parts.values()),
        format=format,
        asymmetric=not beyond and bool((zeros != _middle(linear.bits)).any()),
        reason=reason,
        dtype=linear.parts["scales"].dtype,
        read=None if format is None else functools.partial(_read, linear, format),
        numbers=functools.partial(_numbers, linear) if format is None else None,
    )


def _middle(bits: int) -> int:
    """The code that becomes 0."""
    return 1 << (bits - 1)


def _is_beyond(zeros: Tensor, bits: int) -> bool:
    """True where a zero lies above all codes: no zero point, but 8 bits can express 4-bit codes less such a zero."""
    return bool((zeros >= 1 << bits).any())


def _common_block(groups: Tensor, blocks: tuple[int, ...]) -> int | None:
    """The largest block whose inputs are all of one group, wherever it lies; a scale may serve several blocks."""
    if 0 in blocks and bool((groups == groups[0]).all()):
        return 0
    for block in sorted(blocks, reverse=True):
        if block and len(groups) % block == 0:
            runs = groups.unflatten(0, (-1, block))
            if bool((runs == runs[:, :1]).all()):
                return block
    return None


def _why_no_block(groups: Tensor, blocks: tuple[int, ...]) -> str:
    if bool((groups.diff() < 0).any()):
        return "inputs that share a scale do not lie together (act-order, desc_act)"
    return f"its groups of inputs are no multiples of {min(block for block in blocks if block)}"


def _read(linear: PackedLinear, format: WeightFormat) -> QuantizedTensor:
    groups = linear.groups[:: format.block or len(linear.groups)]  # of each block
    codes, zeros, middle = linear.read_codes(), linear.read_zeros(), _middle(linear.bits)
    zero_points = None
    if _is_beyond(zeros, linear.bits):
        values = codes.view(torch.int8).unflatten(1, (len(groups), -1))
        codes = (values - zeros.to(torch.int8)[:, groups, None]).flatten(1)
    else:
        codes = (codes ^ 0x80).view(torch.int8) if linear.bits == 8 else codes.view(torch.int8) - middle
        if bool((zeros != middle).any()):
            zero_points = (zeros - middle).to(torch.int8)[:, groups]
    return QuantizedTensor(
        format=format, codes=codes, scales=linear.read_scales()[:, groups].float(), zero_points=zero_points
    )


def _numbers(linear: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], every step computed in `dtype`; code - zero is exact in all of them."""
    zeros, scales = linear.read_zeros().to(dtype), linear.read_scales().to(dtype)
    return (linear.read_codes().to(dtype) - zeros[:, linear.groups]) * scales[:, linear.groups]
