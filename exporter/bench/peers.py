"""Other programs that run the same checkpoint: what each needs, and which precisions it has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One program. Its engine is a class in a module of exporter.bench.engines."""

    engine: tuple[str, str]  # module, class
    modules: tuple[str, ...]  # that must be importable in its interpreter
    install: str  # what pip is told
    precisions: Mapping[str, str]  # ours: what it calls the same
    option: str | None = None  # which option of its engine names the precision; None: the model it made says so
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_context: bool = False  # its engine wants to know how many tokens there will be at most
    prepares_here: bool = False  # its model is made by our interpreter, not by its own
    max_batch: int | None = None


_TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

PEERS = {
    "onnxruntime-genai": Peer(
        engine=("onnxruntime_genai", "GenaiEngine"),
        modules=("onnxruntime_genai", "onnx", "onnx_ir", "torch", "transformers"),
        install="onnxruntime-genai onnx onnx-ir torch transformers",
        precisions={"fp32": "fp32", "int4": "int4", "int8": "int8"},
    ),
    "transformers": Peer(
        engine=("huggingface", "TransformersEngine"),
        modules=("torch", "transformers"),
        install="torch transformers",
        precisions=_TORCH_DTYPES,
        option="dtype",
    ),
    "torch.compile": Peer(
        engine=("huggingface", "TransformersEngine"),
        modules=("torch", "transformers"),
        install="torch transformers",
        precisions=_TORCH_DTYPES,
        option="dtype",
        options={"compiled": True},
    ),
    "llama-cpp-python": Peer(
        engine=("llama_cpp", "LlamaCppEngine"),
        modules=("llama_cpp",),
        install="llama-cpp-python",
        precisions={"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"},
        takes_context=True,
        prepares_here=True,
        max_batch=1,
    ),
}
