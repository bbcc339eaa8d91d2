"""The artifact directory: manifest.json, and opening it with every file's hash checked."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError
from runtimes.files import is_file, leads_out, read_json, read_text
from runtimes.hashing import CHUNK_BYTES, sha256_of, sha256_of_chunks, sha256_of_each
from runtimes.signature import SLOT_DIMS, CacheSpec, GraphSignature, VisionPart, VisionSpec

MANIFEST = "manifest.json"
GRAPH_FILES = {"decoder": "decoder.onnx", "vision_encoder": "vision_encoder.onnx"}
CLIENT_GRAPH_FILE = "model.onnx"  # the decoder's, in layouts for clients that look for that name
PARITY_FILE = "parity.json"
GOLDEN_FILE = "parity.golden"  # a safetensors file; those so called are taken for weights by whoever finds them
DIGEST_KEY = "sha256"  # in the manifest: of everything else in it
GENAI_CONFIG = "genai_config.json"  # for onnxruntime-genai, in layouts that it takes
SCHEMA_VERSION = 5


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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EngineEntry":
        """The inverse of dataclasses.asdict, as JSON gives it back."""
        return cls(**{**data, "gpu_archs": tuple(data["gpu_archs"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the artifact must be."""

    sha256: str  # of its bytes, or, where `chunk_bytes` says so, of the SHA-256 digests of its chunks
    bytes: int
    chunk_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        data = dataclasses.asdict(self)
        return data if self.chunk_bytes else {key: data[key] for key in ("sha256", "bytes")}


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
    inputs: str  # digest of all that it was made from and by: the same export would make the same artifact
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The text of manifest.json, which ends in its own digest."""
        files = {name: entry.to_json() for name, entry in self.files.items()}
        data = dataclasses.asdict(self) | {"files": files}
        return json.dumps(data | {DIGEST_KEY: _digest(data)}, indent=1, sort_keys=True) + "\n"

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
            del data[DIGEST_KEY]  # it is part of the text that is compared below
            manifest = cls(
                **data
                | {
                    "cache": CacheSpec.from_json(data["cache"]),
                    "vision": None if data["vision"] is None else VisionSpec.from_json(data["vision"]),
                    "graphs": {
                        name: GraphEntry(file=entry["file"], signature=GraphSignature.from_json(entry["signature"]))
                        for name, entry in data["graphs"].items()
                    },
                    "engines": {name: EngineEntry.from_json(entry) for name, entry in data["engines"].items()},
                    "files": {name: FileEntry(**entry) for name, entry in data["files"].items()},
                }
            )
            manifest._check()
            intact = text == manifest.to_json()
        except ArtifactError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{where} is damaged: {type(error).__name__}: {error}") from None
        if not intact:
            raise ArtifactError(f"{where} has changed since the export (its own digest differs): export again")
        return manifest

    def _check(self) -> None:
        """ValueError when the parts contradict each other, or are not of the types that they are declared with."""
        cache = self.cache
        cache.check()
        _require(type(self.max_batch) is int and self.max_batch > 0, "max_batch must be a whole number above 0")
        _require(isinstance(self.config, dict) and isinstance(self.tools, dict), "config and tools must be objects")
        known = {"model_type": str, "hidden_size": int, "num_hidden_layers": int}
        _require(all(type(self.config.get(key)) is kind for key, kind in known.items()), "config describes no decoder")
        quantization = {"quantizer": str, "formats": dict, "bytes_per_weight": float}
        _require(
            self.quantization is None
            or all(type(self.quantization.get(key)) is kind for key, kind in quantization.items()),
            "quantization does not say how weights were rounded",
        )
        _require(isinstance(self.precision, str) and isinstance(self.layout, str), "precision and layout must be text")
        _require(self.parity is None or type(self.parity.get("passed")) is bool, "parity must say whether it passed")
        _require(isinstance(self.inputs, str), "inputs must be a digest")
        for name, entry in self.files.items():
            _require(isinstance(entry.sha256, str) and type(entry.bytes) is int, f"{name} has no digest or size")
            _require(entry.chunk_bytes in (None, CHUNK_BYTES), f"{name} is hashed in chunks of another size")
        _require("decoder" in self.graphs, "it lists no decoder graph")
        _require(("vision_encoder" in self.graphs) == (self.vision is not None), "vision and its encoder go together")
        for engine in self.engines.values():
            words = (engine.file, engine.graph, engine.target, engine.library_version, *engine.gpu_archs)
            _require(all(isinstance(word, str) for word in words), "an engine is not described in text")
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
    if not is_file(path):
        raise ArtifactError(f"{folder} is not an artifact: it holds no {MANIFEST}")
    manifest = Manifest.from_json(read_text(path), str(path))
    problems = []
    for name, entry in manifest.files.items():
        if not _is_inside(name):
            raise ArtifactError(f"{path} lists {name!r}, which is not a plain file name, nor one in a folder below")
        file = folder / name
        if leads_out(file, folder):
            raise ArtifactError(f"{file} is a link that leads out of the artifact: put the file itself there")
        if not is_file(file):
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {entry.bytes}")
    if check_hashes and not problems:
        changed = changed_files(folder, manifest.files)
        problems = [f"{name} has changed since the export (SHA-256 differs)" for name in changed]
    if problems:
        raise ArtifactError(f"{folder} is damaged, export again: " + "; ".join(problems))
    return Artifact(folder=folder, manifest=manifest)


def changed_files(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Which of the folder's files, all of which are there, do not have the digest that is listed."""
    plain = sha256_of_each(folder / name for name, entry in files.items() if entry.chunk_bytes is None)
    return [name for name, entry in files.items() if entry.sha256 != _sha256(folder / name, entry, plain)]


def _sha256(path: Path, entry: FileEntry, plain: Mapping[Path, str]) -> str:
    return plain[path] if entry.chunk_bytes is None else sha256_of_chunks(path)


def _digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, as the manifest has it of the rest of itself."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an artifact, whose files are not looked at; None where there is none, or not a whole one."""
    try:
        return Manifest.from_json(read_text(folder / MANIFEST))
    except ArtifactError:
        return None


def _is_inside(name: str) -> bool:
    """True for a plain file name, or one in one folder, as some clients want files."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part == Path(part).name and part not in ("", "..") and "\0" not in part for part in parts
    )


def is_artifact(folder: Path) -> bool:
    """True when an export made this folder: its manifest.json is one of ours, whole or not otherwise damaged."""
    return _listed_files(folder) is not None


def foreign_files(folder: Path) -> list[str]:
    """What lies in an artifact's folder and is none of its files."""
    known = {MANIFEST, *(_listed_files(folder) or ())}
    folders = {name.partition("/")[0] for name in known if "/" in name}
    found = [path for path in folder.iterdir() if path.name not in folders]
    found += [path for each in folders if (folder / each).is_dir() for path in (folder / each).iterdir()]
    return sorted(name for path in found if (name := str(path.relative_to(folder))) not in known)


def made_by_export(folder: Path) -> list[str]:
    """Files of an artifact that hold no weights and were not copied: graphs, engines, packages, the parity report."""
    files = [name for name in _listed_files(folder) or () if Path(name).name == name]
    made = (".onnx", ".engine", ".pt2")
    return [name for name in files if name.endswith(made) or name in (PARITY_FILE, GOLDEN_FILE, GENAI_CONFIG)]


def _listed_files(folder: Path) -> list[str] | None:
    """The files that the folder's manifest lists; None when no export made that manifest."""
    try:
        data = read_json(folder / MANIFEST)
    except ArtifactError:
        return None
    files = data.get("files")
    if not isinstance(files, dict) or not {"schema_version", "graphs"} <= data.keys():
        return None
    return list(files) if all(map(_is_inside, files)) else None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def file_entry(path: Path) -> FileEntry:
    """What the manifest records of a file."""
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
