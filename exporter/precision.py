"""The precisions an export can have, and what each is called where."""

from dataclasses import dataclass

import onnx_ir as ir

from exporter.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One model dtype under the names of each party."""

    name: str  # on the command line
    dtype: str  # numpy's and torch's
    safetensors: str
    onnx: ir.DataType


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(name="fp32", dtype="float32", safetensors="F32", onnx=ir.DataType.FLOAT),
    "fp16": Precision(name="fp16", dtype="float16", safetensors="F16", onnx=ir.DataType.FLOAT16),
    "bf16": Precision(name="bf16", dtype="bfloat16", safetensors="BF16", onnx=ir.DataType.BFLOAT16),
}


def find_precision(name: str | None, stored: str) -> Precision:
    """The precision called `name`; without one, that of the checkpoint's own dtype (`stored`: F32, F16 or BF16)."""
    if name is None:
        return next(precision for precision in PRECISIONS.values() if precision.safetensors == stored)
    if name not in PRECISIONS:
        raise ExportError(f"precision {name!r} is not supported; supported: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
