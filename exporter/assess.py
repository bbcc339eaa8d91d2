"""When a quality report is due, and on which text it is made."""

import math
from pathlib import Path

from exporter.precision import FloatType
from exporter.progress import Progress
from exporter.quality import measure_quality, open_pair
from exporter.source import Source
from exporter.text import find_tokens
from exporter.weight_choice import WeightChoice
from exporter.weights import WeightPlan
from graphs.checkpoint import FLOAT_DTYPES, Checkpoint
from runtimes.quality import QualityReport

EVAL_SAMPLES = 16
EVAL_LENGTH = 64
EVAL_SEED = 1  # calibration has another one: what a method was fitted to flatters it


def is_lossy(source: Source, plan: WeightPlan) -> bool:
    """Whether the weights as stored may differ from the checkpoint's."""
    tensors = source.checkpoint.tensors
    narrowed = any(
        tensors[label].dtype != placed.dtype and placed.dtype != "F32"
        for label, placed in plan.placed.items()
        if label in tensors
    )
    return narrowed or any(_rounds(choice) for choice in source.choices.values())


def _rounds(choice: WeightChoice) -> bool:
    """Whether a weight that is quantized, here or in the checkpoint, is rounded."""
    if isinstance(choice.stored, FloatType):
        packed = choice.packed
        return packed is not None and choice.stored.safetensors not in ("F32", packed.dtype if packed.floats else "F32")
    return not choice.kept


def bytes_per_weight(plan: WeightPlan) -> float:
    """Bytes of the weights as stored, scales included, for each number of the model."""
    count = sum(math.prod(weight.shape) for weight in plan.quantized.values())
    count += sum(math.prod(tensor.shape) for tensor in plan.placed.values())
    return sum(tensor.nbytes for tensor in plan.stored) / count


def assess(
    source: Source, stored: Checkpoint, plan: WeightPlan, eval_text: Path | None, progress: Progress
) -> QualityReport | None:
    """The quality report of weights that were rounded; None where none were.

    Raises:
        ExportError: the text is too short, or not text.
    """
    if not is_lossy(source, plan):
        return None
    rounded_to = None if source.choices else FLOAT_DTYPES[source.precision.safetensors][0]
    pair = open_pair(source.family, source.config, source.checkpoint, stored, rounded_to)
    text = "sampled from the model itself" if eval_text is None else eval_text.name
    tokens = find_tokens(
        source, eval_text, EVAL_SAMPLES, EVAL_LENGTH, EVAL_SEED, "measure quality on", progress, pair.original
    )
    return measure_quality(pair, tokens.numpy(), text, source.files, bytes_per_weight(plan), progress)
