"""The plan of an export: what it would write, need and refuse, from headers alone; no weight is read.

Everything is taken from the functions that the export itself uses. What only the work itself can tell is estimated
(exporter/estimates.py) and called `about`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.capture import build_encoder_on_meta, build_on_meta
from exporter.estimates import GpuMemory, PeakMemory, gpu_memory, peak_memory
from exporter.layouts import LAYOUTS
from exporter.pipeline import (
    WEIGHT_MODES,
    ExportRequest,
    check_preprocessor,
    check_source,
    choose_max_images,
    choose_max_len,
)
from exporter.plan_files import PlannedFile, plan_files
from exporter.plan_problems import Problems, check_options, check_tensors, read_config
from exporter.precision import Precision, cache_spec, find_precision, vision_spec
from exporter.quantize import plan_source
from exporter.quantizers import QUANTIZERS
from exporter.source import Source, make_source
from exporter.staging import check_destination
from exporter.targets import TARGETS
from exporter.weights import require_space
from graphs.checkpoint import Checkpoint, open_checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family, find_family
from runtimes.artifact import read_manifest
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec

REPLACES = "{} holds an artifact already: if this export made it, nothing will be done; else --force must replace it"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the checkpoint's headers say it is."""

    model_type: str
    layers: int
    parameters: int | None  # None: tensors are missing or wrong


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Names and sizes of what the artifact takes and returns."""

    precision: str
    cache: CacheSpec
    vision: VisionSpec | None
    signatures: Mapping[str, GraphSignature]
    buffer_bytes: Mapping[str, int]  # of the tables that each graph holds itself


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the export would write and take."""

    files: tuple[PlannedFile, ...]
    weight_bytes: int  # of the numbers that the graphs read
    peak_memory: PeakMemory
    gpu_memory: GpuMemory

    @property
    def written_bytes(self) -> int:
        """Of all files that are written."""
        return sum(file.bytes for file in self.files if file.written)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What would happen; parts that cannot be known because of a problem are None."""

    request: ExportRequest
    problems: tuple[str, ...]  # why the export would be refused; (): it would not be
    warnings: tuple[str, ...]
    tensors: Mapping[str, list[str]]  # {kind of problem: the tensors that have it}
    model: Model | None
    shapes: Shapes | None
    sizes: Sizes | None


def make_plan(request: ExportRequest, *, checks_out: bool = True) -> ExportPlan:
    """Plan an export; what would be refused is in the plan, all of it, and not raised.

    Args:
        checks_out: whether request.out was chosen by the user, so that what is there, and the room, matter.
    """
    problems, warnings = Problems(), list[str]()
    check_options(request, problems)
    if checks_out and request.weights in WEIGHT_MODES:
        warnings += _check_out(request, problems)
    model = shapes = sizes = None
    tensors: dict[str, list[str]] = {}
    opened = _open(request.checkpoint, problems)
    if opened is not None:
        checkpoint, family, config = opened
        tensors = check_tensors(family, config, checkpoint, problems)
        names = {ref.name for ref in family.all_refs(config)}
        count = None if tensors else checkpoint.parameter_count(names)
        model = Model(model_type=config.model_type, layers=config.num_hidden_layers, parameters=count)
        warnings += check_preprocessor(request.checkpoint, config)
        precision = problems.attempt(lambda: find_precision(request.precision, checkpoint))
        shapes = None if precision is None else _shapes(request, config, precision, problems, warnings)
        if precision is not None and not tensors:
            source = problems.attempt(
                lambda: make_source(checkpoint, family, config, request.precision, requantize=request.requantize)
            )
            sizes = None if source is None else _sizes(request, source, shapes, problems)
    if sizes is not None and checks_out:
        problems.attempt(functools.partial(require_space, _existing(request.out), sizes.written_bytes))
    return ExportPlan(
        request=request,
        problems=tuple(problems.messages),
        warnings=tuple(warnings),
        tensors=tensors,
        model=model,
        shapes=shapes,
        sizes=sizes,
    )


def _check_out(request: ExportRequest, problems: Problems) -> tuple[str, ...]:
    """Warnings about what is at request.out."""
    replaces = read_manifest(request.out) is not None and not request.force
    in_place, force = request.weights == "reference", request.force or replaces
    problems.attempt(lambda: check_destination(request.out, request.checkpoint, reference=in_place, force=force))
    return (REPLACES.format(request.out),) if replaces else ()


def _open(path: Path, problems: Problems) -> tuple[Checkpoint, Family, DecoderConfig] | None:
    checkpoint = problems.attempt(lambda: open_checkpoint(path))
    if checkpoint is None:
        return None
    family = problems.attempt(lambda: find_family(checkpoint.config, checkpoint.shapes))
    config = None if family is None else read_config(family, checkpoint.config, problems)
    return None if family is None or config is None else (checkpoint, family, config)


def _shapes(
    request: ExportRequest, config: DecoderConfig, precision: Precision, problems: Problems, warnings: list[str]
) -> Shapes | None:
    chosen = problems.attempt(lambda: choose_max_len(request.max_len, config))
    images = problems.attempt(lambda: choose_max_images(request.max_images, config))
    if chosen is None or images is None or request.layout not in LAYOUTS:
        return None
    max_len, more = chosen
    warnings += more
    layout, dtype = LAYOUTS[request.layout], getattr(torch, precision.dtype)
    decoder = build_on_meta(config, dtype)
    cache = cache_spec(decoder, max_len, precision.dtype)
    vision = vision_spec(config, precision.dtype, images)
    signature = problems.attempt(lambda: layout.signature(config, cache, request.max_batch, vision))
    if signature is None:
        return None
    signatures = {"decoder": signature}
    modules: dict[str, torch.nn.Module] = {"decoder": decoder}
    if vision is not None:
        signatures["vision_encoder"] = layout.encoder_signature(config, vision, request.max_batch)
        modules["vision_encoder"] = build_encoder_on_meta(config, dtype)
    return Shapes(
        precision=precision.name,
        cache=cache,
        vision=vision,
        signatures=signatures,
        buffer_bytes={name: sum(buffer.nbytes for buffer in each.buffers()) for name, each in modules.items()},
    )


def _sizes(request: ExportRequest, source: Source, shapes: Shapes | None, problems: Problems) -> Sizes | None:
    """None where an option that decides on them is wrong."""
    known = all(target in TARGETS for target in request.targets) and request.quantizer in QUANTIZERS
    if not known or request.layout not in LAYOUTS:
        return None
    before = len(problems.messages)
    problems.attempt(lambda: check_source(request, source))
    rows_first = LAYOUTS[request.layout].rows_first
    plan = problems.attempt(
        lambda: plan_source(source, request.weights, request.quantizer, None, rows_first=rows_first)
    )
    if plan is None or shapes is None or len(problems.messages) > before:
        return None
    files = plan_files(request, source, plan, shapes.signatures, shapes.cache, shapes.buffer_bytes)
    return Sizes(
        files=files,
        weight_bytes=sum(tensor.nbytes for tensor in plan.stored),
        peak_memory=peak_memory(request, source, plan, shapes.cache),
        gpu_memory=gpu_memory(source.config, plan, shapes.cache, shapes.vision, request.max_batch),
    )


def _existing(path: Path) -> Path:
    """The folder, or the next one around it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())
