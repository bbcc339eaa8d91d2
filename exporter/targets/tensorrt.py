"""TensorRT and TensorRT-RTX engines from a portable ONNX graph: one module serves both libraries."""

import os
import re
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from exporter.errors import ExportError
from exporter.progress import Progress
from runtimes.artifact import EngineEntry
from runtimes.cuda import cuda_device_count
from runtimes.errors import RuntimeMissingError
from runtimes.signature import DimRange, GraphSignature
from runtimes.tensorrt_api import FLAVORS, get_logger, import_tensorrt


def check(target: str, gpu_archs: tuple[str, ...]) -> None:
    """Raise at once if this machine cannot build for `target`.

    Raises:
        RuntimeMissingError: the library, or a GPU that it needs, is missing.
        ExportError: an architecture that the library does not build for.
    """
    flavor = FLAVORS[target]
    trt = import_tensorrt(target)
    if flavor.builds_without_gpu:
        for arch in gpu_archs:
            _compute_capability(trt, arch)
        return
    if gpu_archs:
        raise ExportError(f"--gpu-arch is for tensorrt-rtx: target {target} builds for the GPU it runs on")
    if not cuda_device_count():
        raise RuntimeMissingError(
            f"target {target} builds on the GPU that will run the engine, and CUDA finds none here: run the export"
            " on that machine, or use --target tensorrt-rtx, which builds without a GPU"
        )


def build_engine(
    target: str,
    onnx_path: Path,
    engine_path: Path,
    signature: GraphSignature,
    *,
    gpu_archs: tuple[str, ...],
    progress: Progress,
    shown: Collection[str] = (),
) -> EngineEntry:
    """Parse the graph, build (a decoder with one profile for prefill and one for decode), and stream it to a file.

    Args:
        shown: inner values of the graph that are to be outputs as well, as far as it has them.

    Raises:
        ExportError: the parser refuses the graph (every error is listed, with its node), it would ignore an input
            of a node, or the builder fails.
    """
    trt = import_tensorrt(target)
    logger = get_logger(target)
    logger.clear()
    with _stop_on_signal() as stop, engine_path.open("wb") as file:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        progress.start("parse")
        _parse(parser, logger, onnx_path)
        _allow_decomposition(trt, network)
        _mark(network, shown)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; a 10-bit mantissa is not what fp32 promises
        for profile in _profiles(builder, network, signature):
            if config.add_optimization_profile(profile) < 0:
                raise ExportError(f"{target} refuses the shapes of this graph: {_last_errors(logger)}")
        for index, arch in enumerate(gpu_archs):
            config.num_compute_capabilities = len(gpu_archs)
            config.set_compute_capability(_compute_capability(trt, arch), index)
        monitor = _make_monitor(trt, progress, stop)  # held here: the config keeps no reference
        config.progress_monitor = monitor
        writer = _make_writer(trt, file)
        with _timing_cache(trt, config, target):
            built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise ExportError(f"{target} could not build an engine from {onnx_path.name}: {_last_errors(logger)}")
    # The parser drops some optional inputs with no more than a warning: the engine would compute something else.
    ignored = [message for message in logger.messages if "unused" in message.lower() and "input" in message.lower()]
    if ignored:
        raise ExportError(f"{target} would ignore inputs of {onnx_path.name}:\n  " + "\n  ".join(ignored))
    return EngineEntry(
        file=engine_path.name,
        graph="decoder",
        target=target,
        library_version=trt.__version__,
        gpu_archs=tuple(_compute_capability(trt, arch).name for arch in gpu_archs),
    )


def _parse(parser: Any, logger: Any, path: Path) -> None:
    parsed = parser.parse_from_file(str(path))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if errors or not parsed:
        lines = [f"{error.node_name() or 'graph'} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise ExportError(
            f"the TensorRT parser refuses {path.name}:\n  " + "\n  ".join(lines or [_last_errors(logger)])
        )


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention without a fused kernel (float32, unusual head sizes) be built from plain operators."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding returns the base class
            layer.attention.decomposable = True


def _mark(network: Any, shown: Collection[str]) -> None:
    """Make these values outputs; the parser calls tensors as the graph does."""
    there = {network.get_output(index).name for index in range(network.num_outputs)}
    for index in range(network.num_layers if shown else 0):
        layer = network.get_layer(index)
        for tensor in (layer.get_output(at) for at in range(layer.num_outputs)):
            if tensor is not None and tensor.name in shown and tensor.name not in there:
                network.mark_output(tensor)
                there.add(tensor.name)


def _profiles(builder: Any, network: Any, signature: GraphSignature) -> list[Any]:
    """The first takes every shape the signature allows; a decoder's second takes one new token per row."""
    one = DimRange(min=1, opt=1, max=1)
    specs = {spec.name: spec for spec in signature.inputs}
    profiles = []
    ranges_of_profiles = [dict(signature.dims)]
    if "sequence_length" in signature.dims:
        ranges_of_profiles.append({**signature.dims, "sequence_length": one, "n": one})
    for dims in ranges_of_profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            ranges = [
                dims[dim] if isinstance(dim, str) else DimRange(min=dim, opt=dim, max=dim)
                for dim in specs[tensor.name].shape
            ]
            try:
                profile.set_shape(tensor.name, *([getattr(r, size) for r in ranges] for size in ("min", "opt", "max")))
            except (RuntimeError, ValueError, TypeError) as error:
                raise ExportError(
                    f"shapes of {tensor.name} up to {[r.max for r in ranges]} are refused ({error}): choose a smaller"
                    " --max-batch, --max-len or --max-images"
                ) from None
        profiles.append(profile)
    return profiles


def _compute_capability(trt: Any, arch: str) -> Any:
    """`89`, `8.9`, `sm89` or `sm_89` as the library's constant."""
    digits = re.sub(r"^sm_?|\.", "", arch.strip().lower())
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if f"SM{digits}" not in known:
        raise ExportError(f"--gpu-arch {arch}: TensorRT-RTX {trt.__version__} builds for {', '.join(known)}")
    return known[f"SM{digits}"]


def _last_errors(logger: Any) -> str:
    return "; ".join(logger.errors[-3:]) or "; ".join(logger.messages[-3:]) or "the library gave no reason"


def _make_writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as error:  # must not cross the library's C++ frames
                self.error = error
                return 0

    return Writer()


def _make_monitor(trt: Any, progress: Progress, stop: threading.Event) -> Any:
    """Feed the library's own phases and steps to our progress bar; a False return cancels the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.outermost: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost = phase_name
                progress.start("build", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                progress.advance(1)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Hold back Ctrl-C and SIGTERM while C++ code runs, and deliver them afterwards.

    An exception in one of its callbacks would end the process without a chance to clean up. The event tells callbacks
    that a signal waits.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's business
        yield stop
        return
    received: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop.set()

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _timing_cache(trt: Any, config: Any, target: str) -> Iterator[None]:
    """Reuse kernel timings of earlier builds, where the library takes timings (it needs the GPU to)."""
    if FLAVORS[target].builds_without_gpu:
        yield
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "export-llm" / f"{target}-{trt.__version__}.timing"
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(bytes(config.get_timing_cache().serialize()))
    partial.rename(path)
