"""An engine whose inner values are outputs as well: what each operator computed, on TensorRT or TensorRT-RTX.

The artifact's own engine shows nothing, so one is built for the comparison, from the same graph. TensorRT does not fuse
operators over a value that is an output.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from exporter.progress import Quiet
from exporter.targets.tensorrt import build_engine, check
from runtimes.errors import EngineLoadError
from runtimes.signature import GraphSignature
from runtimes.tensorrt_api import get_logger, import_tensorrt
from runtimes.tensorrt_runner import Buffers, Cuda

PROFILE = 0  # that takes every shape
# {tensorrt.DataType's name: numpy's}
DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}


class ExposedEngine:
    """Runs a graph of the portable layout, and shows the values that were asked for."""

    rounds_activations = False

    def __init__(
        self, target: str, graph: Path, signature: GraphSignature, dtype: str, wanted: Iterable[str], device_id: int = 0
    ) -> None:
        """Build and load an engine of `graph` with `wanted` values as outputs, as far as it has them.

        Raises:
            RuntimeMissingError: no library, no CUDA bindings, or no GPU.
            ExportError: the library refuses the graph.
            EngineLoadError: it does not load what it built.
        """
        check(target, ())
        self._cuda = Cuda(device_id)  # first: without a GPU there is no use for an engine
        self._trt = import_tensorrt(target)
        self.description, self.computes_in = f"{target} {self._trt.__version__}", dtype
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exposed.engine"
            build_engine(target, graph, path, signature, gpu_archs=(), progress=Quiet(), shown=frozenset(wanted))
            self._engine = self._trt.Runtime(get_logger(target)).deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineLoadError(f"{target} does not load the engine that it built: {get_logger(target).errors[-3:]}")
        self._context = self._engine.create_execution_context()
        self._context.set_optimization_profile_async(PROFILE, int(self._cuda.stream))
        self._buffers = Buffers(self._cuda)
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        outputs = self._trt.TensorIOMode.OUTPUT
        self.names = tuple(name for name in tensors if self._engine.get_tensor_mode(name) == outputs)
        self._aliases = dict(signature.aliases)
        self._inputs = tuple(name for name in tensors if name not in self.names)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value, and the graph's own outputs; floats are float32."""
        host = {name: np.ascontiguousarray(feeds[name], self._dtype(name)) for name in self._inputs}
        for name, array in host.items():
            address = self._buffers.get(name, array.nbytes)
            self._cuda.upload(address, array)
            self._context.set_input_shape(name, array.shape)
            self._context.set_tensor_address(name, address)
        results = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name)) for name in self.names
        }
        places = {name: self._aliases.get(name, name) for name in results}  # the cache is updated where it is
        for name, array in results.items():
            self._context.set_tensor_address(name, self._buffers.get(places[name], max(array.nbytes, 1)))
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise RuntimeError(f"{self.description} could not run the engine")
        for name, array in results.items():
            self._cuda.download(array, self._buffers.get(places[name], array.nbytes))
        wide = (np.float16, ml_dtypes.bfloat16)
        return {name: array.astype(np.float32) if array.dtype in wide else array for name, array in results.items()}

    def _dtype(self, name: str) -> Any:
        return DTYPES[self._engine.get_tensor_dtype(name).name]
