"""One export, from checkpoint to artifact: the story, in order."""

import dataclasses
import functools
import importlib.metadata
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporter.assess import assess, bytes_per_weight
from exporter.capture import build_encoder_on_meta, build_on_meta, capture, capture_encoder
from exporter.config_json import config_as_json
from exporter.errors import ExportError
from exporter.layouts import LAYOUTS
from exporter.layouts.layout import Layout
from exporter.lowering import lower
from exporter.passes.quantize_weights import quantize_weights
from exporter.precision import cache_spec, vision_spec
from exporter.progress import Progress, Quiet
from exporter.quantize import DEFAULT_QUANTIZER, calibrate_source, check_quantizer, plan_source
from exporter.source import COPIED_FILES, Source, read_source, small_files
from exporter.staging import Staging, check_destination, stage
from exporter.targets import TARGETS
from exporter.verify import onnx_targets, verify, verify_all
from exporter.weight_check import check_stored_weights
from exporter.weight_choice import refuse_for_engines
from exporter.weights import WeightPlan, attach_weights, copy_file, require_space, write_weights
from graphs.checkpoint import INDEX_FILE, open_checkpoint
from graphs.config import DecoderConfig
from graphs.families.family import TensorNames
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.artifact import (
    GRAPH_FILES,
    MANIFEST,
    PARITY_FILE,
    EngineEntry,
    GraphEntry,
    Manifest,
    engine_key,
    file_entry,
)
from runtimes.errors import ArtifactError
from runtimes.images import ImageProcessor
from runtimes.onnxruntime_runner import import_onnxruntime
from runtimes.parity import ParityReport, ParitySummary, Rung
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature, VisionPart, VisionSpec
from runtimes.tensorrt_runner import TENSORRT_RUNNERS

DEFAULT_MAX_LEN = 4096  # capacity when none is asked for: a long context's cache would not fit most machines
DEFAULT_MAX_BATCH = 8
DEFAULT_MAX_IMAGES = 4
MAX_LEN_LIMIT = 2**31 - 1
MAX_BATCH_LIMIT = 65536
MAX_IMAGES_LIMIT = 4096
WEIGHT_MODES = ("copy", "reference")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What the user asked for."""

    checkpoint: Path
    out: Path
    targets: tuple[str, ...] = ("onnx",)
    layout: str = "portable"
    precision: str | None = None  # None: as the checkpoint is stored
    quantizer: str = DEFAULT_QUANTIZER  # of weights that are quantized
    calibration: Path | None = None  # text for quantizers that need some; None: sampled from the model
    eval_text: Path | None = None  # that the quality of rounded weights is measured on; None: sampled from the model
    requantize: bool = False  # weights that are quantized already may be rounded again
    max_len: int | None = None  # None: max_position_embeddings, at most DEFAULT_MAX_LEN
    max_batch: int = DEFAULT_MAX_BATCH
    max_images: int | None = None  # of a prompt, for models that see; None: DEFAULT_MAX_IMAGES
    weights: str = "copy"
    verify: bool = True
    force: bool = False
    gpu_archs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was made."""

    out: Path
    manifest: Manifest
    parity: ParitySummary | None  # None: not asked for
    warnings: tuple[str, ...]


def export(request: ExportRequest, progress: Progress | None = None) -> ExportResult:
    """Make an artifact; on any error nothing is left at `request.out` that was not there before.

    Raises:
        CheckpointError, ExportError, RuntimeMissingError: the user's input or machine does not allow it.
        OSError: the disk is full, or not writable.
    """
    progress = progress or Quiet()
    progress.start("check")
    in_place = request.weights == "reference"
    check_request(request)
    check_destination(request.out, request.checkpoint, reference=in_place, force=request.force)
    source = read_source(request.checkpoint, request.precision, requantize=request.requantize)
    check_source(request, source)
    config, precision = source.config, source.precision
    max_len, warnings = choose_max_len(request.max_len, config)
    warnings += check_preprocessor(request.checkpoint, config)
    decoder = build_on_meta(config, getattr(torch, precision.dtype))
    cache = cache_spec(decoder, max_len, precision.dtype)
    vision = vision_spec(config, precision.dtype, choose_max_images(request.max_images, config))
    work = request.out.parent / f".{request.out.name}.calibration"
    with kept_on_error(work):
        calibration = calibrate_source(source, request.quantizer, request.calibration, work, progress)
        plan = plan_source(source, request.weights, request.quantizer, calibration)
        manifest, parity = _write(request, source, plan, decoder, cache, vision, progress)
    shutil.rmtree(work, ignore_errors=True)
    return ExportResult(out=request.out, manifest=manifest, parity=parity, warnings=warnings)


@contextmanager
def kept_on_error(work: Path) -> Iterator[None]:
    """Say of any error that passes through that calibration goes on from where it was."""
    try:
        yield
    except BaseException as error:
        if work.is_dir():
            error.add_note(f"finished layers of the calibration are kept in {work}: the same export goes on from there")
        raise


def _write(
    request: ExportRequest,
    source: Source,
    plan: WeightPlan,
    decoder: TransformerDecoder,
    cache: CacheSpec,
    vision: VisionSpec | None,
    progress: Progress,
) -> tuple[Manifest, ParitySummary | None]:
    """Everything that is written: it appears at request.out whole, or not at all."""
    family, config, precision = source.family, source.config, source.precision
    in_place, layout = request.weights == "reference", LAYOUTS[request.layout]
    dtype = getattr(torch, precision.dtype)

    with stage(request.out, in_place=in_place) as staging:
        require_space(staging.folder, plan.nbytes)
        signature = layout.signature(config, cache, request.max_batch, vision)
        signatures = {"decoder": signature}
        models = {
            "decoder": trace(decoder, layout, signature, cache, family.tensor_names(config), progress, vision=vision)
        }
        if vision is not None:
            signature = layout.encoder_signature(config, vision, request.max_batch)
            signatures["vision_encoder"] = signature
            encoder = build_encoder_on_meta(config, dtype)
            models["vision_encoder"] = trace_encoder(encoder, layout, signature, family.encoder_names(config), progress)
        progress.start("write weights", plan.nbytes or None)
        names = write_weights(plan, staging.path, progress.advance)
        progress.start("write and check graph")
        for name, model in models.items():
            quantize_weights(model, plan.quantized, plan.placed)
            attach_weights(model, plan)
            save_checked(model, staging.path(GRAPH_FILES[name]))
            names.append(GRAPH_FILES[name])
        names += [] if in_place else _write_small_files(source, staging)
        engines = _build_engines(request, staging, signatures, progress)
        names += [engine.file for engine in engines.values()]
        parity = None
        if request.verify:
            parity = _verify(request, source, plan, staging, signatures, cache, vision, engines, progress)
            staging.path(PARITY_FILE).write_text(parity.to_json(), encoding="utf-8")
            names.append(PARITY_FILE)
        progress.start("hash files")
        files = {name: file_entry(staging.path(name)) for name in sorted(names)}
        if in_place:
            used = {str(tensor.path) for tensor in plan.stored} | {INDEX_FILE, *COPIED_FILES}
            present = sorted(name for name in used if (request.checkpoint / name).is_file())
            files |= {name: file_entry(request.checkpoint / name) for name in present}
        manifest = Manifest(
            config=config_as_json(config),
            layout=request.layout,
            precision=precision.name,
            max_batch=request.max_batch,
            cache=cache,
            vision=vision,
            quantization=quantization_summary(source, plan, request.quantizer),
            graphs={name: GraphEntry(file=GRAPH_FILES[name], signature=each) for name, each in signatures.items()},
            engines=engines,
            files=files,
            parity=None if parity is None else parity.short(),
            tools=tool_versions(),
        )
        staging.path(MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest, parity


def check_request(request: ExportRequest) -> None:
    """Refuse what cannot be done before any work is; ExportError or RuntimeMissingError."""
    if request.layout not in LAYOUTS:
        raise ExportError(f"layout {request.layout!r} is not supported; supported: {', '.join(LAYOUTS)}")
    if request.weights not in WEIGHT_MODES:
        raise ExportError(f"--weights {request.weights!r} is not supported; supported: {', '.join(WEIGHT_MODES)}")
    if not 1 <= request.max_batch <= MAX_BATCH_LIMIT:
        raise ExportError(f"--max-batch must be at least 1 and at most {MAX_BATCH_LIMIT}, got {request.max_batch}")
    check_quantizer(request.quantizer, request.calibration)
    if request.verify:
        import_onnxruntime()  # missing, it should be missed now and not when the work is done
    for name in request.targets:
        if name not in TARGETS:
            raise ExportError(f"target {name!r} is not supported; supported: {', '.join(TARGETS)}")
        needed = TARGETS[name].layout
        if needed not in (None, request.layout):
            raise ExportError(f"target {name} needs --layout {needed}, got {request.layout}")
        TARGETS[name].check(request.gpu_archs)
    if request.gpu_archs and "tensorrt-rtx" not in request.targets:
        raise ExportError("--gpu-arch needs --target tensorrt-rtx")


def check_source(request: ExportRequest, source: Source) -> None:
    """Refuse what this checkpoint does not allow; ExportError."""
    refuse_for_engines(source.choices, [name for name in request.targets if TARGETS[name].finish is not None])
    if request.requantize and not source.checkpoint.packed:
        raise ExportError(f"--requantize: {request.checkpoint} holds no quantized weights; leave it out")
    if request.weights == "reference" and source.choices:
        raise ExportError(
            f"--weights reference writes no weights, so it cannot have them in precision {source.precision.name}: use"
            " --weights copy"
        )


def choose_max_len(asked: int | None, config: DecoderConfig) -> tuple[int, tuple[str, ...]]:
    """(cache capacity in tokens, warnings)."""
    trained = config.max_position_embeddings
    if asked is None:
        return min(trained, DEFAULT_MAX_LEN), ()
    if not 1 <= asked <= MAX_LEN_LIMIT:
        raise ExportError(f"--max-len must be at least 1 and at most {MAX_LEN_LIMIT}, got {asked}")
    if config.position_limit is not None and asked > config.position_limit:
        raise ExportError(
            f"--max-len {asked} goes beyond the {config.position_limit} positions that this model has learned numbers"
            " for: ask for at most that many"
        )
    if asked > trained:
        return asked, (f"--max-len {asked} goes beyond the {trained} positions the model was trained for",)
    return asked, ()


def choose_max_images(asked: int | None, config: DecoderConfig) -> int:
    """Most images of a prompt; ExportError where the number is wrong, or the model reads text only."""
    if asked is None:
        return DEFAULT_MAX_IMAGES
    if config.vision is None:
        raise ExportError(f"--max-images {asked}: this model ({config.model_type}) reads text only; leave it out")
    if not 1 <= asked <= MAX_IMAGES_LIMIT:
        raise ExportError(f"--max-images must be at least 1 and at most {MAX_IMAGES_LIMIT}, got {asked}")
    return asked


def check_preprocessor(checkpoint: Path, config: DecoderConfig) -> tuple[str, ...]:
    """Warnings where images could not be made into what the vision encoder takes; graphs can be used without that."""
    if config.vision is None:
        return ()
    try:
        processor = ImageProcessor(checkpoint)
        processor.require_tiles(config.vision.max_num_tiles, config.vision.num_channels, config.vision.image_size)
    except ArtifactError as error:
        return (f"generate --image will be refused: {error}",)
    return ()


def trace(
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    tensor_names: TensorNames,
    progress: Progress,
    *,
    vision: VisionSpec | None = None,
) -> ir.Model:
    """Capture and lower, without reading a weight."""
    progress.start("capture")
    program = capture(decoder, layout, signature, cache, vision)
    progress.start("lower to ONNX")
    return lower(program, layout, signature, tensor_names, decoder.real_buffers(), name="decoder")


def trace_encoder(
    encoder: VisionEncoder, layout: Layout, signature: GraphSignature, names: TensorNames, progress: Progress
) -> ir.Model:
    """The same for the vision encoder."""
    progress.start("capture the vision encoder")
    program = capture_encoder(encoder, layout, signature)
    progress.start("lower it to ONNX")
    return lower(program, layout, signature, names, {}, name="vision_encoder")


def save_checked(model: ir.Model, path: Path) -> None:
    """Write the graph, and let ONNX check it in full, shape inference included."""
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def quantization_summary(source: Source, plan: WeightPlan, quantizer: str) -> dict[str, Any] | None:
    """What the manifest says of quantized weights; None where there are none."""
    if not source.quantizes:
        return None
    formats = Counter(str(choice.format or choice.stored.name) for choice in source.choices.values())
    made = any(choice.format is not None and not choice.kept for choice in source.choices.values())
    return {
        "quantizer": quantizer if made else "none: the checkpoint's own codes",
        "formats": dict(sorted(formats.items())),
        "bytes_per_weight": round(bytes_per_weight(plan), 4),
    }


def tool_versions() -> dict[str, str]:
    """Versions of everything that takes part in an export, where installed."""
    packages = ["export-llm", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"]
    packages += ["tensorrt", "tensorrt-rtx"]
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _write_small_files(source: Source, staging: Staging) -> list[str]:
    files = small_files(source)
    for name, content in files.items():
        if isinstance(content, Path):
            copy_file(content, staging.path(name))
        else:
            staging.path(name).write_text(content, encoding="utf-8")
    return list(files)


def _build_engines(
    request: ExportRequest, staging: Staging, signatures: Mapping[str, GraphSignature], progress: Progress
) -> dict[str, EngineEntry]:
    """Of every target that has engines, one for each graph."""
    engines = {}
    for target in dict.fromkeys(request.targets):
        finish = TARGETS[target].finish
        if finish is None:
            continue
        for graph, signature in signatures.items():
            file = f"{graph}.{target}.engine"
            engine = finish(
                staging.path(GRAPH_FILES[graph]),
                staging.path(file),
                signature,
                gpu_archs=request.gpu_archs if target == "tensorrt-rtx" else (),
                progress=progress,
            )
            engines[engine_key(target, graph)] = dataclasses.replace(engine, file=file, graph=graph)
    return engines


def _verify(
    request: ExportRequest,
    source: Source,
    plan: WeightPlan,
    staging: Staging,
    signatures: Mapping[str, GraphSignature],
    cache: CacheSpec,
    vision: VisionSpec | None,
    engines: Mapping[str, EngineEntry],
    progress: Progress,
) -> ParitySummary:
    """Verify the graphs on ONNX Runtime, and every engine that can run on this machine."""

    def vision_part(file: str) -> VisionPart | None:
        if vision is None:
            return None
        return VisionPart(path=staging.path(file), signature=signatures["vision_encoder"], spec=vision)

    signature = signatures["decoder"]
    graph = staging.path(GRAPH_FILES["decoder"])
    part = vision_part(GRAPH_FILES["vision_encoder"])
    targets = dict(onnx_targets(graph, signature, cache, vision=part, quantized=source.quantizes))
    # Rounding weights is no part of parity: the truth is what the weights as they were written say.
    checkpoint = open_checkpoint(staging.folder) if source.choices else source.checkpoint
    for target in dict.fromkeys(engine.target for engine in engines.values()):
        path = staging.path(engines[target].file)
        encoder = engines.get(engine_key(target, "vision_encoder"))
        part = None if encoder is None else vision_part(encoder.file)
        targets[target] = functools.partial(TENSORRT_RUNNERS[target], path, signature, cache, vision=part)

    operators: dict[torch.dtype, list[Rung]] = {}

    def verify_one(open_target: Callable[[], Runner], on_stage: Callable[[str], None]) -> ParityReport:
        return verify(
            open_target,
            checkpoint,
            layout=request.layout,
            signature=signature,
            cache=cache,
            encoder=signatures.get("vision_encoder"),
            on_stage=on_stage,
            operators=operators,
        )

    summary = verify_all(targets, verify_one, progress)
    if source.choices:
        weights = check_stored_weights(source, checkpoint, request.quantizer, progress)
        summary = dataclasses.replace(summary, reports=(weights, *summary.reports))
    quality = assess(source, checkpoint, plan, request.eval_text, progress)
    return dataclasses.replace(summary, quality=quality)
