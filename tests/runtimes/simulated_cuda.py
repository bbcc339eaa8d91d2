"""A GPU and a TensorRT library, simulated on the CPU and strict: what a GPU leaves undefined is an error here.

`Device.module()` stands for `cuda.bindings.runtime` (signatures, result tuples and error codes as in 12.9 and 13.5),
`Library.module()` for `tensorrt` or `tensorrt_rtx`. Work in a stream runs as late as CUDA allows, which is when
somebody waits for it; an engine runs its decoder.onnx with ONNX Runtime, from and to the addresses bound to it.

Not simulated: numbers, speed, and what only hardware or a driver can refuse.
"""

import ctypes
import dataclasses
import enum
import functools
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from runtimes.signature import DTYPE_BYTES, DimRange, GraphSignature

Error = enum.IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorInvalidDevice": 101,
        "cudaErrorInvalidResourceHandle": 400,
        "cudaErrorIllegalState": 401,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureUnsupported": 900,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)
MemcpyKind = enum.IntEnum(
    "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
)
CaptureMode = enum.IntEnum(
    "cudaStreamCaptureMode",
    {
        "cudaStreamCaptureModeGlobal": 0,
        "cudaStreamCaptureModeThreadLocal": 1,
        "cudaStreamCaptureModeRelaxed": 2,
    },
)
UNINITIALISED, FREED = 0xCD, 0xDD  # what memory holds before it is written and after it is freed


class UndefinedBehaviourError(AssertionError):
    """On a GPU: a crash, wrong numbers, or nothing, by luck."""


class _CallError(Exception):
    """A CUDA call that returns an error code."""

    def __init__(self, error: Error) -> None:
        self.error = error


class Handle:
    """A stream, a graph or an executable graph."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number

    __index__ = __int__


@dataclasses.dataclass
class Work:
    """Something that a stream does; `run(replayed)` when its turn comes."""

    name: str
    run: Callable[[bool], None]
    host: bool = False  # it reads or writes host memory


class Stream:
    """Work that waits for its turn, or that is being captured into a graph."""

    def __init__(self) -> None:
        self.queue: list[tuple[Work, bool]] = []
        self.captured: list[Work] | None = None
        self.broken = False  # the capture, by something that cannot be captured


class Device:
    """One GPU.

    `log` holds what ran, in order; `failing` maps a call's name to the error it shall return once; `fault` is the
    error that every call returns, as after an illegal access.
    """

    def __init__(self) -> None:
        self.memory_bytes = 1 << 30
        self.log: list[str] = []
        self.failing: dict[str, Error] = {}
        self.fault: Error | None = None
        self.objects: weakref.WeakSet[Any] = weakref.WeakSet()  # of the TensorRT library
        self._memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._freed: list[ctypes.Array[ctypes.c_char]] = []  # kept, so that no address comes twice
        self._streams: dict[int, Stream] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._handles = 0x1000

    def alive(self) -> dict[str, int]:
        """What was made and not released; empty when all is well."""
        counts = {
            "allocations": len(self._memory),
            "streams": len(self._streams),
            "graphs": len(self._graphs),
            "executable graphs": len(self._executables),
            "TensorRT objects": len(self.objects),
        }
        return {name: count for name, count in counts.items() if count}

    def executable_graphs(self) -> int:
        """Executable graphs that exist now."""
        return len(self._executables)

    def read(self, address: int, nbytes: int) -> bytes:
        """Device memory, checked."""
        self._check_range(address, nbytes)
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        """Device memory, checked."""
        self._check_range(address, len(data))
        ctypes.memmove(address, data, len(data))

    def stream(self, handle: Any) -> Stream:
        """A stream that exists."""
        if int(handle) not in self._streams:
            raise _CallError(Error.cudaErrorInvalidResourceHandle)
        return self._streams[int(handle)]

    def submit(self, stream: Stream, work: Work) -> None:
        """Let the stream do it later, or capture it."""
        if stream.captured is None:
            stream.queue.append((work, False))
        elif work.host:
            self._break_captures()
            raise _CallError(Error.cudaErrorStreamCaptureUnsupported)
        else:
            stream.captured.append(work)

    def module(self) -> ModuleType:
        """Stands for cuda.bindings.runtime."""
        module = ModuleType("cuda.bindings.runtime")
        module.cudaError_t, module.cudaMemcpyKind, module.cudaStreamCaptureMode = Error, MemcpyKind, CaptureMode
        module.cudaStreamDefault, module.cudaStreamNonBlocking = 0, 1
        calls: dict[str, tuple[Callable[..., Any], bool]] = {  # {name: (function, whether it returns something)}
            "cudaSetDevice": (self._set_device, False),
            "cudaMalloc": (self._malloc, True),
            "cudaFree": (self._free, False),
            "cudaMemcpyAsync": (self._memcpy_async, False),
            "cudaMemsetAsync": (self._memset_async, False),
            "cudaStreamCreate": (self._stream_create, True),
            "cudaStreamCreateWithFlags": (lambda flags: self._stream_create(), True),
            "cudaStreamDestroy": (self._stream_destroy, False),
            "cudaStreamSynchronize": (self._stream_synchronize, False),
            "cudaStreamBeginCapture": (self._begin_capture, False),
            "cudaStreamEndCapture": (self._end_capture, True),
            "cudaGraphInstantiate": (self._graph_instantiate, True),
            "cudaGraphLaunch": (self._graph_launch, False),
            "cudaGraphDestroy": (lambda graph: self._destroy(self._graphs, graph), False),
            "cudaGraphExecDestroy": (lambda graph: self._destroy(self._executables, graph), False),
        }
        for name, (function, returns) in calls.items():
            setattr(module, name, self._api(name, function, returns))
        return module

    def _api(self, name: str, function: Callable[..., Any], returns: bool) -> Callable[..., tuple[Any, ...]]:
        def call(*args: Any) -> tuple[Any, ...]:
            try:
                if self.fault or name in self.failing:
                    raise _CallError(self.fault or self.failing.pop(name))
                result = function(*args)
            except _CallError as failed:
                return (failed.error, None) if returns else (failed.error,)
            return (Error.cudaSuccess, result) if returns else (Error.cudaSuccess,)

        call.__name__ = name
        return call

    def _new_handle(self) -> int:
        self._handles += 8
        return self._handles

    def _check_range(self, address: int, nbytes: int) -> None:
        for base, memory in self._memory.items():
            if base <= address and address + nbytes <= base + len(memory):
                return
        freed = any(ctypes.addressof(m) <= address < ctypes.addressof(m) + len(m) for m in self._freed)
        what = "freed memory" if freed else "memory outside every allocation"
        raise UndefinedBehaviourError(f"{nbytes} bytes at {address:#x}: {what}")

    def _refuse_while_capturing(self) -> None:
        """Allocation is unsafe while this thread captures, and spoils the capture."""
        if any(stream.captured is not None for stream in self._streams.values()):
            self._break_captures()
            raise _CallError(Error.cudaErrorStreamCaptureUnsupported)

    def _break_captures(self) -> None:
        for stream in self._streams.values():
            stream.broken |= stream.captured is not None

    def _set_device(self, device: int) -> None:
        if device != 0:
            raise _CallError(Error.cudaErrorInvalidDevice)

    def _malloc(self, nbytes: int) -> int:
        self._refuse_while_capturing()
        if sum(len(memory) for memory in self._memory.values()) + nbytes > self.memory_bytes:
            raise _CallError(Error.cudaErrorMemoryAllocation)
        memory = ctypes.create_string_buffer(bytes([UNINITIALISED]) * nbytes, nbytes)
        self._memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _free(self, address: int) -> None:
        self._refuse_while_capturing()
        if not address:
            return
        if address not in self._memory:
            raise _CallError(Error.cudaErrorInvalidValue)
        memory = self._memory.pop(address)
        ctypes.memset(address, FREED, len(memory))
        self._freed.append(memory)

    def _memcpy_async(self, target: int, source: int, nbytes: int, kind: MemcpyKind, stream: Any) -> None:
        if not isinstance(kind, MemcpyKind):
            raise TypeError(f"kind must be a cudaMemcpyKind, got {kind!r}")
        if kind == MemcpyKind.cudaMemcpyHostToDevice:
            self._check_range(target, nbytes)
            seen = _host_memory(source, nbytes)

            def run(replayed: bool) -> None:
                if _host_memory(source, nbytes) != seen:
                    raise UndefinedBehaviourError(
                        "a host array changed, or went away, before it was copied to the device"
                    )
                self.write(target, seen)
        elif kind == MemcpyKind.cudaMemcpyDeviceToDevice:
            self._check_range(target, nbytes)
            self._check_range(source, nbytes)
            if abs(target - source) < nbytes:
                raise UndefinedBehaviourError("a copy on the device between ranges that overlap")

            def run(replayed: bool) -> None:
                self.write(target, self.read(source, nbytes))
        else:
            self._check_range(source, nbytes)

            def run(replayed: bool) -> None:
                ctypes.memmove(target, self.read(source, nbytes), nbytes)

        on_host = kind != MemcpyKind.cudaMemcpyDeviceToDevice
        self.submit(self.stream(stream), Work(kind.name, run, host=on_host))

    def _memset_async(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        self._check_range(address, nbytes)
        run = functools.partial(self.write, address, bytes([value]) * nbytes)
        self.submit(self.stream(stream), Work("memset", lambda replayed: run()))

    def _stream_create(self) -> Handle:
        handle = Handle(self._new_handle())
        self._streams[int(handle)] = Stream()
        return handle

    def _stream_destroy(self, handle: Any) -> None:
        self._run(self.stream(handle))
        del self._streams[int(handle)]

    def _stream_synchronize(self, handle: Any) -> None:
        stream = self.stream(handle)
        if stream.captured is not None:
            stream.broken = True
            raise _CallError(Error.cudaErrorStreamCaptureUnsupported)
        self._run(stream)

    def _run(self, stream: Stream) -> None:
        while stream.queue:
            work, replayed = stream.queue.pop(0)
            self.log.append(f"graph {work.name}" if replayed else work.name)
            try:
                work.run(replayed)
            except UndefinedBehaviourError:
                stream.queue.clear()  # what follows would only hide the cause
                raise

    def _begin_capture(self, handle: Any, mode: CaptureMode) -> None:
        if not isinstance(mode, CaptureMode):
            raise TypeError(f"mode must be a cudaStreamCaptureMode, got {mode!r}")
        stream = self.stream(handle)
        if stream.captured is not None:
            raise _CallError(Error.cudaErrorIllegalState)
        stream.captured, stream.broken = [], False

    def _end_capture(self, handle: Any) -> Handle:
        stream = self.stream(handle)
        if stream.captured is None:
            raise _CallError(Error.cudaErrorIllegalState)
        captured, stream.captured = stream.captured, None
        if stream.broken:
            raise _CallError(Error.cudaErrorStreamCaptureInvalidated)
        graph = Handle(self._new_handle())
        self._graphs[int(graph)] = captured
        return graph

    def _graph_instantiate(self, graph: Any, flags: int) -> Handle:
        if graph is None or int(graph) not in self._graphs or flags:
            raise _CallError(Error.cudaErrorInvalidValue)
        executable = Handle(self._new_handle())
        self._executables[int(executable)] = list(self._graphs[int(graph)])
        return executable

    def _graph_launch(self, executable: Any, stream: Any) -> None:
        if int(executable) not in self._executables:
            raise UndefinedBehaviourError("a destroyed graph was launched")
        self.stream(stream).queue += [(work, True) for work in self._executables[int(executable)]]

    def _destroy(self, things: dict[int, list[Work]], handle: Any) -> None:
        if int(handle) not in things:
            raise UndefinedBehaviourError("a graph was destroyed twice")
        del things[int(handle)]


@functools.cache
def _memory_file() -> int:
    return os.open("/proc/self/mem", os.O_RDONLY)


def _host_memory(address: int, nbytes: int) -> bytes | None:
    """This process's memory, read through the kernel: None, not a crash, where there is none any more."""
    try:
        return os.pread(_memory_file(), nbytes, address)
    except OSError:
        return None


# --- TensorRT ---------------------------------------------------------------------------------------------------------

MAGIC = b"simulated engine\n"
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
AllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
DATA_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "bool": DataType.BOOL,
}


class ILogger:
    """The base of the program's logger."""

    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


def write_engine(path: Path, graph: Path, signature: GraphSignature, *, profiles: int = 2) -> None:
    """An engine file as exporter/targets/tensorrt.py would build it from `graph`."""
    path.write_bytes(
        MAGIC + json.dumps({"graph": str(graph), "signature": signature.to_json(), "profiles": profiles}).encode()
    )


@dataclasses.dataclass
class Library:
    """One of the two libraries, on a device; its fields are what a test may let it refuse."""

    device: Device
    rtx: bool = False
    capturable: bool = True  # whether work of a context can be captured into a CUDA graph
    contexts_left: int = 100  # contexts for which there is memory
    one_graph_per_context: bool = False  # a graph is void once its context was given other shapes or addresses

    def module(self) -> ModuleType:
        """Stands for tensorrt or tensorrt_rtx."""
        module = ModuleType("tensorrt_rtx" if self.rtx else "tensorrt")
        module.__version__ = "0.0.simulated"
        module.ILogger, module.DataType = ILogger, DataType
        module.TensorLocation, module.TensorIOMode = TensorLocation, TensorIOMode
        module.ExecutionContextAllocationStrategy = AllocationStrategy
        module.Builder = SimpleNamespace  # only asked for
        module.Runtime = functools.partial(Runtime, self)
        if self.rtx:
            module.CudaGraphStrategy = CudaGraphStrategy
        return module


class Runtime:
    """Loads engines."""

    def __init__(self, library: Library, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        self.library, self.logger = library, logger
        library.device.objects.add(self)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "Engine | None":
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC):
            self.logger.log(Severity.ERROR, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
            return None
        return Engine(self, **json.loads(data.removeprefix(MAGIC)))


class RuntimeConfig:
    """How TensorRT-RTX shall make a context."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.strategy = AllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: AllocationStrategy = AllocationStrategy.STATIC
    ) -> None:
        assert isinstance(strategy, AllocationStrategy)
        self.strategy = strategy


class Engine:
    """An engine with the exporter's two profiles: prefill takes every shape, decode one token per row."""

    def __init__(self, runtime: Runtime, graph: str, signature: Mapping[str, Any], profiles: int) -> None:
        self.runtime = runtime
        self.graph = Path(graph)
        self.signature = GraphSignature.from_json(signature)
        self.inputs = {spec.name: spec for spec in self.signature.inputs}
        self.outputs = {spec.name: spec for spec in self.signature.outputs}
        self.tensors = self.inputs | self.outputs
        one = DimRange(min=1, opt=1, max=1)
        ranges = self.signature.dims
        self.profiles = [ranges, {**ranges, "sequence_length": one, "n": one}][:profiles]
        runtime.library.device.objects.add(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DATA_TYPES[self.tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.tensors[name].shape)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.signature.aliases.get(name)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: AllocationStrategy | RuntimeConfig | None = None) -> "Context | None":
        library = self.runtime.library
        if library.contexts_left < 1:
            self.runtime.logger.log(Severity.ERROR, "IRuntime::createExecutionContext: out of memory")
            return None
        library.contexts_left -= 1
        return (RtxContext if library.rtx else Context)(self)


class Context:
    """An execution context: a profile, and the shapes and addresses it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0  # counts changes of the three above
        self._settled = -1  # the version that an enqueue outside a capture has seen
        engine.runtime.library.device.objects.add(self)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self.engine.profiles):
            return self._refuse(f"profile {profile_index} of {len(self.engine.profiles)}")
        self.engine.runtime.library.device.stream(_plain(stream_handle))
        self.profile = profile_index
        self.shapes.clear()  # "Changing this value will invalidate all dynamic bindings"
        self.version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...] | list[int]) -> bool:
        spec, ranges = self.engine.inputs.get(name), self.engine.profiles[self.profile]
        if spec is None or len(shape) != len(spec.shape):
            return self._refuse(f"{name} is no input of that rank")
        for size, dim in zip(shape, spec.shape, strict=True):
            allowed = DimRange(min=dim, opt=dim, max=dim) if isinstance(dim, int) else ranges[dim]
            if not allowed.min <= size <= allowed.max:
                return self._refuse(f"{name}: {tuple(shape)} is outside profile {self.profile}")
        return self._set(self.shapes, name, tuple(shape))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self._refuse(f"no tensor {name}")
        return self._set(self.addresses, name, _plain(memory))

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, library = self.engine, self.engine.runtime.library
        device = library.device
        problem = self._problem()
        if problem:
            return self._refuse(problem)
        stream = device.stream(_plain(stream_handle))
        if stream.captured is None:
            self._settled = self.version
        elif not library.capturable or self._settled != self.version:
            stream.broken = True
            return self._refuse("Cuda Runtime (operation not permitted when stream is capturing)")
        context, version = weakref.ref(self), self.version
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def run(replayed: bool) -> None:
            if context() is None:
                raise UndefinedBehaviourError("an execution context was destroyed before its work ran")
            if replayed and library.one_graph_per_context and context().version != version:
                raise UndefinedBehaviourError("a graph ran after its context was given other shapes or addresses")
            _run_engine(device, engine, shapes, addresses)

        device.submit(stream, Work(f"engine, profile {self.profile}", run))
        return True

    def _set(self, values: dict[str, Any], name: str, value: Any) -> bool:
        self.version += values.get(name) != value
        values[name] = value
        return True

    def _problem(self) -> str:
        """Why the context cannot run as it is; empty when it can."""
        engine = self.engine
        if missing := engine.inputs.keys() - self.shapes.keys():
            return f"no shape for {sorted(missing)}"
        if missing := {name for name in engine.tensors if not self.addresses.get(name)}:
            return f"no address for {sorted(missing)}"
        sizes: dict[str, int] = {}
        for name, spec in engine.inputs.items():
            for size, dim in zip(self.shapes[name], spec.shape, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    return f"{name}: {dim} is {size} here and {sizes[dim]} elsewhere"
        for present, past in engine.signature.aliases.items():
            if self.addresses[present] != self.addresses[past]:
                return f"{present} and {past} must share an address"
        return ""

    def _refuse(self, message: str) -> bool:
        self.engine.runtime.logger.log(Severity.ERROR, f"IExecutionContext: {message}")
        return False


class RtxContext(Context):
    """What TensorRT-RTX adds."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.runtime.library.capturable


def _plain(number: Any) -> int:
    """Bindings of TensorRT before 11 take nothing but a Python integer."""
    if type(number) is not int:
        raise TypeError(f"expected an int, got {type(number).__name__}")
    return number


@functools.cache
def _session(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: that TensorScatter copies its cache is no news here
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _run_engine(
    device: Device, engine: Engine, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> None:
    feeds = {}
    for name, spec in engine.inputs.items():
        nbytes = int(np.prod(shapes[name])) * DTYPE_BYTES[spec.dtype]
        feeds[name] = np.frombuffer(device.read(addresses[name], nbytes), spec.dtype).reshape(shapes[name])
    if "write_indices" in feeds:
        last = feeds["write_indices"].max() + shapes["input_ids"][1]
        if feeds["write_indices"].min() < 0 or last > engine.get_tensor_shape("past_key_values.0.key")[2]:
            raise UndefinedBehaviourError("tokens written outside the cache")
    results = _session(engine.graph).run(list(engine.outputs), feeds)
    for name, result in zip(engine.outputs, results, strict=True):
        device.write(addresses[name], np.ascontiguousarray(result).tobytes())
