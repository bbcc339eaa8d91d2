"""Formats of quantized weights against ml_dtypes and onnx, and the affine scheme against its own promises."""

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphs.affine import dequantize_affine, quantize_affine
from graphs.formats import own
from graphs.quantization import (
    GRIDS,
    QuantizedTensor,
    WeightFormat,
    code_values,
    largest_scales,
    nearest_codes,
    pack_nibbles,
    unpack_nibbles,
    with_scales,
)

FORMATS = [
    WeightFormat(name=name, block=block)
    for name, grid in GRIDS.items()
    for block in grid.blocks
    if block in (0, 16, 32)
]
floats = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=floats)


def rounded(weight: torch.Tensor, format: WeightFormat, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    scales, tensor_scale = largest_scales(weight, format, scale_dtype)
    return with_scales(weight, scales, format, tensor_scale)


@pytest.mark.parametrize(("name", "dtype"), [("fp8", ml_dtypes.float8_e4m3fn), ("nvfp4", ml_dtypes.float4_e2m1fn)])
def test_codes_are_the_nearest_ones_ties_to_even(name: str, dtype: type) -> None:
    format = WeightFormat(name=name, block=GRIDS[name].block)
    largest = GRIDS[name].largest
    every = np.unique(np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    every = every[np.isfinite(every) & (np.abs(every) <= largest)]
    if name == "nvfp4":
        every = np.arange(-6, 6.25, 0.25, dtype=np.float32)  # all values, ties between them, and more
    middles = np.concatenate((every, (every[1:] + every[:-1]) / 2))
    values = np.concatenate(
        (middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, -np.float32(np.inf)))
    )
    values = values[np.abs(values) <= largest]
    theirs = values.astype(dtype).astype(np.float32)
    ours = code_values(nearest_codes(torch.from_numpy(values), format), format)
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("name", GRIDS)
def test_what_lies_beyond_the_grid_becomes_its_end(name: str) -> None:
    format = WeightFormat(name=name, block=GRIDS[name].block)
    far = code_values(nearest_codes(torch.tensor([-1e9, 1e9]), format), format)
    assert far.tolist() == [GRIDS[name].lowest, GRIDS[name].largest]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_weight_is_within_half_a_step(format: WeightFormat, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 64) * torch.logspace(-3, 1, 7)[:, None]
    weight[3] = 0.0
    quantized = rounded(weight, format, scale_dtype)
    back = quantized.dequantize()
    scale = (quantized.scales * quantized.tensor_scale).repeat_interleave(64 // quantized.scales.shape[1], dim=1)
    # steps of e2m1 and e4m3 grow with the number: 1/4 and 1/16 of it at most, between neighbours
    step = {"int8": 1.0, "int4": 1.0, "fp8": 2.0**-9, "nvfp4": 0.5}[format.name] * scale
    step = torch.maximum(step, weight.abs() * {"fp8": 2.0**-3, "nvfp4": 0.5}.get(format.name, 0.0))
    # a scale that was rounded down leaves the largest number of its block beyond the grid
    cut = weight.abs() - scale * GRIDS[format.name].largest
    assert ((weight - back).abs() <= torch.maximum(step / 2 * (1 + 1e-6), cut * (1 + 1e-6))).all()
    assert (back[3] == 0).all()
    assert torch.equal(quantized.scales.to(scale_dtype).float(), quantized.scales) or format.name == "nvfp4"


@given(st.lists(st.integers(-8, 7), min_size=0, max_size=9))
def test_nibbles_are_packed_as_onnx_packs_them(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    theirs = onnx.numpy_helper.from_array(np.array(codes, np.int8).astype(ml_dtypes.int4), "x").raw_data
    assert packed.numpy().tobytes() == theirs
    assert unpack_nibbles(packed, len(codes), signed=True).tolist() == codes
    assert unpack_nibbles(packed, len(codes), signed=False).tolist() == [code % 16 for code in codes]


@pytest.mark.parametrize("format", [f for f in FORMATS if f.name in ("int4", "int8")], ids=str)
@pytest.mark.parametrize("with_zero_points", [False, True])
def test_stored_parts_are_what_onnx_dequantizes(format: WeightFormat, with_zero_points: bool) -> None:
    """The parts as they are written, read by onnx's own reference of DequantizeLinear."""
    torch.manual_seed(1)
    quantized = rounded(torch.randn(5, 64), format)
    groups = quantized.scales.shape
    if with_zero_points:
        zero_points = torch.randint(-8, 8, groups, dtype=torch.int8)
        quantized = QuantizedTensor(
            format=format, codes=quantized.codes, scales=quantized.scales, zero_points=zero_points
        )
    parts = own.parts(quantized, torch.float32)
    specs = own.part_specs((5, 64), format, "F32", zero_points=with_zero_points)
    assert {suffix: (own.DTYPE_NAMES[part.dtype], tuple(part.shape)) for suffix, part in parts.items()} == specs
    onnx_type = {"int4": onnx.TensorProto.INT4, "int8": onnx.TensorProto.INT8}[format.name]
    dims = [64 // format.block, 5] if format.block else [5]
    initializers = [
        onnx.helper.make_tensor("codes", onnx_type, [64, 5], parts[""].numpy().tobytes(), raw=True),
        onnx.helper.make_tensor("scales", onnx.TensorProto.FLOAT, dims, parts["_scale"].numpy().tobytes(), raw=True),
    ]
    if with_zero_points:
        raw = parts["_zero_point"].numpy().tobytes()
        initializers.append(onnx.helper.make_tensor("zeros", onnx_type, dims, raw, raw=True))
    blocks = {"axis": 0, "block_size": format.block} if format.block else {"axis": 1}
    names = [tensor.name for tensor in initializers]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("DequantizeLinear", names, ["y"], **blocks)],
        "dequantize",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 5])],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    (theirs,) = onnx.reference.ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(quantized.dequantize().t().numpy(), theirs)


def test_nvfp4_is_codes_times_both_scales() -> None:
    format = WeightFormat(name="nvfp4", block=16)
    scales = torch.tensor([[2.0], [0.5]])
    codes = torch.arange(16, dtype=torch.int8).repeat(2, 1)
    tensor = QuantizedTensor(format=format, codes=codes, scales=scales, tensor_scale=0.25)
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), np.stack((e2m1 * 0.5, e2m1 * 0.125)))


@given(arrays, st.integers(2, 8))
def test_affine_round_trip_is_within_half_a_step(x: np.ndarray, bits: int) -> None:
    quantized = quantize_affine(torch.from_numpy(x), bits)
    back = dequantize_affine(quantized, torch.float64).numpy()
    # rounding the zero point may move the range by half a step, so that its ends are cut by as much
    assert np.abs(back - x).max() <= quantized.scale * (1 + 1e-9)
    inside = (quantized.codes.numpy() > 0) & (quantized.codes.numpy() < 2**bits - 1)
    assert (np.abs(back - x)[inside] <= quantized.scale / 2 * (1 + 1e-9)).all()
    assert 0 <= quantized.zero_point <= 2**bits - 1
    assert quantized.codes.max() <= 2**bits - 1


@given(arrays)
def test_affine_codes_keep_order_and_zero(x: np.ndarray) -> None:
    x = np.append(x.ravel(), np.float32(0.0))
    quantized = quantize_affine(torch.from_numpy(x))
    back = dequantize_affine(quantized).numpy()
    assert back[-1] == 0.0
    order = np.argsort(x, kind="stable")
    assert (np.diff(back[order]) >= 0).all()


@given(arrays)
def test_affine_quantizes_what_it_dequantized_to_the_same_codes(x: np.ndarray) -> None:
    first = quantize_affine(torch.from_numpy(x))
    codes = first.codes.to(torch.float64)
    assert torch.equal(torch.round(dequantize_affine(first, torch.float64) / first.scale + first.zero_point), codes)


def test_affine_by_hand() -> None:
    codes, scale, zero_point = quantize_affine(torch.tensor([-1.0, 0.0, 0.5, 1.55]))
    assert (scale, zero_point) == (pytest.approx(2.55 / 255), 100)
    assert codes.tolist() == [0, 100, 150, 255]
    assert quantize_affine(torch.tensor([0.0, 0.0])).codes.tolist() == [0, 0]
    assert quantize_affine(torch.tensor([3.0, 3.0])).codes.tolist() == [255, 255]  # all above 0: every code is used


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_affine_refuses_what_has_no_code(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        quantize_affine(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="num_bits must be from 2 to 8, got 9"):
        quantize_affine(torch.tensor([1.0]), 9)
