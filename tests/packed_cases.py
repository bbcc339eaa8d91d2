"""Weights packed as GPTQ and AWQ checkpoints hold them, one number at a time, from the formats' definitions."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What is to be packed. N outputs, K inputs, G groups."""

    bits: int
    codes: np.ndarray  # [N, K]
    zeros: np.ndarray  # [N, G]
    scales: Tensor  # [N, G], in the dtype that is stored
    groups: np.ndarray  # [K]

    @property
    def weight(self) -> Tensor:
        """[N, K], in float64: exact, for scales of up to 32 bits."""
        numbers = torch.empty(self.codes.shape, dtype=torch.float64)
        for n, k in np.ndindex(*self.codes.shape):
            group = self.groups[k]
            difference = int(self.codes[n, k]) - int(self.zeros[n, group])
            numbers[n, k] = difference * float(self.scales[n, group])
        return numbers


def layer(
    outputs: int = 16,
    inputs: int = 128,
    *,
    group: int = 32,
    bits: int = 4,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Layer:
    """Random codes; zeros from 1, or all in the middle."""
    random = np.random.default_rng(seed)
    count = -(-inputs // (inputs if group == -1 else group))
    zeros = random.integers(1, 2**bits, (outputs, count))
    return Layer(
        bits=bits,
        codes=random.integers(0, 2**bits, (outputs, inputs)),
        zeros=np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=torch.from_numpy(random.uniform(0.001, 0.1, (outputs, count))).to(dtype),
        groups=np.arange(inputs) // (inputs if group == -1 else group),
    )


def library_layer(bits: int) -> Layer:
    """A layer that formulas give, of the smallest size that the libraries' packers take."""
    n, k = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    groups = np.arange(2)[None, :]
    return Layer(
        bits=bits,
        codes=(k * k + 3 * n + n * k // 5) % 2**bits,
        zeros=(5 * n[:, :2] + 3 * groups) % (2**bits - 1) + 1,
        scales=torch.from_numpy(2.0 ** -((n[:, :2] + groups) % 5)).half(),
        groups=np.arange(32) // 16,
    )


def words(shape: tuple[int, int], fields: Mapping[tuple[int, int, int], int]) -> Tensor:
    """int32 words of {(row, column, lowest bit): number}."""
    packed = [[0] * shape[1] for _ in range(shape[0])]
    for (row, column, bit), number in fields.items():
        packed[row][column] |= number << bit
    return torch.from_numpy(np.array(packed, dtype=np.uint32).view(np.int32))


def pack_gptq(layer: Layer, version: str = "gptq") -> dict[str, Tensor]:
    """Words run along the inputs, and for zeros along the outputs; "gptq" stores zeros less one."""
    (outputs, inputs), groups, per_word = layer.codes.shape, layer.zeros.shape[1], 32 // layer.bits
    codes = {
        (k // per_word, n, layer.bits * (k % per_word)): int(layer.codes[n, k]) for n, k in np.ndindex(outputs, inputs)
    }
    zeros = {
        (g, n // per_word, layer.bits * (n % per_word)): int(layer.zeros[n, g]) - (version == "gptq")
        for n, g in np.ndindex(outputs, groups)
    }
    return {
        "qweight": words((-(-inputs // per_word), outputs), codes),
        "qzeros": words((groups, -(-outputs // per_word)), zeros),
        "scales": layer.scales.t().contiguous(),
        "g_idx": torch.from_numpy(layer.groups.astype(np.int32)),
    }


def pack_awq(layer: Layer) -> dict[str, Tensor]:
    """Words run along the outputs: those at 0, 2, 4, 6, 1, 3, 5 and 7 from the lowest bits up."""
    (outputs, inputs), groups = layer.codes.shape, layer.zeros.shape[1]
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = {
        (k, word, 4 * place): int(layer.codes[8 * word + order[place], k])
        for k, word, place in np.ndindex(inputs, outputs // 8, 8)
    }
    zeros = {
        (g, word, 4 * place): int(layer.zeros[8 * word + order[place], g])
        for g, word, place in np.ndindex(groups, outputs // 8, 8)
    }
    return {
        "qweight": words((inputs, outputs // 8), codes),
        "qzeros": words((groups, outputs // 8), zeros),
        "scales": layer.scales.t().contiguous(),
    }


def named(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}
