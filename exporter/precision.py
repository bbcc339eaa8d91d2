"""The precisions an export can have, and what each is called where."""

from dataclasses import dataclass

from exporter.errors import ExportError
from graphs.config import DecoderConfig
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, StateSpec, VisionSpec


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


def cache_spec(decoder: TransformerDecoder, max_len: int, precision: Precision) -> CacheSpec:
    """The decoder's state for texts of up to max_len tokens."""
    tensors = tuple(
        StateSpec(
            layer=index,
            name=tensor.name,
            dtype="float32" if tensor.float32 else precision.dtype,
            shape=tensor.shape,
            slot_axis=tensor.slot_axis,
        )
        for index, layer in enumerate(decoder.state(max_len))
        for tensor in layer
    )
    return CacheSpec(max_len=max_len, dtype=precision.dtype, tensors=tensors)


def vision_spec(config: DecoderConfig, precision: Precision, max_images: int) -> VisionSpec | None:
    """The keys and values of images, for a model that sees; None for others."""
    if config.vision is None:
        return None
    return VisionSpec(
        layers=config.cross_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=precision.dtype,
        patches_per_tile=config.vision.num_patches,
        max_tiles=config.vision.max_num_tiles,
        max_images=max_images,
    )
