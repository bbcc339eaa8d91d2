"""Export one attention layer alone, as a graph without decoding state: x in, y out.

It is the only export of layers that have no causal incremental form (Linformer), and shows any other by itself.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from exporter.capture import EXAMPLE_SIZES
from exporter.layouts import LAYOUTS
from exporter.lowering import lower
from exporter.pipeline import save_checked
from exporter.quiet import quiet_torch
from exporter.weights import WeightPlan, attach_weights
from graphs.checkpoint import SINGLE_FILE, TensorRef, read_header
from graphs.transformer import real_buffers
from runtimes.onnxruntime_session import run_model_file
from runtimes.parity import Rung, compare
from runtimes.signature import DimRange, GraphSignature, TensorSpec

STATELESS_FILE = "layer.onnx"
CHECK_LENGTH = 7
CHECK_ROWS = 2


def export_stateless(
    layer: nn.Module, out: Path, *, embed_dim: int, max_len: int, max_batch: int = 8
) -> tuple[GraphSignature, Rung]:
    """Write out/layer.onnx and out/model.safetensors, run it on ONNX Runtime, and compare.

    Args:
        layer: any of graphs/attention, with its weights, all of one dtype; float32 or float16.
        out: folder, made if it is not there; files of these names are replaced.
        embed_dim: width of x.
        max_len, max_batch: the largest x that is promised to work.

    Returns:
        The graph's signature, and how far its result lies from float64 eager PyTorch's (Rung.passed is the verdict).
    """
    layer = copy.deepcopy(layer).eval().requires_grad_(False)
    (dtype,) = {parameter.dtype for parameter in layer.parameters()}
    signature = _signature(embed_dim, str(dtype).removeprefix("torch."), max_len, max_batch)
    out.mkdir(parents=True, exist_ok=True)
    parameters = {name: parameter.contiguous() for name, parameter in layer.named_parameters()}
    save_file(parameters, out / SINGLE_FILE, metadata={"format": "pt"})
    on_meta = copy.deepcopy(layer).to("meta")
    sizes = [EXAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in signature.inputs[0].shape]
    dims = {0: Dim("batch_size", min=1), 1: Dim("sequence_length", min=1, max=max_len)}
    with quiet_torch(), torch.no_grad():
        example = torch.empty(sizes, dtype=dtype, device="meta")
        program = torch.export.export(_Alone(on_meta), (example,), dynamic_shapes=(dims,), strict=False)
    refs = {name: TensorRef(name) for name in parameters}
    model = lower(program, LAYOUTS["portable"], signature, refs, real_buffers(layer), name="layer").model
    stored = read_header(out / SINGLE_FILE)
    placed = {name: dataclasses.replace(tensor, path=Path(SINGLE_FILE)) for name, tensor in stored.items()}
    attach_weights(model, WeightPlan(placed=placed, nbytes=0))
    save_checked(model, out / STATELESS_FILE)
    return signature, _check(layer, out / STATELESS_FILE, embed_dim, min(CHECK_LENGTH, max_len), dtype)


class _Alone(nn.Module):
    """The layer, called with x only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.wrapped = layer  # the name that lowering takes off

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


def _signature(embed_dim: int, dtype: str, max_len: int, max_batch: int) -> GraphSignature:
    shape = ("batch_size", "sequence_length", embed_dim)
    return GraphSignature(
        inputs=(TensorSpec(name="x", dtype=dtype, shape=shape),),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=shape),),
        dims={
            "batch_size": DimRange(min=1, opt=1, max=max_batch),
            "sequence_length": DimRange(min=1, opt=min(128, max_len), max=max_len),
        },
        aliases={},
        limits={},
    )


def _check(layer: nn.Module, path: Path, embed_dim: int, length: int, dtype: torch.dtype) -> Rung:
    x = torch.randn(CHECK_ROWS, length, embed_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        eager = layer(x)
        truth = copy.deepcopy(layer).double()(x.double())
    (found,) = run_model_file(path, [x.numpy()])
    name = str(dtype).removeprefix("torch.")
    return compare("stateless layer", found, truth.numpy(), eager.double().numpy(), name)
