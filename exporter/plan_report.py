"""A plan, as data and as lines to read."""

import dataclasses
from typing import Any

from exporter.plan import ExportPlan, Shapes, Sizes

FIRST_NAMES = 8  # of tensors that are missing or not expected
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def plan_to_dict(plan: ExportPlan) -> dict[str, Any]:
    """What --json prints: bytes are exact but for those that are `about`; null is what cannot be known."""
    request, model, shapes, sizes = plan.request, plan.model, plan.shapes, plan.sizes
    return {
        "checkpoint": str(request.checkpoint),
        "refused": list(plan.problems),
        "warnings": list(plan.warnings),
        "tensors": {kind: {"count": len(found), "first": found[:FIRST_NAMES]} for kind, found in plan.tensors.items()},
        "model": None if model is None else dataclasses.asdict(model),
        "layout": request.layout,
        "precision": None if shapes is None else shapes.precision,
        "weights": request.weights,
        "targets": list(request.targets),
        "max_batch": request.max_batch,
        "max_len": None if shapes is None else shapes.cache.max_len,
        "cache": None if shapes is None else _cache(shapes, request.max_batch),
        "files": None if sizes is None else [dataclasses.asdict(file) for file in sizes.files],
        "written_bytes": None if sizes is None else sizes.written_bytes,
        "weight_bytes": None if sizes is None else sizes.weight_bytes,
        "about": None if sizes is None else _about(sizes),
    }


def _cache(shapes: Shapes, max_batch: int) -> dict[str, Any]:
    cache = shapes.cache
    return {
        "bytes_per_token": cache.bytes_per_token,
        "bytes_per_row": cache.nbytes(1),
        "bytes": cache.nbytes(max_batch),
        "bytes_per_image": None if shapes.vision is None else shapes.vision.bytes_per_image,
    }


def _about(sizes: Sizes) -> dict[str, Any]:
    """Estimates."""
    peak, gpu = sizes.peak_memory, sizes.gpu_memory
    return {
        "export_peak_memory_bytes": peak.total,
        "export_peak_memory": {"program": peak.program, **peak.stages},
        "gpu_memory_bytes": gpu.total,
        "gpu_memory": dataclasses.asdict(gpu),
    }


def plan_facts(plan: ExportPlan) -> dict[str, str]:
    """The same as {what: in words}."""
    facts: dict[str, str] = {}
    if plan.model is not None:
        count = "" if plan.model.parameters is None else f", {plan.model.parameters:,} parameters"
        facts["model"] = f"{plan.model.model_type}, {plan.model.layers} layers{count}"
    if plan.shapes is not None:
        facts |= _shape_facts(plan.shapes, plan.request.layout, plan.request.max_batch)
    if plan.sizes is not None:
        facts |= _size_facts(plan.sizes)
    return facts


def _shape_facts(shapes: Shapes, layout: str, max_batch: int) -> dict[str, str]:
    cache = shapes.cache
    facts = {
        "layout": f"{layout}, {shapes.precision}",
        "cache": f"{cache.bytes_per_token:,} bytes a token of each row; {in_units(cache.nbytes(1))} a row of"
        f" {cache.max_len:,} tokens, {in_units(cache.nbytes(max_batch))} for {max_batch} rows",
    }
    if shapes.vision is not None:
        facts["images"] = f"{in_units(shapes.vision.bytes_per_image)} each, {shapes.vision.max_images} at most in a row"
    return facts


def _size_facts(sizes: Sizes) -> dict[str, str]:
    facts = {}
    for file in sizes.files:
        size = f"about {in_units(file.bytes)}" if file.about else f"{file.bytes:,} bytes"
        facts[file.name] = size if file.written else f"{size}, the checkpoint's own"
    peak, gpu = sizes.peak_memory, sizes.gpu_memory
    largest = max(peak.stages, key=lambda stage: peak.stages[stage])
    facts["to be written"] = f"about {in_units(sizes.written_bytes)}"
    facts["memory to export"] = f"about {in_units(peak.total)}, most of it to {largest}"
    if peak.program > peak.stages[largest]:
        facts["memory to export"] = f"about {in_units(peak.total)}"
    facts["GPU memory to run"] = (
        f"about {in_units(gpu.total)}: weights {in_units(gpu.weights)}, cache {in_units(gpu.cache)}, activations"
        f" {in_units(gpu.activations)}"
    )
    return facts


def in_units(count: int) -> str:
    """Bytes to three digits, such as 1.07 GB."""
    for size, unit in UNITS:
        if count >= size:
            digits = 2 if count < 10 * size else 1 if count < 100 * size else 0
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} bytes"


def refusal(plan: ExportPlan) -> str:
    """All that stands in the way, in one message."""
    count = len(plan.problems)
    reasons = "\n  ".join(problem.replace("\n", "\n  ") for problem in plan.problems)
    return f"this export would be refused, for {count} reason{'s' * (count > 1)}:\n  {reasons}"
