"""What an export can end in. ONNX is always made; the others are built from it, or beside it from the same model."""

import dataclasses

from exporter.targets import aot_inductor, tensorrt
from exporter.targets.target import Job, Target
from runtimes.artifact import EngineEntry


def _any(gpu_archs: tuple[str, ...]) -> None:
    """Nothing to check."""


def _build_engine(job: Job) -> EngineEntry:
    (file,) = TARGETS[job.target].files(job.graph)
    engine = tensorrt.build_engine(
        job.target,
        job.onnx_path,
        job.path(file),
        job.signature,
        gpu_archs=job.gpu_archs,
        progress=job.progress,
    )
    return dataclasses.replace(engine, file=file, graph=job.graph)


def _engine(target: str) -> Target:
    return Target(
        layout="portable",
        check=lambda gpu_archs: tensorrt.check(target, gpu_archs),
        finish=_build_engine,
        files=lambda graph: (f"{graph}.{target}.engine",),
        parses_onnx=True,
    )


TARGETS: dict[str, Target] = {
    "onnx": Target(layout=None, check=_any, finish=None),
    "tensorrt-rtx": _engine("tensorrt-rtx"),
    "tensorrt": _engine("tensorrt"),
    "torch": Target(
        layout="portable",
        check=aot_inductor.check,
        finish=aot_inductor.build_packages,
        files=aot_inductor.package_files,
    ),
}
