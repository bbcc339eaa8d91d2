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
from exporter.background import in_background
from exporter.capture import build_encoder_on_meta, build_on_meta, capture_encoder
from exporter.clients import CLIENTS, relocate_weights
from exporter.config_json import config_as_json
from exporter.errors import ExportError
from exporter.genai_config import genai_config
from exporter.inputs import Inputs, inputs_key, read_inputs, refuse_nonfinite
from exporter.layouts import LAYOUTS
from exporter.layouts.layout import Layout
from exporter.lowering import lower
from exporter.passes.quantize_weights import quantize_weights
from exporter.precision import cache_spec, vision_spec
from exporter.progress import Progress, Quiet
from exporter.quantize import DEFAULT_QUANTIZER, calibrate_source, check_quantizer, plan_source
from exporter.repeat import trace_decoder
from exporter.source import COPIED_FILES, Source, read_source, small_files
from exporter.staging import Staging, check_destination, hold_destination, remove_remains, stage
from exporter.targets import TARGETS
from exporter.targets.target import Job
from exporter.verify import Answers, make_answers, make_golden, verify_target
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
    GOLDEN_FILE,
    GRAPH_FILES,
    MANIFEST,
    PARITY_FILE,
    Artifact,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    engine_key,
    file_entry,
    open_artifact,
    read_manifest,
)
from runtimes.errors import ArtifactError
from runtimes.golden import save_golden
from runtimes.images import ImageProcessor
from runtimes.onnxruntime_session import import_onnxruntime
from runtimes.parity import ParityReport, ParitySummary
from runtimes.quality import QualityReport
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature, VisionPart, VisionSpec
from runtimes.tensorrt_runner import TENSORRT_RUNNERS
from runtimes.verification import onnx_targets, verify_all

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
    allow_nonfinite: bool = False  # weights may hold NaN or infinity


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was made."""

    out: Path
    manifest: Manifest
    parity: ParitySummary | None  # None: not asked for
    warnings: tuple[str, ...]
    unchanged: bool = False  # it was there already, and nothing was done
    taken_over: tuple[str, ...] = ()  # stages that an earlier run had finished before it was stopped


def export(request: ExportRequest, progress: Progress | None = None) -> ExportResult:
    """Make an artifact; on any error nothing is left at `request.out` that was not there before.

    Where the same export was interrupted before, it goes on with what was finished; where it is done, nothing is.

    Raises:
        CheckpointError, ExportError, RuntimeMissingError: the user's input or machine does not allow it.
        OSError: the disk is full, or not writable.
    """
    progress = progress or Quiet()
    progress.start("check")
    in_place = request.weights == "reference"
    check_request(request)
    source = read_source(request.checkpoint, request.precision, requantize=request.requantize)
    check_source(request, source)
    config, precision = source.config, source.precision
    max_len, warnings = choose_max_len(request.max_len, config)
    warnings += check_preprocessor(request.checkpoint, config)
    decoder = build_on_meta(config, getattr(torch, precision.dtype))
    cache = cache_spec(decoder, max_len, precision.dtype)
    vision = vision_spec(config, precision.dtype, choose_max_images(request.max_images, config))
    check = functools.partial(check_destination, request.out, request.checkpoint, reference=in_place)
    check(force=True)  # what no --force allows
    with hold_destination(request.out, in_place=in_place):
        made_from = read_manifest(request.out)
        wanted = (request.layout, precision.name, request.max_batch, cache, vision)
        if made_from is None or _plainly(made_from) != wanted:  # else only the digest of everything tells
            check(force=request.force)
        inputs = read_inputs(source, progress)
        warnings += refuse_nonfinite(inputs, allowed=request.allow_nonfinite)
        key = inputs_key(request, inputs, tool_versions(), precision.name)
        if made_from is not None and made_from.inputs == key and not request.force:
            progress.start("check hashes")
            if (there := find_unchanged(request.out, in_place=in_place)) is not None:
                return dataclasses.replace(there, warnings=warnings)
        check(force=request.force)
        work = request.out.parent / f".{request.out.name}.calibration"
        with kept_on_error(work):
            calibration = calibrate_source(source, request.quantizer, request.calibration, work, progress)
            rows_first = LAYOUTS[request.layout].rows_first
            plan = plan_source(source, request.weights, request.quantizer, calibration, rows_first=rows_first)
            result = _write(request, source, inputs, key, plan, decoder, cache, vision, progress)
        shutil.rmtree(work, ignore_errors=True)
    return dataclasses.replace(result, warnings=warnings)


def _plainly(made: Manifest) -> tuple[Any, ...]:
    """What can be told of an artifact at once to be another than what is asked for."""
    return made.layout, made.precision, made.max_batch, made.cache, made.vision


def find_unchanged(out: Path, *, in_place: bool) -> ExportResult | None:
    """The artifact that is at OUT; None where it is not whole."""
    try:
        artifact = open_artifact(out)
        parity = read_parity(artifact)
    except ArtifactError:
        return None
    remove_remains(out, in_place=in_place)
    return ExportResult(out=out, manifest=artifact.manifest, parity=parity, warnings=(), unchanged=True)


def read_parity(artifact: Artifact) -> ParitySummary | None:
    """The verdict that an artifact was published with; ArtifactError where parity.json is damaged."""
    if PARITY_FILE not in artifact.manifest.files:
        return None
    return ParitySummary.from_json(artifact.path(PARITY_FILE).read_text(encoding="utf-8"))


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
    inputs: Inputs,
    key: str,
    plan: WeightPlan,
    decoder: TransformerDecoder,
    cache: CacheSpec,
    vision: VisionSpec | None,
    progress: Progress,
) -> ExportResult:
    """Everything that is written: it appears at request.out whole, or not at all."""
    config, precision = source.config, source.precision
    in_place, layout = request.weights == "reference", LAYOUTS[request.layout]
    graph_files = GRAPH_FILES | {"decoder": layout.graph_file}
    signatures = {"decoder": layout.signature(config, cache, request.max_batch, vision)}
    if vision is not None:
        signatures["vision_encoder"] = layout.encoder_signature(config, vision, request.max_batch)

    with stage(request.out, in_place=in_place, key=key) as staging:
        stages = staging.stages
        require_space(staging.folder, plan.nbytes - stages.nbytes)
        missing = [name for name in signatures if not stages.has(_graph_stage(name))]
        with _writing_weights(plan, staging) as written:
            # Tracing does not wait for weights: what cannot be traced fails at once.
            models = {
                name: _trace(name, source, decoder, layout, signatures[name], cache, vision, progress)
                for name in missing
            }
            progress.start("write weights", plan.nbytes or None)
            names = written(progress.advance)
        progress.start("write and check graph")
        for name in signatures:
            save = functools.partial(_save_graph, models.get(name), name, layout, plan, staging, graph_files[name])
            names += stages.run(_graph_stage(name), save)[0]
        names += [] if in_place else _write_small_files(source, staging)
        if layout.shared_cache is not None and request.client is None:
            text = genai_config(source, signatures["decoder"], cache, shared_cache=layout.shared_cache)
            names.append(_write_text(staging, GENAI_CONFIG, text))
        engines = _build_engines(request, staging, signatures, cache, vision, progress)
        names += [file for engine in engines.values() for file in engine.files]
        parity = None
        if request.verify:
            parity, golden = _verify(request, source, plan, staging, signatures, cache, vision, engines, progress)
            names += [_write_text(staging, PARITY_FILE, parity.to_json()), *golden]
        entry: Callable[[str], FileEntry] = stages.entry
        if request.client is not None:
            renamed = _rename_for_client(request.client, source, staging, names)
            names = [renamed.get(name, name) for name in names if name != INDEX_FILE]
            graph_files = {graph: renamed.get(file, file) for graph, file in graph_files.items()}
            entry = functools.partial(_entry_now, staging)  # files have been changed
        progress.start("hash files")
        files = {name: entry(name) for name in sorted(names)}
        if in_place:
            used = {str(tensor.path) for tensor in plan.stored} | {INDEX_FILE, *COPIED_FILES}
            files |= {name: inputs.files[name] for name in sorted(used & inputs.files.keys())}
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
            inputs=key,
        )
        _write_text(staging, MANIFEST, manifest.to_json())
    return ExportResult(
        out=request.out, manifest=manifest, parity=parity, warnings=(), taken_over=tuple(stages.taken_over)
    )


def _graph_stage(name: str) -> str:
    return f"graph {name}"


def _trace(
    name: str,
    source: Source,
    decoder: TransformerDecoder,
    layout: Layout,
    signature: GraphSignature,
    cache: CacheSpec,
    vision: VisionSpec | None,
    progress: Progress,
) -> ir.Model:
    family, config = source.family, source.config
    if name == "decoder":
        names = family.tensor_names(config)
        return trace(decoder, layout, signature, cache, names, progress, vision=vision)
    encoder = build_encoder_on_meta(config, getattr(torch, source.precision.dtype))
    return trace_encoder(encoder, layout, signature, family.encoder_names(config), progress)


@contextmanager
def _writing_weights(plan: WeightPlan, staging: Staging) -> Iterator[Callable[[Callable[[int], None]], list[str]]]:
    """What writes the weights; where files are only copied, that begins now. Whatever computes waits for its turn:
    PyTorch's tracing changes tables that all threads use."""
    write = functools.partial(_write_weights, plan, staging)
    if plan.jobs:
        yield write
    else:
        with in_background(write) as written:
            yield written


def _write_weights(plan: WeightPlan, staging: Staging, advance: Callable[[int], None]) -> list[str]:
    """One stage for each file: a shard that is written is not written again."""

    def put(name: str, write: Callable[[Path], None]) -> None:
        def make() -> tuple[list[str], None]:
            write(staging.path(name))
            return [name], None

        staging.stages.run(f"weights {name}", make)

    return write_weights(plan, put, advance)


def _save_graph(
    model: ir.Model | None, name: str, layout: Layout, plan: WeightPlan, staging: Staging, file: str
) -> tuple[list[str], None]:
    assert model is not None, "a graph that is to be written has been traced"
    quantize_weights(model, plan.quantized, plan.placed)
    if layout.finish is not None and name == "decoder":
        layout.finish(model)
    attach_weights(model, plan)
    save_checked(model, staging.path(file))
    return [file], None


def _entry_now(staging: Staging, name: str) -> FileEntry:
    return file_entry(staging.path(name))


def _write_text(staging: Staging, name: str, text: str) -> str:
    staging.path(name).write_text(text, encoding="utf-8")
    return name


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
    """The decoder's graph; no weight is read."""
    progress.start("trace")
    return trace_decoder(decoder, layout, signature, cache, tensor_names, vision)


def trace_encoder(
    encoder: VisionEncoder, layout: Layout, signature: GraphSignature, names: TensorNames, progress: Progress
) -> ir.Model:
    """The same for the vision encoder."""
    progress.start("trace the vision encoder")
    program = capture_encoder(encoder, layout, signature)
    return lower(program, layout, signature, names, {}, name="vision_encoder").model


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
            key = engine_key(target, graph)
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
            _, made = staging.stages.run(f"engine {key}", functools.partial(_finish, finish, job))
            engines[key] = EngineEntry.from_json(made)
    return engines


def _finish(finish: Callable[[Job], EngineEntry], job: Job) -> tuple[Sequence[str], dict[str, Any]]:
    engine = finish(job)
    return engine.files, dataclasses.asdict(engine)


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
) -> tuple[ParitySummary, list[str]]:
    """Verify the graphs on ONNX Runtime, and every engine that can run on this machine; (verdict, files written)."""

    def vision_part(file: str) -> VisionPart | None:
        if vision is None:
            return None
        return VisionPart(path=staging.path(file), signature=signatures["vision_encoder"], spec=vision)

    signature, stages = signatures["decoder"], staging.stages
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

    answers = make_answers(
        checkpoint, layout=request.layout, signature=signature, cache=cache, encoder=signatures.get("vision_encoder")
    )
    runs: list[dict[str, Any]] = []

    def verify_one(name: str, open_target: Callable[[], Runner]) -> ParityReport:
        make = functools.partial(_verify_one, name, open_target, answers, source.quantizes, progress)
        runs.append(stages.run(f"verify on {name}", make)[1])
        return ParityReport.from_dict(runs[-1]["report"])

    summary = verify_all(targets, verify_one)
    golden, _ = stages.run("golden tensors", functools.partial(_write_golden, answers, runs, staging, progress))
    if source.choices:

        def check_weights() -> tuple[list[str], dict[str, Any]]:
            return [], check_stored_weights(source, checkpoint, request.quantizer, progress).to_dict()

        weights = ParityReport.from_dict(stages.run("check weights", check_weights)[1])
        summary = dataclasses.replace(summary, reports=(weights, *summary.reports))

    def measure() -> tuple[list[str], dict[str, Any] | None]:
        quality = assess(source, checkpoint, plan, request.eval_text, progress)
        return [], None if quality is None else quality.to_dict()

    _, quality = stages.run("quality", measure)
    return dataclasses.replace(summary, quality=None if quality is None else QualityReport.from_dict(quality)), golden


def _verify_one(
    name: str, open_target: Callable[[], Runner], answers: Answers, quantized: bool, progress: Progress
) -> tuple[list[str], dict[str, Any]]:
    done = verify_target(
        open_target,
        answers,
        quantized=quantized,
        on_stage=lambda stage: progress.start(f"verify on {name}: {stage}"),
    )
    return [], dataclasses.asdict(done) | {"report": done.report.to_dict()}


def _write_golden(
    answers: Answers, runs: Sequence[Mapping[str, Any]], staging: Staging, progress: Progress
) -> tuple[list[str], None]:
    verified = [(run["computes_in"], run["int8_activations"], run["greedy"]) for run in runs]
    golden = make_golden(answers, verified, lambda stage: progress.start(f"verify: {stage}"))
    staging.path(GOLDEN_FILE).write_bytes(save_golden(golden))
    return [GOLDEN_FILE], None
