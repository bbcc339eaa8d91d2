"""AOTInductor packages for PyTorch: a program for prefill, one for decode steps, one for pictures; no weights inside.

They are compiled for the machine that the export runs on: its GPU, or else its processor.
"""

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock  # torch itself needs it
from torch import nn
from torch.export import ExportedProgram

from exporter.errors import ExportError
from exporter.quiet import quiet_torch
from exporter.targets.target import Job
from exporter.torch_model import map_model
from exporter.torch_program import (
    DECODER_PREFIX,
    ENCODER_PREFIX,
    decode_signature,
    decoder_program,
    encoder_program,
    on_device,
)
from graphs.checkpoint import StoredTensor, open_checkpoint
from graphs.families import find_family
from graphs.transformer import real_buffers
from runtimes.artifact import EngineEntry
from runtimes.errors import RuntimeMissingError
from runtimes.torch_package import METADATA_KEY, MODEL_NAME, PackageFacts, Place, processor_features
from runtimes.torch_runner import torch_device

SETTINGS = {
    "aot_inductor.package": True,
    # Weights stay in the artifact's safetensors files: a package of a 100 GB model has a few MB.
    "aot_inductor.package_constants_in_so": False,
    # As many threads as the machine that runs it has, not as the one that compiled it.
    "cpp.dynamic_threads": True,
}
# Source paths of this machine say nothing elsewhere. PyTorch 2.11 writes none and does not know the setting.
NO_LINE_TABLES = {"aot_inductor.enable_line_tables": False}

STEPS = ("prefill", "decode")  # the decoder's programs
LOCK_FILE = "export_llm.lock"  # in Inductor's cache
NO_SOURCE = "// compiled by export-llm --target torch\n"
LOAD = "import sys, torch; torch._C._aoti.AOTIModelPackageLoader(*sys.argv[1:], False, 1, -1)"


def check(gpu_archs: tuple[str, ...]) -> None:
    """Raise at once if packages cannot be compiled here.

    Raises:
        RuntimeMissingError: Inductor or a C++ compiler is missing.
    """
    try:
        importlib.import_module("torch._inductor")
        device = torch_device(None)
        if device == "cuda":
            importlib.import_module("triton")
    except ImportError as error:
        raise RuntimeMissingError(
            f"target torch needs PyTorch's compiler, which cannot be imported ({error}): install PyTorch with its"
            " dependencies (pip install torch)"
        ) from None
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeMissingError(
            f"target torch needs a C++ compiler, and there is no {compiler} here: install g++ (apt-get install g++), or"
            " set CXX to the one you have"
        )


def package_files(graph: str) -> tuple[str, ...]:
    """What is compiled of a graph."""
    return tuple(f"{graph}.{step}.pt2" for step in STEPS) if graph == "decoder" else (f"{graph}.pt2",)


def build_packages(job: Job) -> EngineEntry:
    """Compile a graph's packages.

    Raises:
        ExportError: PyTorch cannot compile it, or cannot load what it compiled.
    """
    device = torch_device(None)
    checkpoint = open_checkpoint(job.folder)
    family = find_family(checkpoint.config, checkpoint.shapes)
    model = map_model(family, family.parse_config(checkpoint.config), checkpoint, getattr(torch, job.cache.dtype))
    moved: dict[int, torch.Tensor] = {}
    files = package_files(job.graph)
    if job.graph == "decoder":
        steps = {"prefill": job.signature, "decode": decode_signature(job.signature)}
        assert tuple(steps) == STEPS
        facts = _facts(device, DECODER_PREFIX, model.decoder, model.decoder_places)
        for file, (step, signature) in zip(files, steps.items(), strict=True):
            job.progress.start(f"compile {step}")
            program = decoder_program(model.decoder, job.layout, signature, job.cache, job.vision)
            _compile(on_device(program, device, moved), job, file, facts)
    else:
        assert model.encoder is not None
        facts = _facts(device, ENCODER_PREFIX, model.encoder, model.encoder_places)
        job.progress.start("compile the vision encoder")
        program = encoder_program(model.encoder, job.layout, job.signature)
        _compile(on_device(program, device, moved), job, files[0], facts)
    return EngineEntry(
        file=files[0],
        decode_file=files[1] if len(files) > 1 else None,
        graph=job.graph,
        target=job.target,
        library_version=torch.__version__,
        gpu_archs=() if device == "cpu" else ("SM{}{}".format(*torch.cuda.get_device_capability()),),
    )


def _facts(device: str, prefix: str, module: nn.Module, places: Mapping[str, StoredTensor]) -> PackageFacts:
    return PackageFacts(
        torch=torch.__version__,
        device=device,
        processor=processor_features(),
        places={
            prefix + name: Place(file=each.path.name, offset=each.offset, dtype=each.dtype, shape=each.shape)
            for name, each in places.items()
        },
        tables={prefix + name: table.numpy() for name, table in real_buffers(module).items()},
    )


def _compile(program: ExportedProgram, job: Job, file: str, facts: PackageFacts) -> None:
    from torch._inductor import config  # as in _package
    from torch._inductor.runtime.runtime_utils import cache_dir

    no_line_tables = NO_LINE_TABLES if hasattr(config.aot_inductor, "enable_line_tables") else {}
    settings = SETTINGS | no_line_tables | {"aot_inductor.metadata": {METADATA_KEY: facts.to_json()}}
    args, kwargs = program.example_inputs
    # Another export may compile the same program, and Inductor would write the files that are read here.
    cache = Path(cache_dir())
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / LOCK_FILE), quiet_torch(), torch.no_grad():
            made = torch._inductor.aot_compile(program.module(check_guards=False), args, kwargs, options=settings)
            package = _package([Path(each) for each in made])
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise ExportError(
            f"PyTorch {torch.__version__} cannot compile {file}: {reason[0] if reason else type(error).__name__}"
        ) from error
    job.path(file).write_bytes(package)
    if facts.device == "cuda":
        require_loadable(job.path(file))


def require_loadable(path: Path) -> None:
    """Load a package in a process of its own: what PyTorch 2.11 compiles for a GPU ends the process that loads it.

    Raises:
        ExportError: it cannot be loaded.
    """
    command = [sys.executable, "-c", LOAD, str(path), MODEL_NAME]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines()
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else said[-1] if said else "no reason given"
    raise ExportError(
        f"PyTorch {torch.__version__} compiled {path.name}, and cannot load it ({how}): leave --target torch out, or"
        " try another version of PyTorch"
    )


def _package(files: list[Path]) -> bytes:
    """The files as AOTInductor's archive, but for the text of the sources: their comments tell when and where they were
    compiled, which no two exports have in common."""
    from torch._inductor.package import package_aoti  # it takes a second to import, and may be missing (see check)

    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, quiet_torch():
        kept = [Path(folder) / file.name for file in files]
        for file, copy in zip(files, kept, strict=True):
            if file.suffix == ".cpp":
                copy.write_text(NO_SOURCE)
            else:
                shutil.copyfile(file, copy)
        package_aoti(buffer, [str(copy) for copy in kept])
    return buffer.getvalue()
