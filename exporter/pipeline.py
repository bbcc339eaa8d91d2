"""One export, from checkpoint to artifact: the story, in order."""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporter.assess import assess, bytes_per_weight
from exporter.capture import build_encoder_on_meta, build_on_meta, capture, capture_encoder
from exporter.clients import CLIENTS, relocate_weights
from exporter.config_json import config_as_json
from exporter.errors import ExportError
from exporter.genai_config import genai_config
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
from exporter.targets.target import Job
from exporter.verify import onnx_targets, verify, verify_all
from exporter.weight_check import check_stored_weights
from exporter.weight_choice import refuse_for_engines
from exporter.weights import WeightPlan, attach_weights, copy_file, require_space, write_weights
from graphs.checkpoint import INDEX_FILE, open_checkpoint
from graphs.config import DecoderConfig
from graphs.families.family import TensorNames
from graphs.keys import read_json
from graphs.transformer import TransformerDecoder
from graphs.vision import VisionEncoder
from runtimes.aoti_runner import TARGET, AOTIRunner
from runtimes.artifact import (
    CLIENT_GRAPH_FILE,
    GENAI_CONFIG,
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
from runtimes.onnxruntime_session import import_onnxruntime
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
# By target: what runs its engines.
ENGINE_RUNNERS: Mapping[str, Callable[..., Runner]] = {**TENSORRT_RUNNERS, TARGET: AOTIRunner}


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
    client: str | None = None  # whose names the files are to have; None: ours


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
        rows_first = LAYOUTS[request.layout].rows_first
        plan = plan_source(source, request.weights, request.quantizer, calibration, rows_first=rows_first)
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
    graph_files = GRAPH_FILES | {"decoder": layout.graph_file}

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
            if layout.finish is not None and name == "decoder":
                layout.finish(model)
            attach_weights(model, plan)
            save_checked(model, staging.path(graph_files[name]))
            names.append(graph_files[name])
        names += [] if in_place else _write_small_files(source, staging)
        if layout.shared_cache is not None and request.client is None:
            text = genai_config(source, signatures["decoder"], cache, shared_cache=layout.shared_cache)
            staging.path(GENAI_CONFIG).write_text(text, encoding="utf-8")
            names.append(GENAI_CONFIG)
        engines = _build_engines(request, staging, signatures, cache, vision, progress)
        names += [file for engine in engines.values() for file in engine.files]
        parity = None
        if request.verify:
            parity = _verify(request, source, plan, staging, signatures, cache, vision, engines, progress)
            staging.path(PARITY_FILE).write_text(parity.to_json(), encoding="utf-8")
            names.append(PARITY_FILE)
        if request.client is not None:
            renamed = _rename_for_client(request.client, source, staging, names)
            names = [renamed.get(name, name) for name in names if name != INDEX_FILE]
            graph_files = {graph: renamed.get(file, file) for graph, file in graph_files.items()}
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
            graphs={name: GraphEntry(file=graph_files[name], signature=each) for name, each in signatures.items()},
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
    if request.client is not None:
        _check_client(request.client, request)
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


def _check_client(client: str, request: ExportRequest) -> None:
    if client not in CLIENTS:
        raise ExportError(f"--client {client!r} is not supported; supported: {', '.join(CLIENTS)}")
    if request.layout != CLIENTS[client].layout:
        raise ExportError(f"--client {client} needs --layout {CLIENTS[client].layout}, got {request.layout}")
    if request.weights == "reference":
        raise ExportError(f"--client {client} gives the weights' files other names: use --weights copy")


def check_source(request: ExportRequest, source: Source) -> None:
    """Refuse what this checkpoint does not allow; ExportError."""
    if request.client is not None:
        CLIENTS[request.client].rename(source.precision, ())
    refuse_for_engines(source.choices, [name for name in request.targets if TARGETS[name].parses_onnx])
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


def _rename_for_client(client: str, source: Source, staging: Staging, names: Sequence[str]) -> Mapping[str, str]:
    """Move the files to where the client looks for them, and tell it in config.json; {our name: the client's}."""
    renaming = CLIENTS[client].rename(source.precision, names)
    relocate_weights(staging.path(CLIENT_GRAPH_FILE), renaming.files)
    for name, wanted in renaming.files.items():
        target = staging.folder / wanted
        target.parent.mkdir(exist_ok=True)
        staging.path(name).rename(target)
    staging.path(INDEX_FILE).unlink(missing_ok=True)  # it speaks of names that are gone
    for name, more in renaming.json_files(staging.folder).items():
        merged = read_json(staging.path(name)) | more
        staging.path(name).write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return renaming.files


def _build_engines(
    request: ExportRequest,
    staging: Staging,
    signatures: Mapping[str, GraphSignature],
    cache: CacheSpec,
    vision: VisionSpec | None,
    progress: Progress,
) -> dict[str, EngineEntry]:
    """Of every target that has engines, one for each graph."""
    engines = {}
    for target in dict.fromkeys(request.targets):
        finish = TARGETS[target].finish
        if finish is None:
            continue
        for graph, signature in signatures.items():
            job = Job(
                graph=graph,
                target=target,
                onnx_path=staging.path(GRAPH_FILES[graph]),
                folder=staging.folder,
                path=staging.path,
                layout=LAYOUTS[request.layout],
                signature=signature,
                cache=cache,
                vision=vision,
                gpu_archs=request.gpu_archs if target == "tensorrt-rtx" else (),
                progress=progress,
            )
            engines[engine_key(target, graph)] = finish(job)
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
    graph = staging.path(LAYOUTS[request.layout].graph_file)
    part = vision_part(GRAPH_FILES["vision_encoder"])
    targets = dict(onnx_targets(request.layout, graph, signature, cache, vision=part, quantized=source.quantizes))
    # Rounding weights is no part of parity: the truth is what the weights as they were written say.
    checkpoint = open_checkpoint(staging.folder) if source.choices else source.checkpoint
    for target in dict.fromkeys(engine.target for engine in engines.values()):
        paths = [staging.path(file) for file in engines[target].files]
        encoder = engines.get(engine_key(target, "vision_encoder"))
        part = None if encoder is None else vision_part(encoder.file)
        targets[target] = functools.partial(ENGINE_RUNNERS[target], *paths, signature, cache, vision=part)

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
