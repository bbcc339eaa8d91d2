"""What an artifact is verified on, and verifying it by its golden tensors, with no PyTorch."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from runtimes.artifact import GOLDEN_FILE, Artifact
from runtimes.errors import ArtifactError, EngineLoadError, RuntimeMissingError
from runtimes.golden import check_golden, load_golden
from runtimes.onnxruntime_layouts import LAYOUT_RUNNERS
from runtimes.parity import ParityReport, ParitySummary
from runtimes.runner import Runner
from runtimes.signature import CacheSpec, GraphSignature, VisionPart

Targets = Mapping[str, Callable[[], Runner]]  # {name: opens the runner}
Start = Callable[[str], None]  # told in words what begins


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


def verify_all(targets: Targets, verify_one: Callable[[str, Callable[[], Runner]], ParityReport]) -> ParitySummary:
    """Verify on each target that this machine can run; the others are named in the summary, with the reason."""
    reports, not_run = [], {}
    for name, open_target in targets.items():
        try:
            reports.append(verify_one(name, open_target))
        except (RuntimeMissingError, EngineLoadError) as error:  # an engine may be for another GPU than this machine's
            not_run[name] = str(error)
    return ParitySummary(reports=tuple(reports), not_run=not_run)


def require_reports(summary: ParitySummary) -> ParitySummary:
    """The summary; RuntimeMissingError when nothing could be run."""
    if not summary.reports:
        raise RuntimeMissingError("; ".join(summary.not_run.values()))
    return summary


def verify_golden(artifact: Artifact, targets: Targets, start: Start = lambda _: None) -> ParitySummary:
    """Compare an artifact with the answers that eager PyTorch gave when it was exported.

    Raises:
        ArtifactError: it holds no golden tensors, or none for what the target computes in.
        RuntimeMissingError: there is one target, and it cannot run here.
    """
    if GOLDEN_FILE not in artifact.manifest.files:
        raise ArtifactError(
            f"{artifact.folder} holds no {GOLDEN_FILE}, for it was exported with --no-verify: verify it where PyTorch"
            " is installed"
        )
    golden = load_golden(artifact.path(GOLDEN_FILE))
    quantized = artifact.manifest.quantization is not None

    def verify_one(name: str, open_target: Callable[[], Runner]) -> ParityReport:
        start(f"verify on {name}, by golden tensors")
        return check_golden(open_target, golden, quantized=quantized)

    return require_reports(verify_all(targets, verify_one))
