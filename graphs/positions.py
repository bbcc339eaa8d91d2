"""Rotary position embedding: frequencies, their scalings, and the tables of cosines and sines."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """float32 [dim / 2] on the CPU: the angle per position of each pair, after `rope.rope_type`'s scaling."""
    with torch.device("cpu"):
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
        return ROPE_TYPES[rope.rope_type](1.0 / (rope.theta**exponents), rope)


def _default(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    return inv_freq


def _linear(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Position interpolation, arXiv:2306.15595."""
    return inv_freq / rope.factor


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_max_position_embeddings / wavelength  # full turns within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)  # 0: slowed fully, 1: kept
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


ROPE_TYPES: dict[str, Callable[[Tensor, RopeConfig], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}


class RotaryPositionalEmbeddings(nn.Module):
    """Rotary embeddings with torchtune's interface; pairs are interleaved unless `interleaved=False` (Hugging Face).

    Args:
        dim: head dimension, even.
        max_seq_len: positions at or above it are the caller's error.
        base: theta of the geometric progression of frequencies.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 10_000, *, interleaved: bool = True) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim ({dim}) must be even: rotary embeddings turn pairs")
        self._setup(RopeConfig(theta=float(base), interleaved=interleaved), dim, max_seq_len)

    @classmethod
    def from_config(cls, rope: RopeConfig, dim: int, max_seq_len: int) -> "RotaryPositionalEmbeddings":
        """With any scaling that RopeConfig can express."""
        module = cls(dim, max_seq_len, rope.theta, interleaved=rope.interleaved)
        module._setup(rope, dim, max_seq_len)
        return module

    def _setup(self, rope: RopeConfig, dim: int, max_seq_len: int) -> None:
        self.rope = rope
        self.dim = dim
        self.max_seq_len = max_seq_len
        table = inverse_frequencies(rope, dim).to(torch.get_default_device())
        self.register_buffer("inv_freq", table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryPositionalEmbeddings":
        """Move with the module, but stay float32 whatever it is cast to: a rounded frequency is off by whole turns."""
        super()._apply(fn, recurse)
        self.inv_freq = inverse_frequencies(self.rope, self.dim).to(self.inv_freq.device)
        return self

    def tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B, S, dim / 2] in `dtype`, for positions [B, S]; angles are float32, as in Hugging Face."""
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(self, x_BHSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Turn x by the tables; x keeps its shape and dtype."""
        return ops.rotary(x_BHSD, *tables, self.rope.interleaved)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """torchtune's call: x is [b, s, n_h, h_d]; input_pos is [s] or [b, s], and 0..s-1 when absent."""
        batch, length = x.shape[:2]
        if input_pos is None:
            input_pos = torch.arange(length, device=x.device)
        position_ids = input_pos.expand(batch, length)
        return self.rotate(x.transpose(1, 2), self.tables(position_ids, x.dtype)).transpose(1, 2)
