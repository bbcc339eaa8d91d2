"""One benchmark, start to end."""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporter.bench.contestants import (
    EVERY_PEER,
    Contestant,
    artifact_contestant,
    other_artifact,
    peer_contestant,
    with_unique_names,
)
from exporter.bench.engines.onnxruntime_genai import graph_of
from exporter.bench.machine import machine_facts
from exporter.bench.measure import Measured, measure
from exporter.bench.peers import PEERS
from exporter.bench.plan import Plan
from exporter.bench.process import WorkerProcess
from exporter.bench.report import Report, make_report
from exporter.bench.traffic import weight_bytes
from exporter.errors import ExportError
from exporter.progress import Progress, Quiet
from runtimes.artifact import Artifact
from runtimes.errors import RuntimeMissingError
from runtimes.signature import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What is compared.

    Attributes:
        runtimes: what runs the artifact; each is a contestant.
        against: peers, `all` of those that can be had, or other artifacts as FOLDER or FOLDER@RUNTIME.
        checkpoint: what peers make their models of; the artifact's own files where nothing is rounded.
        pythons: {peer: an interpreter that has it}.
    """

    artifact: Artifact
    plan: Plan
    runtimes: tuple[str, ...] = ("onnxruntime",)
    against: tuple[str, ...] = ()
    checkpoint: Path | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)


def bench(request: BenchRequest, progress: Progress | None = None) -> Report:
    """Measure the artifact and everything it is compared with.

    Raises:
        ExportError, RuntimeMissingError: a contestant that was asked for cannot take part, or fails.
    """
    progress = progress or Quiet()
    if request.artifact.manifest.vision is not None:
        raise ExportError(f"{request.artifact.folder} sees: bench measures models that read text only")
    plan, vocab_size = request.plan, request.artifact.manifest.config["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="export-llm-bench-") as folder:
        scratch = Path(folder)
        machine = machine_facts(plan.threads)
        contestants, not_run = _choose(request, scratch)
        contestants = [_prepare(each, plan, scratch, progress) for each in contestants]
        measured, bandwidth = measure(
            contestants,
            plan,
            vocab_size,
            start=lambda each: WorkerProcess(each.name, scratch, python=each.python, threads=plan.threads),
            start_reader=lambda: WorkerProcess("memory", scratch, threads=plan.threads),
            progress=progress,
        )
        return make_report(
            measured,
            bandwidth,
            plan,
            machine=machine,
            not_run=not_run,
            weight_bytes=[_weight_bytes(each) for each in measured],
            number_bytes=DTYPE_BYTES[request.artifact.manifest.cache.dtype],
        )


def _choose(request: BenchRequest, scratch: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Contestants, the artifact first; of `all` peers, why the others are not among them."""
    first, plan, pythons = request.artifact, request.plan, request.pythons
    contestants = [artifact_contestant(first, runtime, plan, pythons) for runtime in request.runtimes]
    not_run = {}
    for name in request.against:
        if name == EVERY_PEER:
            for peer in PEERS:
                try:
                    contestants.append(_peer(peer, request, scratch))
                except (ExportError, RuntimeMissingError) as error:
                    not_run[peer] = str(error)
        elif name in PEERS:
            contestants.append(_peer(name, request, scratch))
        else:
            contestants.append(other_artifact(name, first, request.runtimes[0], plan, pythons))
    for each in contestants:
        if each.peer is None:
            _require_library(each, scratch)
    return with_unique_names(contestants), not_run


def _peer(name: str, request: BenchRequest, scratch: Path) -> Contestant:
    contestant = peer_contestant(name, request.artifact, request.checkpoint, request.plan, request.pythons)
    _require_library(contestant, scratch)
    return contestant


def _require_library(contestant: Contestant, scratch: Path) -> None:
    """RuntimeMissingError when what runs it cannot be imported in its interpreter."""
    peer = contestant.library
    if peer is None:
        return
    with WorkerProcess(peer, scratch, python=contestant.python, threads=1) as worker:
        missing = worker.ask("missing", modules=PEERS[peer].modules)
    if missing:
        where = contestant.python or "this environment"
        raise RuntimeMissingError(
            f"{peer} needs {', '.join(missing)}, which {where} does not have: pip install {PEERS[peer].install}, there"
            f" or in another environment, and then --peer-python {peer}=ITS_PYTHON"
        )


def _prepare(contestant: Contestant, plan: Plan, scratch: Path, progress: Progress) -> Contestant:
    """The same with the model that the peer makes of the checkpoint."""
    peer = contestant.peer
    if peer is None:
        return contestant
    progress.start(f"{contestant.name} makes its model")
    python = None if peer.prepares_here else contestant.python
    with WorkerProcess(contestant.name, scratch, python=python, threads=plan.threads) as worker:
        model = worker.ask(
            "prepare",
            engine=peer.engine[0],
            checkpoint=str(contestant.model),
            precision=peer.precisions[contestant.precision.partition(":")[0]],
            folder=str(scratch / contestant.name),
        )
    return dataclasses.replace(contestant, model=Path(model))


def _weight_bytes(measured: Measured) -> int:
    """What it reads for each token: counted by its engine, or in its graph."""
    if measured.weight_bytes is not None:
        return measured.weight_bytes
    contestant = measured.contestant
    return weight_bytes(contestant.graph or graph_of(contestant.model))
