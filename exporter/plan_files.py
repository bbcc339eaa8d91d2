"""Which files an export writes, and how large they are, before any is written."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from exporter.clients import CLIENTS
from exporter.estimates import engine_bytes, golden_bytes, graph_bytes, manifest_bytes, parity_bytes
from exporter.genai_config import genai_config
from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest
from exporter.source import COPIED_FILES, Source, small_files
from exporter.targets import TARGETS
from exporter.weights import WeightPlan
from graphs.checkpoint import INDEX_FILE
from graphs.keys import read_json
from runtimes.artifact import GENAI_CONFIG, GOLDEN_FILE, GRAPH_FILES, MANIFEST, PARITY_FILE
from runtimes.signature import CacheSpec, GraphSignature


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of the artifact."""

    name: str
    bytes: int
    about: bool = False  # `bytes` is an estimate
    written: bool = True  # False: it is the checkpoint's own, and stays as it is


def plan_files(
    request: ExportRequest,
    source: Source,
    plan: WeightPlan,
    signatures: Mapping[str, GraphSignature],
    cache: CacheSpec,
    buffer_bytes: Mapping[str, int],
) -> tuple[PlannedFile, ...]:
    """Every file of the artifact, by name.

    Args:
        buffer_bytes: of the tables that each graph holds itself.
    """
    layout = LAYOUTS[request.layout]
    files = [PlannedFile(name=name, bytes=size) for name, size in plan.files.items()]
    for graph in signatures:
        size = graph_bytes(request.layout, source, plan, graph, buffer_bytes[graph])
        name = layout.graph_file if graph == "decoder" else GRAPH_FILES[graph]
        files.append(PlannedFile(name=name, bytes=size, about=True))
    if request.weights == "copy":
        files += _small_files(source)
    if layout.shared_cache is not None and request.client is None:
        text = genai_config(source, signatures["decoder"], cache, shared_cache=layout.shared_cache)
        files.append(PlannedFile(name=GENAI_CONFIG, bytes=len(text.encode())))
    for target in dict.fromkeys(request.targets):
        for graph in signatures:
            for name in TARGETS[target].files(graph):
                files.append(PlannedFile(name=name, bytes=engine_bytes(target, source, plan, graph), about=True))
    if request.verify:
        files.append(PlannedFile(name=PARITY_FILE, bytes=parity_bytes(source, request.targets), about=True))
        size = golden_bytes(source.config, cache, signatures.get("vision_encoder"))
        files.append(PlannedFile(name=GOLDEN_FILE, bytes=size, about=True))
    if request.client is not None:
        files = _renamed(request.client, source, files)
    if request.weights == "reference":
        files += _referenced(request, plan)
    size = manifest_bytes(signatures, cache, len(files))
    return tuple(sorted([*files, PlannedFile(name=MANIFEST, bytes=size, about=True)], key=lambda file: file.name))


def _small_files(source: Source) -> list[PlannedFile]:
    return [
        PlannedFile(name=name, bytes=len(content.encode()) if isinstance(content, str) else content.stat().st_size)
        for name, content in small_files(source).items()
    ]


def _referenced(request: ExportRequest, plan: WeightPlan) -> list[PlannedFile]:
    """The checkpoint's own files that belong to the artifact."""
    names = {str(tensor.path) for tensor in plan.stored} | {INDEX_FILE, *COPIED_FILES}
    paths = [request.checkpoint / name for name in sorted(names)]
    return [PlannedFile(name=path.name, bytes=path.stat().st_size, written=False) for path in paths if path.is_file()]


def _renamed(client: str, source: Source, files: Iterable[PlannedFile]) -> list[PlannedFile]:
    """The files under the client's names, with what it wants to read in them."""
    files = [file for file in files if file.name != INDEX_FILE]
    renaming = CLIENTS[client].rename(source.precision, [file.name for file in files])
    sizes = {}
    for name, more in renaming.json_files(source.files).items():
        own = small_files(source).get(name)
        content = json.loads(own) if isinstance(own, str) else read_json(source.files / name)
        sizes[name] = len((json.dumps(content | more, indent=2, ensure_ascii=False) + "\n").encode())
    return [
        dataclasses.replace(file, name=renaming.files.get(file.name, file.name), bytes=sizes.get(file.name, file.bytes))
        for file in files
    ]
