"""Rotary frequencies, tables and turns against transformers, and against what rotation means."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from graphs.config import RopeConfig
from graphs.positions import ROPE_TYPES, RotaryPositionalEmbeddings, inverse_frequencies

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear 2": {"rope_type": "linear", "factor": 2.0},
    "linear 2.5": {"rope_type": "linear", "factor": 2.5},
    "linear 8": {"rope_type": "linear", "factor": 8.0},
    "llama 3.1": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "llama 3.2": {"rope_type": "llama3", "factor": 32.0, **LLAMA3},
    "narrow band": {**LLAMA3, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
    "short context": {**LLAMA3, "rope_type": "llama3", "factor": 3.7, "original_max_position_embeddings": 64},
}
every_rope = pytest.mark.parametrize("rope", list(ROPES.values()), ids=list(ROPES))
every_theta = pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1234.5])
every_dim = pytest.mark.parametrize("dim", [2, 64, 80, 128])


def hf_config(rope: dict[str, Any], theta: float, dim: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={**rope, "rope_theta": theta},
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(rope: dict[str, Any], theta: float, dim: int) -> list[float]:
    """float64, one pair at a time. llama3: the reference code that Meta published with Llama 3.1."""
    out = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        if rope["rope_type"] == "llama3":
            context, wavelength = rope["original_max_position_embeddings"], 2 * math.pi / frequency
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > context / low:
                frequency /= rope["factor"]
            elif wavelength > context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        out.append(frequency)
    return out


# --- frequencies -------------------------------------------------------------------------------------------------


@every_dim
@every_theta
@every_rope
def test_inverse_frequencies_equal_transformers(rope: dict[str, Any], theta: float, dim: int) -> None:
    config = hf_config(rope, theta, dim)
    compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, attention_factor = compute(config)
    found = inverse_frequencies(RopeConfig(theta=theta, **rope), dim)
    assert attention_factor == 1.0
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


@every_theta
@every_rope
def test_inverse_frequencies_are_their_formula(rope: dict[str, Any], theta: float) -> None:
    found = inverse_frequencies(RopeConfig(theta=theta, **rope), 128)
    torch.testing.assert_close(found.double(), torch.tensor(formula(rope, theta, 128)).double(), rtol=3e-6, atol=0)


def test_frequencies_by_hand() -> None:
    """theta = 10000 and four pairs: 1, 1/10, 1/100, 1/1000; linear scaling divides all of them."""
    torch.testing.assert_close(inverse_frequencies(RopeConfig(theta=1e4), 8), torch.tensor([1, 0.1, 0.01, 0.001]))
    scaled = inverse_frequencies(RopeConfig(theta=1e4, rope_type="linear", factor=4.0), 8)
    torch.testing.assert_close(scaled, torch.tensor([0.25, 0.025, 0.0025, 0.00025]))


def test_llama3_scaling_touches_long_wavelengths_only() -> None:
    """As in Llama 3.1: fast pairs keep their frequency, slow ones lose a factor of 8, a few lie between."""
    plain = inverse_frequencies(RopeConfig(theta=5e5), 128)
    ratio = plain / inverse_frequencies(RopeConfig(theta=5e5, **ROPES["llama 3.1"]), 128)
    wavelength = 2 * math.pi / plain
    assert torch.equal(ratio[wavelength < 8192 / 4], torch.ones(int((wavelength < 8192 / 4).sum())))
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full((int((wavelength > 8192).sum()),), 8.0))
    between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) > 0
    assert ((between > 1) & (between < 8)).all()


def test_every_rope_type_is_tested() -> None:
    """A new rope type needs a line in ROPES."""
    assert {rope["rope_type"] for rope in ROPES.values()} == set(ROPE_TYPES)


def test_frequencies_are_real_whatever_the_default_device() -> None:
    """Decoders are built on `meta`; the frequencies are needed all the same."""
    with torch.device("meta"):
        found = inverse_frequencies(RopeConfig(theta=1e4), 8)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.tensor([1, 0.1, 0.01, 0.001]))


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_rope
def test_tables_equal_transformers(rope: dict[str, Any], dtype: torch.dtype) -> None:
    """Also far out, where an angle in fewer than 24 bits would be wrong by a turn; rows have their own positions."""
    positions = torch.tensor([[0, 1, 2, 3, 1000], [131_071, 70_000, 65_537, 7, 0]])
    theirs = LlamaRotaryEmbedding(hf_config(rope, 500_000.0, 64))(torch.empty(0, dtype=dtype), positions)
    ours = RotaryPositionalEmbeddings.from_config(RopeConfig(theta=500_000.0, **rope), 64, 131_072)
    for table, full in zip(ours.tables(positions, dtype), theirs, strict=True):
        assert table.dtype == dtype
        assert table.shape == (2, 5, 32)
        torch.testing.assert_close(table, full[..., :32], rtol=0, atol=max(1e-6, torch.finfo(dtype).eps / 2))
        assert torch.equal(full[..., :32], full[..., 32:])  # theirs holds every angle twice


def test_tables_stay_exact_in_a_module_cast_to_half_precision() -> None:
    """model.to(bfloat16) casts buffers as well; at position 4000 a frequency of 8 bits is wrong by whole turns."""
    positions = torch.arange(3990, 4000)[None]
    module = RotaryPositionalEmbeddings(64)
    expected = module.tables(positions, torch.float32)
    for found, table in zip(module.to(torch.bfloat16).tables(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(found, table, rtol=0, atol=1e-6)


# --- turns -------------------------------------------------------------------------------------------------------


@every_rope
def test_turns_equal_transformers(rope: dict[str, Any]) -> None:
    positions = torch.tensor([[0, 1, 5, 300], [4, 90, 91, 1000]])
    q, k = normal(2, 4, 4, 64).float(), normal(2, 2, 4, 64, seed=1).float()
    cos, sin = LlamaRotaryEmbedding(hf_config(rope, 10_000.0, 64))(q, positions)
    ours = RotaryPositionalEmbeddings.from_config(RopeConfig(theta=10_000.0, **rope), 64, 2048)
    tables = ours.tables(positions, torch.float32)
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours.rotate(x, tables), expected, rtol=0, atol=2e-6)


def test_interleaved_is_half_split_after_the_permutation() -> None:
    """Meta's pairs (2i, 2i + 1) are Hugging Face's (i, i + D/2): conversion reorders 0 2 4 .. 1 3 5 .."""
    permutation = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    x = normal(2, 7, 3, 16).float()
    pairs = RotaryPositionalEmbeddings(16, interleaved=True)(x)
    halves = RotaryPositionalEmbeddings(16, interleaved=False)(x[..., permutation])
    assert torch.equal(pairs[..., permutation], halves)
    assert not torch.allclose(pairs, halves)


@pytest.mark.parametrize("interleaved", [False, True])
def test_position_zero_is_the_identity(interleaved: bool) -> None:
    x = normal(2, 3, 4, 8).float()
    module = RotaryPositionalEmbeddings(8, interleaved=interleaved)
    assert torch.equal(module(x, input_pos=torch.zeros(3, dtype=torch.int64)), x)
    assert torch.equal(module(x)[:, 0], x[:, 0])
    assert not torch.allclose(module(x)[:, 1:], x[:, 1:])


@pytest.mark.parametrize("interleaved", [False, True])
@every_rope
def test_products_depend_on_distance_only(rope: dict[str, Any], interleaved: bool) -> None:
    """<turn(q, m), turn(k, n)> is a function of m - n: what makes rotary embedding relative."""
    q, k = normal(1, 1, 1, 64), normal(1, 1, 1, 64, seed=1)
    module = RotaryPositionalEmbeddings.from_config(
        RopeConfig(theta=10_000.0, interleaved=interleaved, **rope), 64, 4096
    )

    def product(m: int, n: int) -> float:
        turned = [module(x, input_pos=torch.tensor([p])) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    products = {distance: product(distance, 0) for distance in (0, 1, 3, 9, 40)}
    for distance, expected in products.items():
        for n in (1, 17, 200):
            assert product(n + distance, n) == pytest.approx(expected, abs=5e-4)
    assert max(products.values()) - min(products.values()) > 0.5  # and it does depend on it


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_keeps_lengths(interleaved: bool) -> None:
    x = normal(2, 50, 3, 64)
    out = RotaryPositionalEmbeddings(64, interleaved=interleaved)(x)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


# --- torchtune's interface ---------------------------------------------------------------------------------------


def test_torchtune_call_defaults_to_interleaved_pairs_and_positions_from_zero() -> None:
    """[b, s, n_h, h_d] in and out, against a loop: torchtune turns pair (2i, 2i + 1) of token s by s * base^(-2i/d)."""
    x = normal(2, 5, 3, 8)
    out = RotaryPositionalEmbeddings(dim=8, max_seq_len=16, base=100)(x)
    assert out.shape == x.shape
    for s in range(5):
        for i in range(4):
            angle = s * 100 ** (-2 * i / 8)
            turn = complex(math.cos(angle), math.sin(angle))
            for b in range(2):
                for h in range(3):
                    expected = complex(*x[b, s, h, 2 * i : 2 * i + 2].tolist()) * turn
                    assert out[b, s, h, 2 * i : 2 * i + 2].tolist() == pytest.approx(
                        [expected.real, expected.imag], abs=1e-6
                    )


def test_input_pos_of_one_dimension_is_shared_by_all_rows() -> None:
    """[s]: token i is at position input_pos[i], as in a longer sequence without input_pos."""
    x = normal(2, 9, 3, 8)
    module = RotaryPositionalEmbeddings(8)
    whole = module(x)
    chosen = torch.tensor([2, 5, 8])
    assert torch.equal(module(x[:, chosen], input_pos=chosen), whole[:, chosen])
    assert torch.equal(module(x, input_pos=torch.arange(9)), whole)


def test_input_pos_of_two_dimensions_is_per_row() -> None:
    """[b, s]: every row as if it were alone."""
    x = normal(2, 3, 2, 8)
    module = RotaryPositionalEmbeddings(8)
    positions = torch.tensor([[0, 1, 2], [10, 4, 30]])
    out = module(x, input_pos=positions)
    for row in range(2):
        assert torch.equal(out[row : row + 1], module(x[row : row + 1], input_pos=positions[row]))


def test_the_table_is_no_part_of_the_state() -> None:
    """torchtune's checkpoints hold no rotary tables."""
    assert not RotaryPositionalEmbeddings(8).state_dict()


@pytest.mark.parametrize("dim", [1, 7, 65])
def test_odd_dim_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"dim \({dim}\) must be even: rotary embeddings turn pairs"):
        RotaryPositionalEmbeddings(dim)
