"""Rewrite a graph so that ONNX Runtime can run it on the CPU, with the same weights.

It has no bfloat16 kernels there, and none for float4. A graph of 16-bit floats is widened to float32; it can then be
checked to float32 accuracy as well: only the rounding of intermediate results is missing, behind which a mistake might
hide. Weights in float4 become whole numbers of 8 bits, exactly.
"""

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import ArtifactError, RuntimeMissingError
from runtimes.files import require_inside, shown, why_no_file


def load_onnx(path: Path) -> Any:
    """The model in `path` as an onnx.ModelProto, its external data not loaded. Needs the onnx package.

    Raises:
        RuntimeMissingError: there is no onnx package.
        ArtifactError: the file is missing or damaged.
    """
    try:
        import onnx
    except ImportError:
        raise RuntimeMissingError(
            "computing a 16-bit graph in float32 on the CPU needs the onnx package: pip install onnx"
        ) from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # onnx is built on it

    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: export again") from None
    except DecodeError as error:
        raise ArtifactError(f"{path} is damaged ({error}): export again") from None


def external_file(graph: Path, location: str) -> Path:
    """The file of weights that a graph's external data names; ArtifactError unless it lies beside the graph."""
    if Path(location).name != location or location in ("", ".", ".."):
        raise ArtifactError(
            f"{graph} has weights in {shown(location)}, expected the name of a file beside it: export again"
        )
    require_inside(graph.parent / location)
    return graph.parent / location


def widen(model: Any) -> bytes:
    """The onnx.ModelProto, serialised, with every 16-bit float of its kind made float32 (`model` itself is changed).

    Weights stay where they are, as they are; each is followed by a Cast.
    """
    import onnx

    graph = model.graph
    float32 = onnx.TensorProto.FLOAT
    # The graph's own: whatever is cast to another one is rounded on purpose, or by mistake.
    own = {value.type.tensor_type.elem_type for value in graph.input} | {each.data_type for each in graph.initializer}
    narrow = own & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

    casts = []
    renamed = {}
    for tensor in graph.initializer:
        if tensor.data_type in narrow:
            renamed[tensor.name] = f"{tensor.name}/float32"
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [renamed[tensor.name]], to=float32))
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = float32
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = float32
    del graph.value_info[:]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    serialized: bytes = model.SerializeToString()
    return serialized


FLOAT32_ACTIVATIONS = 1  # MatMulNBits' accuracy_level


def multiply_in_float32(model: Any) -> None:
    """Let quantized weights multiply what they are given, and not that rounded to 8 bits."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT32_ACTIVATIONS


# Twice what the codes of float4 e2m1 stand for: whole numbers.
_TWICE_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def expand_float4(model: Any, folder: Path) -> None:
    """Replace float4 weights with float8 scales, as DequantizeLinear reads them, by int8 ones with float32 scales.

    Args:
        model: an onnx.ModelProto, which is changed.
        folder: where its external data lies.

    Raises:
        ArtifactError: the graph is damaged, or its weights are not where it says.
    """
    try:
        _expand_float4(model, folder)
    except ArtifactError:
        raise
    except (LookupError, ValueError, OSError) as error:
        raise ArtifactError(
            f"the graph in {folder} is damaged ({type(error).__name__}: {error}): export again"
        ) from None


def _expand_float4(model: Any, folder: Path) -> None:
    import ml_dtypes
    import onnx

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    gone: list[Any] = []

    def raw(name: str) -> bytes:
        external = {entry.key: entry.value for entry in initializers[name].external_data}
        path = external_file(folder / "the graph", external["location"])
        if reason := why_no_file(path):
            raise ArtifactError(f"{path} cannot be read: {reason}")
        with path.open("rb") as file:
            file.seek(int(external["offset"]))
            return file.read(min(int(external["length"]), path.stat().st_size))

    for node in list(graph.node):
        codes = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != onnx.TensorProto.FLOAT4E2M1:
            continue
        scales = makers[node.input[1]]
        shape, scale_shape = list(codes.dims), list(initializers[scales.input[0]].dims)
        packed = np.frombuffer(raw(codes.name), np.uint8)
        doubled = _TWICE_FP4[np.stack((packed & 0xF, packed >> 4), axis=1).reshape(-1)[: np.prod(shape)]]
        block_scales = np.frombuffer(raw(scales.input[0]), ml_dtypes.float8_e4m3fn).astype(np.float32)
        halves = block_scales * np.frombuffer(raw(scales.input[1]), np.float32) / 2
        for name, array in ((f"{codes.name}/int8", doubled.reshape(shape)), (scales.output[0], halves)):
            made = array if name != scales.output[0] else array.reshape(scale_shape)
            graph.initializer.append(onnx.numpy_helper.from_array(made, name))
        node.input[0] = f"{codes.name}/int8"
        graph.node.remove(scales)
        gone += [codes, *(initializers[name] for name in scales.input)]
    for tensor in gone:
        graph.initializer.remove(tensor)
