"""Parity of an artifact: run the case on a runner and on eager PyTorch, and judge."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from exporter.layouts import LAYOUTS
from exporter.op_parity import op_rungs
from exporter.reference import Reference, reference_device
from graphs.checkpoint import Checkpoint, open_checkpoint
from graphs.families import find_family
from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError
from runtimes.parity import ParityReport, judge, judge_greedy, make_case, run_case
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature


def verify(
    open_target: Callable[[], Runner],
    checkpoint: Checkpoint,
    *,
    layout: str,
    signature: GraphSignature,
    cache: CacheSpec,
    on_stage: Callable[[str], None] = lambda _: None,
    reference_name: str = "the checkpoint",
    seed: int = 0,
) -> ParityReport:
    """Compare a runner with eager PyTorch on the checkpoint's weights.

    The target runs and is closed before the reference is made, so that only one of them is in memory.

    Args:
        open_target: opens the runner; called once.
        on_stage: told in words what is happening.
        seed: of the random tokens.
    """
    family = find_family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    dtype = cache.dtype
    case = make_case(config.vocab_size, cache, signature.dims["batch_size"].max, seed)
    on_stage("target")
    with open_target() as runner:
        target = run_case(runner, case)
        computes_in = getattr(runner, "computes_in", dtype)
        description = runner.description

    on_stage("boundary operators")
    rungs = op_rungs(config, LAYOUTS[layout], getattr(torch, dtype))
    graph_dtype, compute_dtype = getattr(torch, dtype), getattr(torch, computes_in)
    # A graph that computes in float32 is measured against float64, with its weights rounded as the graph's are.
    exact = torch.float64 if compute_dtype == torch.float32 else torch.float32
    rounded = graph_dtype if compute_dtype == torch.float32 else None
    on_stage(f"reference, {exact}".replace("torch.", ""))
    truth = Reference(family, config, checkpoint, exact, weights_rounded_to=rounded)
    true_trace, true_greedy = truth.trace(case), truth.greedy_logits(case, target)
    del truth
    on_stage(f"yardstick, eager {computes_in}")
    eager = Reference(family, config, checkpoint, compute_dtype, weights_rounded_to=rounded).trace(case)

    rungs += judge(case, target, true_trace, eager, computes_in)
    limit = max(rung.max_limit for rung in rungs if "logits" in rung.name or "decode" in rung.name)
    rungs.append(judge_greedy(case, target, true_greedy, limit))
    weights = f", weights rounded to {dtype}" if rounded not in (None, torch.float32) else ""
    exact_name = str(exact).removeprefix("torch.")
    return ParityReport(
        runtime=description,
        reference=f"eager PyTorch {exact_name} on {reference_device()}{weights}, {reference_name}",
        precision=dtype,
        prompt_lengths=tuple(len(prompt) for prompt in case.prompts),
        decode_steps=case.forced.shape[1],
        rungs=tuple(rungs),
    )


def verify_artifact(
    artifact: Artifact,
    open_target: Callable[[], Runner],
    reference: Path | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare an artifact with a checkpoint; by default with its own weights, which proves the graph and the runtime
    but not that the weights are those of the checkpoint it came from.

    Raises:
        ArtifactError: the reference describes another model.
        CheckpointError: the reference cannot be read.
    """
    manifest = artifact.manifest
    checkpoint = open_checkpoint(reference or artifact.folder)
    config = dataclasses.asdict(find_family(checkpoint.config).parse_config(checkpoint.config))
    differing = [key for key, value in manifest.config.items() if config.get(key) != value]
    if differing:
        raise ArtifactError(
            f"{checkpoint.folder} is another model than {artifact.folder}: they differ in {', '.join(differing)}"
        )
    return verify(
        open_target,
        checkpoint,
        layout=manifest.layout,
        signature=manifest.graphs["decoder"].signature,
        cache=manifest.cache,
        on_stage=on_stage,
        reference_name="the artifact's own weights" if reference is None else str(reference),
    )
