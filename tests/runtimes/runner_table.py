"""Every runner there is, and how it is opened: what the conformance suite runs over."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from simulation import export_for_this_gpu, simulated

from exporter.torch_runners import MODULE_RUNNERS
from runtimes.artifact import Artifact
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.runner import Runner, open_runner

Get = Callable[[str], Any]  # a session's fixture of that name


def tiny(get: Get) -> Artifact:
    """tiny_llama in the portable layout."""
    artifact: Artifact = get("tiny_artifact")
    return artifact


def in_layout(layout: str) -> Callable[[Get], Artifact]:
    """tiny_llama in a layout."""
    return lambda get: get("tiny_in_layout")(layout)


def seeing(get: Get) -> Artifact:
    """tiny_vision in the portable layout."""
    artifact: Artifact = get("tiny_vision_artifact")
    return artifact


def compiled(get: Get) -> Artifact:
    """One layer of tiny_llama, with AOTInductor's packages."""
    artifact: Artifact = get("torch_artifact")
    return artifact


def for_this_gpu(target: str, checkpoint: str) -> Callable[[Get], Artifact]:
    """That checkpoint with an engine."""

    def make(get: Get) -> Artifact:
        return export_for_this_gpu(get(checkpoint), get("tmp_path_factory").mktemp("gpu") / "artifact", [target])

    return make


@contextlib.contextmanager
def as_it_is(artifact: Artifact, folder: Path) -> Iterator[Artifact]:
    """Nothing has to be there for its runner."""
    yield artifact


def by_open_runner(runtime: str, **fixed: Any) -> Callable[..., Runner]:
    """Opens it as anybody would."""
    return lambda artifact, **options: open_runner(artifact, runtime, **fixed | options)


def by_module(name: str, device: str) -> Callable[..., Runner]:
    """Opens one of exporter.torch_runners."""
    return lambda artifact, **options: MODULE_RUNNERS[name](artifact, options.get("device", device))


def onnxruntime_addresses(runner: Any) -> list[int]:
    """Where the cache lies."""
    return [value.data_ptr() for value in runner._cache]


def torch_addresses(runner: Any) -> list[int]:
    """Where the cache lies."""
    return [tensor.data_ptr() for tensor in runner._cache]


def tensorrt_addresses(runner: Any) -> list[int]:
    """Where the cache lies."""
    return [runner._buffers._memory[name][0] for name in runner.cache_spec.past_names()]


# What onnxruntime's fused attention cannot do: {a case of runner_cases.STEPS: what the refusal says}
GAPLESS = {
    "hidden slots": "hides no slots of a row",
    "positions ahead": "takes a token's slot as its position",
    "a gap in the cache": "hides no slots of a row",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One runner.

    Attributes:
        artifact: makes what it runs.
        open: opens it.
        inside: what must be there while it is used.
        library: the module without which it cannot be opened.
        file: of the artifact, which it cannot do without.
        wrong_device: options that name a device which exists nowhere.
        addresses: where its cache lies, which must not change; None: it makes a new one with every step.
        refuses: steps that it does not take.
        sees: makes what it runs of a model that sees; None: it reads text only, or takes long to compile.
    """

    artifact: Callable[[Get], Artifact] = tiny
    open: Callable[..., Runner]
    inside: Callable[[Artifact, Path], contextlib.AbstractContextManager[Artifact]] = as_it_is
    marks: tuple[pytest.MarkDecorator, ...] = ()
    library: str
    file: str
    wrong_device: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"device": "tpu"})
    addresses: Callable[[Any], list[int]] | None = None
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sees: Callable[[Get], Artifact] | None = None


def _torch(name: str, device: str, *marks: pytest.MarkDecorator, **changes: Any) -> Entry:
    what = {"open": by_module(name, device), "library": "torch", "file": "model.safetensors"}
    return Entry(marks=marks, **what | changes)


def _onnxruntime(device: str, layout: str, *marks: pytest.MarkDecorator, **changes: Any) -> Entry:
    what: dict[str, Any] = {
        "artifact": in_layout(layout),
        "open": by_open_runner("onnxruntime", device=device),
        "library": "onnxruntime",
        "file": {"portable": "decoder.onnx"}.get(layout, "model.onnx"),
    }
    return Entry(marks=marks, **what | changes)


def _tensorrt(target: str, *, real: bool, **options: Any) -> Entry:
    return Entry(
        artifact=for_this_gpu(target, "tiny_llama") if real else tiny,
        sees=for_this_gpu(target, "tiny_vision") if real else seeing,
        inside=as_it_is if real else simulated,
        open=by_open_runner(target, **options),
        marks=(pytest.mark.cuda,) if real else (),
        library=target.replace("-", "_"),
        file=f"decoder.{target}.engine",
        wrong_device={"device_id": 77},
        addresses=tensorrt_addresses,
    )


IN_PLACE = {"addresses": onnxruntime_addresses}
PORTABLE = IN_PLACE | {"sees": seeing}
TORCH_IN_PLACE = {"artifact": compiled, "addresses": torch_addresses}
AOTI = {"open": by_open_runner("aoti"), "file": "decoder.decode.pt2"} | TORCH_IN_PLACE

ENTRIES: dict[str, Entry] = {
    "eager": _torch("eager", "cpu", sees=seeing),
    "eager-cuda": _torch("eager", "cuda", pytest.mark.cuda, sees=seeing),
    "compiled": _torch("compiled", "cpu", pytest.mark.slow, **TORCH_IN_PLACE),
    "compiled-cuda": _torch("compiled", "cuda", pytest.mark.cuda, **TORCH_IN_PLACE),
    "aoti": _torch("aoti", "", **AOTI),
    "onnxruntime": _onnxruntime("cpu", "portable", **PORTABLE),
    "onnxruntime-as-in-the-file": _onnxruntime(
        "cpu", "portable", open=functools.partial(OnnxRuntimeRunner.open, device="cpu"), **PORTABLE
    ),
    "onnxruntime-dynamic": _onnxruntime("cpu", "dynamic"),
    "onnxruntime-genai": _onnxruntime("cpu", "genai", refuses=GAPLESS, **IN_PLACE),
    "onnxruntime-cuda": _onnxruntime("cuda", "portable", pytest.mark.cuda, **PORTABLE),
    "onnxruntime-cuda-dynamic": _onnxruntime("cuda", "dynamic", pytest.mark.cuda),
    "tensorrt-simulated": _tensorrt("tensorrt", real=False),
    "tensorrt-simulated-without-graphs": _tensorrt("tensorrt", real=False, cuda_graphs=False),
    "tensorrt-rtx-simulated": _tensorrt("tensorrt-rtx", real=False),
    "tensorrt": _tensorrt("tensorrt", real=True),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx", real=True),
}
PARAMS = [pytest.param(entry, id=name, marks=entry.marks) for name, entry in ENTRIES.items()]
SEEING = [
    pytest.param(dataclasses.replace(entry, artifact=entry.sees), id=name, marks=entry.marks)
    for name, entry in ENTRIES.items()
    if entry.sees is not None
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A runner's entry, and what it runs."""

    entry: Entry
    artifact: Artifact

    def open(self, artifact: Artifact | None = None, **options: Any) -> Runner:
        """A new runner, by default of that artifact."""
        return self.entry.open(artifact or self.artifact, **options)


@contextlib.contextmanager
def opened_subject(request: pytest.FixtureRequest, folders: pytest.TempPathFactory) -> Iterator[Subject]:
    """The subject of a fixture that has PARAMS, or SEEING."""
    made = request.param.artifact(request.getfixturevalue)
    with request.param.inside(made, folders.mktemp("inside")) as artifact:
        yield Subject(entry=request.param, artifact=artifact)
