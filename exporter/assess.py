"""When a quality report is due, and on which text it is made."""

import math
from pathlib import Path

from exporter.precision import FloatType
from exporter.progress import Progress
from exporter.quality import measure_quality, open_pair
from exporter.source import Source
from exporter.text import read_bos, read_tokens, sample_tokens
from exporter.weight_choice import WeightChoice
from exporter.weights import WeightPlan
from graphs.checkpoint import FLOAT_DTYPES, Checkpoint
from runtimes.quality import QualityReport
from runtimes.tokenizer import Tokenizer

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


def bytes_per_weight(source: Source, plan: WeightPlan) -> float:
    """Bytes of the weights as stored, scales included, for each number of the model."""
    tensors = plan.stored
    count = sum(math.prod(weight.shape) for weight in plan.quantized.values())
    count += sum(math.prod(tensor.shape) for tensor in plan.placed.values())
    return sum(tensor.nbytes for tensor in tensors) / count


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
    length = min(EVAL_LENGTH, source.config.max_position_embeddings)
    if eval_text is None:
        text = "sampled from the model itself"
        progress.start("sample text to measure quality on", EVAL_SAMPLES * (length - 1))
        bos = read_bos(source.checkpoint.config, source.config.vocab_size)
        tokens = sample_tokens(pair.original, EVAL_SAMPLES, length, EVAL_SEED, bos, progress)
    else:
        text = eval_text.name
        tokens = read_tokens(eval_text, Tokenizer(source.files), EVAL_SAMPLES, length)
    return measure_quality(pair, tokens.numpy(), text, source.files, bytes_per_weight(source, plan), progress)
