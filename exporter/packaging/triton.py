"""A model repository for Triton Inference Server: NAME/config.pbtxt and NAME/1/model.onnx (or model.plan).

The decoder's cache becomes Triton's implicit state: it stays in the server, and a client sends tokens only. Of a model
that sees, the vision encoder is a second model, NAME_vision_encoder, which the client calls once for its pictures.
"""

import dataclasses
import re
from contextlib import ExitStack
from pathlib import Path

from exporter.errors import ExportError
from exporter.packaging.pbtxt import to_text
from exporter.packaging.request import Package, PackagedModel, PackageRequest
from exporter.packaging.triton_config import BACKENDS, Backend, Serving, decoder_config, stateless_config
from exporter.progress import Progress
from exporter.staging import hold_destination, stage
from exporter.weights import copy_file
from runtimes.artifact import Artifact, EngineEntry, Manifest, engine_key, open_artifact
from runtimes.errors import ArtifactError
from runtimes.generation import read_stop_ids
from runtimes.signature import GraphSignature, TensorSpec
from runtimes.widen import external_file, load_onnx

CONFIG, VERSION = "config.pbtxt", "1"
ENCODER_SUFFIX = "_vision_encoder"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RTX = "tensorrt-rtx"
PROFILES = {"decoder": 2, "vision_encoder": 1}  # of engines, as exporter/targets/tensorrt.py builds them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to be written."""

    name: str
    config: str  # the text of config.pbtxt
    states: int
    files: dict[str, Path]  # {name in the version's folder: what to copy}


def package(request: PackageRequest, progress: Progress) -> Package:
    """Write the artifact's models into the repository `request.out`; each appears whole or not at all.

    Raises:
        ExportError: an option that Triton cannot honour, or a model of that name is there already.
        ArtifactError: the artifact is damaged, or lacks the engine that was asked for.
    """
    backend = _check_options(request)
    progress.start("check hashes")
    artifact = open_artifact(request.artifact)
    name = request.name or artifact.folder.resolve().name
    if not MODEL_NAME.fullmatch(name):
        raise ExportError(
            f"{name!r} cannot be a Triton model's name: choose one of letters, digits, '.', '_' and '-' with --name"
        )
    models = [_decoder(artifact, name, backend, request)]
    if artifact.manifest.vision is not None:
        models.append(_vision_encoder(artifact, name + ENCODER_SUFFIX, backend, request))
    for model in models:
        _check_destination(request, model.name)
    progress.start("copy", sum(source.stat().st_size for model in models for source in model.files.values()))
    with ExitStack() as stack:
        packaged = [_write(model, request.out, stack, progress) for model in models]
    return Package(models=tuple(packaged), warnings=tuple(_warnings(artifact.manifest, backend)))


def _check_options(request: PackageRequest) -> Backend:
    """The backend that was asked for; ExportError for options that do not go with it."""
    if request.runtime == RTX:
        raise ExportError(
            "Triton's tensorrt backend loads engines of TensorRT, not of TensorRT-RTX: export with --target tensorrt"
            " for --runtime tensorrt, or package the ONNX graph with --runtime onnxruntime"
        )
    if request.runtime not in BACKENDS:
        raise ExportError(f"unknown --runtime {request.runtime!r}; Triton runs {', '.join(BACKENDS)}")
    backend = BACKENDS[request.runtime]
    if request.device not in backend.kinds:
        known = " or ".join(device for device in backend.kinds if device)
        raise ExportError(f"--device must be {known} for --runtime {backend.name}, got {request.device!r}")
    if request.threads is not None and backend.name != "onnxruntime":
        raise ExportError(f"--threads {request.threads} is for --runtime onnxruntime; {backend.name} runs on the GPU")
    for option, value in (("--threads", request.threads), ("--max-sequences", request.max_sequences)):
        if value is not None and value < 1:
            raise ExportError(f"{option} must be at least 1, got {value}")
    if not request.idle_timeout_s > 0:
        raise ExportError(f"--idle-timeout must be above 0 seconds, got {request.idle_timeout_s}")
    return backend


def _decoder(artifact: Artifact, name: str, backend: Backend, request: PackageRequest) -> Model:
    manifest = artifact.manifest
    cache, vision = manifest.cache, manifest.vision
    signature = _signature(artifact, "decoder", backend)
    (vocab_size,) = (spec.shape[-1] for spec in signature.outputs if spec.name == "logits")
    parameters: dict[str, object] = {
        "layout": manifest.layout,
        "precision": manifest.precision,
        "max_len": cache.max_len,
        "vocab_size": vocab_size,
        "stop_ids": ",".join(map(str, read_stop_ids(artifact.folder))),
        "cache_bytes_per_sequence": cache.nbytes(1),
    }
    if vision is not None:
        parameters |= {"vision_encoder": name + ENCODER_SUFFIX, "bytes_per_image": vision.bytes_per_image}
    config = decoder_config(
        name,
        signature,
        cache,
        _serving(manifest, backend, request, "decoder"),
        max_sequences=request.max_sequences or manifest.max_batch,
        idle_timeout_s=request.idle_timeout_s,
        parameters=parameters,
    )
    states = len(cache.tensors)
    return Model(name=name, config=to_text(config), states=states, files=_files(artifact, "decoder", backend))


def _vision_encoder(artifact: Artifact, name: str, backend: Backend, request: PackageRequest) -> Model:
    graph = "vision_encoder"
    serving = _serving(artifact.manifest, backend, request, graph)
    config = stateless_config(name, _signature(artifact, graph, backend), serving)
    return Model(name=name, config=to_text(config), states=0, files=_files(artifact, graph, backend))


def _serving(manifest: Manifest, backend: Backend, request: PackageRequest, graph: str) -> Serving:
    """ExportError when the graph has tensors that the backend does not pass on."""
    signature = manifest.graphs[graph].signature
    if refused := {spec.dtype for spec in (*signature.inputs, *signature.outputs)} - backend.dtypes:
        raise ExportError(
            f"Triton's {backend.name} backend passes no {' or '.join(sorted(refused))} tensors on, and this artifact's"
            f" {graph} has some ({manifest.precision}): export with --precision fp16 or fp32"
        )
    return Serving(
        backend=backend,
        device=request.device,
        max_batch=manifest.max_batch,
        threads=request.threads,
        profiles=PROFILES[graph] if backend.name == "tensorrt" else 1,
        use_tf32=backend.name != "onnxruntime" or manifest.cache.dtype != "float32",
    )


def _signature(artifact: Artifact, graph: str, backend: Backend) -> GraphSignature:
    """As the file has it, which the backend compares with: no inputs that have a default, constant sizes as numbers."""
    entry = artifact.manifest.graphs[graph]
    if backend.name == "tensorrt":
        return entry.signature
    stored = load_onnx(artifact.path(entry.file)).graph
    defaults = {tensor.name for tensor in stored.initializer}
    sizes = {
        each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in (*stored.input, *stored.output)
    }

    def as_stored(spec: TensorSpec) -> TensorSpec:
        dims = zip(sizes[spec.name], spec.shape, strict=True)
        return dataclasses.replace(spec, shape=tuple(size or dim for size, dim in dims))

    return dataclasses.replace(
        entry.signature,
        inputs=tuple(as_stored(spec) for spec in entry.signature.inputs if spec.name not in defaults),
        outputs=tuple(as_stored(spec) for spec in entry.signature.outputs),
    )


def _files(artifact: Artifact, graph: str, backend: Backend) -> dict[str, Path]:
    """What the version's folder holds: an engine, or a graph and the weights that it points into."""
    if backend.name == "tensorrt":
        return {backend.model_file: artifact.path(_engine(artifact, graph).file)}
    path = artifact.path(artifact.manifest.graphs[graph].file)
    return {backend.model_file: path} | {file.name: file for file in _external_files(path)}


def _engine(artifact: Artifact, graph: str) -> EngineEntry:
    key = engine_key("tensorrt", graph)
    if key not in artifact.manifest.engines:
        held = ", ".join(artifact.manifest.engines) or "none"
        raise ArtifactError(
            f"{artifact.folder} holds no engine for --runtime tensorrt (engines: {held}): export it with --target"
            " tensorrt, or package the ONNX graph with --runtime onnxruntime"
        )
    return artifact.manifest.engines[key]


def _external_files(graph: Path) -> list[Path]:
    """The files beside a graph that hold its weights; ArtifactError where it names others."""
    tensors = [tensor for tensor in load_onnx(graph).graph.initializer if tensor.external_data]
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [external_file(graph, name) for name in sorted(names)]


def _check_destination(request: PackageRequest, name: str) -> None:
    """Refuse to replace what no packaging made, or anything without --force."""
    folder = request.out / name
    if request.out.exists() and not request.out.is_dir():
        raise ExportError(f"{request.out} is no folder: -o names the model repository, a folder of models")
    if request.out.resolve().is_relative_to(request.artifact.resolve()):
        raise ExportError(f"the repository {request.out} lies in the artifact itself: choose another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ExportError(f"{folder} exists and is no folder: choose another --name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, VERSION))
    if foreign or not (folder / CONFIG).is_file():
        found = ", ".join(foreign[:8]) or f"no {CONFIG}"
        raise ExportError(
            f"{folder} is left alone, because no packaging made it (it holds {found}): use another --name"
        )
    if not request.force:
        raise ExportError(f"{folder} exists: pass --force to replace that model, or --name for another one")


def _write(model: Model, repository: Path, stack: ExitStack, progress: Progress) -> PackagedModel:
    """Write into a folder that appears under its name when the stack unwinds."""
    stack.enter_context(hold_destination(repository / model.name, in_place=False))
    staging = stack.enter_context(stage(repository / model.name, in_place=False))
    # First of all: Triton refuses a folder whose name is not its model's, so a server that looks now loads nothing.
    staging.path(CONFIG).write_text(model.config, encoding="utf-8")
    staging.path(VERSION).mkdir()
    for name, source in model.files.items():
        copy_file(source, staging.path(VERSION) / name, progress.advance)
    files = {CONFIG: len(model.config.encode())}
    files |= {f"{VERSION}/{name}": source.stat().st_size for name, source in model.files.items()}
    return PackagedModel(name=model.name, folder=repository / model.name, files=files, states=model.states)


def _warnings(manifest: Manifest, backend: Backend) -> list[str]:
    warnings = []
    if manifest.parity is not None and not manifest.parity["passed"]:
        warnings.append("this artifact failed parity: its numbers are not those of the checkpoint")
    if backend.name == "tensorrt" and manifest.graphs["decoder"].signature.aliases:
        warnings.append(
            "the decoder's engine updates its cache in place, so TensorRT wants past and present at one address, but"
            " Triton's tensorrt backend gives every tensor memory of its own: unless yours binds them together,"
            " requests will fail; --runtime onnxruntime has no such condition"
        )
    return warnings
