"""The first divergence of an artifact, start to end."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.clients import artifact_checkpoint
from exporter.config_json import config_as_json, differing_keys
from exporter.diff.against import Eager, Side, compare_graphs
from exporter.diff.calls import make_texts
from exporter.diff.compare import DECODER, Found, compare_texts
from exporter.diff.eager import ModuleCheck
from exporter.diff.exposed import NodeFailedError
from exporter.diff.lanes import Lane
from exporter.diff.program import Program, trace_programs
from exporter.diff.report import Comparison, DiffReport
from exporter.diff.rows import failed_row, module_rows, operator_rows, weight_row, whole_row
from exporter.diff.targets import Open, ways_to_run
from exporter.diff.weights import Weights
from exporter.progress import Progress, Quiet
from exporter.reference import reference_device
from exporter.source import Source, read_source
from exporter.weight_check import compare_weight
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family, find_family
from runtimes.artifact import Artifact, is_artifact, open_artifact
from runtimes.errors import ArtifactError
from runtimes.tolerances import WEIGHT_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that an artifact should be, with its weights."""

    family: Family
    config: DecoderConfig
    checkpoint: Checkpoint
    source: Source | None = None  # the checkpoint as an export reads it, where it is not the artifact's own weights
    name: str

    def lanes(self, dtype: str, target_dtype: str, *, int8_activations: bool) -> tuple[Lane, Lane]:
        """The truth, a step more precise than the target, and eager PyTorch as precise as that."""
        make = functools.partial(Weights, self.checkpoint, reference_device(), getattr(torch, dtype))
        exact = torch.float64 if target_dtype == "float32" else torch.float32
        return (
            Lane(weights=make(), dtype=exact),
            Lane(
                weights=make(
                    int8_activations=int8_activations, choices=None if self.source is None else self.source.choices
                ),
                dtype=None if target_dtype == dtype else getattr(torch, target_dtype),
            ),
        )


def diff_artifact(
    artifact: Artifact,
    against: Path | None = None,
    *,
    runtime: str = "onnxruntime",
    device: str | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare what every operator of the artifact's graphs makes with what it should.

    Args:
        against: a checkpoint whose weights are the right ones, or an artifact whose graph is; by default the artifact's
            own weights, which tells faults of the graph and of the runtime, but not of the weights.
        runtime: what runs the graph, one of exporter.diff.targets.WAYS.
        device: of ONNX Runtime.

    Raises:
        ArtifactError: `against` is another model, or the runtime does not run this layout.
        CheckpointError: it cannot be read.
        ExportError: the artifact's precision cannot be had from it, or TensorRT refuses the graph.
        RuntimeMissingError: the runtime is not there, or shows no values.
    """
    progress = progress or Quiet()
    ways = ways_to_run(artifact, runtime, device)
    other = open_artifact(against) if against is not None and is_artifact(against) else None
    model = _read_model(artifact, None if other is not None else against)
    programs = trace_programs(artifact, model.family, model.config, progress)
    comparisons: list[Comparison] = []
    if model.source is not None and model.source.choices:
        comparisons += _compare_weights(artifact, model.source)
    if other is not None:
        comparisons.append(_compare_artifacts(artifact, other, model, programs, ways, progress))
    else:
        for index, (name, way) in enumerate(ways.items()):
            progress.start(f"compare on {name}")
            comparisons += _compare(artifact, model, programs, way, check_program=index == 0)
    return DiffReport(artifact=str(artifact.folder), comparisons=tuple(comparisons))


def _read_model(artifact: Artifact, against: Path | None) -> Model:
    """The artifact's own weights, or a checkpoint's of the same model."""
    if against is None:
        own = artifact_checkpoint(artifact)
        family = find_family(own.config, own.shapes)
        config = family.parse_config(own.config)
        name = "the artifact's own weights"
        return Model(family=family, config=config, checkpoint=own, name=name)
    source = read_source(against, artifact.manifest.precision, requantize=True)
    _require_same(artifact, config_as_json(source.config), against)
    return Model(
        family=source.family,
        config=source.config,
        checkpoint=source.checkpoint,
        source=source,
        name=f"the weights of {against}",
    )


def _require_same(artifact: Artifact, config: Mapping[str, Any], against: Path) -> None:
    untied = {"tie_word_embeddings": False}  # rounding may have untied a copy of the same numbers
    if differing := differing_keys({**artifact.manifest.config, **untied}, {**config, **untied}):
        raise ArtifactError(
            f"{against} is another model than {artifact.folder}: they differ in {', '.join(differing)}; pass the"
            " checkpoint that the artifact was exported from, or another artifact of it"
        )


def _compare(
    artifact: Artifact, model: Model, programs: list[Program], way: Open, *, check_program: bool
) -> list[Comparison]:
    """The program against eager PyTorch, if that was not looked at yet; then the target against the program."""
    manifest, device = artifact.manifest, reference_device()
    targets = {program.name: way(program.name, program.values) for program in programs}
    decoder = targets[DECODER]
    dtype, computes_in = manifest.cache.dtype, decoder.computes_in
    lanes = model.lanes(dtype, computes_in, int8_activations=decoder.rounds_activations)
    texts = make_texts(manifest, model.config)
    check = ModuleCheck(programs[-1])
    exact = str(lanes[0].dtype).removeprefix("torch.")
    reference = f"eager PyTorch {exact} on {device}, {model.name}"
    made = functools.partial(Comparison, runtime=decoder.description, reference=reference, computes_in=computes_in)
    try:
        found = compare_texts(
            programs,
            targets,
            lanes,
            texts,
            manifest.cache,
            device,
            whole=way(DECODER, ()),
            watch=check.watch if check_program else lambda *_: None,
        )
    except NodeFailedError as error:
        return [made(rows=(failed_row(error),))]
    comparisons = []
    if check_program:
        modules = check.compare(model.family, model.config, model.checkpoint, lanes[0], getattr(torch, dtype))
        comparisons.append(
            Comparison(
                runtime="the traced program",
                reference=f"eager PyTorch {exact} on {device}, module by module, each row alone, without a cache",
                computes_in=computes_in,
                rows=tuple(module_rows(modules, check.ends, computes_in)),
            )
        )
    rows = [row for each in programs for row in operator_rows(artifact, each, found[each.name], computes_in)]
    last = whole_row(found[""]["logits"], computes_in)
    comparisons.append(made(rows=(*rows, last)))
    return comparisons


def _compare_weights(artifact: Artifact, source: Source) -> list[Comparison]:
    """Stored weights one by one: of one wrong block among many, the result of a product says little.

    Where the quantizer moves factors from weight to weight, only those that were taken over are compared.
    """
    multiple = WEIGHT_MULTIPLE.get((artifact.manifest.quantization or {}).get("quantizer", ""))
    stored = artifact_checkpoint(artifact)
    rows = [
        weight_row(choice, ref, compare_weight(source, stored, ref, choice, multiple or 0.0))
        for ref, choice in source.choices.items()
        if choice.kept or multiple is not None
    ]
    reference = f"the weights of {source.checkpoint.folder}, rounded to nearest"
    made = Comparison(runtime="the stored weights", reference=reference, computes_in="float32", rows=tuple(rows))
    return [made] if rows else []


def _compare_artifacts(
    artifact: Artifact,
    other: Artifact,
    model: Model,
    programs: list[Program],
    ways: Mapping[str, Open],
    progress: Progress,
) -> Comparison:
    """Two graphs, both computed as exactly as they can be; eager PyTorch in the artifact's precision is the yardstick.

    Of the same precision they should have the same weights, so eager takes the other's; else rounding them is no fault.
    """
    _require_same(artifact, other.manifest.config, other.folder)
    manifest, device = artifact.manifest, reference_device()
    mine_way, other_way = next(iter(ways.values())), next(iter(ways_to_run(other, "onnxruntime", "cpu").values()))
    other_model = _read_model(other, None)
    other_programs = trace_programs(other, other_model.family, other_model.config, progress)
    progress.start("compare both artifacts")
    mine = Side(programs, {each.name: mine_way(each.name, each.values) for each in programs}, manifest)
    theirs = {each.name: other_way(each.name, each.values) for each in other_programs}
    target = mine.targets[DECODER]
    same = manifest.precision == other.manifest.precision
    lanes = (other_model if same else model).lanes(
        manifest.cache.dtype, target.computes_in, int8_activations=target.rounds_activations
    )
    found: dict[str, dict[str, Found]] = compare_graphs(
        mine,
        Side(other_programs, theirs, other.manifest),
        Eager(programs, lanes[1], manifest, device),
        (make_texts(manifest, model.config), make_texts(other.manifest, model.config)),
        device,
    )
    rows = [row for each in programs for row in operator_rows(artifact, each, found[each.name], target.computes_in)]
    return Comparison(
        runtime=target.description,
        reference=f"{other.folder}, {other.manifest.precision}, {other.manifest.layout}, {theirs[DECODER].description}",
        computes_in=target.computes_in,
        rows=tuple(rows),
    )
