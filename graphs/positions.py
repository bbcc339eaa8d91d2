"""Positions: rotary embeddings with their frequency scalings, and embeddings that are added to the tokens'.

ALiBi, which adds to attention scores, is in attention/alibi.py.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphs import ops
from graphs.config import DecoderConfig, RopeConfig
from graphs.fixed_buffers import FixedBuffers


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """float32 [dim / 2] on the CPU: the angle per position of each pair, after `rope.rope_type`'s scaling.

    Of the types that depend on the length of the text it is the one for short texts; length_buffers has the rest.
    """
    with torch.device("cpu"):
        return ROPE_TYPES[rope.rope_type](_periods(rope), rope)


def _periods(rope: RopeConfig) -> Tensor:
    """float32 [dim / 2]: theta^(2i / dim), positions per radian of each pair before any scaling."""
    return rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).to(torch.float32) / rope.dim)


def _default(periods: Tensor, rope: RopeConfig) -> Tensor:
    return 1.0 / periods


def _linear(periods: Tensor, rope: RopeConfig) -> Tensor:
    """Position interpolation, arXiv:2306.15595."""
    return 1.0 / periods / rope.factor


def _llama3(periods: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    inv_freq = 1.0 / periods
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_max_position_embeddings / wavelength  # full turns within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)  # 0: slowed fully, 1: kept
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _yarn(periods: Tensor, rope: RopeConfig) -> Tensor:
    """YaRN, arXiv:2309.00071 section 3.2: as llama3, but the ramp runs over pair numbers, not wavelengths."""

    def pair_of(turns: float) -> float:  # the pair that makes that many turns within the original context
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    slowed = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (rope.factor * periods) * slowed + 1.0 / periods * (1 - slowed)


def _longrope(periods: Tensor, rope: RopeConfig) -> Tensor:
    """LongRoPE, arXiv:2402.13753: a searched factor for each pair; these are the ones for short texts."""
    return 1.0 / (torch.tensor(rope.short_factor, dtype=torch.float32) * periods)


ROPE_TYPES: dict[str, Callable[[Tensor, RopeConfig], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def length_buffers(rope: RopeConfig) -> dict[str, Tensor]:
    """float32 [dim / 2] tables, on the CPU, from which the frequencies of a longer text follow (see `tables`)."""
    with torch.device("cpu"):
        if rope.rope_type == "dynamic":  # the growing base's exponent: (2i / dim) (dim / (dim - 2))
            return {"stretch": torch.arange(0, rope.dim, 2, dtype=torch.float32) / (rope.dim - 2)}
        if rope.rope_type == "longrope":
            return {"long_inv_freq": 1.0 / (torch.tensor(rope.long_factor, dtype=torch.float32) * _periods(rope))}
    return {}


class RotaryPositionalEmbeddings(FixedBuffers):
    """Rotary embeddings with torchtune's interface; pairs are interleaved unless `interleaved=False` (Hugging Face).

    Args:
        dim: head dimension, even.
        max_seq_len: positions at or above it are the caller's error.
        base: theta of the geometric progression of frequencies.
    """

    inv_freq: Tensor
    # [B, S] or None: for each token the length of its row when it was fed, which takes the place of `lengths` below. A
    # reference sets it, to compute in one pass what was fed in several calls.
    fed_lengths: Tensor | None = None

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 10_000, *, interleaved: bool = True) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim ({dim}) must be even: rotary embeddings turn pairs")
        self._setup(RopeConfig(theta=float(base), dim=dim, interleaved=interleaved), max_seq_len)

    @classmethod
    def from_config(cls, rope: RopeConfig, max_seq_len: int) -> "RotaryPositionalEmbeddings":
        """With anything that RopeConfig can express."""
        module = cls(rope.dim, max_seq_len, rope.theta)
        module._setup(rope, max_seq_len)
        return module

    def _setup(self, rope: RopeConfig, max_seq_len: int) -> None:
        self.rope = rope
        self.dim = rope.dim
        self.max_seq_len = max_seq_len
        self._register()

    def real_buffers(self) -> dict[str, Tensor]:
        """The buffers' values, on the CPU."""
        return {"inv_freq": inverse_frequencies(self.rope), **length_buffers(self.rope)}

    def tables(self, position_ids: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B, S, dim / 2] in `dtype`; angles are float32, as in Hugging Face.

        Args:
            position_ids: int64 [B, S].
            lengths: float32 [B], how many tokens each row has once these are in; needed by the rope types that depend
                on it (RopeConfig.depends_on_length).
        """
        inv_freq = self.inv_freq
        if self.rope.depends_on_length:
            lengths = lengths if self.fed_lengths is None else self.fed_lengths
            assert lengths is not None
            inv_freq = self._frequencies_at(lengths.reshape(lengths.shape[0], -1, 1))
        angles = position_ids.to(torch.float32).unsqueeze(-1) * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.rope.attention_factor != 1.0:
            cos, sin = cos * self.rope.attention_factor, sin * self.rope.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def _frequencies_at(self, lengths: Tensor) -> Tensor:
        """[B, 1 or S, dim / 2] from [B, 1 or S, 1]: as transformers recomputes them for each call."""
        rope, original = self.rope, float(self.rope.original_max_position_embeddings)
        if rope.rope_type == "longrope":
            return torch.where(lengths > original, self.long_inv_freq, self.inv_freq)
        # dynamic NTK: the base grows with the length; theta * growth ** (dim / (dim - 2))
        growth = rope.factor * lengths.clamp(min=original) / original - (rope.factor - 1)
        return self.inv_freq * torch.exp(-self.stretch * growth.log())

    def rotate(self, x_BHSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Turn the first `dim` numbers of each head by the tables; x keeps its shape and dtype."""
        return ops.rotary(x_BHSD, *tables, self.rope.interleaved)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """torchtune's call: x is [b, s, n_h, h_d]; input_pos is [s] or [b, s], and 0..s-1 when absent."""
        batch, length = x.shape[:2]
        if input_pos is None:
            input_pos = torch.arange(length, device=x.device)
        position_ids = input_pos.expand(batch, length)
        lengths = position_ids.amax(dim=1).to(torch.float32) + 1
        return self.rotate(x.transpose(1, 2), self.tables(position_ids, x.dtype, lengths)).transpose(1, 2)


class SinusoidalPositionalEmbeddings(FixedBuffers):
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i + 1) = cos(the same); arXiv:1706.03762 section 3.5."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim ({dim}) must be even: sinusoidal embeddings are pairs of sine and cosine")
        self.dim = dim
        self._register()

    def real_buffers(self) -> dict[str, Tensor]:
        """The buffers' values, on the CPU."""
        return {"inv_freq": inverse_frequencies(RopeConfig(theta=10_000.0, dim=self.dim))}

    def forward(self, position_ids: Tensor) -> Tensor:
        """[B, S] -> float32 [B, S, dim]."""
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self.inv_freq
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


# position_embedding: added to the tokens' embeddings, called with position ids [B, S]; both are arXiv:1706.03762
ABSOLUTE: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "learned": lambda config: nn.Embedding(config.max_position_embeddings, config.hidden_size),
    "sinusoidal": lambda config: SinusoidalPositionalEmbeddings(config.hidden_size),
}
