"""Are the weights that were written those of the checkpoint, up to the rounding that was asked for?

Parity takes the written weights as they are; this compares them with the checkpoint's, each by itself.
"""

import torch

from exporter.progress import Progress
from exporter.quality import rms
from exporter.quantizers import rtn
from exporter.source import Source
from exporter.weight_choice import WeightChoice
from graphs.checkpoint import Checkpoint, TensorRef
from runtimes.parity import ParityReport, Rung
from runtimes.tolerances import MACHINE_EPSILON, WEIGHT_MULTIPLE


def check_stored_weights(
    source: Source, stored: Checkpoint, quantizer: str, progress: Progress, reference_name: str = "the checkpoint"
) -> ParityReport:
    """Compare every weight; errors are root mean squares relative to the weight's own.

    Args:
        stored: the artifact's weights.
        quantizer: that made the codes. One that moves factors from weight to weight is left to the quality report.
    """
    progress.start("compare stored weights", len(source.choices))
    worst: dict[str, Rung] = {}
    for ref, choice in source.choices.items():
        progress.advance(1)
        multiple = WEIGHT_MULTIPLE.get(quantizer)
        if multiple is None and not choice.kept:
            continue
        rung = compare_weight(source, stored, ref, choice, multiple or 0.0)
        if rung.name not in worst or _excess(rung) > _excess(worst[rung.name]):
            worst[rung.name] = rung
    return ParityReport(
        runtime="stored weights",
        reference=f"the weights of {reference_name}",
        precision=source.precision.name,
        prompt_lengths=(),
        decode_steps=0,
        rungs=tuple(worst[name] for name in sorted(worst)),
    )


def compare_weight(source: Source, stored: Checkpoint, ref: TensorRef, choice: WeightChoice, multiple: float) -> Rung:
    """One weight, `multiple` times as far from the checkpoint's as rounding it to nearest at most."""
    original = source.checkpoint.load(ref, torch.float64)
    # a weight is quantized, as the checkpoint holds it, in float32
    written = stored.load(ref, torch.float64)
    size = rms(original) or 1.0
    error = rms(written - original) / size
    own = 0.0
    if choice.format is None:
        name = "float weights"
        limit = MACHINE_EPSILON[str(written.dtype).removeprefix("torch.")]
        limit = 0.0 if written.dtype == original.dtype else limit
    elif choice.kept:
        name, limit = "weights taken over", 0.0
    else:
        name = f"weights in {choice.format}"
        scale_dtype = getattr(torch, source.precision.dtype)
        rounded = rtn.quantize(original.float(), choice.format, scale_dtype).dequantize(torch.float64)
        own = rms(rounded - original) / size
        limit = multiple * own + MACHINE_EPSILON["float32"]
    return Rung(
        name=name,
        max_error=error,
        rms_error=error,
        eager_max_error=own,
        eager_rms_error=own,
        max_limit=limit,
        rms_limit=limit,
        passed=error <= limit,
        note=f"worst: {ref.label}",
    )


def _excess(rung: Rung) -> float:
    return rung.rms_error / rung.rms_limit if rung.rms_limit else float("inf") if rung.rms_error else 0.0
