"""A linear layer whose weight stays in the codes it is stored in, from operators that a compiler can fuse.

Codes, scales and zero points are buffers as graphs.formats.own stores them, inputs first; docs/formats.md. Letters: N
outputs, K inputs, G blocks of C inputs each that share a scale.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.formats.own import SCALE, TENSOR_SCALE, ZERO_POINT
from graphs.quantization import WeightFormat

# Buffers' names, by what stands behind the weight's name in the file.
BUFFERS = {"": "codes", SCALE: "scales", ZERO_POINT: "zero_points", TENSOR_SCALE: "tensor_scale"}


def _signed(nibbles: Tensor) -> Tensor:
    """Whole numbers from -8 to 7."""
    return (nibbles ^ 8).to(torch.float32) - 8


def _e2m1(nibbles: Tensor) -> Tensor:
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: computed, because a table look-up does not vectorise."""
    magnitude = (nibbles & 7).to(torch.float32)
    value = torch.where(magnitude < 4, magnitude / 2, torch.where(magnitude < 6, magnitude - 2, 2 * magnitude - 8))
    return torch.where(nibbles > 7, -value, value)


def _whole(codes: Tensor) -> Tensor:
    return codes.to(torch.float32)


def _computed(x: Tensor) -> Tensor:
    """x as numbers in memory: a compiler would else compute them anew for each output that they are multiplied into."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


# format: (the values of codes as they are unpacked, codes in a byte)
VALUES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "int8": (_whole, 1),
    "int4": (_signed, 2),
    "fp8": (_whole, 1),
    "nvfp4": (_e2m1, 2),
}


class QuantizedLinear(nn.Module):
    """x W^T + bias, with W = scale * (value of the code - zero point), computed in float32 in every call."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    tensor_scale: Tensor | None

    def __init__(
        self,
        format: WeightFormat,
        shape: tuple[int, int],
        parts: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        outputs: tuple[int, int] | None = None,
    ) -> None:
        """Make the layer.

        Args:
            shape: (N, K) of the stored matrix.
            parts: by suffix of its name, as graphs.formats.own.part_specs lists them.
            dtype: of the weight as it is multiplied, and of the result.
            outputs: the first one that is the layer's own, and one past the last, of a matrix that several share.
        """
        super().__init__()
        self.format = format
        self.stored_outputs, self.in_features = shape
        self.first, self.end = outputs or (0, shape[0])
        self.dtype = dtype
        self.bias = bias
        for suffix, name in BUFFERS.items():
            self.register_buffer(name, parts.get(suffix))

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        planes = [(values * scales).flatten(0, 1) for values, scales in self._planes()]
        return torch.stack(planes, dim=-1).flatten(1).t().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # One token a row, for a compiler: a sum of products, which reads each code once and writes no weight anywhere.
        one_token = torch.compiler.is_exporting() and isinstance(x.shape[-2], int) and x.shape[-2] == 1
        if one_token:
            groups = _computed(x.to(torch.float32)).unflatten(-1, (self._groups, -1)).unsqueeze(-1)
            sums = [((groups * values).sum(dim=-2) * scales[:, 0]).sum(dim=-2) for values, scales in self._planes()]
            out = torch.stack(sums, dim=-1).flatten(-2).to(self.dtype)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)

    @property
    def _groups(self) -> int:
        return self.format.scales_of(self.in_features)

    @property
    def _step(self) -> int:
        """How many planes the outputs are taken apart into: as many as codes share a byte, where no byte is shared with
        the next input's outputs or another layer's."""
        in_byte = VALUES[self.format.name][1]
        return 1 if any(number % in_byte for number in (self.stored_outputs, self.first, self.end)) else in_byte

    def _planes(self) -> list[tuple[Tensor, Tensor]]:
        """Of every P-th output, from the first on, from the second on, ..: (float32 numbers before any scale
        [G, C, outputs / P], their scales [G, 1, outputs / P]); P is _step."""
        values, step = VALUES[self.format.name][0], self._step
        codes, zero_points = self._unpack(self.codes), self._unpack(self.zero_points)
        own = slice(self.first // step, self.end // step)
        scales = self.scales.to(torch.float32)
        if self.tensor_scale is not None:
            scales = scales * self.tensor_scale
        planes = []
        for index in range(step):
            shape = (self._groups, -1, self.stored_outputs // step)
            plane = values(codes[index].reshape(shape)[..., own])
            if zero_points:
                plane = plane - values(zero_points[index].reshape(shape)[..., own])
            planes.append((plane, scales.reshape(self._groups, 1, self.stored_outputs)[..., index::step][..., own]))
        return planes

    def _unpack(self, codes: Tensor | None) -> list[Tensor]:
        """The codes of each plane, of all stored outputs."""
        if codes is None or VALUES[self.format.name][1] == 1:
            return [] if codes is None else [codes]
        low, high = codes & 0xF, codes >> 4
        if self._step > 1:
            return [low, high]
        count = self.stored_outputs * (self.in_features if codes is self.codes else self._groups)
        return [torch.stack((low, high), dim=-1).flatten()[:count]]
