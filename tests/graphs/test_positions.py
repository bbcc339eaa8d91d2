"""Rotary frequencies, tables and turns against transformers, and against what rotation means."""

import dataclasses
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
from graphs.rope_config import read_rope

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
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    "yarn, deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.707,
        "mscale_all_dim": 0.4,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
}
every_rope = pytest.mark.parametrize("rope", list(ROPES.values()), ids=list(ROPES))
every_theta = pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1234.5])
every_dim = pytest.mark.parametrize("dim", [2, 64, 80, 128])
MAX_POSITIONS = 131_072


def for_dim(rope: dict[str, Any], theta: float, dim: int) -> dict[str, Any]:
    """As config.json writes it; longrope has a list with a factor for each pair.

    They are powers of two here: transformers multiplies before it inverts, and a last bit is much at position 100000.
    """
    factors = {}
    if rope["rope_type"] == "longrope":
        pairs = range(dim // 2)
        factors = {"short_factor": [2.0 ** (i % 3) for i in pairs], "long_factor": [2.0 ** (i % 5 + 1) for i in pairs]}
    return {**rope, **factors, "rope_theta": theta}


def hf_config(rope: dict[str, Any], theta: float, dim: int, max_positions: int = MAX_POSITIONS) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters=for_dim(rope, theta, dim),
    )


def our_config(
    rope: dict[str, Any], theta: float, dim: int, max_positions: int = MAX_POSITIONS, *, interleaved: bool = False
) -> RopeConfig:
    if rope["rope_type"] == "dynamic" and dim < 4:
        pytest.skip("refused: its formula divides by dim - 2")
    config = read_rope(for_dim(rope, theta, dim), "config.json", dim, max_positions)
    return dataclasses.replace(config, interleaved=interleaved)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(rope: dict[str, Any], theta: float, dim: int) -> list[float]:
    """float64, one pair at a time. llama3: the reference code that Meta published with Llama 3.1."""
    out = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        context = rope.get("original_max_position_embeddings", math.inf)
        turns = context * frequency / (2 * math.pi)
        if rope["rope_type"] == "linear":
            frequency /= rope["factor"]
        if rope["rope_type"] == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if turns < low:
                frequency /= rope["factor"]
            elif turns < high:
                smooth = (turns - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        if rope["rope_type"] == "yarn":  # the ramp is linear in the pair's number: in the logarithm of its turns
            ends = [
                dim / 2 * math.log(context / (rope.get(key, default) * 2 * math.pi), theta)
                for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
            ]
            first, last = ends if not rope.get("truncate", True) else (math.floor(ends[0]), math.ceil(ends[1]))
            slowed = min(max((i - max(first, 0)) / (min(last, dim - 1) - max(first, 0)), 0), 1)
            frequency = slowed * frequency / rope["factor"] + (1 - slowed) * frequency
        if rope["rope_type"] == "longrope":
            frequency /= for_dim(rope, theta, dim)["short_factor"][i]
        out.append(frequency)
    return out


# --- frequencies -------------------------------------------------------------------------------------------------


@every_dim
@every_theta
@every_rope
def test_inverse_frequencies_equal_transformers(rope: dict[str, Any], theta: float, dim: int) -> None:
    config = hf_config(rope, theta, dim)
    compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    ours = our_config(rope, theta, dim)
    short = {"seq_len": 1} if ours.depends_on_length else {}
    expected, attention_factor = compute(config, **short)
    found = inverse_frequencies(ours)
    assert ours.attention_factor == attention_factor
    assert (attention_factor != 1.0) == (rope["rope_type"] in ("yarn", "longrope"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)


@every_theta
@every_rope
def test_inverse_frequencies_are_their_formula(rope: dict[str, Any], theta: float) -> None:
    found = inverse_frequencies(our_config(rope, theta, 128))
    torch.testing.assert_close(found.double(), torch.tensor(formula(rope, theta, 128)).double(), rtol=3e-6, atol=0)


def test_frequencies_by_hand() -> None:
    """theta = 10000 and four pairs: 1, 1/10, 1/100, 1/1000; linear scaling divides all of them."""
    torch.testing.assert_close(inverse_frequencies(RopeConfig(theta=1e4, dim=8)), torch.tensor([1, 0.1, 0.01, 0.001]))
    scaled = inverse_frequencies(RopeConfig(theta=1e4, dim=8, rope_type="linear", factor=4.0))
    torch.testing.assert_close(scaled, torch.tensor([0.25, 0.025, 0.0025, 0.00025]))


def test_llama3_scaling_touches_long_wavelengths_only() -> None:
    """As in Llama 3.1: fast pairs keep their frequency, slow ones lose a factor of 8, a few lie between."""
    plain = inverse_frequencies(RopeConfig(theta=5e5, dim=128))
    ratio = plain / inverse_frequencies(RopeConfig(theta=5e5, dim=128, **ROPES["llama 3.1"]))
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
        found = inverse_frequencies(RopeConfig(theta=1e4, dim=8))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.tensor([1, 0.1, 0.01, 0.001]))


@every_rope
def test_buffers_of_a_module_are_real_whatever_the_default_device(rope: dict[str, Any]) -> None:
    config = our_config(rope, 1e4, 8)
    expected = RotaryPositionalEmbeddings.from_config(config, 16)
    with torch.device("meta"):
        module = RotaryPositionalEmbeddings.from_config(config, 16)
        found = module.real_buffers()
    assert {name for name, _ in module.named_buffers()} == set(found)
    for name, buffer in expected.named_buffers():
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], buffer)


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_rope
def test_tables_equal_transformers(rope: dict[str, Any], dtype: torch.dtype) -> None:
    """Also far out, where an angle in fewer than 24 bits would be wrong by a turn; rows have their own positions."""
    positions = torch.tensor([[0, 1, 2, 3, 1000], [131_071, 70_000, 65_537, 7, 0]])
    ours = RotaryPositionalEmbeddings.from_config(our_config(rope, 500_000.0, 64), MAX_POSITIONS)
    lengths = positions.amax(dim=1).float() + 1
    found = ours.tables(positions, dtype, lengths)
    for row in range(2):  # one by one: of types that depend on the length, transformers has one for the whole batch
        theirs = LlamaRotaryEmbedding(hf_config(rope, 500_000.0, 64))(torch.empty(0, dtype=dtype), positions[row, None])
        for table, full in zip(found, theirs, strict=True):
            assert table.dtype == dtype
            assert table.shape == (2, 5, 32)
            # an attention factor takes the numbers above 1, where bfloat16 and float16 have a bit less
            atol = max(1e-6, torch.finfo(dtype).eps / 2) * (1 if full.abs().max() <= 1 else 2)
            torch.testing.assert_close(table[row, None], full[..., :32], rtol=0, atol=atol)
            assert torch.equal(full[..., :32], full[..., 32:])  # theirs holds every angle twice


LONG_ROPES = ["dynamic", "longrope"]


def test_every_rope_type_that_depends_on_length_is_tested() -> None:
    for name, rope in ROPES.items():
        assert our_config(rope, 1e4, 64).depends_on_length == (name in LONG_ROPES), name


@pytest.mark.parametrize("name", LONG_ROPES)
def test_tables_of_long_texts_equal_transformers(name: str) -> None:
    """Rows of one call that are shorter and longer than the original context, and just as long."""
    rope = {**ROPES[name], **({"original_max_position_embeddings": 100} if name == "longrope" else {})}
    longest = 400 if name == "longrope" else 100  # of dynamic, the original context is max_position_embeddings
    lengths = [5, 99, 100, 101, 150, 1000]
    positions = torch.stack([torch.arange(length - 5, length) for length in lengths])
    ours = RotaryPositionalEmbeddings.from_config(our_config(rope, 10_000.0, 64, longest), 2048)
    found = torch.stack(ours.tables(positions, torch.float32, torch.tensor(lengths, dtype=torch.float32)))
    plain = torch.stack(ours.tables(positions, torch.float32, torch.ones(6)))
    for row, length in enumerate(lengths):
        theirs = LlamaRotaryEmbedding(hf_config(rope, 10_000.0, 64, longest))
        full = torch.stack(theirs(torch.empty(0), positions[row, None]))
        torch.testing.assert_close(found[:, row], full[:, 0, :, :32], rtol=0, atol=2e-4)  # 1000 positions * eps
        assert (length > 100) != torch.allclose(found[:, row], plain[:, row], atol=1e-3)


@every_rope
def test_tables_stay_exact_in_a_module_cast_to_half_precision(rope: dict[str, Any]) -> None:
    """model.to(bfloat16) casts buffers as well; at position 4000 a frequency of 8 bits is wrong by whole turns."""
    positions, lengths = torch.arange(3990, 4000)[None], torch.tensor([5000.0])
    module = RotaryPositionalEmbeddings.from_config(our_config(rope, 10_000.0, 64), 8192)
    expected = module.tables(positions, torch.float32, lengths)
    for found, table in zip(module.to(torch.bfloat16).tables(positions, torch.float32, lengths), expected, strict=True):
        torch.testing.assert_close(found, table, rtol=0, atol=1e-6)


# --- turns -------------------------------------------------------------------------------------------------------


@every_rope
def test_turns_equal_transformers(rope: dict[str, Any]) -> None:
    positions = torch.tensor([[0, 1, 5, 300], [4, 90, 91, 1000]])
    q, k = normal(2, 4, 4, 64).float(), normal(2, 2, 4, 64, seed=1).float()
    cos, sin = LlamaRotaryEmbedding(hf_config(rope, 10_000.0, 64))(q, positions)
    ours = RotaryPositionalEmbeddings.from_config(our_config(rope, 10_000.0, 64), 2048)
    tables = ours.tables(positions, torch.float32, positions.amax(dim=1).float() + 1)
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
    module = RotaryPositionalEmbeddings.from_config(our_config(rope, 10_000.0, 64, interleaved=interleaved), 4096)

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
