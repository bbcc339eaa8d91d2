"""config.pbtxt of a Triton model: the fields of Triton's own message inference.ModelConfig.

Rules that no example shows, read in the sources of Triton's core and of its ONNX Runtime backend:

- Every input of the graph must be listed once, as an input or as a state; dims leave the batch dimension out.
- A tensor of the batch dimension alone is listed with one element and reshaped to none.
- A sequence's first request sees its states with 1 in place of every -1, whatever initial_state says. A cache that
  grows thus begins with a slot that holds nothing, which the client's attention_mask must hide.
- State tensors are paired by their place in the alphabet (github.com/triton-inference-server/server/issues/8586), so
  sorted inputs and sorted outputs must be in the same order.
- Requests are batched when their inputs have equal shapes; states are not compared, but follow from the mask's shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.packaging.pbtxt import Word
from runtimes.signature import CacheSpec, GraphSignature, TensorSpec

TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "bool": "TYPE_BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One of Triton's backends."""

    name: str
    platform: str
    model_file: str
    kinds: Mapping[str | None, str]  # {--device: kind of instance}
    dtypes: frozenset[str]  # of tensors that it passes on


BACKENDS = {
    "onnxruntime": Backend(
        name="onnxruntime",
        platform="onnxruntime_onnx",
        model_file="model.onnx",
        kinds={None: "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"},
        dtypes=frozenset(TYPES) - {"bfloat16"},  # github.com/triton-inference-server/server/issues/8464
    ),
    "tensorrt": Backend(
        name="tensorrt",
        platform="tensorrt_plan",
        model_file="model.plan",
        kinds={None: "KIND_GPU", "cuda": "KIND_GPU"},
        dtypes=frozenset(TYPES),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is to be run."""

    backend: Backend
    device: str | None
    max_batch: int
    threads: int | None
    profiles: int  # optimisation profiles of an engine
    use_tf32: bool  # False: float32 is to be float32


def stateless_config(name: str, signature: GraphSignature, serving: Serving) -> dict[str, Any]:
    """A graph that keeps nothing."""
    return _config(name, list(signature.inputs), list(signature.outputs), serving, {}, {})


def decoder_config(
    name: str,
    signature: GraphSignature,
    cache: CacheSpec,
    serving: Serving,
    *,
    max_sequences: int,
    idle_timeout_s: float,
    parameters: Mapping[str, object],
) -> dict[str, Any]:
    """A decoder whose cache stays in the server, sequence by sequence, as Triton's implicit state."""
    states = cache_states(signature, cache)
    past = {state["input_name"] for state in states}
    present = {state["output_name"] for state in states}
    batching = {
        "max_sequence_idle_microseconds": round(idle_timeout_s * 1e6),
        "oldest": {"max_candidate_sequences": max_sequences},
        "state": states,
    }
    parameters = {**parameters, "empty_slots": int(any(-1 in state["dims"] for state in states))}
    inputs = [spec for spec in signature.inputs if spec.name not in past]
    outputs = [spec for spec in signature.outputs if spec.name not in present]
    return _config(name, inputs, outputs, serving, {"sequence_batching": batching}, parameters)


def cache_states(signature: GraphSignature, cache: CacheSpec) -> list[dict[str, Any]]:
    """An implicit state for each tensor of the cache, zero at first."""
    names = list(zip(cache.past_names(), cache.present_names(), strict=True))
    assert [new for _, new in sorted(names)] == sorted(new for _, new in names), "Triton would confuse the states"
    past = {spec.name: spec for spec in signature.inputs}
    states = []
    for (old, new), tensor in zip(names, cache.tensors, strict=True):
        in_place = new in signature.aliases
        dims = list(tensor.shape) if in_place else _dims(past[old])
        states.append(
            {
                "input_name": old,
                "output_name": new,
                "data_type": Word(TYPES[tensor.dtype]),
                "dims": dims,
                "initial_state": {
                    "name": f"zero {old}",
                    "data_type": Word(TYPES[tensor.dtype]),
                    "dims": [1 if dim == -1 else dim for dim in dims],
                    "zero_data": True,
                },
                **({"use_same_buffer_for_input_output": True} if in_place else {}),
            }
        )
    return states


def _config(
    name: str,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    serving: Serving,
    scheduling: Mapping[str, Any],
    parameters: Mapping[str, object],
) -> dict[str, Any]:
    backend = serving.backend
    group: dict[str, Any] = {"count": 1, "kind": Word(backend.kinds[serving.device])}
    if serving.profiles > 1:
        group["profile"] = [str(index) for index in range(serving.profiles)]
    texts = dict(parameters)
    if serving.threads is not None:
        texts["intra_op_thread_count"] = serving.threads
    return {
        "name": name,
        "platform": backend.platform,
        "backend": backend.name,
        "max_batch_size": serving.max_batch,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [_tensor(spec) for spec in inputs],
        "output": [_tensor(spec) for spec in outputs],
        **scheduling,
        "instance_group": [group],
        **({} if serving.use_tf32 else {"optimization": _without_tf32()}),
        "parameters": [{"key": key, "value": {"string_value": str(text)}} for key, text in texts.items()],
    }


def _without_tf32() -> dict[str, Any]:
    """The CUDA provider's default is TF32, which is not what fp32 promises; on the CPU it says nothing."""
    cuda = {"name": "cuda", "parameters": [{"key": "use_tf32", "value": "0"}]}
    return {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    entry = {"name": spec.name, "data_type": Word(TYPES[spec.dtype])}
    dims = _dims(spec)
    return entry | ({"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}})


def _dims(spec: TensorSpec) -> list[int]:
    """Without the batch dimension; -1 where it varies."""
    assert spec.shape[0] == "batch_size", f"{spec.name} has no rows that requests could be batched by"
    return [dim if isinstance(dim, int) else -1 for dim in spec.shape[1:]]
