"""Norms, feed-forward networks, experts and positions against loops in float64, torch and transformers.

Letters in shapes: B rows, S tokens, E embedding dimension, F inner width, R rotated numbers of a head.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from graphs.config import DecoderConfig, ExpertsConfig, RopeConfig
from graphs.errors import CheckpointError
from graphs.families import FAMILIES
from graphs.keys import Keys
from graphs.layers import (
    NORMS,
    FeedForward,
    GemmaRMSNorm,
    LayerNorm,
    MoE,
    RMSNorm,
    build_feed_forward,
    build_mlp,
)
from graphs.ops import ACTIVATION_FUNCTIONS
from graphs.positions import ABSOLUTE, ROPE_TYPES, RotaryPositionalEmbeddings, SinusoidalPositionalEmbeddings
from graphs.rope_config import ROPE_READERS, parse_rope

E, WIDTH = 12, 20
ATOL = {torch.float64: 1e-12, torch.float32: 2e-6}
every_dtype = pytest.mark.parametrize("dtype", list(ATOL), ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(x: Tensor) -> np.ndarray:
    """float64, exactly."""
    return x.detach().to(torch.float64).numpy()


def close(found: Tensor, wanted: np.ndarray | Tensor, atol: float) -> None:
    wanted = array(wanted) if isinstance(wanted, Tensor) else wanted
    np.testing.assert_allclose(array(found), wanted, rtol=0, atol=atol)


def fill(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> Any:
    """Random weights, of a size that keeps results about 1."""
    for index, parameter in enumerate(module.parameters()):
        width = parameter.shape[-1] if parameter.dim() > 1 else 4
        parameter.data = normal(*parameter.shape, seed=100 * seed + index) / math.sqrt(width)
    return module.to(dtype)


# --- norms -------------------------------------------------------------------------------------------------------


def loop_norm(kind: str, row: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, eps: float) -> list[float]:
    """RMSNorm arXiv:1910.07467, its Gemma form arXiv:2403.08295, LayerNorm arXiv:1607.06450; one row."""
    mean = sum(row) / len(row) if kind == "layer_norm" else 0.0
    variance = sum((number - mean) ** 2 for number in row) / len(row)
    out = []
    for i, number in enumerate(row):
        factor = 1 + scale[i] if kind == "gemma_rms_norm" else scale[i]
        shift = 0.0 if bias is None else bias[i]
        out.append((number - mean) / math.sqrt(variance + eps) * factor + shift)
    return out


@every_dtype
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("kind", list(NORMS))
def test_norm_is_its_formula(kind: str, eps: float, dtype: torch.dtype) -> None:
    """eps = 0.5 shows that it stands under the root."""
    module = fill(NORMS[kind](E, eps), dtype)
    x_BSE = (3 * normal(2, 5, E) + 1).to(dtype)
    weights = {name: array(parameter) for name, parameter in module.named_parameters()}
    assert set(weights) == ({"scale", "bias"} if kind == "layer_norm" else {"scale"})
    wanted = [
        [loop_norm(kind, row, weights["scale"], weights.get("bias"), eps) for row in rows] for rows in array(x_BSE)
    ]
    out = module(x_BSE)
    assert out.dtype == dtype
    close(out, np.array(wanted), ATOL[dtype])


@pytest.mark.parametrize("kind", list(NORMS))
def test_norm_by_hand(kind: str) -> None:
    """As it is made: rms([3, 4, 0, 0]) = 2.5; mean 1.75, variance 6.25 - 1.75^2."""
    out = NORMS[kind](4, 1e-12)(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    deviation = math.sqrt(6.25 - 1.75**2)
    wanted = [(x - 1.75) / deviation for x in (3, 4, 0, 0)] if kind == "layer_norm" else [1.2, 1.6, 0.0, 0.0]
    close(out, np.array(wanted), 1e-6)


@every_dtype
def test_norms_equal_torch(dtype: torch.dtype) -> None:
    x_BSE = (3 * normal(2, 5, E) + 1).to(dtype)
    layer, rms = fill(LayerNorm(E, 0.01), dtype), fill(RMSNorm(E, 0.01), dtype)
    close(layer(x_BSE), F.layer_norm(x_BSE, (E,), layer.scale, layer.bias, 0.01), ATOL[dtype])
    close(rms(x_BSE), F.rms_norm(x_BSE, (E,), rms.scale, 0.01), ATOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gemma_norm_equals_transformers(dtype: torch.dtype) -> None:
    """Bit for bit in 16 bits: everything in float32, rounded once."""
    ours, theirs = fill(GemmaRMSNorm(E, 0.01), dtype), Gemma2RMSNorm(E, 0.01).to(dtype)
    theirs.weight.data = ours.scale.data
    x_BSE = (3 * normal(2, 50, E)).to(dtype)
    torch.testing.assert_close(ours(x_BSE), theirs(x_BSE), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_gemma_norm_keeps_a_small_scale_in_float16() -> None:
    """1.0001 is 1 in float16; the average of 100,000 results tells it from 1 all the same."""
    x = normal(1000, 100).to(torch.float16)
    module = GemmaRMSNorm(100).to(torch.float16)
    plain = array(module(x))
    module.scale.data.fill_(1e-4)
    ratio = (array(module(x)) * plain).sum() / (plain * plain).sum()
    assert ratio - 1 == pytest.approx(1e-4, rel=0.1)


def test_norm_defaults() -> None:
    """The papers' (and torch's) eps; scales that change nothing."""
    assert [NORMS[kind](4, 1e-3).eps for kind in NORMS] == [1e-3] * 3
    assert (RMSNorm(4).eps, GemmaRMSNorm(4).eps, LayerNorm(4).eps) == (1e-6, 1e-6, 1e-5)
    assert not GemmaRMSNorm(4).scale.any()


@pytest.mark.parametrize("kind", list(NORMS))
def test_a_norm_of_another_kind_is_seen(kind: str) -> None:
    """The comparison above tells the kinds apart."""
    x = 3 * normal(5, E) + 1
    module = fill(NORMS[kind](E, 1e-6), torch.float64)
    for other in NORMS:
        wanted = np.array([loop_norm(other, row, array(module.scale), None, 1e-6) for row in array(x)])
        if other != kind:
            assert np.abs(array(module(x)) - wanted).max() > 0.1


# --- feed-forward networks ---------------------------------------------------------------------------------------

ACTIVATION_FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}
every_activation = pytest.mark.parametrize("name", list(ACTIVATION_FUNCTIONS))


@every_activation
def test_activation_is_its_formula_and_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    found = ACTIVATION_FUNCTIONS[name](x)
    close(found, np.array([ACTIVATION_FORMULAS[name](number) for number in x.tolist()]), 1e-14)
    close(found, ACT2FN[name](x), 1e-14)


def test_both_forms_of_gelu_are_told_apart() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert (ACTIVATION_FUNCTIONS["gelu"](x) - ACTIVATION_FUNCTIONS["gelu_pytorch_tanh"](x)).abs().max() > 1e-4


def config(**changes: Any) -> DecoderConfig:
    raw = {
        "model_type": "transformer_decoder",
        "vocab_size": 40,
        "hidden_size": E,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
    }
    return FAMILIES["transformer_decoder"].parse_config({**raw, **changes})


def loop_feed_forward(module: FeedForward, x_E: np.ndarray, activation: str) -> np.ndarray:
    """w2 (act(w1 x) * w3 x), arXiv:2002.05202 section 2, number by number."""

    def linear(layer: nn.Linear, x: Any) -> list[float]:
        bias = [0.0] * layer.out_features if layer.bias is None else array(layer.bias)
        return [sum(a * b for a, b in zip(row, x, strict=True)) + bias[i] for i, row in enumerate(array(layer.weight))]

    inner = [ACTIVATION_FORMULAS[activation](number) for number in linear(module.w1, x_E)]
    if module.w3 is not None:
        inner = [a * b for a, b in zip(inner, linear(module.w3, x_E), strict=True)]
    return np.array(linear(module.w2, inner))


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@every_activation
def test_feed_forward_is_its_formula(name: str, gated: bool, bias: bool, dtype: torch.dtype) -> None:
    """SwiGLU, GeGLU, ReGLU, and the networks with two matrices; with w1 as the gate, as in torchtune."""
    module = fill(build_feed_forward(config(hidden_act=name, gated_mlp=gated, mlp_bias=bias), WIDTH), dtype)
    linears = ("w1", "w2", "w3") if gated else ("w1", "w2")
    leaves = ("weight", "bias") if bias else ("weight",)
    assert set(module.state_dict()) == {f"{linear}.{leaf}" for linear in linears for leaf in leaves}
    x_SE = normal(3, E).to(dtype)
    close(module(x_SE), np.array([loop_feed_forward(module, row, name) for row in array(x_SE)]), ATOL[dtype])


def test_feed_forward_is_silu_unless_told() -> None:
    linears = {name: nn.Linear(E, E, bias=False) for name in ("gate_proj", "down_proj", "up_proj")}
    module = fill(FeedForward(**linears), torch.float64)
    x_SE = normal(2, E)
    close(module(x_SE), np.array([loop_feed_forward(module, row, "silu") for row in array(x_SE)]), 1e-12)


# --- experts -----------------------------------------------------------------------------------------------------

EXPERTS = 5


def make_moe(picked: int, norm_topk_prob: bool, dtype: torch.dtype, activation: str = "silu") -> MoE:
    experts = ExpertsConfig(
        num_experts=EXPERTS, num_experts_per_tok=picked, intermediate_size=WIDTH, norm_topk_prob=norm_topk_prob
    )
    module = build_mlp(config(hidden_act=activation), experts)
    assert isinstance(module, MoE)
    return fill(module, dtype)


def loop_moe(module: MoE, x_E: np.ndarray, picked: int, norm: bool, activation: str = "silu") -> np.ndarray:
    """Only the picked experts are computed; Mixtral, arXiv:2401.04088 section 2.1."""
    scores = [sum(a * b for a, b in zip(row, x_E, strict=True)) for row in array(module.router.weight)]
    total = sum(math.exp(score) for score in scores)
    probs = [math.exp(score) / total for score in scores]
    best = sorted(range(EXPERTS), key=lambda expert: -probs[expert])[:picked]
    total = sum(probs[expert] for expert in best) if norm else 1.0
    return sum(probs[e] / total * loop_feed_forward(module.experts[e], x_E, activation) for e in best)


@every_dtype
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("picked", [1, 2, EXPERTS])
def test_moe_is_its_formula(picked: int, norm: bool, dtype: torch.dtype) -> None:
    module, x_SE = make_moe(picked, norm, dtype), normal(6, E).to(dtype)
    wanted = np.array([loop_moe(module, row, picked, norm) for row in array(x_SE)])
    close(module(x_SE), wanted, ATOL[dtype])
    close(module(x_SE.reshape(2, 3, E)), wanted.reshape(2, 3, E), ATOL[dtype])
    if picked < EXPERTS:  # the comparison notices one expert too many, and the other normalisation
        for wrong in ((picked + 1, norm), (picked, not norm)):
            assert np.abs(np.array([loop_moe(module, row, *wrong) for row in array(x_SE)]) - wanted).max() > 0.01


@pytest.mark.parametrize("norm", [False, True])
def test_moe_equals_transformers(norm: bool) -> None:
    """Qwen 3 both ways; Mixtral always makes the weights add up to 1. float32: theirs picks experts in it."""
    sizes = {"hidden_size": E, "num_experts_per_tok": 2, "num_attention_heads": 2, "experts_implementation": "eager"}
    blocks: list[nn.Module] = [
        Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=WIDTH, norm_topk_prob=norm, **sizes)
        )
    ]
    if norm:
        blocks.append(MixtralSparseMoeBlock(MixtralConfig(num_local_experts=EXPERTS, intermediate_size=WIDTH, **sizes)))
    module, x_BSE = make_moe(2, norm, torch.float32), normal(2, 7, E).float()
    for theirs in blocks:
        theirs.gate.weight.data = module.router.weight.data
        gate_up = [torch.cat((expert.w1.weight, expert.w3.weight)) for expert in module.experts]
        theirs.experts.gate_up_proj.data = torch.stack(gate_up).detach()
        theirs.experts.down_proj.data = torch.stack([expert.w2.weight for expert in module.experts]).detach()
        close(module(x_BSE), theirs(x_BSE), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moe_routes_and_adds_in_float32(dtype: torch.dtype) -> None:
    """Rounding of each expert's result and of the sum, no more."""
    module, x_SE = make_moe(3, True, dtype), normal(6, E).to(dtype)
    out = module(x_SE)
    assert out.dtype == dtype
    parts = [expert(x_SE).float() for expert in module.experts]
    probs = torch.softmax(module.router(x_SE).float(), dim=-1)
    best = probs.topk(3)
    kept = torch.zeros_like(probs).scatter(-1, best.indices, best.values / best.values.sum(dim=-1, keepdim=True))
    wanted = sum(part * kept[:, i, None] for i, part in enumerate(parts)).to(dtype)
    close(out, wanted, torch.finfo(dtype).eps)


def test_moe_takes_nothing_from_an_expert_that_was_not_picked() -> None:
    """What an expert makes of tokens that it never sees in training may overflow float16: 0 * inf is not a number."""
    module, x_SE = make_moe(2, True, torch.float16), normal(6, E).to(torch.float16)
    module.router.weight.data[0] = 0
    x_SE[:, 0] = 4.0
    module.router.weight.data[0, 0] = -50.0  # nobody picks expert 0 ..
    wanted = module(x_SE)
    module.experts[0].w2.weight.data.fill_(60_000.0)  # .. whose result is infinite
    assert module.experts[0](x_SE).isinf().any()
    assert torch.equal(module(x_SE), wanted)


@pytest.mark.parametrize("norm", [False, True])
def test_moe_without_near_ties_picks_the_same_with_swaps(norm: bool) -> None:
    """swap_margin (graphs/near_ties.py) changes choices only where probabilities nearly tie."""
    for picked in (1, 2, EXPERTS):
        module, x_SE = make_moe(picked, norm, torch.float64), normal(6, E)
        right = module(x_SE)
        module.swap_margin = 1e-9
        assert torch.equal(module(x_SE), right)


def test_moe_with_a_near_tie_swaps_it() -> None:
    """Scores 2, 1, 0.999, 0, 0 and two picks: with a margin of 1 % the third expert takes the second's place."""
    module, x_E = make_moe(2, False, torch.float64), torch.zeros(E, dtype=torch.float64)
    x_E[0] = 1.0
    module.router.weight.data[:, 0] = torch.tensor([2.0, 1.0, 0.999, 0.0, 0.0])
    module.swap_margin = 0.01
    probs = torch.softmax(module.router(x_E), dim=-1)
    wanted = probs[0] * module.experts[0](x_E) + probs[2] * module.experts[2](x_E)
    close(module(x_E[None]), wanted[None], 1e-12)


# --- positions that are added ------------------------------------------------------------------------------------


def test_sinusoidal_is_its_formula() -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i + 1) = cos; rows have positions of their own."""
    positions = torch.tensor([[0, 1, 2, 50], [3000, 7, 1, 0]])
    out = SinusoidalPositionalEmbeddings(E)(positions)
    assert (out.shape, out.dtype) == ((2, 4, E), torch.float32)
    for b, s, i in np.ndindex(2, 4, E // 2):
        angle = int(positions[b, s]) / 10_000 ** (2 * i / E)
        assert out[b, s, 2 * i].item() == pytest.approx(math.sin(angle), abs=5e-4 if angle > 100 else 3e-6)
        assert out[b, s, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=5e-4 if angle > 100 else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinusoidal_stays_exact_in_a_module_of_half_precision(dtype: torch.dtype) -> None:
    positions = torch.arange(3990, 4000)[None]
    module = SinusoidalPositionalEmbeddings(E)
    expected = module(positions)
    assert torch.equal(module.to(dtype)(positions), expected)
    assert not module.state_dict()


def test_learned_positions_are_rows_of_a_table() -> None:
    module = fill(ABSOLUTE["learned"](config(position_embedding="learned")), torch.float64)
    assert module.weight.shape == (64, E)
    positions = torch.tensor([[0, 63, 5], [7, 7, 1]])
    for b, s in np.ndindex(2, 3):
        assert torch.equal(module(positions)[b, s], module.weight[positions[b, s]])


def test_odd_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^dim \(7\) must be even: sinusoidal embeddings are pairs of sine and cosine$"
    ):
        SinusoidalPositionalEmbeddings(7)


# --- rotary embedding: every type against transformers -----------------------------------------------------------

HEAD_DIM, LONGEST, ORIGINAL = 32, 512, 64
FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 2.0 * i for i in range(HEAD_DIM // 2)],
}
HALF_FACTORS = {name: values[: HEAD_DIM // 4] for name, values in FACTORS.items()}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default, partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear, partial": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic 1": {"rope_type": "dynamic", "factor": 1.0},
    "dynamic, partial": {"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": ORIGINAL},
    "llama3, partial": {**LLAMA3, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.75},
    "llama3, narrow": {**LLAMA3, "original_max_position_embeddings": ORIGINAL, "low_freq_factor": 3.5, "factor": 3.0},
    "yarn": YARN,
    "yarn, partial": {**YARN, "partial_rotary_factor": 0.5},
    "yarn, betas": {**YARN, "beta_fast": 2.0, "beta_slow": 0.5},
    "yarn, exact ramp": {**YARN, "truncate": False, "factor": 3.0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, mscale alone": {**YARN, "mscale": 0.7},
    "yarn, mscale of zero": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.0},
    "yarn 1": {**YARN, "factor": 1.0},
    "yarn, empty ramp": {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "longrope": LONGROPE,
    "longrope, partial": {**LONGROPE, **HALF_FACTORS, "partial_rotary_factor": 0.5},
    "longrope, factor": {**LONGROPE, "factor": 5.0},
    "longrope, factor below 1": {**LONGROPE, "factor": 0.5},
    "longrope, attention_factor": {**LONGROPE, "attention_factor": 1.7},
}
every_rope = pytest.mark.parametrize("raw", list(ROPES.values()), ids=list(ROPES))
every_theta = pytest.mark.parametrize("theta", [10_000.0, 500.0, 5.0])  # of 5, YaRN's ramp ends beyond the last pair
# tokens in the row: within the original context, at its end, just beyond, at the end of the context, and beyond that
LENGTHS = (2, ORIGINAL, ORIGINAL + 1, LONGEST, LONGEST + 1, 4 * LONGEST)


def theirs(raw: dict[str, Any], theta: float) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=LONGEST,
        rope_parameters={**raw, "rope_theta": theta},
    )


def read(raw: dict[str, Any], **outer: Any) -> RopeConfig:
    return parse_rope(Keys({"rope_scaling": raw, **outer}), HEAD_DIM, LONGEST, partial=True)


def module_of(raw: dict[str, Any], theta: float) -> RotaryPositionalEmbeddings:
    return RotaryPositionalEmbeddings.from_config(read(raw, rope_theta=theta), LONGEST)


@every_theta
@every_rope
def test_frequencies_equal_transformers(raw: dict[str, Any], theta: float) -> None:
    """Read off the tables: at position 1 the angle is the frequency, and the length of (cos, sin) the factor."""
    module = module_of(raw, theta)
    compute = ROPE_INIT_FUNCTIONS.get(raw["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    one = torch.ones(len(LENGTHS), 1, dtype=torch.int64)
    cos, sin = (table[:, 0].double() for table in module.tables(one, torch.float32, torch.tensor(LENGTHS).float()))
    for row, length in enumerate(LENGTHS):
        dim = int(HEAD_DIM * raw.get("partial_rotary_factor", 1.0))
        if raw["rope_type"] == "default":  # theirs for Llama knows no partial rotation
            expected, factor = theta ** (-torch.arange(0, dim, 2) / dim), 1.0
        else:
            expected, factor = compute(theirs(raw, theta), seq_len=length)
        assert expected.shape == (dim // 2,)
        torch.testing.assert_close(torch.atan2(sin[row], cos[row]).float(), expected.float(), rtol=2e-6, atol=0)
        torch.testing.assert_close(
            torch.hypot(cos[row], sin[row]), torch.full((dim // 2,), factor).double(), rtol=2e-7, atol=0
        )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("default", {"theta": 10_001.0}),
        ("linear", {"factor": 2.501}),
        ("dynamic", {"factor": 2.01}),
        ("dynamic", {"original_max_position_embeddings": LONGEST + 1}),
        ("llama3", {"low_freq_factor": 1.1}),
        ("llama3", {"high_freq_factor": 4.1}),
        ("llama3", {"original_max_position_embeddings": ORIGINAL + 1}),
        ("yarn", {"beta_fast": 2.0}),
        ("yarn", {"beta_slow": 0.1}),
        ("yarn", {"truncate": False}),
        ("yarn", {"attention_factor": 1.0}),
        ("longrope", {"original_max_position_embeddings": ORIGINAL + 1}),
        ("longrope", {"short_factor": (*FACTORS["short_factor"][:-1], 9.0)}),
        ("longrope", {"long_factor": (*FACTORS["long_factor"][:-1], 9.0)}),
    ],
    ids=str,
)
def test_a_mutant_of_the_rope_fails_the_comparison(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field counts: the comparison with transformers notices each of them."""
    right = read(ROPES[name], rope_theta=10_000.0)
    monkeypatch.setitem(globals(), "read", lambda raw, **outer: dataclasses.replace(right, **changes))
    with pytest.raises(AssertionError):
        test_frequencies_equal_transformers(ROPES[name], 10_000.0)


def test_every_rope_type_is_tested() -> None:
    """A new rope type needs a line in ROPES, and its formula a reader."""
    assert {raw["rope_type"] for raw in ROPES.values()} == set(ROPE_TYPES) == set(ROPE_READERS)


@every_rope
def test_tables_equal_transformers(raw: dict[str, Any]) -> None:
    """At all positions of a text, for texts within the original context and beyond the longest."""
    if raw["rope_type"] == "default" and "partial_rotary_factor" in raw:
        raw = {**raw, "rope_type": "linear", "factor": 1.0}
    for length in LENGTHS:
        positions = torch.arange(length)[None]
        expected = LlamaRotaryEmbedding(theirs(raw, 10_000.0))(torch.empty(0), positions)
        found = module_of(raw, 10_000.0).tables(positions, torch.float32, torch.tensor([length]).float())
        for table, full in zip(found, expected, strict=True):
            torch.testing.assert_close(table, full[..., : table.shape[-1]], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_rows_of_one_batch_have_their_own_lengths(name: str) -> None:
    """Each row's tables are those it would have alone."""
    module = module_of(ROPES[name], 10_000.0)
    positions = torch.tensor([[0, 1, 5], [600, 601, 602], [63, 64, 70]])
    lengths = torch.tensor([6.0, 2000.0, 71.0])
    for row in range(3):
        alone = module.tables(positions[row : row + 1], torch.float32, lengths[row : row + 1])
        for table, wanted in zip(module.tables(positions, torch.float32, lengths), alone, strict=True):
            assert torch.equal(table[row], wanted[0])


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_torchtunes_call_takes_the_length_from_the_positions(name: str) -> None:
    module = module_of(ROPES[name], 10_000.0)
    x_BSHD = normal(1, 3, 2, HEAD_DIM).float()
    positions = torch.tensor([[900, 1000, 1099]])
    tables = module.tables(positions, torch.float32, torch.tensor([1100.0]))
    expected = module.rotate(x_BSHD.transpose(1, 2), tables).transpose(1, 2)
    torch.testing.assert_close(module(x_BSHD, input_pos=positions), expected, rtol=0, atol=0)
    assert (module(x_BSHD, input_pos=positions - 900) - x_BSHD).abs().max() > 0.1


# --- rotary embedding: config.json, beyond what test_config.py has -----------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two partial factors": (
        {"rope_scaling": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
        "config.json: partial_rotary_factor = 0.25 contradicts rope_scaling: remove one of them",
    ),
    "odd part": (
        {"partial_rotary_factor": 0.1},
        "config.json: rope_scaling: partial_rotary_factor 0.1 of head_dim 32 turns 3 numbers of each head: expected an"
        " even number from 2 to 32",
    ),
    "no part": (
        {"partial_rotary_factor": 0.05},
        "partial_rotary_factor 0.05 of head_dim 32 turns 1 numbers of each head: expected an even number from 2 to 32",
    ),
    "more than all": ({"partial_rotary_factor": 2}, "partial_rotary_factor 2 of head_dim 32 turns 64 numbers"),
    "part of zero": (
        {"rope_scaling": {"partial_rotary_factor": 0}},
        "config.json: rope_scaling: partial_rotary_factor must be a number above 0, found 0",
    ),
    "dynamic of a pair": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.0625}},
        "config.json: rope_scaling: rope type dynamic needs at least 4 rotated numbers a head, found 2",
    ),
    "yarn truncate": (
        {"rope_scaling": {**YARN, "truncate": 1}},
        "config.json: rope_scaling: truncate must be true or false, found 1",
    ),
    "yarn mscale": (
        {"rope_scaling": {**YARN, "mscale": -1}},
        "config.json: rope_scaling: mscale must be a number of at least 0, found -1",
    ),
    "yarn beta": (
        {"rope_scaling": {**YARN, "beta_fast": 0}},
        "config.json: rope_scaling: beta_fast must be a number above 0, found 0",
    ),
    "yarn attention_factor": (
        {"rope_scaling": {**YARN, "attention_factor": "big"}},
        'config.json: rope_scaling: attention_factor must be a number above 0, found "big"',
    ),
    "longrope original": (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}},
        "config.json: rope_scaling: original_max_position_embeddings must be above 1 for rope type longrope",
    ),
}


@pytest.mark.parametrize(("raw", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_rope_message(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^(?:.*: )?{re.escape(message)}"):
        parse_rope(Keys(raw), HEAD_DIM, LONGEST, partial=True)


@pytest.mark.parametrize("name", [name for name in ROPES if "partial" in name])
def test_partial_factor_is_read_wherever_it_stands(name: str) -> None:
    """Inside of the rope's own object, beside it, or both."""
    inner = {key: value for key, value in ROPES[name].items() if key != "partial_rotary_factor"}
    factor = ROPES[name]["partial_rotary_factor"]
    assert read(ROPES[name]) == read(inner, partial_rotary_factor=factor)
    assert read(ROPES[name]) == read(ROPES[name], partial_rotary_factor=factor)
    assert read(ROPES[name]).dim == int(HEAD_DIM * factor)


def test_original_length_from_outside_of_the_rope_keys() -> None:
    """Phi-3 reads it beside rope_scaling."""
    inner = {key: value for key, value in LONGROPE.items() if key != "original_max_position_embeddings"}
    assert parse_rope(Keys({"rope_scaling": inner}), HEAD_DIM, LONGEST, original_max=ORIGINAL) == read(LONGROPE)
