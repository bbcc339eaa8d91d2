"""The precisions an export can have: what it computes in, and how each weight is stored.

`--precision NAME[:KEY=VALUE,...]`, as in `int4:block=64,lm_head=int8,model.layers.0.*=fp16`. docs/quantization.md.
"""

import fnmatch
from dataclasses import dataclass

from exporter.errors import ExportError
from graphs.checkpoint import Checkpoint, TensorRef
from graphs.config import DecoderConfig
from graphs.positions import RotaryPositionalEmbeddings
from graphs.quantization import GRIDS, WeightFormat
from graphs.transformer import TransformerDecoder
from runtimes.signature import CacheSpec, StateSpec, VisionSpec


@dataclass(frozen=True, kw_only=True)
class FloatType:
    """One float dtype under the names of each party."""

    name: str  # on the command line
    dtype: str  # numpy's and torch's
    safetensors: str


FLOAT_TYPES: dict[str, FloatType] = {
    "fp32": FloatType(name="fp32", dtype="float32", safetensors="F32"),
    "fp16": FloatType(name="fp16", dtype="float16", safetensors="F16"),
    "bf16": FloatType(name="bf16", dtype="bfloat16", safetensors="BF16"),
}
AS_STORED = "stored"  # as the checkpoint holds its weights, quantized ones code for code
PRECISIONS = (*FLOAT_TYPES, *GRIDS, AS_STORED)

Choice = WeightFormat | FloatType  # how one weight is stored

# Parameters with a name of their own in --precision
ALIASES = {"embed": "tok_embeddings.weight", "lm_head": "output.weight"}
# The output projection decides between tokens that lie close together: in 4 bits it costs more quality than any layer.
HEAD_FORMATS = {"int4": "int8", "nvfp4": "fp8"}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What an export computes in, and how its weights are stored."""

    name: str  # as given, or found in the checkpoint
    compute: FloatType
    weights: WeightFormat | None = None  # of matrices that multiply; None: as `compute`; as_stored: if rounded again
    overrides: tuple[tuple[str, Choice], ...] = ()  # (alias or glob over tensor names, choice); the last match counts
    as_stored: bool = False  # weights that the checkpoint holds quantized stay as they are
    any_block: bool = False  # ... and so do those of the same kind with other blocks than `weights` has

    @property
    def dtype(self) -> str:
        """What it computes in: numpy's and torch's name."""
        return self.compute.dtype

    @property
    def safetensors(self) -> str:
        """The same under safetensors' name."""
        return self.compute.safetensors

    def choose(self, parameter: str, ref: TensorRef, *, multiplies: bool) -> tuple[Choice, bool]:
        """(how the parameter is stored, whether an override says so).

        Args:
            parameter: our name of it.
            multiplies: whether it is a matrix that multiplies, which may be quantized.
        """
        name = ref.name.removesuffix(".weight")
        for key, choice in reversed(self.overrides):
            if ALIASES.get(key) == parameter or (multiplies and fnmatch.fnmatchcase(name, key)):
                return choice, True
        if parameter == ALIASES["embed"] and self.weights is not None and not self.as_stored:
            return FLOAT_TYPES["fp16" if self.compute.name == "fp32" else self.compute.name], False
        if not multiplies or self.weights is None or self.as_stored:
            return self.compute, False
        if parameter == ALIASES["lm_head"] and self.weights.name in HEAD_FORMATS:
            return _default(HEAD_FORMATS[self.weights.name]), False
        return self.weights, False

    def check_overrides(self, names: dict[str, TensorRef]) -> None:
        """ExportError for an override that no weight matches.

        Args:
            names: {parameter that multiplies: where it is in the checkpoint}.
        """
        known = [ref.name.removesuffix(".weight") for ref in names.values()]
        for key, _ in self.overrides:
            if key not in ALIASES and not fnmatch.filter(known, key):
                raise ExportError(
                    f"--precision {self.name}: {key} matches no matrix of this model; its matrices are called such as"
                    f" {', '.join(known[:3])}"
                )


def find_precision(text: str | None, checkpoint: Checkpoint) -> Precision:
    """The precision that --precision asks for; without one (or "stored"), what the checkpoint is stored in.

    Raises:
        ExportError: the text is wrong; it says what could stand there.
    """
    stored = next(each for each in FLOAT_TYPES.values() if each.safetensors == checkpoint.dtype)
    name, _, rest = (text or AS_STORED).partition(":")
    if name not in PRECISIONS:
        raise ExportError(f"precision {name!r} is not supported; supported: {', '.join(PRECISIONS)}")
    if name == AS_STORED:
        return _as_stored(checkpoint, stored, rest)
    quantizes = name in GRIDS
    compute = _compute(checkpoint, stored, "fp16") if quantizes else FLOAT_TYPES[name]
    weights = _default(name) if quantizes else None
    any_block = True
    overrides: dict[str, Choice] = {}
    seen = set()
    for item in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        where = f"--precision {text}: {item!r}"
        if not equals or not key or not value:
            raise ExportError(f"{where} is not KEY=VALUE, as in int4:block=64,lm_head=int8")
        if key in seen:
            raise ExportError(f"{where} is given twice")
        seen.add(key)
        if key == "block":
            if weights is None:
                raise ExportError(f"{where}: {name} has no blocks")
            weights, any_block = _format(f"{name}/{value}", where), False
        elif key == "dtype":
            if not quantizes:
                raise ExportError(f"{where}: {name} computes in {name}")
            if value not in FLOAT_TYPES:
                raise ExportError(f"{where}: dtype must be one of {', '.join(FLOAT_TYPES)}")
            compute = FLOAT_TYPES[value]
        elif key in ALIASES or any(char in key for char in ".*?["):
            overrides[key] = _choice(value, where)
            if key == "embed" and isinstance(overrides[key], WeightFormat):
                raise ExportError(
                    f"{where}: embeddings are looked up, and runtimes would dequantize the whole table for a row of it:"
                    f" choose one of {', '.join(FLOAT_TYPES)}"
                )
        else:
            raise ExportError(
                f"{where}: unknown key {key!r}; known: block, dtype, {', '.join(ALIASES)}, or a pattern over tensor"
                " names such as model.layers.0.*"
            )
    return Precision(
        name=text or name, compute=compute, weights=weights, overrides=tuple(overrides.items()), any_block=any_block
    )


def _as_stored(checkpoint: Checkpoint, stored: FloatType, rest: str) -> Precision:
    """Whatever the checkpoint holds; `rest` may say what is computed in, as in stored:dtype=fp16."""
    quantized = [tensor for tensor in checkpoint.packed.values() if not tensor.floats]
    key, _, value = rest.partition("=")
    if rest and (key != "dtype" or value not in FLOAT_TYPES or not quantized):
        raise ExportError(
            f"--precision {AS_STORED}:{rest}: of weights that are stored quantized, dtype alone can be said, as in"
            f" {AS_STORED}:dtype=fp16; known: {', '.join(FLOAT_TYPES)}"
        )
    if not quantized:
        return Precision(name=stored.name, compute=stored)
    formats = [tensor.format for tensor in quantized if tensor.format is not None]
    most = max(set(formats), key=formats.count) if formats else _default("int4")
    return Precision(
        name=f"{AS_STORED}:{rest}" if rest else AS_STORED,
        compute=FLOAT_TYPES[value] if rest else _compute(checkpoint, stored, stored.name),
        weights=most,
        as_stored=True,
        any_block=True,
    )


def _compute(checkpoint: Checkpoint, stored: FloatType, narrow: str) -> FloatType:
    """What quantized weights are computed with: float32 where the checkpoint has it or needs it, else `narrow`.

    That is float16 if nothing else is asked: ONNX Runtime has no bfloat16 kernels on the CPU.
    """
    quantized = [tensor for tensor in checkpoint.packed.values() if not tensor.floats]
    # some scales, and scale * code of an embedding, are exact in float32 only
    wide = any(tensor.dtype == "F32" or tensor.name.endswith("embed_tokens.weight") for tensor in quantized)
    return FLOAT_TYPES["fp32" if wide or stored.name == "fp32" else narrow]


def _default(name: str) -> WeightFormat:
    return WeightFormat(name=name, block=GRIDS[name].block)


def _choice(value: str, where: str) -> Choice:
    return FLOAT_TYPES[value] if value in FLOAT_TYPES else _format(value, where)


def _format(value: str, where: str) -> WeightFormat:
    """A weight format, as in int4 or int4/64."""
    name, slash, block = value.partition("/")
    if name not in GRIDS:
        raise ExportError(
            f"{where}: expected one of {', '.join((*FLOAT_TYPES, *GRIDS))}, or one with its block, as in int4/64"
        )
    if not slash:
        return _default(name)
    if not block.isdigit() or int(block) not in GRIDS[name].blocks:
        blocks = ", ".join(str(each) for each in GRIDS[name].blocks)
        raise ExportError(f"{where}: block of {name} must be one of {blocks}, got {block!r}")
    return WeightFormat(name=name, block=int(block))


def fit_block(format: WeightFormat, inputs: int) -> WeightFormat:
    """The format with blocks that divide a weight's inputs, which TensorRT insists on: the next smaller ones that do,
    or int8 without blocks where none does."""
    blocks = [block for block in format.grid.blocks if block and block <= format.block and inputs % block == 0]
    if not format.block or blocks:
        return WeightFormat(name=format.name, block=max(blocks, default=0))
    return WeightFormat(name="int8", block=0)


def cache_spec(decoder: TransformerDecoder, max_len: int, dtype: str) -> CacheSpec:
    """The decoder's state for texts of up to max_len tokens, in a model that computes in `dtype`."""
    tensors = tuple(
        StateSpec(
            layer=index,
            name=tensor.name,
            dtype="float32" if tensor.float32 else dtype,
            shape=tensor.shape,
            slot_axis=tensor.slot_axis,
        )
        for index, layer in enumerate(decoder.state(max_len))
        for tensor in layer
    )
    ropes = [module.rope for module in decoder.modules() if isinstance(module, RotaryPositionalEmbeddings)]
    steady = [rope.original_max_position_embeddings for rope in ropes if rope.depends_on_length]
    return CacheSpec(max_len=max_len, dtype=dtype, tensors=tensors, steady_len=min(steady, default=None))


def vision_spec(config: DecoderConfig, dtype: str, max_images: int) -> VisionSpec | None:
    """The keys and values of images, for a model that sees; None for others."""
    if config.vision is None:
        return None
    return VisionSpec(
        layers=config.cross_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        patches_per_tile=config.vision.num_patches,
        max_tiles=config.vision.max_num_tiles,
        max_images=max_images,
    )
