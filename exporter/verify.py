"""Parity of an artifact: run the case on a runner and on eager PyTorch, and judge."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from exporter.clients import artifact_checkpoint
from exporter.config_json import config_as_json, differing_keys
from exporter.layouts import LAYOUTS
from exporter.op_parity import op_rungs
from exporter.progress import Progress, Quiet
from exporter.reference import Reference, reference_device
from exporter.source import read_source
from exporter.table_check import check_tables
from exporter.weight_check import check_stored_weights
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family, find_family
from graphs.loading import build_on_meta
from graphs.near_ties import Chooser
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError
from runtimes.golden import Golden, basis_name, rounds_activations
from runtimes.onnxruntime_layouts import AnyOnnxRuntimeRunner
from runtimes.parity import (
    Case,
    ParityReport,
    ParitySummary,
    Rung,
    Trace,
    Yardstick,
    judge,
    make_case,
    measure_eager,
    run_case,
)
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature
from runtimes.tolerances import MACHINE_EPSILON, NEAR_TIE_ULPS
from runtimes.verification import Targets, require_reports, verify_all

OnStage = Callable[[str], None]  # told in words what is happening


class Answers:
    """What eager PyTorch makes of a case, each thing computed once, however many targets are judged by it."""

    def __init__(
        self,
        family: Family,
        config: DecoderConfig,
        checkpoint: Checkpoint,
        layout: str,
        cache: CacheSpec,
        case: Case,
    ) -> None:
        """Make it of a checkpoint; for an artifact with quantized weights, the artifact itself: rounding weights is no
        part of parity."""
        self.case = case
        self.dtype: torch.dtype = getattr(torch, cache.dtype)
        self._make = _ReferenceMaker(family, config, checkpoint, self.dtype)
        self._layout = layout
        self._config = config
        self._traces: dict[tuple[torch.dtype, bool], Trace] = {}
        self._operators: dict[torch.dtype, list[Rung]] = {}
        self._yardsticks: dict[tuple[torch.dtype, bool], Yardstick] = {}
        self._last: tuple[torch.dtype, Reference] | None = None
        decoder, _ = build_on_meta(config)
        self.chooses = any(isinstance(module, Chooser) for module in decoder.modules())  # experts, or keys

    def operators(self, dtype: torch.dtype, on_stage: OnStage) -> list[Rung]:
        """Rungs of the boundary operators, in that dtype."""
        if dtype not in self._operators:
            on_stage("boundary operators")
            self._operators[dtype] = op_rungs(self._config, LAYOUTS[self._layout], dtype)
        return self._operators[dtype]

    def trace(self, dtype: torch.dtype, *, int8_activations: bool = False) -> Trace:
        """Logits and state of the case, computed in `dtype`."""
        key = (dtype, int8_activations)
        if key not in self._traces:
            reference = self._make(dtype, int8_activations=True) if int8_activations else self._exact(dtype)
            self._traces[key] = reference.trace(self.case)
        return self._traces[key]

    def yardstick(self, dtype: torch.dtype, *, int8_activations: bool, on_stage: OnStage) -> Yardstick:
        """How large the errors of eager in `dtype` are."""
        key = (dtype, int8_activations)
        if key in self._yardsticks:
            return self._yardsticks[key]
        exact = exact_dtype(dtype)
        truth = self.trace(exact)
        swapped = None
        if self.chooses:
            on_stage("near ties the other way")
            margin = NEAR_TIE_ULPS * MACHINE_EPSILON[_name(dtype)]
            swapped = self._make(exact, swap_margin=margin).trace(self.case)
        on_stage(f"yardstick, eager {_name(dtype)}")
        eager = self.trace(dtype, int8_activations=int8_activations)
        self._yardsticks[key] = measure_eager(truth, eager, swapped)
        return self._yardsticks[key]

    def greedy(self, dtype: torch.dtype, chosen: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Per row [steps, V]: the logits before each token that a target chose."""
        return self._exact(dtype).greedy_logits(self.case, chosen)

    def _exact(self, dtype: torch.dtype) -> Reference:
        """The reference in that dtype; the last one is kept, for it has encoded the case's pictures."""
        if self._last is None or self._last[0] != dtype:
            self._last = None
            self._last = (dtype, self._make(dtype))
        return self._last[1]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """A step more precise than the target: weights are rounded as the graph's, and what is left is the error of
    arithmetic, against which a mistake stands out."""
    return torch.float64 if dtype == torch.float32 else torch.float32


@dataclasses.dataclass(frozen=True)
class _ReferenceMaker:
    family: Family
    config: DecoderConfig
    checkpoint: Checkpoint
    rounded_to: torch.dtype

    def __call__(self, dtype: torch.dtype, *, int8_activations: bool = False, swap_margin: float = 0.0) -> Reference:
        return Reference(
            self.family,
            self.config,
            self.checkpoint,
            dtype,
            weights_rounded_to=self.rounded_to,
            swap_margin=swap_margin,
            int8_activations=int8_activations,
        )


def _model_of(checkpoint: Checkpoint) -> tuple[Family, DecoderConfig]:
    family = find_family(checkpoint.config, checkpoint.shapes)
    return family, family.parse_config(checkpoint.config)


def fitting_case(
    config: DecoderConfig, layout: str, cache: CacheSpec, max_batch: int, encoder: GraphSignature | None, seed: int = 0
) -> Case:
    """A case of random tokens that fits the model, the layout and the cache."""
    gapless = LAYOUTS[layout].gapless
    windows = [kind.window for kind in config.kinds if kind.attention == "sliding_window"]
    return make_case(
        config.vocab_size,
        cache,
        max_batch,
        seed,
        window=windows[0] if windows and not gapless else None,
        gapless=gapless,
        free_positions=all(kind.attention in ("causal", "cross") for kind in config.kinds),
        encoder=encoder,
    )


def make_answers(
    checkpoint: Checkpoint,
    *,
    layout: str,
    signature: GraphSignature,
    cache: CacheSpec,
    encoder: GraphSignature | None = None,
    seed: int = 0,
) -> Answers:
    """A case that fits the artifact, to be answered by eager PyTorch on the checkpoint's weights.

    Args:
        encoder: the vision encoder's, of a model that sees.
        seed: of the random tokens.
    """
    family, config = _model_of(checkpoint)
    case = fitting_case(config, layout, cache, signature.dims["batch_size"].max, encoder, seed)
    return Answers(family, config, checkpoint, layout, cache, case)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """A report, and what golden tensors need to know of the run."""

    report: ParityReport
    computes_in: str
    int8_activations: bool
    greedy: list[list[int]]


def verify_target(
    open_target: Callable[[], Runner],
    answers: Answers,
    *,
    quantized: bool,
    on_stage: OnStage = lambda _: None,
    reference_name: str = "the checkpoint",
) -> Verified:
    """Compare a runner with eager PyTorch.

    The target runs and is closed before the reference is made, so that only one of them is in memory.

    Args:
        open_target: opens the runner; called once.
        quantized: weights are quantized, so that some runtimes round what they multiply.
    """
    case, dtype = answers.case, answers.dtype
    on_stage("target")
    with open_target() as runner:
        target = run_case(runner, case)
        computes_in, description = runner.computes_in, runner.description
        int8_activations = quantized and rounds_activations(runner)
        on_onnxruntime_cpu = isinstance(runner, AnyOnnxRuntimeRunner) and runner.device == "cpu"
    compute_dtype = getattr(torch, computes_in)
    # where the operators' own graph runs as well
    rungs = list(answers.operators(compute_dtype, on_stage)) if on_onnxruntime_cpu else []
    exact = exact_dtype(compute_dtype)
    on_stage(f"reference, {_name(exact)}")
    truth, greedy_truth = answers.trace(exact), answers.greedy(exact, target.greedy)
    yardstick = answers.yardstick(compute_dtype, int8_activations=int8_activations, on_stage=on_stage)
    rungs += judge(case, target, truth, yardstick, greedy_truth, computes_in)
    report = ParityReport(
        runtime=description,
        reference=f"{describe_reference(exact, dtype)}, {reference_name}",
        precision=_name(dtype),
        prompt_lengths=tuple(len(prompt) for prompt in case.prompts),
        decode_steps=case.forced.shape[1],
        rungs=tuple(rungs),
    )
    return Verified(report=report, computes_in=computes_in, int8_activations=int8_activations, greedy=target.greedy)


def describe_reference(exact: torch.dtype, rounded_to: torch.dtype) -> str:
    """What the truth is, in words."""
    weights = "" if rounded_to == torch.float32 else f", weights rounded to {_name(rounded_to)}"
    return f"eager PyTorch {_name(exact)} on {reference_device()}{weights}"


def verify(
    open_target: Callable[[], Runner],
    checkpoint: Checkpoint,
    *,
    layout: str,
    signature: GraphSignature,
    cache: CacheSpec,
    encoder: GraphSignature | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compare one runner with eager PyTorch on the checkpoint's weights; arguments as in make_answers."""
    answers = make_answers(checkpoint, layout=layout, signature=signature, cache=cache, encoder=encoder, seed=seed)
    return verify_target(open_target, answers, quantized=bool(checkpoint.packed)).report


def make_golden(answers: Answers, verified: Sequence[tuple[str, bool, list[list[int]]]], on_stage: OnStage) -> Golden:
    """Golden tensors for the runtimes that were verified, and for those that compute in the graph's own dtype.

    Args:
        verified: (what a target computed in, whether activations were rounded to 8 bits, the tokens that it chose).
    """
    own = (_name(answers.dtype), False)
    bases = dict.fromkeys([(computes_in, int8) for computes_in, int8, _ in verified] + [own])
    yardsticks = {
        basis_name(name, int8_activations=int8): answers.yardstick(
            getattr(torch, name), int8_activations=int8, on_stage=on_stage
        )
        for name, int8 in bases
    }
    exact = max((exact_dtype(getattr(torch, name)) for name, _ in bases), key=lambda dtype: dtype.itemsize)
    on_stage(f"golden tensors, {_name(exact)}")
    chosen = verified[-1][2]
    return Golden(
        case=answers.case,
        truth=answers.trace(exact),
        greedy=chosen,
        greedy_truth=answers.greedy(exact, chosen),
        yardsticks=yardsticks,
        precision=_name(answers.dtype),
        reference=describe_reference(exact, answers.dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify_artifact(
    artifact: Artifact,
    targets: Targets,
    reference: Path | None = None,
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> ParitySummary:
    """Compare an artifact with a checkpoint; by default with its own weights, which proves the graph and the runtime
    but not that the weights are those of the checkpoint it came from.

    The weights of an artifact that stores them in another way than the checkpoint are compared with it one by one.

    Args:
        seed: of the case's random tokens and pictures.

    Raises:
        ArtifactError: the reference describes another model.
        CheckpointError: the reference cannot be read.
        ExportError: the artifact's precision cannot be had from the reference.
        RuntimeMissingError: there is one target, and it cannot run here.
    """
    manifest = artifact.manifest
    progress = progress or Quiet()
    own = artifact_checkpoint(artifact)
    source = None
    if reference is None:
        checkpoint = own
        _, config = _model_of(checkpoint)
    else:
        source = read_source(reference, manifest.precision, requantize=True)
        checkpoint, config = source.checkpoint, source.config
    differing = differing_keys(dict(manifest.config), config_as_json(config))
    if differing:
        raise ArtifactError(
            f"{checkpoint.folder} is another model than {artifact.folder}: they differ in {', '.join(differing)}"
        )
    checked: list[ParityReport] = []
    if source is not None and source.choices:
        quantizer = (manifest.quantization or {}).get("quantizer", "")
        checked.append(check_stored_weights(source, own, quantizer, progress, str(reference)))
        checkpoint = own

    answers = make_answers(
        checkpoint,
        layout=manifest.layout,
        signature=manifest.graphs["decoder"].signature,
        cache=manifest.cache,
        encoder=None if manifest.vision is None else manifest.graphs["vision_encoder"].signature,
        seed=seed,
    )

    def verify_one(name: str, open_target: Callable[[], Runner]) -> ParityReport:
        return verify_target(
            open_target,
            answers,
            quantized=bool(checkpoint.packed),
            on_stage=lambda stage: progress.start(f"verify on {name}: {stage}"),
            reference_name="the artifact's own weights" if checkpoint is own else str(reference),
        ).report

    summary = require_reports(verify_all(targets, verify_one))
    reports = summary.reports
    if source is not None and not source.choices:
        reports = (reports[0].with_rung(check_tables(source, own)), *reports[1:])
    return dataclasses.replace(summary, reports=(*checked, *reports))
