"""What Triton Inference Server does with a model repository, as its documentation and sources have it; on the CPU.

It speaks gRPC, so that the real client can be used, and knows no more of a model than its folder: config.pbtxt is
parsed by Triton's own protobuf message, and the checks at load are those of its core and its ONNX Runtime backend.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

ONNX_TYPES = {
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_BOOL": "tensor(bool)",
}
NUMPY = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_BOOL": np.bool_}
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}


class LoadError(Exception):
    """Triton would not load the model."""


class RequestError(Exception):
    """Triton would answer the request with an error."""


@dataclasses.dataclass
class Request:
    """One inference request."""

    inputs: dict[str, np.ndarray]
    sequence_id: int = 0
    start: bool = False
    end: bool = False


def read_config(folder: Path) -> Any:
    """config.pbtxt, with what Triton's core checks of every model."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    _require(config.name == folder.name, "directory name must equal model name")
    _require(PLATFORMS.get(config.backend) == config.platform, "unexpected 'platform' and 'backend' pair")
    _require(config.max_batch_size >= 0, "'max_batch_size' must be non-negative")
    for tensor in (*config.input, *config.output):
        _require(bool(tensor.name) and tensor.data_type != model_config_pb2.TYPE_INVALID, "must specify name and type")
        _require(len(tensor.dims) > 0, "must specify 'dims'")
        _require(all(dim == -1 or dim >= 1 for dim in tensor.dims), "dims must be >= 1, or -1")
        if tensor.HasField("reshape"):
            _require(config.max_batch_size > 0 or len(tensor.reshape.shape) > 0, "empty reshape without batching")
            _require(np.prod(tensor.dims) == np.prod(tensor.reshape.shape), "reshape has a different size")
    batching = config.sequence_batching
    for state in batching.state:
        (initial,) = state.initial_state
        _require(initial.data_type == state.data_type, "'initial_state' does not match the state data type")
        _require(bool(initial.name), "Field 'name' must be set when using initial_state")
        _require(len(initial.dims) == len(state.dims), "Number of dimensions in 'initial_state' doesn't match")
        _require(initial.zero_data, "initial_state setting expects state to have state_data set")
        for size, dim in zip(initial.dims, state.dims, strict=True):
            _require(size != -1, "'initial_state' contains variable dimensions")
            _require(dim in (-1, size), "'initial_state' dim doesn't match 'state' dim")
    return config


class SimulatedModel:
    """A loaded model, and the states of its sequences."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(folder / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
        states = self.config.sequence_batching.state
        self._check_inputs(len(states))
        self._check_outputs()
        # core/src/sequence_state.cc pairs them by their place in sorted order, not as the configuration does
        by_input, by_output = ({getattr(s, key): s for s in states} for key in ("input_name", "output_name"))
        self.pairs = list(zip(sorted(by_input), sorted(by_output), strict=True))
        self.states = by_input
        self.sequences: dict[int, dict[str, np.ndarray]] = {}
        self.batch_sizes: list[int] = []

    def _check_inputs(self, states: int) -> None:
        """onnxruntime_backend: ModelInstanceState::ValidateInputs."""
        real = {value.name: value for value in self.session.get_inputs()}
        _require(len(real) == len(self.config.input) + states, "configuration expects another number of inputs")
        for tensor in self.config.input:
            _require(tensor.name in real, f"unexpected inference input {tensor.name}")
            self._check_type(tensor, real[tensor.name])
            self._check_dims(tensor, real[tensor.name], exact=False)

    def _check_outputs(self) -> None:
        real = {value.name: value for value in self.session.get_outputs()}
        for tensor in self.config.output:
            _require(tensor.name in real, f"unexpected inference output {tensor.name}")
            self._check_type(tensor, real[tensor.name])
            self._check_dims(tensor, real[tensor.name], exact=True)

    def _check_type(self, tensor: Any, value: Any) -> None:
        name = model_config_pb2.DataType.Name(tensor.data_type)
        _require(name in ONNX_TYPES, f"unsupported datatype {name}")
        _require(ONNX_TYPES[name] == value.type, f"{tensor.name} is {value.type}, not {name}")

    def _check_dims(self, tensor: Any, value: Any, *, exact: bool) -> None:
        """CompareDimsSupported: all sizes of outputs, and of inputs those that are constants, must be equal."""
        model = [dim if isinstance(dim, int) else -1 for dim in value.shape]
        dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        full = [-1, *dims]
        _require(model[0] == -1 and len(model) == len(full), f"{tensor.name}: expects shape {model}, not {full}")
        for ours, size in zip(full, model, strict=True):
            _require(ours == size or (not exact and size == -1), f"{tensor.name}: expects shape {model}, not {full}")

    def infer(self, request: Request) -> dict[str, np.ndarray]:
        """One request by itself."""
        return self.infer_batch([request])[0]

    def infer_batch(self, requests: list[Request]) -> list[dict[str, np.ndarray]]:
        """Requests of different sequences, executed as one: their inputs must have equal shapes."""
        for request in requests:
            self._check_request(request)
        _require(len(requests) <= self.config.max_batch_size, "batch size exceeds max_batch_size", RequestError)
        kept = [self._begin(request) for request in requests]
        feeds = {}
        for tensor in self.config.input:
            arrays = [request.inputs[tensor.name] for request in requests]
            if tensor.HasField("reshape"):
                arrays = [array.reshape(len(array), *tensor.reshape.shape) for array in arrays]
            feeds[tensor.name] = np.concatenate(arrays)
        feeds |= {name: np.concatenate([states[name] for states in kept]) for name in self.states}
        names = [tensor.name for tensor in self.config.output] + [new for _, new in self.pairs]
        results = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.batch_sizes.append(sum(len(next(iter(request.inputs.values()))) for request in requests))
        for row, (request, states) in enumerate(zip(requests, kept, strict=True)):
            for old, new in self.pairs:
                if self.states[old].use_same_buffer_for_input_output:  # whose shape Triton does not update
                    _require(states[old].shape[1:] == results[new].shape[1:], f"{new} changed its shape", RequestError)
                states[old] = results[new][row : row + 1].copy()
            if self.states:
                self.sequences[request.sequence_id] = states
                if request.end:
                    del self.sequences[request.sequence_id]
        outputs = [tensor.name for tensor in self.config.output]
        return [{name: results[name][row : row + 1] for name in outputs} for row in range(len(requests))]

    def _check_request(self, request: Request) -> None:
        expected = {tensor.name for tensor in self.config.input}
        _require(set(request.inputs) == expected, f"expected {sorted(expected)} as inputs", RequestError)
        for tensor in self.config.input:
            array = request.inputs[tensor.name]
            wanted = NUMPY[model_config_pb2.DataType.Name(tensor.data_type)]
            _require(
                array.dtype == wanted, f"inference input data-type of {tensor.name} is {array.dtype}", RequestError
            )
            _require(array.ndim == 1 + len(tensor.dims), f"unexpected shape for input {tensor.name}", RequestError)
            fits = all(dim in (-1, size) for dim, size in zip(tensor.dims, array.shape[1:], strict=True))
            _require(fits, f"unexpected shape for input {tensor.name}", RequestError)
            if self.states:
                _require(len(array) == 1, "must specify batch-size 1 due to sequence batcher", RequestError)

    def _begin(self, request: Request) -> dict[str, np.ndarray]:
        """A sequence's states; zeros at its start, of size 1 wherever the configuration says -1."""
        if not self.states:
            return {}
        _require(request.sequence_id != 0, "must specify a non-zero or non-empty correlation ID", RequestError)
        if request.start:
            return {
                name: np.zeros(
                    (1, *(1 if dim == -1 else dim for dim in state.dims)),
                    NUMPY[model_config_pb2.DataType.Name(state.data_type)],
                )
                for name, state in self.states.items()
            }
        started = request.sequence_id in self.sequences
        _require(started, "must specify the START flag on the first request of the sequence", RequestError)
        return self.sequences[request.sequence_id]


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Triton's gRPC endpoint, as far as a client needs it."""

    def __init__(self, models: Mapping[str, SimulatedModel]) -> None:
        self._models = models

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelConfigResponse(config=self._models[request.name].config)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = self._models[request.model_name]
        types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in model.config.input}
        inputs = {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if types.get(tensor.name) != f"TYPE_{tensor.datatype}":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected inference input '{tensor.name}'")
            inputs[tensor.name] = np.frombuffer(raw, NUMPY[types[tensor.name]]).reshape(tensor.shape)
        flags = request.parameters
        asked = Request(
            inputs=inputs,
            sequence_id=flags["sequence_id"].int64_param if "sequence_id" in flags else 0,
            start="sequence_start" in flags and flags["sequence_start"].bool_param,
            end="sequence_end" in flags and flags["sequence_end"].bool_param,
        )
        try:
            results = model.infer(asked)
        except RequestError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for wanted in request.outputs:
            array = results[wanted.name]
            answer.outputs.add(name=wanted.name, datatype="FP32", shape=array.shape)
            answer.raw_output_contents.append(np.ascontiguousarray(array, np.float32).tobytes())
        return answer


@contextmanager
def serve(repository: Path) -> Iterator[tuple[str, dict[str, SimulatedModel]]]:
    """Load every model of a repository and answer on a free port; yields its address, and the models."""
    models = {folder.name: SimulatedModel(folder) for folder in sorted(repository.iterdir())}
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(models), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", models
    finally:
        server.stop(grace=None)


def _require(condition: bool, problem: str, error: type[Exception] = LoadError) -> None:
    if not condition:
        raise error(problem)
