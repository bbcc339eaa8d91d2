"""Who takes part: the artifact under each runtime that was asked for, other artifacts, and peers."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.bench.engines.onnxruntime_genai import CONFIG as GENAI_CONFIG
from exporter.bench.engines.onnxruntime_genai import graph_of
from exporter.bench.peers import PEERS, Peer
from exporter.bench.plan import Plan
from exporter.config_json import config_as_json, differing_keys
from exporter.errors import ExportError
from runtimes.artifact import Artifact, open_artifact
from runtimes.errors import RuntimeMissingError
from runtimes.runner import RUNNERS
from runtimes.tensorrt_api import FLAVORS

EVERY_PEER = "all"
CLIENTS = ("onnxruntime-genai",)  # peers that run artifacts of ours as well: --runtime takes their names


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row of the result: an engine, and the model it loads."""

    name: str
    precision: str
    engine: tuple[str, str]  # module of exporter.bench.engines, class
    model: Path  # of a peer that makes its own: the checkpoint, until that is made
    options: Mapping[str, Any]
    cache_bytes_per_token: int
    graph: Path | None = None  # whose weights are read for each token; None: the engine says how many bytes
    on_gpu: bool = False
    library: str | None = None  # the entry of PEERS whose library runs it; None: a runner of ours
    python: str | None = None  # None: this interpreter
    peer: Peer | None = None  # which makes its own model; None: an artifact of ours


def artifact_contestant(artifact: Artifact, runtime: str, plan: Plan, pythons: Mapping[str, str]) -> Contestant:
    """The artifact run by one of our runners, or by a client that loads it as it is.

    Raises:
        RuntimeMissingError: an unknown runtime.
        ExportError: that client cannot load this layout, or the artifact takes fewer tokens or rows than planned.
    """
    manifest = artifact.manifest
    _check_room(artifact, plan)
    engine, graph = ("artifact", "ArtifactEngine"), artifact.path(manifest.graphs["decoder"].file)
    options: dict[str, Any] = {"threads": plan.threads, "runtime": runtime}
    if runtime in CLIENTS:
        if not (artifact.folder / GENAI_CONFIG).is_file():
            raise ExportError(
                f"{artifact.folder} has the layout {manifest.layout!r} and no {GENAI_CONFIG}, so {runtime} cannot load"
                " it: export it with --layout genai"
            )
        engine, graph, options = PEERS[runtime].engine, graph_of(artifact.folder), {"threads": plan.threads}
    elif runtime not in RUNNERS:
        _check_module_runner(runtime)
    return Contestant(
        name=f"{artifact.folder.resolve().name}@{runtime}",
        precision=manifest.precision,
        engine=engine,
        model=artifact.folder.resolve(),
        options=options,
        cache_bytes_per_token=manifest.cache.bytes_per_token,
        graph=graph,
        on_gpu=runtime in FLAVORS,
        library=runtime if runtime in CLIENTS else None,
        python=pythons.get(runtime),
    )


def peer_contestant(
    name: str, artifact: Artifact, checkpoint: Path | None, plan: Plan, pythons: Mapping[str, str]
) -> Contestant:
    """A peer on the artifact's checkpoint, in the artifact's precision.

    Raises:
        ExportError: the peer has no such precision or batch, or there is no checkpoint for it.
    """
    peer, manifest = PEERS[name], artifact.manifest
    precision = manifest.precision.partition(":")[0]
    if precision not in peer.precisions:
        raise ExportError(f"{name} is compared at {', '.join(peer.precisions)}, and this artifact is {precision}")
    if peer.max_batch is not None and plan.batch_size > peer.max_batch:
        raise ExportError(f"{name} takes {peer.max_batch} row at most, and --batch-size is {plan.batch_size}")
    options: dict[str, Any] = {"threads": plan.threads, **peer.options}
    if peer.option is not None:
        options[peer.option] = peer.precisions[precision]
    if peer.takes_context:
        options["context_tokens"] = plan.prompt_tokens[-1] + plan.new_tokens
    return Contestant(
        name=name,
        precision=precision,
        engine=peer.engine,
        model=_checkpoint_of(artifact, checkpoint, name),
        options=options,
        cache_bytes_per_token=manifest.cache.bytes_per_token,
        library=name,
        python=pythons.get(name),
        peer=peer,
    )


def other_artifact(text: str, first: Artifact, runtime: str, plan: Plan, pythons: Mapping[str, str]) -> Contestant:
    """`FOLDER`, run by `runtime`, or `FOLDER@RUNTIME`."""
    folder, _, other_runtime = text.rpartition("@") if "@" in text and not Path(text).exists() else (text, "", runtime)
    if not Path(folder).is_dir():
        raise ExportError(
            f"--against {text}: {folder} is neither a peer ({', '.join(PEERS)}, or {EVERY_PEER}) nor the folder of an"
            " artifact"
        )
    artifact = open_artifact(folder)
    if differing := _differences(artifact.manifest.config, first.manifest.config):
        raise ExportError(f"{folder} is another model than {first.folder}: they differ in {', '.join(differing)}")
    return artifact_contestant(artifact, other_runtime, plan, pythons)


def with_unique_names(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Contestants whose names are the same get their folder's whole path.

    Raises:
        ExportError: one takes part twice.
    """
    names = [each.name for each in contestants]
    unique = [
        each if names.count(each.name) == 1 else dataclasses.replace(each, name=f"{each.model.parent}/{each.name}")
        for each in contestants
    ]
    for index, each in enumerate(unique):
        if each.name in [other.name for other in unique[:index]]:
            raise ExportError(f"{each.name} takes part twice: name it once")
    return unique


def _check_module_runner(runtime: str) -> None:
    from exporter.torch_runners import MODULE_RUNNERS

    if runtime not in MODULE_RUNNERS:
        known = (*RUNNERS, *MODULE_RUNNERS, *CLIENTS)
        raise RuntimeMissingError(f"unknown runtime {runtime!r}; known: {', '.join(known)}")


def _check_room(artifact: Artifact, plan: Plan) -> None:
    manifest, most = artifact.manifest, plan.prompt_tokens[-1] + plan.new_tokens
    if manifest.cache.max_len < most or manifest.max_batch < plan.batch_size:
        raise ExportError(
            f"{artifact.folder} holds {manifest.cache.max_len} tokens of {manifest.max_batch} rows, but {most} tokens"
            f" of {plan.batch_size} rows are planned: export it again with a larger --max-len or --max-batch"
        )


def _checkpoint_of(artifact: Artifact, checkpoint: Path | None, peer: str) -> Path:
    """Which checkpoint a peer makes its model of; ExportError where there is none, or it is of another model."""
    from graphs.checkpoint import open_checkpoint
    from graphs.families import find_family

    if checkpoint is None and artifact.manifest.quantization is not None:
        raise ExportError(
            f"{peer} makes its own model of the checkpoint, and this artifact's weights are rounded: give --checkpoint"
        )
    folder = artifact.folder if checkpoint is None else checkpoint
    if not folder.is_dir():
        raise ExportError(f"--checkpoint {folder}: {peer} needs a folder with config.json and safetensors files")
    opened = open_checkpoint(folder)
    config = config_as_json(find_family(opened.config, opened.shapes).parse_config(opened.config))
    if differing := _differences(config, artifact.manifest.config):
        raise ExportError(
            f"{folder} is another model than {artifact.folder}: they differ in {', '.join(differing)}; give the"
            " --checkpoint that it was exported from"
        )
    return folder.resolve()


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Keys of two configurations; quantizing may have given the output projection weights of its own."""
    return [key for key in differing_keys(dict(first), dict(second)) if key != "tie_word_embeddings"]
