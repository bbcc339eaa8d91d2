"""The precisions an export can have, and what each is called where."""

from dataclasses import dataclass

from exporter.errors import ExportError
from graphs.config import DecoderConfig
from runtimes.signature import CacheSpec


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One model dtype under the names of each party."""

    name: str  # on the command line
    dtype: str  # numpy's and torch's
    safetensors: str


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(name="fp32", dtype="float32", safetensors="F32"),
    "fp16": Precision(name="fp16", dtype="float16", safetensors="F16"),
    "bf16": Precision(name="bf16", dtype="bfloat16", safetensors="BF16"),
}


def find_precision(name: str | None, stored: str) -> Precision:
    """The precision called `name`; without one, that of the checkpoint's own dtype (`stored`: F32, F16 or BF16)."""
    if name is None:
        return next(precision for precision in PRECISIONS.values() if precision.safetensors == stored)
    if name not in PRECISIONS:
        raise ExportError(f"precision {name!r} is not supported; supported: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def cache_spec(config: DecoderConfig, max_len: int, precision: Precision) -> CacheSpec:
    """The decoder's cache."""
    return CacheSpec(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        max_len=max_len,
        head_dim=config.head_dim,
        dtype=precision.dtype,
    )
