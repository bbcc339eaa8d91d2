"""What only the work itself can tell, estimated before it: sizes of graphs and engines, and memory.

Constants were measured with the package versions of constraints.txt; tests/exporter/test_plan.py holds them to what
exports really take. Memory is the resident set, mapped files included.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from exporter.pipeline import ExportRequest
from exporter.quantize import CALIBRATION_LENGTH, CALIBRATION_SAMPLES
from exporter.quantizers import QUANTIZERS
from exporter.source import Source
from exporter.targets import TARGETS
from exporter.text import STATE_BYTES
from exporter.weights import WeightPlan
from graphs.checkpoint import CHUNK_BYTES
from graphs.config import DecoderConfig
from runtimes.hashing import WHOLE_PIECE_BYTES
from runtimes.parity import (
    CACHE_BYTES,
    CHUNK_IMAGES,
    CHUNK_ROWS,
    CHUNK_TOKENS,
    DECODE_STEPS,
    GREEDY_STEPS,
    IMAGE_COUNTS,
    PROMPT_LENGTHS,
)
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec

MB = 1_000_000
FP32_BYTES = 4

# A graph: bytes for each weight that it reads, with its nodes and names, by layout; and for each part more that a
# quantized one has (scales, ..).
GRAPH_BYTES_PER_WEIGHT = {"portable": 960, "dynamic": 940, "genai": 720}
GRAPH_BYTES_PER_PART = 130
GRAPH_BYTES = 3_000
# An engine holds the weights, and beside them kernels and tables. A package of PyTorch's compiler holds no weights.
ENGINE_BYTES = 3 * MB
ENGINE_BYTES_PER_LAYER = MB
PACKAGE_BYTES = 200_000
PACKAGE_BYTES_PER_LAYER = 40_000
MANIFEST_BYTES = 3_000  # beside signatures and files
MANIFEST_BYTES_PER_FILE = 150
PARITY_BYTES_PER_REPORT = 4_000

# Python, torch, its exporter and ONNX, having traced a model of two layers; and each layer more, which in a decoder is
# a copy of one (exporter/repeat.py).
PROGRAM_BYTES = 440 * MB
TRACE_BYTES_PER_LAYER = 2_500_000
REPEAT_BYTES_PER_LAYER = 600_000
CAST_CHUNKS = 6  # of CHUNK_BYTES: the chunk, its numbers in the new dtype, and which of them are infinite
QUANTIZE_BYTES_PER_NUMBER = 5  # codes as they are found, joined, turned round and packed; beside the stored numbers
# Activations of a layer that calibration keeps at a time, of all text, in feed-forward widths
CALIBRATION_ACTIVATIONS = 8
SESSION_FACTOR = 1.5  # a session of ONNX Runtime takes its weights, and again those that it packs for its kernels
CODE_KERNELS = {"int4", "int8"}  # that it multiplies by as they are
CODES_FACTOR = 6  # of their bytes: as stored, packed, and with scales and sums of blocks in float32
VERIFY_BYTES = 250 * MB  # ONNX Runtime, the reference's layer and its float64 numbers
BUILDER_BYTES = 600 * MB  # TensorRT
BUILDER_FACTOR = 2.5  # of the weights: the network's, the kernels' and the engine's
COMPILER_BYTES = 600 * MB  # Inductor; g++ is another process
ACTIVATION_WIDTHS = 4  # hidden states that a layer keeps at a time on a GPU, beside its feed-forward network's two


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """The export's own largest resident set: `program`, and on top of it the largest of its stages."""

    program: int
    stages: Mapping[str, int]

    @property
    def total(self) -> int:
        """All at a time."""
        return self.program + max(self.stages.values())


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """What running the artifact takes with its largest batch and longest texts, attention being fused."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All at a time."""
        return self.weights + self.cache + self.activations


def graph_bytes(layout: str, source: Source, plan: WeightPlan, graph: str, buffer_bytes: int) -> int:
    """Of an ONNX file, whose weights are elsewhere."""
    weights, parts = _labels_of(source, graph), 0
    for name, weight in plan.quantized.items():
        if weights & {name, *weight.members}:
            parts += len(weight.parts)
    return GRAPH_BYTES + buffer_bytes + GRAPH_BYTES_PER_WEIGHT[layout] * len(weights) + GRAPH_BYTES_PER_PART * parts


def _labels_of(source: Source, graph: str) -> set[str]:
    """Names of the weights that a graph reads."""
    names = source.family.tensor_names if graph == "decoder" else source.family.encoder_names
    return {ref.label for ref in names(source.config).values()}


def engine_bytes(target: str, source: Source, plan: WeightPlan, graph: str) -> int:
    """Of one file that `target` makes of a graph."""
    layers = _layers(source.config, graph)
    if not TARGETS[target].parses_onnx:
        return PACKAGE_BYTES + PACKAGE_BYTES_PER_LAYER * layers
    return ENGINE_BYTES + ENGINE_BYTES_PER_LAYER * layers + _graph_weights(source, plan, graph)


def _graph_weights(source: Source, plan: WeightPlan, graph: str) -> int:
    """Bytes of the numbers that a graph reads."""
    labels = _labels_of(source, graph)
    placed = sum(tensor.nbytes for label, tensor in plan.placed.items() if label in labels)
    quantized = (weight for name, weight in plan.quantized.items() if labels & {name, *weight.members})
    return placed + sum(part.nbytes for weight in quantized for part in weight.parts.values())


def _layers(config: DecoderConfig, graph: str) -> int:
    if graph == "decoder":
        return config.num_hidden_layers
    assert config.vision is not None
    return config.vision.num_hidden_layers + config.vision.num_global_layers


def manifest_bytes(signatures: Mapping[str, GraphSignature], cache: CacheSpec, files: int) -> int:
    """Of manifest.json."""
    facts = {"cache": asdict(cache), "graphs": {name: each.to_json() for name, each in signatures.items()}}
    return MANIFEST_BYTES + MANIFEST_BYTES_PER_FILE * files + len(json.dumps(facts, indent=1))


def parity_bytes(source: Source, targets: Sequence[str]) -> int:
    """Of parity.json."""
    return PARITY_BYTES_PER_REPORT * (1 + len(set(targets)) + 2 * bool(source.choices))


def golden_bytes(config: DecoderConfig, cache: CacheSpec, encoder: GraphSignature | None) -> int:
    """Of parity.golden: logits and caches of the parity case, in float32, and its pictures."""
    rows = len(PROMPT_LENGTHS)
    logits = rows * (1 + DECODE_STEPS + GREEDY_STEPS) + CHUNK_ROWS * CHUNK_TOKENS + 1
    tokens = sum(PROMPT_LENGTHS) + rows * DECODE_STEPS
    numbers = logits * config.vocab_size + tokens * _cache_numbers(cache)
    if encoder is not None:
        images = encoder.dims["num_images"].max
        pictures = rows * min(max(IMAGE_COUNTS), images) + CHUNK_ROWS * min(max(CHUNK_IMAGES), images)
        (pixels,) = (spec for spec in encoder.inputs if spec.name == "pixel_values")
        numbers += pictures * encoder.dims["num_tiles"].max * math.prod(int(size) for size in pixels.shape[3:])
    return FP32_BYTES * numbers


def _cache_numbers(cache: CacheSpec) -> int:
    """Of one token."""
    return sum(math.prod(each.shape) for each in cache.tensors if each.slot_axis is not None) // cache.max_len


def peak_memory(request: ExportRequest, source: Source, plan: WeightPlan, cache: CacheSpec) -> PeakMemory:
    """Of the export's process.

    Tracing holds no weight, so the program grows with the number of layers alone. Weights are streamed: copied by the
    kernel and hashed in pieces, cast in chunks, quantized matrix by matrix. Calibration holds the activations of all
    its text at one layer, and the state of the rows it samples. Verification opens a session, which holds all weights,
    with the cache of a few rows at full length; the reference beside it holds one matrix at a time. Building an engine
    holds the weights more than twice. What was freed at the end of a stage is used again by the next, so the largest
    stage counts.
    """
    layers = {graph: _layers(source.config, graph) for graph in _graphs(source.config)}
    traced = REPEAT_BYTES_PER_LAYER * layers["decoder"] + TRACE_BYTES_PER_LAYER * layers.get("vision_encoder", 0)
    stages = {"write weights": _writing(plan)}
    if plan.quantized and QUANTIZERS[request.quantizer].needs_calibration:
        stages["calibrate"] = _calibrating(source.config, sampled=request.calibration is None) + stages["write weights"]
    if request.verify:
        stages["verify"] = _verifying(request, source, plan, cache)
    for target in request.targets:
        if TARGETS[target].parses_onnx:
            most = max(_graph_weights(source, plan, graph) for graph in _graphs(source.config))
            stages[f"build {target}"] = BUILDER_BYTES + int(BUILDER_FACTOR * most)
        elif TARGETS[target].finish is not None:
            stages[f"build {target}"] = COMPILER_BYTES
    return PeakMemory(program=PROGRAM_BYTES + traced, stages=stages)


def _graphs(config: DecoderConfig) -> tuple[str, ...]:
    return ("decoder",) if config.vision is None else ("decoder", "vision_encoder")


def _writing(plan: WeightPlan) -> int:
    if not plan.jobs:
        return WHOLE_PIECE_BYTES if plan.copies else 0
    matrices = [math.prod(weight.shape) for weight in plan.quantized.values()]
    return max(CAST_CHUNKS * CHUNK_BYTES, (FP32_BYTES + QUANTIZE_BYTES_PER_NUMBER) * max(matrices, default=0))


def _calibrating(config: DecoderConfig, *, sampled: bool) -> int:
    width = max(config.intermediate_size, config.hidden_size)
    activations = CALIBRATION_ACTIVATIONS * CALIBRATION_SAMPLES * CALIBRATION_LENGTH * width * FP32_BYTES
    return activations + (STATE_BYTES if sampled else 0)


def _verifying(request: ExportRequest, source: Source, plan: WeightPlan, cache: CacheSpec) -> int:
    rows = max(1, min(CHUNK_ROWS, request.max_batch, CACHE_BYTES // cache.nbytes(1)))
    widened = 2 if cache.dtype != "float32" else 1
    return VERIFY_BYTES + _session(source, plan, cache) + rows * cache.nbytes(1) * widened


def _session(source: Source, plan: WeightPlan, cache: CacheSpec) -> int:
    """ONNX Runtime's weights: those of 16 and of 8 bits in float32 as well, on a CPU."""
    stored = sum(tensor.nbytes for tensor in plan.stored)
    formats = {weight.format.name for weight in plan.quantized.values()}
    if formats and formats <= CODE_KERNELS:
        return int(CODES_FACTOR * stored)
    if cache.dtype == "float32" and not formats:
        return int(SESSION_FACTOR * stored)
    numbers = sum(math.prod(weight.shape) for weight in plan.quantized.values())
    numbers += sum(math.prod(tensor.shape) for tensor in plan.placed.values())
    return int(SESSION_FACTOR * (FP32_BYTES * numbers + stored))


def gpu_memory(
    config: DecoderConfig, plan: WeightPlan, cache: CacheSpec, vision: VisionSpec | None, max_batch: int
) -> GpuMemory:
    """Of an engine, or of ONNX Runtime on CUDA: for a prefill of max_len tokens in each of max_batch rows."""
    item = 4 if cache.dtype == "float32" else 2
    tokens = max_batch * cache.max_len
    widths = ACTIVATION_WIDTHS * config.hidden_size + 2 * config.intermediate_size
    mask = tokens * cache.max_len  # a byte for each token and each slot
    logits = max_batch * config.vocab_size * FP32_BYTES  # of one token of each row
    images = 0 if vision is None else max_batch * vision.max_images * vision.bytes_per_image
    return GpuMemory(
        weights=sum(tensor.nbytes for tensor in plan.stored),
        cache=cache.nbytes(max_batch) + images,
        activations=tokens * widths * item + mask + logits,
    )
