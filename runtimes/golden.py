"""Golden tensors: a parity case with its true answers, for a machine that has neither PyTorch nor the checkpoint.

One safetensors file: what is fed, what eager PyTorch says, and how large eager's own errors are in each precision that
a runtime may compute in. `check_golden` runs the case on a runner and judges it as the export did.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes import tensor_file
from runtimes.errors import ArtifactError, FeedError
from runtimes.files import require_inside, why_no_file
from runtimes.images import ImageBatch
from runtimes.onnxruntime_layouts import AnyOnnxRuntimeRunner
from runtimes.parity import (
    Case,
    Chunks,
    ParityReport,
    Spread,
    Trace,
    Yardstick,
    judge,
    run_case,
)
from runtimes.runner import Runner

FORMAT = "export-llm golden 1"
IMAGE_TOKENS = 128  # of each row's pictures, whose keys and values would be larger than many models
_NO_FIT = (ValueError, LookupError, TypeError, FeedError)  # what comes of tensors of other shapes
_IMAGE_FIELDS = tuple(field.name for field in dataclasses.fields(ImageBatch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """A case and its answers."""

    case: Case
    truth: Trace  # keys and values of images: of every `image_stride`th token of a row
    greedy: list[list[int]]  # per row, the tokens that the export's runtime chose
    greedy_truth: list[np.ndarray]  # per row [steps, V], the true logits before each of them
    yardsticks: Mapping[str, Yardstick]  # by what basis_of says of a runner
    precision: str
    reference: str  # where the truth comes from, in words


def basis_of(runner: Runner, *, quantized: bool) -> str:
    """By which of eager's errors a runner is judged: what it computes in, and whether it rounds activations to 8 bits.

    Args:
        quantized: weights are quantized.
    """
    return basis_name(runner.computes_in, int8_activations=quantized and rounds_activations(runner))


def basis_name(computes_in: str, *, int8_activations: bool) -> str:
    """The same in words."""
    return f"{computes_in}, activations in int8" if int8_activations else computes_in


def rounds_activations(runner: Runner) -> bool:
    """Whether the runtime's kernels round what quantized weights multiply: ONNX Runtime's on the CPU do."""
    return isinstance(runner, AnyOnnxRuntimeRunner) and runner.device == "cpu" and not runner.in_float32


def image_stride(tokens: int) -> int:
    """Of a row with so many vision tokens every how manieth is kept."""
    return max(1, -(-tokens // IMAGE_TOKENS))


def check_golden(open_target: Callable[[], Runner], golden: Golden, *, quantized: bool) -> ParityReport:
    """Run the case and judge it by the golden tensors.

    Raises:
        ArtifactError: they hold no yardstick for what this runtime computes in, or do not fit this artifact.
    """
    with open_target() as runner:
        basis, computes_in, description = basis_of(runner, quantized=quantized), runner.computes_in, runner.description
        if basis not in golden.yardsticks:
            raise ArtifactError(
                f"the golden tensors were made for runtimes that compute in {' or '.join(golden.yardsticks)}, and"
                f" {description} computes in {basis}: verify where PyTorch is installed"
            )
        try:
            _require_room(golden.case, runner.cache_spec.max_len)
            target = run_case(runner, golden.case)
        except _NO_FIT as error:
            raise ArtifactError(f"the golden tensors do not fit this artifact: {error}") from None
    try:
        steps = [_steps_in_common(ours, theirs) for ours, theirs in zip(target.greedy, golden.greedy, strict=True)]
        greedy_truth = [logits[:known] for logits, known in zip(golden.greedy_truth, steps, strict=True)]
        thin = dataclasses.replace(target, images=thinned(target.images))
        rungs = judge(golden.case, thin, golden.truth, golden.yardsticks[basis], greedy_truth, computes_in)
    except _NO_FIT as error:
        raise ArtifactError(f"the golden tensors do not fit this artifact: {error}") from None
    return ParityReport(
        runtime=description,
        reference=f"golden tensors of {golden.reference}",
        precision=golden.precision,
        prompt_lengths=tuple(len(prompt) for prompt in golden.case.prompts),
        decode_steps=golden.case.forced.shape[1],
        rungs=tuple(rungs),
    )


def _require_room(case: Case, max_len: int) -> None:
    """ValueError where the case has slots that the cache has not."""
    slots = np.concatenate(
        [case.chunks.slots.ravel(), [case.far_position, case.far_position + len(case.far_prompt) - 1]]
    )
    if slots.min() < 0 or slots.max() >= max_len:
        raise ValueError(f"slots from {slots.min()} to {slots.max()}, in a cache of {max_len}")


def _steps_in_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """So many first tokens were chosen after the same text; the first that differs is one of them."""
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            return step + 1
    return len(ours)


def thinned(images: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Keys and values [kv_heads, tokens, head_dim] per row and tensor, of some tokens only."""
    return [[tensor[:, :: image_stride(tensor.shape[1])] for tensor in row] for row in images]


# --- the file ---------------------------------------------------------------------------------------------------------


def save_golden(golden: Golden) -> bytes:
    """The file's bytes; answers are rounded to float32."""
    case, truth = golden.case, golden.truth
    tensors: dict[str, np.ndarray] = {
        "case.prompts": np.array([token for prompt in case.prompts for token in prompt], np.int64),
        "case.prompt_lengths": np.array([len(prompt) for prompt in case.prompts], np.int64),
        "case.forced": case.forced,
        "case.far_prompt": np.array(case.far_prompt, np.int64),
        "case.far_position": np.array([case.far_position], np.int64),
        "case.chunks.tokens": case.chunks.tokens,
        "case.chunks.sizes": np.array(case.chunks.sizes, np.int64),
        "case.chunks.slots": case.chunks.slots,
        "case.chunks.positions": case.chunks.positions,
        "greedy.tokens": np.array(golden.greedy, np.int64),
        "truth.far_logits": truth.far_logits,
    }
    for name, images in (("case.images", case.images), ("case.chunks.images", case.chunks.images)):
        if images is not None:
            tensors |= {f"{name}.{field}": getattr(images, field) for field in _IMAGE_FIELDS}
    for name, rows in (
        ("truth.logits", truth.logits),
        ("truth.chunk_logits", truth.chunk_logits),
        ("greedy.logits", golden.greedy_truth),
    ):
        tensors |= {f"{name}.{row}": array for row, array in enumerate(rows)}
    for name, table in (("truth.cache", truth.cache), ("truth.images", thinned(truth.images))):
        tensors |= {f"{name}.{row}.{i}": array for row, arrays in enumerate(table) for i, array in enumerate(arrays)}
    facts = {
        "format": FORMAT,
        "precision": golden.precision,
        "reference": golden.reference,
        "yardsticks": {name: dataclasses.asdict(each) for name, each in golden.yardsticks.items()},
    }
    parts = ((name, "float32" if array.dtype.kind == "f" else "int64", array) for name, array in tensors.items())
    header, data = tensor_file.encode(parts)
    return tensor_file.join(header, {"golden": json.dumps(facts, sort_keys=True)}, data)


def load_golden(path: Path) -> Golden:
    """Read the file; ArtifactError when it is missing or damaged."""
    try:
        require_inside(path)
        if path.exists() and (reason := why_no_file(path)):
            raise ArtifactError(f"{path} cannot be read: {reason}")
        header, metadata, data = tensor_file.split(path.read_bytes())
        facts = json.loads(metadata["golden"])
        if facts["format"] != FORMAT:
            raise ArtifactError(f"{path} has format {facts['format']!r}, this program reads {FORMAT!r}: export again")
        return _from_tensors(tensor_file.decode(header, data)[0], facts)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: the artifact was exported with --no-verify; verify it where PyTorch is installed"
        ) from None
    except ArtifactError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _from_tensors(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Golden:
    ends = np.cumsum(tensors["case.prompt_lengths"])
    prompts = np.split(tensors["case.prompts"], ends[:-1])
    rows = len(prompts)
    greedy = tensors["greedy.tokens"]
    case = Case(
        prompts=tuple(tuple(prompt.tolist()) for prompt in prompts),
        forced=tensors["case.forced"],
        greedy_steps=greedy.shape[1],
        far_prompt=tuple(tensors["case.far_prompt"].tolist()),
        far_position=int(tensors["case.far_position"][0]),
        chunks=Chunks(
            tokens=tensors["case.chunks.tokens"],
            sizes=tuple(tensors["case.chunks.sizes"].tolist()),
            slots=tensors["case.chunks.slots"],
            positions=tensors["case.chunks.positions"],
            images=_images(tensors, "case.chunks.images"),
        ),
        images=_images(tensors, "case.images"),
    )
    truth = Trace(
        logits=[tensors[f"truth.logits.{row}"] for row in range(rows)],
        cache=_table(tensors, "truth.cache", rows),
        far_logits=tensors["truth.far_logits"],
        chunk_logits=[tensors[f"truth.chunk_logits.{row}"] for row in range(len(case.chunks.tokens))],
        images=[] if case.images is None else _table(tensors, "truth.images", rows),
    )
    return Golden(
        case=case,
        truth=truth,
        greedy=greedy.tolist(),
        greedy_truth=[tensors[f"greedy.logits.{row}"] for row in range(rows)],
        yardsticks={name: _yardstick(each) for name, each in facts["yardsticks"].items()},
        precision=str(facts["precision"]),
        reference=str(facts["reference"]),
    )


def _images(tensors: Mapping[str, np.ndarray], name: str) -> ImageBatch | None:
    if f"{name}.{_IMAGE_FIELDS[0]}" not in tensors:
        return None
    return ImageBatch(**{field: tensors[f"{name}.{field}"] for field in _IMAGE_FIELDS})


def _table(tensors: Mapping[str, np.ndarray], name: str, rows: int) -> list[list[np.ndarray]]:
    columns = sum(each.startswith(f"{name}.0.") for each in tensors)
    return [[tensors[f"{name}.{row}.{column}"] for column in range(columns)] for row in range(rows)]


def _yardstick(data: Mapping[str, Any]) -> Yardstick:
    cache, images = (tuple(_spread(each) for each in data[name]) for name in ("cache", "images"))
    return Yardstick(logits=_spread(data["logits"]), cache=cache, images=images)


def _spread(data: Mapping[str, Any]) -> Spread:
    if not all(isinstance(data[name], float) for name in ("max", "rms")):
        raise ValueError("an error of eager's is no number")
    return Spread(data["max"], data["rms"])
