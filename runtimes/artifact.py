"""The artifact directory: manifest.json, and opening it with every file's hash checked."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError
from runtimes.signature import SLOT_DIMS, CacheSpec, GraphSignature, VisionPart, VisionSpec

MANIFEST = "manifest.json"
GRAPH_FILES = {"decoder": "decoder.onnx", "vision_encoder": "vision_encoder.onnx"}
CLIENT_GRAPH_FILE = "model.onnx"  # the decoder's, in layouts for clients that look for that name
PARITY_FILE = "parity.json"
GENAI_CONFIG = "genai_config.json"  # for onnxruntime-genai, in layouts that it takes
SCHEMA_VERSION = 4
_CHUNK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphEntry:
    """One ONNX graph of the artifact."""

    file: str
    signature: GraphSignature


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One TensorRT engine, or AOTInductor's packages: of `graph`, made by `target`, for these compute capabilities
    (none: the default ones, or the CPU)."""

    file: str
    graph: str
    target: str
    library_version: str
    gpu_archs: tuple[str, ...]
    decode_file: str | None = None  # for one new token of each row; None: `file` is for that as well

    @property
    def files(self) -> tuple[str, ...]:
        """All of its files."""
        return (self.file,) if self.decode_file is None else (self.file, self.decode_file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the artifact must be."""

    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime needs to know of an artifact, and the parity verdict it was published with."""

    config: Mapping[str, Any]  # the decoder's configuration, as graphs.config.DecoderConfig wrote it
    layout: str
    precision: str
    max_batch: int
    cache: CacheSpec
    vision: VisionSpec | None  # None: a model that reads text only
    graphs: Mapping[str, GraphEntry]  # "decoder", and "vision_encoder" where there is one
    engines: Mapping[str, EngineEntry]  # by engine_key
    files: Mapping[str, FileEntry]
    quantization: Mapping[str, Any] | None  # {"quantizer", "formats", "bytes_per_weight"}; None: no weight is quantized
    parity: Mapping[str, Any] | None  # {"passed", "runtimes", "not_run"}; None: not asked for
    tools: Mapping[str, str]  # versions of what made it
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> "Manifest":
        """Read manifest.json's text; ArtifactError when it is damaged or of another schema version."""
        try:
            data = json.loads(text)
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise ArtifactError(
                    f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}: export again"
                )
            manifest = cls(
                **data
                | {
                    "cache": CacheSpec.from_json(data["cache"]),
                    "vision": None if data["vision"] is None else VisionSpec.from_json(data["vision"]),
                    "graphs": {
                        name: GraphEntry(file=entry["file"], signature=GraphSignature.from_json(entry["signature"]))
                        for name, entry in data["graphs"].items()
                    },
                    "engines": {
                        name: EngineEntry(**entry | {"gpu_archs": tuple(entry["gpu_archs"])})
                        for name, entry in data["engines"].items()
                    },
                    "files": {name: FileEntry(**entry) for name, entry in data["files"].items()},
                }
            )
            manifest._check()
        except ArtifactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{where} is damaged: {type(error).__name__}: {error}") from None
        return manifest

    def _check(self) -> None:
        """ValueError when the parts contradict each other, or are not of the types that they are declared with."""
        cache = self.cache
        cache.check()
        _require(type(self.max_batch) is int and self.max_batch > 0, "max_batch must be a whole number above 0")
        _require(isinstance(self.config, dict) and isinstance(self.tools, dict), "config and tools must be objects")
        _require(self.quantization is None or isinstance(self.quantization, dict), "quantization must be an object")
        _require(self.parity is None or type(self.parity.get("passed")) is bool, "parity must say whether it passed")
        _require("decoder" in self.graphs, "it lists no decoder graph")
        _require(("vision_encoder" in self.graphs) == (self.vision is not None), "vision and its encoder go together")
        files = [graph.file for graph in self.graphs.values()]
        files += [file for engine in self.engines.values() for file in engine.files]
        _require(all(file in self.files for file in files), "a graph or engine is not among the files")
        _require(all(engine.graph in self.graphs for engine in self.engines.values()), "an engine is of no graph")
        keys = {engine_key(engine.target, engine.graph) for engine in self.engines.values()}
        _require(keys == set(self.engines), "an engine is listed under another's name")
        targets = {engine.target for engine in self.engines.values()}
        needed = {engine_key(target, graph) for target in targets for graph in self.graphs}
        _require(needed == keys, "a target has no engine of some graph")
        for graph in self.graphs.values():
            graph.signature.check()
        signature = self.graphs["decoder"].signature
        specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
        _require("input_ids" in signature.limits, "the decoder has no limit for input_ids")
        state = {spec.name for spec in signature.inputs if spec.name.startswith("past_key_values.")}
        _require(state == set(cache.past_names()), "the decoder's inputs are not the cache's tensors")
        _require(self.layout in SLOT_DIMS, f"the layout {self.layout!r} is unknown")
        past_slots, present_slots = SLOT_DIMS[self.layout]
        in_place = {
            new
            for new, tensor in zip(cache.present_names(), cache.tensors, strict=True)
            if tensor.slot_axis is not None and self.layout != "dynamic"
        }
        _require(set(signature.aliases) == in_place, "other tensors than caches share memory")
        for names, slots in ((cache.past_names(), past_slots), (cache.present_names(), present_slots)):
            for name, tensor in zip(names, cache.tensors, strict=True):
                fits = specs[name].shape == tensor.symbolic_shape(slots) and specs[name].dtype == tensor.dtype
                _require(fits, f"{name} is not what the cache says")
        if self.vision is not None:
            self._check_vision(self.vision)

    def _check_vision(self, vision: VisionSpec) -> None:
        vision.check()
        decoder, encoder = self.graphs["decoder"].signature, self.graphs["vision_encoder"].signature
        made = [spec.name for spec in encoder.outputs]
        _require(made == vision.names(), "the vision encoder's outputs are not the keys and values of images")
        read = [spec for spec in decoder.inputs if spec.name in made]
        for spec in (*encoder.outputs, *read):
            fits = spec.shape == vision.symbolic_shape() and spec.dtype == vision.dtype
            _require(fits, f"{spec.name} is not what vision says")
        _require(len(read) == len(made), "the decoder does not take every key and value of images")
        needed = {"num_images", "num_tiles"}
        _require(all(needed <= graph.dims.keys() for graph in (decoder, encoder)), "images or tiles have no range")


def engine_key(target: str, graph: str) -> str:
    """Under which name the manifest lists an engine: the decoder's is called by its target alone."""
    return target if graph == "decoder" else f"{target}/{graph}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """An opened artifact directory."""

    folder: Path
    manifest: Manifest

    def path(self, file: str) -> Path:
        """Where a file of the artifact lies."""
        return self.folder / file

    def engine(self, target: str, what: str) -> EngineEntry:
        """What that target made of the decoder; ArtifactError says how to get one."""
        entry = self.manifest.engines.get(target)
        if entry is None:
            held, layout = ", ".join(self.manifest.engines) or "none", self.manifest.layout
            needed = "" if layout == "portable" else f" --layout portable, for its layout is {layout}"
            raise ArtifactError(
                f"{self.folder} holds no {what} (engines: {held}): export with --target {target}{needed}"
            )
        return entry

    def vision_part(self, engine: EngineEntry | None = None) -> VisionPart | None:
        """The vision encoder, as a graph or as that engine; None where there is none."""
        if self.manifest.vision is None:
            return None
        graph = self.manifest.graphs["vision_encoder"]
        path = self.path(graph.file if engine is None else engine.file)
        return VisionPart(path=path, signature=graph.signature, spec=self.manifest.vision)


def open_artifact(folder: str | Path, *, check_hashes: bool = True) -> Artifact:
    """Read the manifest and check every file it lists, by size and by SHA-256 (`check_hashes=False`: by size only).

    Raises:
        ArtifactError: no artifact there, or a file is missing or not what the manifest says.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist: pass the folder that `export-llm export` wrote")
    if not path.is_file():
        raise ArtifactError(f"{folder} is not an artifact: it holds no {MANIFEST}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    manifest = Manifest.from_json(text, str(path))
    problems = []
    for name, entry in manifest.files.items():
        if not _is_inside(name):
            raise ArtifactError(f"{path} lists {name!r}, which is not a plain file name, nor one in a folder below")
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {entry.bytes}")
        elif check_hashes and sha256_of(file) != entry.sha256:
            problems.append(f"{name} has changed since the export (SHA-256 differs)")
    if problems:
        raise ArtifactError(f"{folder} is damaged, export again: " + "; ".join(problems))
    return Artifact(folder=folder, manifest=manifest)


def _is_inside(name: str) -> bool:
    """True for a plain file name, or one in one folder, as some clients want files."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part == Path(part).name and part not in ("", "..") for part in parts)


def is_artifact(folder: Path) -> bool:
    """True when an export made this folder: its manifest.json is one of ours, whole or not otherwise damaged."""
    return _listed_files(folder) is not None


def foreign_files(folder: Path) -> list[str]:
    """What lies in an artifact's folder and is none of its files."""
    known = {MANIFEST, *(_listed_files(folder) or ())}
    folders = {name.partition("/")[0] for name in known if "/" in name}
    found = [path for path in folder.iterdir() if path.name not in folders]
    found += [path for each in folders for path in (folder / each).iterdir()]
    return sorted(name for path in found if (name := str(path.relative_to(folder))) not in known)


def made_by_export(folder: Path) -> list[str]:
    """Files of an artifact that hold no weights and were not copied: graphs, engines, packages, the parity report."""
    files = [name for name in _listed_files(folder) or () if Path(name).name == name]
    made = (".onnx", ".engine", ".pt2")
    return [name for name in files if name.endswith(made) or name in (PARITY_FILE, GENAI_CONFIG)]


def _listed_files(folder: Path) -> list[str] | None:
    """The files that the folder's manifest lists; None when no export made that manifest."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(data, dict) and {"schema_version", "graphs", "files"} <= data.keys()
    return list(data["files"]) if ours else None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """What the manifest records of a file."""
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
