"""Names, dtypes and shapes of a graph's inputs and outputs, and of its cache: the one place that knows them.

ONNX names, dynamic shapes of torch.export, TensorRT profiles and feed checks are all read from here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from runtimes.errors import FeedError

DTYPE_BYTES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}

MAX_STATE_BYTES = 1 << 40  # of one row; a manifest that asks for more is damaged

# What the largest size of a dynamic dimension follows from, if not from --max-len
LIMITED_BY = {
    "batch_size": "--max-batch, at export",
    "num_images": "--max-images, at export",
    "num_tiles": "the model's max_num_tiles",
}

# Which dimension counts the slots of past and present caches, by the graph's layout; None: max_len, a constant.
SLOT_DIMS: dict[str, tuple[str | None, str | None]] = {
    "portable": (None, None),
    "dynamic": ("past_sequence_length", "total_sequence_length"),
    "genai": ("past_sequence_length", "total_sequence_length"),
}

Shape = tuple[int | str, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One graph input or output; a dimension is a number, or the name of an entry in GraphSignature.dims."""

    name: str
    dtype: str
    shape: Shape


# What every runner's step takes beside state and images, and the portable layout's inputs.
STEP_INPUTS = tuple(
    TensorSpec(name=name, dtype="int64", shape=shape)
    for name, shape in (
        ("input_ids", ("batch_size", "sequence_length")),
        ("position_ids", ("batch_size", "sequence_length")),
        ("write_indices", ("batch_size",)),
        ("attention_mask", ("batch_size", "total_sequence_length")),
        ("logit_indices", ("batch_size", "n")),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimRange:
    """The sizes a dynamic dimension may take, and the one to optimise for."""

    min: int
    opt: int
    max: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One tensor that a layer carries from call to call."""

    layer: int
    name: str  # key, value; numerator, ..
    dtype: str
    shape: tuple[int, ...]  # of one row
    slot_axis: int | None  # which axis of `shape` counts cache slots; None: it sums over all tokens so far

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def array_shape(self, batch_size: int) -> tuple[int, ...]:
        """Its shape for `batch_size` rows."""
        return (batch_size, *self.shape)

    def symbolic_shape(self, slots: str | None = None) -> Shape:
        """The same with the dynamic batch dimension; `slots` names that of slots where it is dynamic as well."""
        shape: list[int | str] = ["batch_size", *self.shape]
        if slots is not None and self.slot_axis is not None:
            shape[1 + self.slot_axis] = slots
        return tuple(shape)

    def slots(self, array: np.ndarray, row: int, first: int, end: int | None) -> np.ndarray:
        """A view of the slots first .. end of one row of the tensor; [.., slots, ..] without the batch axis."""
        assert self.slot_axis is not None
        index: list[slice] = [slice(None)] * len(self.shape)
        index[self.slot_axis] = slice(first, end)
        return array[row][tuple(index)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The decoding state of all layers, layer by layer: static caches of max_len slots, and sums that have none.

    Softmax attention has a key and a value of [batch_size, kv_heads, max_len, head_dim].
    """

    max_len: int
    dtype: str  # the model's; sums may be wider
    tensors: tuple[StateSpec, ...]
    # A text of at most so many tokens leaves the same however it is fed; in a longer one, keys are turned by angles
    # that depend on how long it was at their call. None: it never matters.
    steady_len: int | None = None

    def past_names(self) -> list[str]:
        """Input names; present_names is parallel to it."""
        return [f"past_key_values.{tensor.layer}.{tensor.name}" for tensor in self.tensors]

    def present_names(self) -> list[str]:
        """Output names."""
        return [f"present.{tensor.layer}.{tensor.name}" for tensor in self.tensors]

    def sum_names(self) -> list[str]:
        """Input names of the tensors without slots, which cannot be taken back to fewer tokens."""
        pairs = zip(self.past_names(), self.tensors, strict=True)
        return [name for name, tensor in pairs if tensor.slot_axis is None]

    def past_specs(self, slots: str | None = None) -> tuple[TensorSpec, ...]:
        """What a graph takes; `slots` names the dimension of slots where it is dynamic."""
        return self._specs(self.past_names(), slots)

    def present_specs(self, slots: str | None = None) -> tuple[TensorSpec, ...]:
        """What a graph returns."""
        return self._specs(self.present_names(), slots)

    def _specs(self, names: Sequence[str], slots: str | None) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=name, dtype=tensor.dtype, shape=tensor.symbolic_shape(slots))
            for name, tensor in zip(names, self.tensors, strict=True)
        )

    def by_layer(self, items: Sequence[T]) -> list[tuple[T, ...]]:
        """One item for each tensor, grouped by layer."""
        groups: dict[int, list[T]] = {}
        for tensor, item in zip(self.tensors, items, strict=True):
            groups.setdefault(tensor.layer, []).append(item)
        return [tuple(group) for group in groups.values()]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers."""
        return sum(tensor.row_bytes for tensor in self.tensors if tensor.slot_axis is not None) // self.max_len

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row takes however long it is: sums."""
        return sum(tensor.row_bytes for tensor in self.tensors if tensor.slot_axis is None)

    def nbytes(self, batch_size: int) -> int:
        """Bytes of the whole state for `batch_size` rows."""
        return batch_size * sum(tensor.row_bytes for tensor in self.tensors)

    def check(self) -> None:
        """ValueError when a tensor is not what a state can be."""
        for tensor in self.tensors:
            sizes = (*tensor.shape, self.max_len)
            if not all(type(size) is int and 0 < size < 2**31 for size in sizes) or type(tensor.layer) is not int:
                raise ValueError("sizes must be whole numbers above 0")
            if not {tensor.dtype, self.dtype} <= DTYPE_BYTES.keys():
                raise ValueError(f"unknown dtype {tensor.dtype!r}")
            axis = tensor.slot_axis
            if axis is not None and not (0 <= axis < len(tensor.shape) and tensor.shape[axis] == self.max_len):
                raise ValueError(f"axis {axis} of {tensor.name} does not count {self.max_len} slots")
        if not self.tensors:
            raise ValueError("there is no decoding state")
        if self.nbytes(1) > MAX_STATE_BYTES:
            raise ValueError(f"the decoding state of a row would have {self.nbytes(1):,} bytes")
        if self.steady_len is not None and type(self.steady_len) is not int:
            raise ValueError("steady_len must be a whole number, or null")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CacheSpec":
        """The inverse of dataclasses.asdict."""
        tensors = tuple(StateSpec(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in data["tensors"])
        return cls(**{**data, "tensors": tensors})


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """The keys and values of images: what the vision encoder makes and the decoder's cross-attention layers read.

    Each is [batch_size, kv_heads, vision_tokens, head_dim], of num_images * num_tiles * patches_per_tile vision tokens.
    """

    layers: tuple[int, ...]  # the decoder's cross-attention layers
    kv_heads: int
    head_dim: int
    dtype: str
    patches_per_tile: int  # vision tokens of a tile
    max_tiles: int  # of an image
    max_images: int  # of a row

    def names(self) -> list[str]:
        """Of the encoder's outputs and the decoder's inputs: a key and a value for each layer."""
        return [f"cross_key_values.{layer}.{part}" for layer in self.layers for part in ("key", "value")]

    def symbolic_shape(self) -> Shape:
        """Of each, with dynamic dimensions."""
        return ("batch_size", self.kv_heads, "vision_tokens", self.head_dim)

    def array_shape(self, batch_size: int, images: int, tiles: int) -> tuple[int, ...]:
        """Of each."""
        return (batch_size, self.kv_heads, images * tiles * self.patches_per_tile, self.head_dim)

    def by_layer(self, items: Sequence[T]) -> list[tuple[T, ...]]:
        """One item for each tensor, in pairs of key and value."""
        return list(zip(items[::2], items[1::2], strict=True))

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one image of max_tiles tiles, over all layers."""
        numbers = math.prod(self.array_shape(1, 1, self.max_tiles))
        return numbers * DTYPE_BYTES[self.dtype] * len(self.names())

    def check(self) -> None:
        """ValueError when it describes nothing."""
        sizes = (self.kv_heads, self.head_dim, self.patches_per_tile, self.max_tiles, self.max_images)
        if not all(type(size) is int and size > 0 for size in sizes) or not self.layers:
            raise ValueError("sizes of the vision encoder's output must be whole numbers above 0")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "VisionSpec":
        """The inverse of dataclasses.asdict."""
        return cls(**{**data, "layers": tuple(data["layers"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSignature:
    """Inputs and outputs in order; sizes of dynamic dimensions; which output may share memory with which input."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    aliases: Mapping[str, str]  # {output name: input name}
    limits: Mapping[str, int]  # {input name: its numbers are below this}

    def check_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Check some inputs against the signature; return the sizes of the dynamic dimensions they fix.

        Raises:
            FeedError: an unknown name, a wrong dtype or rank, or sizes that disagree or lie outside their range.
        """
        specs = {spec.name: spec for spec in self.inputs}
        sizes: dict[str, int] = {}
        for name, array in feeds.items():
            if name not in specs:
                raise FeedError(f"unknown input {name!r}; this graph takes {', '.join(specs)}")
            spec = specs[name]
            if not isinstance(array, np.ndarray):
                raise FeedError(f"{name} must be a numpy array, got {type(array).__name__}")
            if array.dtype != spec.dtype:
                raise FeedError(f"{name} must be {spec.dtype}, got {array.dtype}")
            if array.ndim != len(spec.shape):
                raise FeedError(f"{name} must have shape {_show(spec.shape)}, got {_show(array.shape)}")
            for size, dim in zip(array.shape, spec.shape, strict=True):
                if isinstance(dim, int):
                    if size != dim:
                        raise FeedError(f"{name} must have shape {_show(spec.shape)}, got {_show(array.shape)}")
                    continue
                allowed = self.dims[dim]
                if not allowed.min <= size <= allowed.max:
                    raise FeedError(
                        f"{name}: {dim} is {size}, but this artifact takes {allowed.min} to {allowed.max}"
                        f" (set by {LIMITED_BY.get(dim, '--max-len, at export')})"
                    )
                if sizes.setdefault(dim, size) != size:
                    raise FeedError(f"{name}: {dim} is {size}, but another input has {sizes[dim]}")
        return sizes

    def check(self) -> None:
        """ValueError when a dimension has no range, a range is empty, or an alias names no tensor."""
        specs = {spec.name for spec in (*self.inputs, *self.outputs)}
        for spec in (*self.inputs, *self.outputs):
            if not isinstance(spec.name, str):
                raise ValueError(f"a tensor is called {spec.name!r:.80}")
            if spec.dtype not in DTYPE_BYTES:
                raise ValueError(f"{spec.name} has the unknown dtype {spec.dtype!r}")
            for dim in spec.shape:
                if dim not in self.dims and not (type(dim) is int and dim > 0):
                    raise ValueError(f"dimension {dim!r} of {spec.name} has no range")
        for name, sizes in self.dims.items():
            numbers = (sizes.min, sizes.opt, sizes.max)
            if not all(type(number) is int for number in numbers) or not 0 <= sizes.min <= sizes.opt <= sizes.max > 0:
                raise ValueError(f"the range of dimension {name} is not one: {numbers}")
        if not specs.issuperset([*self.aliases.keys(), *self.aliases.values()]):
            raise ValueError("an alias names no tensor")
        if not specs.issuperset(self.limits) or not all(type(limit) is int for limit in self.limits.values()):
            raise ValueError("a limit is not a number, or names no tensor")

    def to_json(self) -> dict[str, Any]:
        """As plain data, for manifest.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "GraphSignature":
        """The inverse of to_json."""
        return cls(
            inputs=tuple(_tensor_spec(spec) for spec in data["inputs"]),
            outputs=tuple(_tensor_spec(spec) for spec in data["outputs"]),
            dims={name: DimRange(**sizes) for name, sizes in data["dims"].items()},
            aliases=dict(data["aliases"]),
            limits=dict(data["limits"]),
        )


def _tensor_spec(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


def _show(shape: Shape | tuple[int, ...]) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionPart:
    """What makes a decoder see: its vision encoder, as a graph or an engine."""

    path: Path
    signature: GraphSignature
    spec: VisionSpec


def step_signature(graph: GraphSignature, cache: CacheSpec) -> GraphSignature:
    """What Runner.step takes, of a graph whose own inputs are others: the portable layout's inputs and ranges."""
    length = graph.dims["sequence_length"]
    return GraphSignature(
        inputs=(*STEP_INPUTS, *cache.past_specs()),
        outputs=(),
        dims={
            "batch_size": graph.dims["batch_size"],
            "sequence_length": length,
            "total_sequence_length": length,
            "n": dataclasses.replace(length, opt=1),
        },
        aliases={},
        limits=graph.limits,
    )
