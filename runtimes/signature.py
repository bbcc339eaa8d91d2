"""Names, dtypes and shapes of a graph's inputs and outputs, and of its cache: the one place that knows them.

ONNX names, dynamic shapes of torch.export, TensorRT profiles and feed checks are all read from here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.errors import FeedError

DTYPE_BYTES = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}

Shape = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One graph input or output; a dimension is a number, or the name of an entry in GraphSignature.dims."""

    name: str
    dtype: str
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimRange:
    """The sizes a dynamic dimension may take, and the one to optimise for."""

    min: int
    opt: int
    max: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The static key/value cache: per layer a key and a value of [batch_size, kv_heads, max_len, head_dim]."""

    layers: int
    kv_heads: int
    max_len: int
    head_dim: int
    dtype: str

    def past_names(self) -> list[str]:
        """Input names, key then value, layer by layer; present_names is parallel to it."""
        return [f"past_key_values.{i}.{part}" for i in range(self.layers) for part in ("key", "value")]

    def present_names(self) -> list[str]:
        """Output names."""
        return [f"present.{i}.{part}" for i in range(self.layers) for part in ("key", "value")]

    def array_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        """Shape of each cache tensor for `batch_size` rows."""
        return (batch_size, self.kv_heads, self.max_len, self.head_dim)

    def symbolic_shape(self) -> Shape:
        """The same with the dynamic batch dimension."""
        return ("batch_size", self.kv_heads, self.max_len, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def nbytes(self, batch_size: int) -> int:
        """Bytes of the whole cache for `batch_size` rows."""
        return batch_size * self.max_len * self.bytes_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSignature:
    """Inputs and outputs in order; sizes of dynamic dimensions; which output may share memory with which input."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    aliases: Mapping[str, str]  # {output name: input name}

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
            if str(array.dtype) != spec.dtype:
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
                        f" (set at export: --max-len, --max-batch)"
                    )
                if sizes.setdefault(dim, size) != size:
                    raise FeedError(f"{name}: {dim} is {size}, but another input has {sizes[dim]}")
        return sizes

    def check(self) -> None:
        """ValueError when a dimension has no range, a range is empty, or an alias names no tensor."""
        specs = {spec.name for spec in (*self.inputs, *self.outputs)}
        for spec in (*self.inputs, *self.outputs):
            if spec.dtype not in DTYPE_BYTES:
                raise ValueError(f"{spec.name} has the unknown dtype {spec.dtype!r}")
            for dim in spec.shape:
                if dim not in self.dims and not (type(dim) is int and dim > 0):
                    raise ValueError(f"dimension {dim!r} of {spec.name} has no range")
        for name, sizes in self.dims.items():
            numbers = (sizes.min, sizes.opt, sizes.max)
            if not all(type(number) is int for number in numbers) or not 0 < sizes.min <= sizes.opt <= sizes.max:
                raise ValueError(f"the range of dimension {name} is not one: {numbers}")
        if not specs.issuperset([*self.aliases.keys(), *self.aliases.values()]):
            raise ValueError("an alias names no tensor")

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
        )


def _tensor_spec(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))


def _show(shape: Shape | tuple[int, ...]) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"
