"""Every runtime against eager PyTorch, by the gate that an export runs: on a GPU where there is one.

The reference runs on the GPU as well. Without one, the same tests run what the CPU can, or TensorRT's simulation.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runner_table import as_it_is
from simulation import export_for_this_gpu, simulated

from exporter.pipeline import ExportRequest, export
from exporter.torch_runners import MODULE_RUNNERS
from exporter.verify import verify_artifact
from runtimes.artifact import Artifact, open_artifact
from runtimes.runner import Runner, open_runner
from runtimes.tensorrt_api import FLAVORS

Export = Callable[[Path, Path, str], Artifact]  # checkpoint, out, precision


def to_onnx(layout: str = "portable", targets: tuple[str, ...] = ()) -> Export:
    """An export with these targets beside ONNX."""

    def make(checkpoint: Path, out: Path, precision: str) -> Artifact:
        more = {"targets": targets} if targets else {}
        export(ExportRequest(checkpoint=checkpoint, out=out, precision=precision, layout=layout, verify=False, **more))
        return open_artifact(out)

    return make


def to_engine(target: str) -> Export:
    """An export with an engine for this GPU."""
    return lambda checkpoint, out, precision: export_for_this_gpu(checkpoint, out, [target], precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a runtime is reached on a device.

    Attributes:
        open: opens an artifact's runner.
        export: makes the artifact.
        precisions: of tiny_llama.
        seen: precisions of tiny_vision.
        inside: what must be there while it runs.
    """

    open: Callable[[Artifact], Runner]
    export: Export
    precisions: tuple[str, ...]
    seen: tuple[str, ...] = ()
    inside: Callable[[Artifact, Path], contextlib.AbstractContextManager[Artifact]] = as_it_is
    marks: tuple[pytest.MarkDecorator, ...] = (pytest.mark.cuda,)


def _module(name: str, device: str) -> Callable[[Artifact], Runner]:
    return lambda artifact: MODULE_RUNNERS[name](artifact, device)


def _runner(runtime: str, **options: Any) -> Callable[[Artifact], Runner]:
    return lambda artifact: open_runner(artifact, runtime, **options)


EVERY, FLOATS = ("fp32", "fp16", "bf16", "int4"), ("fp32", "fp16", "bf16")
PORTABLE = to_onnx()
ON_CUDA = {
    "eager": Way(open=_module("eager", "cuda"), export=PORTABLE, precisions=EVERY, seen=FLOATS),
    "compiled": Way(open=_module("compiled", "cuda"), export=PORTABLE, precisions=EVERY, seen=FLOATS),
    "aoti": Way(open=_runner("aoti", device="cuda"), export=to_onnx(targets=("torch",)), precisions=EVERY, seen=FLOATS),
    "onnxruntime": Way(open=_runner("onnxruntime", device="cuda"), export=PORTABLE, precisions=EVERY, seen=FLOATS),
    "onnxruntime-dynamic": Way(open=_runner("onnxruntime", device="cuda"), export=to_onnx("dynamic"), precisions=EVERY),
    "onnxruntime-genai": Way(  # whose attention takes 16-bit floats alone
        open=_runner("onnxruntime", device="cuda"),
        export=to_onnx("genai"),
        precisions=("fp16", "bf16", "int4:dtype=fp16"),
    ),
} | {target: Way(open=_runner(target), export=to_engine(target), precisions=EVERY, seen=FLOATS) for target in FLAVORS}
ON_THE_CPU = {
    "eager": Way(open=_module("eager", "cpu"), export=PORTABLE, precisions=("fp32", "int4"), marks=()),
    "onnxruntime": Way(open=_runner("onnxruntime", device="cpu"), export=PORTABLE, precisions=("fp32",), marks=()),
    "tensorrt": Way(
        open=_runner("tensorrt"), export=PORTABLE, precisions=("fp32",), seen=("fp32",), inside=simulated, marks=()
    ),
    "tensorrt-rtx": Way(
        open=_runner("tensorrt-rtx"), export=PORTABLE, precisions=("fp32",), inside=simulated, marks=()
    ),
}


def cases(pick: str) -> list[Any]:
    """(way, precision) of all ways; `pick` names the attribute with the precisions."""
    return [
        pytest.param(way, precision, id=f"{name}-{device}-{precision}", marks=way.marks)
        for device, ways in (("cuda", ON_CUDA), ("cpu", ON_THE_CPU))
        for name, way in ways.items()
        for precision in getattr(way, pick)
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Way, Path, str], Artifact]:
    """Exports what is asked for, once."""
    made: dict[tuple[Any, ...], Artifact] = {}

    def get(way: Way, checkpoint: Path, precision: str) -> Artifact:
        key = way.export, checkpoint, precision
        if key not in made:
            made[key] = way.export(checkpoint, tmp_path_factory.mktemp("parity") / "artifact", precision)
        return made[key]

    return get


def assert_parity(way: Way, artifact: Artifact, folder: Path) -> None:
    """The parity suite, on the artifact's own weights."""
    with way.inside(artifact, folder) as whole:
        summary = verify_artifact(artifact, {"target": lambda: way.open(whole)})
    (report,) = summary.reports
    assert report.passed, [rung for rung in report.rungs if not rung.passed]


@pytest.mark.parametrize(("way", "precision"), cases("precisions"))
def test_parity(way: Way, precision: str, tiny_llama: Path, exported: Callable[..., Artifact], tmp_path: Path) -> None:
    """Prefill, decode steps, the cache, greedy tokens."""
    assert_parity(way, exported(way, tiny_llama, precision), tmp_path)


@pytest.mark.parametrize(("way", "precision"), cases("seen"))
def test_parity_of_a_model_that_sees(
    way: Way, precision: str, tiny_vision: Path, exported: Callable[..., Artifact], tmp_path: Path
) -> None:
    """The same with pictures."""
    assert_parity(way, exported(way, tiny_vision, precision), tmp_path)
