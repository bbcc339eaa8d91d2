"""QuantizedLinear: a weight in codes multiplies as the numbers that docs/formats.md says its codes stand for."""

import math

import pytest
import torch
from torch import nn

from graphs.formats import own
from graphs.quantization import QuantizedTensor, WeightFormat, largest_scales, nearest_codes
from graphs.quantized_linear import QuantizedLinear

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CASES = {  # (format, outputs, inputs, with zero points)
    "int8, a scale an output": (WeightFormat(name="int8", block=0), 6, 32, False),
    "int8, blocks": (WeightFormat(name="int8", block=16), 5, 48, True),
    "int4": (WeightFormat(name="int4", block=16), 6, 48, False),
    "int4, zero points": (WeightFormat(name="int4", block=16), 6, 48, True),
    "int4, bytes that two outputs share": (WeightFormat(name="int4", block=16), 5, 48, True),
    "fp8": (WeightFormat(name="fp8", block=0), 6, 32, False),
    "nvfp4": (WeightFormat(name="nvfp4", block=16), 6, 32, False),
}


def quantized(format: WeightFormat, outputs: int, inputs: int, zero_points: bool) -> QuantizedTensor:
    """Random codes of a random weight."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=rng)
    scales, tensor_scale = largest_scales(weight, format, torch.float32)
    groups = weight.unflatten(1, (scales.shape[1], -1)) / (scales * tensor_scale)[..., None]
    zeros = torch.randint(-3, 4, scales.shape, generator=rng, dtype=torch.int8) if zero_points else None
    return QuantizedTensor(
        format=format,
        codes=nearest_codes(groups, format).flatten(1),
        scales=scales,
        zero_points=zeros,
        tensor_scale=tensor_scale,
    )


def value(tensor: QuantizedTensor, n: int, k: int) -> float:
    """One number of the weight, by the formula."""
    code, group = tensor.codes[n, k], k // (tensor.format.block or tensor.shape[1])
    number = float(code)
    if tensor.format.name == "nvfp4":
        number = math.copysign(FP4[int(code) % 8], -1 if int(code) > 7 else 1)
    zero = 0 if tensor.zero_points is None else int(tensor.zero_points[n, group])
    return (number - zero) * float(tensor.scales[n, group]) * tensor.tensor_scale


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("one_token", [False, True])
def test_multiplies_as_the_formula_says(case: str, one_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and as the sum of products that a decode step is traced as."""
    tensor = quantized(*CASES[case])
    outputs, inputs = tensor.shape
    weight = torch.tensor([[value(tensor, n, k) for k in range(inputs)] for n in range(outputs)], dtype=torch.float64)
    bias = nn.Parameter(torch.arange(outputs, dtype=torch.float32), requires_grad=False)
    layer = QuantizedLinear(tensor.format, tensor.shape, own.parts(tensor, torch.float32), bias, torch.float32)
    x = torch.randn(2, 1 if one_token else 3, inputs, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: one_token)
    expected = x.double() @ weight.t() + bias.double()
    torch.testing.assert_close(layer.weight.double(), weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("outputs", [(0, 2), (2, 6), (1, 4)])
@pytest.mark.parametrize("case", ["int8, blocks", "int4, zero points", "int4, bytes that two outputs share"])
@pytest.mark.parametrize("one_token", [False, True])
def test_several_layers_may_share_a_matrix(
    case: str, outputs: tuple[int, int], one_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has some of its outputs, whether bytes end where they do or not."""
    tensor = quantized(*CASES[case])
    first, end = outputs[0], min(outputs[1], tensor.shape[0])
    weight = [[value(tensor, n, k) for k in range(tensor.shape[1])] for n in range(first, end)]
    parts = own.parts(tensor, torch.float32)
    layer = QuantizedLinear(tensor.format, tensor.shape, parts, None, torch.float32, (first, end))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: one_token)
    x = torch.randn(2, 1, tensor.shape[1], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ torch.tensor(weight, dtype=torch.float64).t()
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-5)


def test_the_result_has_the_models_dtype() -> None:
    """Sums are float32 inside, whatever the model computes in."""
    tensor = quantized(*CASES["int4"])
    parts = own.parts(tensor, torch.float16)
    layer = QuantizedLinear(tensor.format, tensor.shape, parts, None, torch.float16)
    assert layer(torch.ones(1, 2, 48, dtype=torch.float16)).dtype == torch.float16
