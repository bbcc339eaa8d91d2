"""Parity of an artifact: run the case on a runner and on eager PyTorch, and judge."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from exporter.clients import artifact_checkpoint
from exporter.config_json import config_as_json, differing_keys
from exporter.layouts import LAYOUTS
from exporter.op_parity import op_rungs
from exporter.progress import Progress, Quiet
from exporter.reference import Reference, reference_device
from exporter.source import read_source
from exporter.weight_check import check_stored_weights
from graphs.checkpoint import Checkpoint
from graphs.families import find_family
from graphs.near_ties import Chooser
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, EngineLoadError, RuntimeMissingError
from runtimes.onnxruntime_layouts import LAYOUT_RUNNERS, AnyOnnxRuntimeRunner
from runtimes.parity import ParityReport, ParitySummary, Rung, judge, make_case, run_case
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature, VisionPart
from runtimes.tolerances import MACHINE_EPSILON, NEAR_TIE_ULPS

Targets = Mapping[str, Callable[[], Runner]]  # {name: opens the runner}


def verify(
    open_target: Callable[[], Runner],
    checkpoint: Checkpoint,
    *,
    layout: str,
    signature: GraphSignature,
    cache: CacheSpec,
    encoder: GraphSignature | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
    reference_name: str = "the checkpoint",
    operators: dict[torch.dtype, list[Rung]] | None = None,
    seed: int = 0,
) -> ParityReport:
    """Compare a runner with eager PyTorch on the checkpoint's weights.

    The target runs and is closed before the reference is made, so that only one of them is in memory.

    Args:
        open_target: opens the runner; called once.
        checkpoint: for an artifact with quantized weights, the artifact itself: rounding weights is no part of parity.
        encoder: the vision encoder's, of a model that sees.
        on_stage: told in words what is happening.
        operators: rungs of the boundary operators that are known from other targets of this layout; more are added.
        seed: of the random tokens.
    """
    operators = {} if operators is None else operators
    family = find_family(checkpoint.config, checkpoint.shapes)
    config = family.parse_config(checkpoint.config)
    dtype = cache.dtype
    gapless = LAYOUTS[layout].gapless
    windows = [kind.window for kind in config.kinds if kind.attention == "sliding_window"]
    case = make_case(
        config.vocab_size,
        cache,
        signature.dims["batch_size"].max,
        seed,
        window=windows[0] if windows and not gapless else None,
        gapless=gapless,
        free_positions=all(kind.attention in ("causal", "cross") for kind in config.kinds),
        encoder=encoder,
    )
    on_stage("target")
    with open_target() as runner:
        target = run_case(runner, case)
        computes_in = runner.computes_in
        description = runner.description
        on_onnxruntime_cpu, exact = False, False
        if isinstance(runner, AnyOnnxRuntimeRunner):
            on_onnxruntime_cpu, exact = runner.device == "cpu", runner.in_float32
        int8_activations = on_onnxruntime_cpu and not exact and bool(checkpoint.packed)

    graph_dtype, compute_dtype = getattr(torch, dtype), getattr(torch, computes_in)
    rungs = []
    if on_onnxruntime_cpu:  # where the operators' own graph runs as well
        on_stage("boundary operators")
        if compute_dtype not in operators:
            operators[compute_dtype] = op_rungs(config, LAYOUTS[layout], compute_dtype)
        rungs = list(operators[compute_dtype])
    # The truth is a step more precise than the target, and its weights are rounded from the checkpoint's as the graph's
    # should be: what is left is the error of arithmetic, against which a mistake stands out.
    exact = torch.float64 if compute_dtype == torch.float32 else torch.float32
    on_stage(f"reference, {exact}".replace("torch.", ""))
    truth = Reference(family, config, checkpoint, exact, weights_rounded_to=graph_dtype)
    true_trace, true_greedy = truth.trace(case), truth.greedy_logits(case, target)
    chooses = any(isinstance(module, Chooser) for module in truth.decoder.modules())
    del truth
    on_stage(f"yardstick, eager {computes_in}")
    eager = Reference(
        family, config, checkpoint, compute_dtype, weights_rounded_to=graph_dtype, int8_activations=int8_activations
    ).trace(case)

    swapped = None
    if chooses:
        on_stage("near ties the other way")
        margin = NEAR_TIE_ULPS * MACHINE_EPSILON[computes_in]
        other = Reference(family, config, checkpoint, exact, weights_rounded_to=graph_dtype, swap_margin=margin)
        swapped = other.trace(case)

    rungs += judge(case, target, true_trace, eager, true_greedy, computes_in, swapped)
    weights = "" if graph_dtype == torch.float32 else f", weights rounded to {dtype}"
    exact_name = str(exact).removeprefix("torch.")
    return ParityReport(
        runtime=description,
        reference=f"eager PyTorch {exact_name} on {reference_device()}{weights}, {reference_name}",
        precision=dtype,
        prompt_lengths=tuple(len(prompt) for prompt in case.prompts),
        decode_steps=case.forced.shape[1],
        rungs=tuple(rungs),
    )


def onnx_targets(
    layout: str,
    graph: Path,
    signature: GraphSignature,
    cache: CacheSpec,
    device: str | None = None,
    vision: VisionPart | None = None,
    *,
    quantized: bool = False,
) -> Targets:
    """What an ONNX graph is verified on: ONNX Runtime and, where that computes less precisely, once more in float32.

    Behind the rounding of float16, or of activations to 8 bits, a small mistake in the graph could hide; in float32 it
    cannot.
    """
    make = functools.partial(LAYOUT_RUNNERS[layout], graph, signature, cache, vision=vision)
    targets: dict[str, Callable[[], Runner]] = {"onnxruntime": functools.partial(make, device=device)}
    if cache.dtype == "float16" or quantized:
        targets["onnxruntime in float32"] = functools.partial(make, in_float32=True)
    return targets


def artifact_targets(artifact: Artifact, device: str | None = None) -> Targets:
    """The same of an artifact's graphs."""
    manifest = artifact.manifest
    graph = manifest.graphs["decoder"]
    return onnx_targets(
        manifest.layout,
        artifact.path(graph.file),
        graph.signature,
        manifest.cache,
        device,
        artifact.vision_part(),
        quantized=manifest.quantization is not None,
    )


def verify_all(
    targets: Targets,
    verify_one: Callable[[Callable[[], Runner], Callable[[str], None]], ParityReport],
    progress: Progress,
) -> ParitySummary:
    """Verify on each target that this machine can run; the others are named in the summary, with the reason."""
    reports, not_run = [], {}
    for name, open_target in targets.items():
        try:
            reports.append(verify_one(open_target, functools.partial(_start_stage, progress, name)))
        except (RuntimeMissingError, EngineLoadError) as error:  # an engine may be for another GPU than this machine's
            not_run[name] = str(error)
    return ParitySummary(reports=tuple(reports), not_run=not_run)


def _start_stage(progress: Progress, target: str, stage: str) -> None:
    progress.start(f"verify on {target}: {stage}")


def verify_artifact(
    artifact: Artifact, targets: Targets, reference: Path | None = None, progress: Progress | None = None
) -> ParitySummary:
    """Compare an artifact with a checkpoint; by default with its own weights, which proves the graph and the runtime
    but not that the weights are those of the checkpoint it came from.

    The weights of an artifact that stores them in another way than the checkpoint are compared with it one by one.

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
        family = find_family(checkpoint.config, checkpoint.shapes)
        config = family.parse_config(checkpoint.config)
    else:
        source = read_source(reference, manifest.precision, requantize=True)
        checkpoint, config = source.checkpoint, source.config
    differing = differing_keys(dict(manifest.config), config_as_json(config))
    if differing:
        raise ArtifactError(
            f"{checkpoint.folder} is another model than {artifact.folder}: they differ in {', '.join(differing)}"
        )
    checked: list[ParityReport] = []
    operators: dict[torch.dtype, list[Rung]] = {}
    if source is not None and source.choices:
        quantizer = (manifest.quantization or {}).get("quantizer", "")
        checked.append(check_stored_weights(source, own, quantizer, progress))
        checkpoint = own

    def verify_one(open_target: Callable[[], Runner], on_stage: Callable[[str], None]) -> ParityReport:
        return verify(
            open_target,
            checkpoint,
            layout=manifest.layout,
            signature=manifest.graphs["decoder"].signature,
            cache=manifest.cache,
            encoder=None if manifest.vision is None else manifest.graphs["vision_encoder"].signature,
            on_stage=on_stage,
            reference_name="the artifact's own weights" if checkpoint is own else str(reference),
            operators=operators,
        )

    summary = verify_all(targets, verify_one, progress)
    if not summary.reports:
        raise RuntimeMissingError("; ".join(summary.not_run.values()))
    return dataclasses.replace(summary, reports=(*checked, *summary.reports))
