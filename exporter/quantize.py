"""From a source to a weight plan: which method makes the codes of quantized weights, calibrated if it needs to be."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import ExportError
from exporter.progress import Progress
from exporter.quantizers import QUANTIZERS
from exporter.quantizers.calibration import calibrate
from exporter.quantizers.work import Calibrated
from exporter.source import Source
from exporter.text import find_tokens
from exporter.weight_choice import WeightChoice
from exporter.weights import WeightPlan, plan_choices, plan_weights
from graphs.checkpoint import TensorRef
from graphs.quantization import QuantizedTensor
from runtimes.hashing import sha256_of

DEFAULT_QUANTIZER = "rtn"
CALIBRATION_SAMPLES = 64
CALIBRATION_LENGTH = 256
CALIBRATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found, by parameter."""

    results: Calibrated
    parameters: Mapping[TensorRef, str]


def check_quantizer(quantizer: str, calibration: Path | None) -> None:
    """ExportError for a method that there is not, or text for one that takes none."""
    if quantizer not in QUANTIZERS:
        raise ExportError(f"--quantizer {quantizer!r} is not supported; supported: {', '.join(QUANTIZERS)}")
    if calibration is not None and not QUANTIZERS[quantizer].needs_calibration:
        needing = ", ".join(name for name, each in QUANTIZERS.items() if each.needs_calibration)
        raise ExportError(f"--calibration is for --quantizer {needing}; {quantizer} looks at weights alone")


def calibrate_source(
    source: Source, quantizer: str, text: Path | None, work: Path, progress: Progress
) -> Calibration | None:
    """Calibrate the source's weights; None where nothing is to be quantized by a method that needs it.

    Args:
        text: to calibrate on; None: sampled from the model itself.
        work: folder for what is finished, from which a run that was stopped goes on.

    Raises:
        ExportError: the text is too short, or not text; or the model computes numbers that are not finite.
    """
    parameters = {ref: _unique(choice) for ref, choice in source.choices.items()}
    formats = {
        parameters[ref]: choice.format
        for ref, choice in source.choices.items()
        if choice.format is not None and not choice.kept
    }
    if not formats or not QUANTIZERS[quantizer].needs_calibration:
        return None
    origin: list[object] = (
        ["sampled", CALIBRATION_SEED] if text is None else ["text", sha256_of(text) if text.is_file() else ""]
    )
    tokens = find_tokens(
        source, text, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, CALIBRATION_SEED, "calibrate on", progress
    )
    results = calibrate(
        quantizer,
        {parameter: ref for ref, parameter in parameters.items()},
        source.config,
        source.checkpoint,
        tokens,
        formats,
        getattr(torch, source.precision.dtype),
        work,
        progress,
        fingerprint=_fingerprint(source, quantizer, origin, tokens.shape[1]),
    )
    return Calibration(results=results, parameters=parameters)


def _unique(choice: WeightChoice) -> str:
    """The decoder's own names, and others for the vision encoder's."""
    return f"vision_encoder.{choice.parameter}" if choice.in_encoder else choice.parameter


def _fingerprint(source: Source, quantizer: str, origin: list[object], length: int) -> str:
    """Of all that calibration depends on; files are known by their name, size and time."""
    tensors = source.checkpoint.all_tensors.values()
    folder = source.checkpoint.folder
    paths = {path for path in (folder.iterdir() if folder.is_dir() else (folder,)) if path.is_file()}
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    formats = {ref.label: str(choice.stored) for ref, choice in source.choices.items()}
    facts = [str(folder.resolve()), files, quantizer, origin, length, CALIBRATION_SAMPLES, source.precision.dtype]
    facts += [sorted(formats.items()), sorted(tensor.name for tensor in tensors)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def plan_source(
    source: Source, weights: str, quantizer: str, calibration: Calibration | None, *, rows_first: bool = False
) -> WeightPlan:
    """Where the source's weights go, and how they get there.

    Args:
        weights: "copy", or "reference" to use the checkpoint's own files where they lie.
        rows_first: see plan_choices.
    """
    checkpoint, precision = source.checkpoint, source.precision
    if not source.choices:
        return plan_weights(checkpoint, source.family.all_refs(source.config), precision, weights)
    scale_dtype = getattr(torch, precision.dtype)

    def quantize(ref: TensorRef, choice: WeightChoice) -> QuantizedTensor:
        if calibration is not None:
            tensor = calibration.results.quantized(calibration.parameters[ref])
            assert tensor is not None
            return tensor
        method = QUANTIZERS[quantizer].quantize_weight
        assert method is not None
        assert choice.format is not None
        return method(checkpoint.load(ref, torch.float32), choice.format, scale_dtype)

    changed = {}
    if calibration is not None:
        results = calibration.results

        def load(parameter: str) -> torch.Tensor:
            value = results.changed(parameter)
            assert value is not None
            return value

        changed = {
            ref: functools.partial(load, parameter)
            for ref, parameter in calibration.parameters.items()
            if parameter in results.changes
        }
    return plan_choices(checkpoint, source.choices, precision, quantize, changed, rows_first=rows_first)
