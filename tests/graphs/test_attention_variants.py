"""Every attention variant against loops in float64 written from the papers' formulas: in one pass, and step by step.

The papers: GQA arXiv:2305.13245, sliding window arXiv:2310.06825, ALiBi arXiv:2108.12409, Explicit Sparse Transformer
arXiv:1912.11637, Linformer arXiv:2006.04768, AFT arXiv:2105.14103.

Letters in shapes: B rows, T all tokens of a row, S tokens of one call, H query heads, K key/value heads, D head
dimension, E embedding dimension. Slots count from the start of a row's cache; t is a query's, u a key's.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphs.attention import ATTENTION
from graphs.attention.aft_full import AFTFullAttention
from graphs.attention.aft_local import AFTLocalAttention
from graphs.attention.aft_simple import AFTSimpleAttention
from graphs.attention.alibi import ALiBiAttention, alibi_slopes
from graphs.attention.causal import CausalSelfAttention
from graphs.attention.linformer import LinformerAttention
from graphs.attention.sliding_window import SlidingWindowAttention
from graphs.attention.sparse_top_k import SparseTopKAttention
from graphs.build import build_decoder
from graphs.config import LayerKind, RopeConfig
from graphs.errors import CheckpointError
from graphs.families import FAMILIES
from graphs.kv_cache import KVCache
from graphs.layers import LayerNorm, RMSNorm
from graphs.positions import RotaryPositionalEmbeddings
from graphs.state import LayerState, StepContext

E = 24  # a multiple of every number of heads below
ROWS, TOKENS = 3, 12
CAPACITY = 24
MAX_SEQ_LEN = 32
THETA = 50.0
POISON = 1e4
ATOL = {torch.float64: 1e-10, torch.float32: 1e-5}
TABLE_ATOL = 1e-6  # angles, their sines and cosines, and slopes are float32 whatever the dtype
FINE = {torch.float64: 1e-12, torch.float32: 1e-6}  # differences that are no more than another order of summation


@dataclass(frozen=True)
class Spec:
    """A variant with its sizes: `make` builds the module, `loop` is its formula."""

    kind: str = "causal"
    heads: int = 4
    kv_heads: int | None = 2
    dim: int = 4
    bias: bool = False
    scale: float | None = None
    softcap: float = 0.0
    rope_dim: int = 0  # numbers of each head that turn; 0: no rotation
    interleaved: bool = False
    rope_type: str = "default"  # of an entry of LENGTH_ROPES, or default
    norm_eps: float = 0.0  # of the norms of queries and keys; 0: there are none
    window: int = 0
    top_k: int = 0
    rank: int = 5
    mistake: str = ""  # one that the formula makes on purpose, to see that the comparison notices

    @property
    def is_aft(self) -> bool:
        return self.kind.startswith("aft")

    def atol(self, dtype: torch.dtype) -> float:
        return max(ATOL[dtype], TABLE_ATOL if self.rope_dim or self.kind == "alibi" else 0.0)


ROPE = Spec(rope_dim=4)
WINDOW = Spec("sliding_window", window=3)
ALIBI = Spec("alibi", heads=8, kv_heads=2)
TOP_K = Spec("sparse_top_k", top_k=3)
AFT_FULL, AFT_LOCAL, AFT_SIMPLE = Spec("aft_full"), Spec("aft_local", window=3), Spec("aft_simple")
SPECS: dict[str, Spec] = {
    "single head": Spec(heads=1, kv_heads=1, dim=8),
    "mha": Spec(heads=4, kv_heads=None),
    "mqa": Spec(heads=4, kv_heads=1),
    "gqa": Spec(heads=6, kv_heads=2, bias=True),
    "scale": Spec(scale=0.9),
    "softcap": Spec(softcap=0.8),
    "rope": ROPE,
    "rope interleaved": replace(ROPE, interleaved=True),
    "rope partial": replace(ROPE, dim=8),
    "rope partial interleaved": replace(ROPE, dim=10, interleaved=True),
    "norms": Spec(norm_eps=0.1),
    "norms, rope": replace(ROPE, norm_eps=0.1),
    "window 1": replace(WINDOW, window=1),
    "window 3": WINDOW,
    "window of all": replace(WINDOW, window=100),
    "window, rope, softcap": replace(WINDOW, rope_dim=4, softcap=0.8),
    "alibi 8": ALIBI,
    "alibi 6": replace(ALIBI, heads=6),
    "alibi 12, softcap": replace(ALIBI, heads=12, kv_heads=12, dim=2, softcap=0.8),
    "top 1": replace(TOP_K, top_k=1),
    "top 3": TOP_K,
    "top of all": replace(TOP_K, top_k=100),
    "top 3, rope, softcap": replace(TOP_K, rope_dim=4, softcap=0.8),
    "aft_full": AFT_FULL,
    "aft_local 2": replace(AFT_LOCAL, window=2),
    "aft_local 3": AFT_LOCAL,
    "aft_local of all": replace(AFT_LOCAL, window=20, bias=True),
    "aft_simple": AFT_SIMPLE,
}
every_spec = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
every_dtype = pytest.mark.parametrize("dtype", list(ATOL), ids=str)


def only(*kinds: str) -> pytest.MarkDecorator:
    chosen = {name: spec for name, spec in SPECS.items() if spec.kind.startswith(kinds)}
    return pytest.mark.parametrize("spec", list(chosen.values()), ids=list(chosen))


every_aft = only("aft")
every_softmax = only("causal", "sliding_window", "alibi", "sparse_top_k")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(x: Tensor) -> np.ndarray:
    """float64, exactly."""
    return x.detach().to(torch.float64).numpy()


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights for which every term counts: scores and biases of about 1."""
    for index, (name, parameter) in enumerate(module.named_parameters()):
        values = normal(*parameter.shape, seed=100 * seed + index)
        if name.endswith("scale"):
            values = 1 + 0.3 * values
        elif name.endswith(("proj.weight", "router.weight", "w1.weight", "w2.weight", "w3.weight", "output.weight")):
            values = values / math.sqrt(parameter.shape[-1])
        parameter.data = values.to(parameter.dtype)


def make(spec: Spec, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module, through its constructor."""
    kv_heads = spec.heads if spec.kv_heads is None else spec.kv_heads
    widths = (E, E, E) if spec.is_aft else tuple(count * spec.dim for count in (spec.heads, kv_heads, kv_heads))
    projections: dict[str, Any] = {
        name: nn.Linear(E, width, bias=spec.bias)
        for name, width in zip(("q_proj", "k_proj", "v_proj"), widths, strict=True)
    }
    projections["output_proj"] = nn.Linear(widths[0], E, bias=spec.bias)
    if spec.is_aft:
        extra = {
            "aft_full": {"max_seq_len": MAX_SEQ_LEN, "rank": spec.rank},
            "aft_local": {"max_seq_len": MAX_SEQ_LEN, "window": spec.window},
            "aft_simple": {},
        }[spec.kind]
        module: nn.Module = AFT[spec.kind](E, **extra, **projections)
    else:
        rope = RopeConfig(
            theta=THETA,
            dim=spec.rope_dim,
            interleaved=spec.interleaved,
            rope_type=spec.rope_type,
            **LENGTH_ROPES.get(spec.rope_type, {}),
        )
        arguments: dict[str, Any] = {
            **projections,
            "pos_embeddings": RotaryPositionalEmbeddings.from_config(rope, MAX_SEQ_LEN) if spec.rope_dim else None,
            "max_seq_len": MAX_SEQ_LEN,
            "q_norm": RMSNorm(spec.dim, spec.norm_eps) if spec.norm_eps else None,
            "k_norm": RMSNorm(spec.dim, spec.norm_eps) if spec.norm_eps else None,
            "scale": spec.scale,
            "softcap": spec.softcap,
        }
        arguments |= {name: getattr(spec, name) for name in ("window", "top_k") if getattr(spec, name)}
        module = SOFTMAX[spec.kind](E, spec.heads, spec.kv_heads, spec.dim, **arguments)
    fill(module)
    return module.to(dtype).eval()


# rope types whose frequencies depend on how long a row is when a token is fed
LENGTH_ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"original_max_position_embeddings": 6, "factor": 3.0},
    "longrope": {
        "original_max_position_embeddings": 6,
        "short_factor": (1.0, 1.5),
        "long_factor": (2.0, 5.0),
        "attention_factor": 1.2,
    },
}
AFT: dict[str, Any] = {
    "aft_full": AFTFullAttention,
    "aft_local": AFTLocalAttention,
    "aft_simple": AFTSimpleAttention,
}
SOFTMAX: dict[str, Any] = {
    "causal": CausalSelfAttention,
    "sliding_window": SlidingWindowAttention,
    "alibi": ALiBiAttention,
    "sparse_top_k": SparseTopKAttention,
}


# --- the formulas as loops ---------------------------------------------------------------------------------------

Weights = dict[str, np.ndarray]


def weights_of(module: nn.Module) -> Weights:
    return {name: array(parameter) for name, parameter in module.named_parameters()}


def project(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)


def normed(head: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return head / math.sqrt(sum(number * number for number in head) / len(head) + eps) * scale


def frequency(i: int, length: int, spec: Spec) -> float:
    """Of pair i in a row of that length: RoFormer, arXiv:2104.09864; LongRoPE, arXiv:2402.13753; dynamic NTK."""
    theta, factor = THETA, 1.0
    rope = LENGTH_ROPES.get(spec.rope_type, {})
    if spec.rope_type == "dynamic":
        growth = rope["factor"] * max(length, 6) / 6 - (rope["factor"] - 1)
        theta *= growth ** (spec.rope_dim / (spec.rope_dim - 2))
    if spec.rope_type == "longrope":
        factor = rope["long_factor" if length > 6 else "short_factor"][i]
    return theta ** (-2 * i / spec.rope_dim) / factor


def turned(head: np.ndarray, slot: int, length: int, spec: Spec) -> np.ndarray:
    """Pair i of the first rope_dim numbers turns by slot * frequency."""
    out = head.copy()
    for i in range(spec.rope_dim // 2):
        first, second = (2 * i, 2 * i + 1) if spec.interleaved else (i, i + spec.rope_dim // 2)
        angle = slot * frequency(i, length, spec)
        pair = complex(head[first], head[second]) * complex(math.cos(angle), math.sin(angle))
        pair *= LENGTH_ROPES.get(spec.rope_type, {}).get("attention_factor", 1.0)
        out[first], out[second] = pair.real, pair.imag
    return out


def slope(h: int, heads: int) -> float:
    """The authors' get_slopes: 2^(-8/n), 2^(-16/n), ..; or those of the power of two below, and some of twice it.

    github.com/ofirpress/attention_with_linear_biases
    """
    if heads & (heads - 1) == 0:
        return 2.0 ** (-8.0 * (h + 1) / heads)
    power = 1 << (heads.bit_length() - 1)
    return slope(h, power) if h < power else slope(2 * (h - power), 2 * power)


def loop_softmax(
    w: Weights, x_TE: np.ndarray, slots: Sequence[int], spec: Spec, lengths: Sequence[int] = ()
) -> np.ndarray:
    """lengths: of the row, when each token was fed; it matters to the rope types of LENGTH_ROPES."""
    kv_heads = spec.heads if spec.kv_heads is None else spec.kv_heads
    scale = 1 / math.sqrt(E if spec.mistake == "scale of E" else spec.dim) if spec.scale is None else spec.scale
    tokens = range(len(x_TE))
    lengths = lengths or [slots[-1] + 1] * len(x_TE)

    def head_of(name: str, head: int, t: int) -> np.ndarray:
        values = project(w, f"{name}_proj", x_TE[t])[head * spec.dim : (head + 1) * spec.dim]
        if name == "v":
            return values
        if spec.mistake == "norm after rope":
            return normed(turned(values, slots[t], lengths[t], spec), w[f"{name}_norm.scale"], spec.norm_eps)
        if spec.norm_eps:
            values = normed(values, w[f"{name}_norm.scale"], spec.norm_eps)
        return turned(values, slots[t], lengths[t], spec)

    heads = np.zeros((len(x_TE), spec.heads * spec.dim))
    for h in range(spec.heads):
        shared = h % kv_heads if spec.mistake == "neighbours apart" else h // (spec.heads // kv_heads)
        queries = [head_of("q", h, t) for t in tokens]
        keys = [head_of("k", shared, t) for t in tokens]
        values = [head_of("v", shared, t) for t in tokens]
        for t in tokens:
            scores: dict[int, float] = {}
            for u in tokens:
                distance = slots[t] - slots[u]
                if distance < 0 and spec.mistake != "looks ahead":
                    continue
                if spec.window and distance >= spec.window:
                    continue
                score = scale * sum(a * b for a, b in zip(queries[t], keys[u], strict=True))
                if spec.softcap:
                    score = spec.softcap * math.tanh(score / spec.softcap)
                if spec.kind == "alibi":
                    score -= slope(h, spec.heads) * distance
                scores[u] = score
            if spec.top_k:
                threshold = sorted(scores.values(), reverse=True)[: spec.top_k][-1]
                scores = {u: score for u, score in scores.items() if score >= threshold}
            largest = max(scores.values())
            total = sum(math.exp(score - largest) for score in scores.values())
            for u, score in scores.items():
                heads[t, h * spec.dim : (h + 1) * spec.dim] += math.exp(score - largest) / total * values[u]
    return np.array([project(w, "output_proj", row) for row in heads])


def bias_full(w: Weights, t: int, u: int, spec: Spec) -> float:
    return float(sum(a * b for a, b in zip(w["query_bias.weight"][t], w["key_bias.weight"][u], strict=True)))


def bias_local(w: Weights, t: int, u: int, spec: Spec) -> float:
    if t - u >= spec.window or t < u:
        return -math.inf if spec.mistake == "far hidden" else 0.0
    return float(w["position_bias.weight"][t, t - u])


AFT_BIAS: dict[str, Callable[[Weights, int, int, Spec], float]] = {
    "aft_full": bias_full,
    "aft_local": bias_local,
    "aft_simple": lambda w, t, u, spec: 0.0,
}


def loop_aft(w: Weights, x_TE: np.ndarray, slots: Sequence[int], spec: Spec) -> np.ndarray:
    """Equation 3 in its causal form, exponentials relative to the largest one that the query sees."""
    q, k, v = ([project(w, f"{name}_proj", x) for x in x_TE] for name in ("q", "k", "v"))
    tokens = range(len(x_TE))
    mixed = np.zeros(x_TE.shape)
    for t in tokens:
        seen = [u for u in tokens if slots[u] <= slots[t] or spec.mistake == "looks ahead"]
        biases = {u: AFT_BIAS[spec.kind](w, slots[t], slots[u], spec) for u in seen}
        for e in range(x_TE.shape[1]):
            largest = max(k[u][e] + biases[u] for u in seen)
            parts = {u: math.exp(k[u][e] + biases[u] - largest) for u in seen}
            mean = sum(part * v[u][e] for u, part in parts.items()) / sum(parts.values())
            mixed[t, e] = mean / (1 + math.exp(-q[t][e]))
    return np.array([project(w, "output_proj", row) for row in mixed])


def loop(module: nn.Module, x_BTE: Tensor, spec: Spec, offset: int = 0) -> np.ndarray:
    formula = loop_aft if spec.is_aft else loop_softmax
    slots = range(offset, offset + x_BTE.shape[1])
    return np.stack([formula(weights_of(module), row, slots, spec) for row in array(x_BTE)])


# Modules, inputs and formulas that many tests share; a test that changes a module makes its own.


@functools.cache
def shared_module(spec: Spec, dtype: torch.dtype) -> nn.Module:
    return make(spec, dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(ROWS, TOKENS, E, seed=7).to(dtype)


@functools.cache
def expected(spec: Spec, dtype: torch.dtype, offset: int = 0) -> np.ndarray:
    """[B, T, E]; a row's first slot matters only to learned biases of pairs of slots."""
    if offset and spec.kind not in ("aft_full", "aft_local"):
        return expected(spec, dtype)
    return loop(shared_module(replace(spec, mistake=""), dtype), inputs(dtype), spec, offset)


def close(found: Tensor | np.ndarray, wanted: np.ndarray, atol: float) -> None:
    found = array(found) if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


# --- the full pass -----------------------------------------------------------------------------------------------


@every_dtype
@every_spec
@torch.no_grad()
def test_full_pass_is_the_formula(spec: Spec, dtype: torch.dtype) -> None:
    """Where the text begins matters to learned biases only."""
    module = shared_module(spec, dtype)
    close(module(inputs(dtype)), expected(spec, dtype), spec.atol(dtype))
    shifted = module(inputs(dtype), input_pos=torch.arange(5, 5 + TOKENS))
    close(shifted, expected(spec, dtype, 5), spec.atol(dtype))
    if spec.kind in ("aft_full", "aft_local"):
        assert np.abs(expected(spec, dtype, 5) - expected(spec, dtype)).max() > 0.1


def test_every_variant_is_tested() -> None:
    """A new entry of ATTENTION needs a formula here."""
    assert {spec.kind for spec in SPECS.values()} | {"linformer"} == set(ATTENTION)


MISTAKES: dict[str, Spec] = {
    "scale of E": replace(SPECS["mha"], mistake="scale of E"),
    "looks ahead": replace(SPECS["mha"], mistake="looks ahead"),
    "neighbours apart": replace(SPECS["gqa"], mistake="neighbours apart"),
    "norm after rope": replace(SPECS["norms, rope"], mistake="norm after rope"),
    "chosen among later keys": replace(TOP_K, mistake="looks ahead"),
    "far tokens hidden": replace(AFT_LOCAL, mistake="far hidden"),
    "the whole text summed": replace(AFT_SIMPLE, mistake="looks ahead"),
}


@pytest.mark.parametrize("wrong", list(MISTAKES.values()), ids=list(MISTAKES))
def test_a_mistake_in_the_formula_is_seen(wrong: Spec) -> None:
    """The reference article's own mistakes, and others: none is within a tolerance of the right result."""
    right = expected(replace(wrong, mistake=""), torch.float64)
    assert np.abs(expected(wrong, torch.float64) - right).max() > 0.01


MUTANTS: dict[str, tuple[Spec, Callable[[Any], Any]]] = {
    "window one wider": (WINDOW, lambda m: setattr(m, "window", 4)),
    "window one narrower": (WINDOW, lambda m: setattr(m, "window", 2)),
    "slopes reversed": (ALIBI, lambda m: setattr(m, "slopes", m.slopes.flip(0))),
    "scale of E": (SPECS["mha"], lambda m: setattr(m, "scale", E**-0.5)),
    "no softcap": (SPECS["softcap"], lambda m: setattr(m, "softcap", 0.0)),
    "k one larger": (TOP_K, lambda m: setattr(m, "top_k", 4)),
    "pairs of the other convention": (
        ROPE,
        lambda m: setattr(m.pos_embeddings, "rope", replace(m.pos_embeddings.rope, interleaved=True)),
    ),
    "bias of another distance": (AFT_LOCAL, lambda m: m.position_bias.weight.copy_(m.position_bias.weight.flip(1))),
    "a and b swapped": (
        AFT_FULL,
        lambda m: (
            m.query_bias.weight.set_(m.key_bias.weight.clone()),
            m.key_bias.weight.set_(m.query_bias.weight.roll(1, 0)),
        ),
    ),
}


@pytest.mark.parametrize(("spec", "mutate"), list(MUTANTS.values()), ids=list(MUTANTS))
@torch.no_grad()
def test_a_mutant_fails_the_comparison(spec: Spec, mutate: Callable[[Any], Any]) -> None:
    module = make(spec)
    mutate(module)
    with pytest.raises(AssertionError):
        close(module(inputs()), expected(spec, torch.float64), 1e-3)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 32])
def test_alibi_slopes_are_the_authors(heads: int) -> None:
    assert alibi_slopes(heads).tolist() == pytest.approx([slope(h, heads) for h in range(heads)], rel=1e-7)


def test_alibi_slopes_by_hand() -> None:
    """Section 3: for 8 heads 1/2, 1/4, .. 1/256; six heads take four of 4 heads, then the first and third of 8."""
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


def test_alibi_slopes_stay_float32() -> None:
    """bfloat16 would hold 2 ** -0.5 in 8 bits."""
    module = make(replace(ALIBI, heads=12)).to(torch.bfloat16)
    assert module.slopes.dtype == torch.float32
    assert torch.equal(module.slopes, alibi_slopes(12))
    assert torch.equal(module.real_buffers()["slopes"], alibi_slopes(12))
    assert "slopes" not in module.state_dict()


def plain(module: CausalSelfAttention) -> CausalSelfAttention:
    """One head of E whose queries, keys and values are x itself."""
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.output_proj):
        projection.weight.data = torch.eye(E, dtype=torch.float64)
    return module


@torch.no_grad()
def test_top_k_keeps_what_ties_with_the_last() -> None:
    """Tokens in scores of 3 2 2 2 1 and k = 2: the three that tie for the second place are all used."""
    module = plain(make(Spec("sparse_top_k", heads=1, kv_heads=1, dim=E, scale=1.0, top_k=2)))
    x_BTE = torch.zeros(1, 6, E, dtype=torch.float64)
    x_BTE[0, :, 0] = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    x_BTE[0, :, 1:7] = torch.eye(6)  # tells in the result which tokens were used ..
    x_BTE[0, 5, 1:7] = 0.0  # .. and adds nothing to the last token's scores
    out = module(x_BTE)[0, 5]
    used = np.exp([3.0, 2.0, 2.0, 2.0])
    close(out[1:5], used / used.sum(), 1e-12)
    assert out[5:].abs().max() == 0
    close(module(x_BTE), loop(module, x_BTE, Spec("sparse_top_k", 1, 1, E, scale=1.0, top_k=2)), 1e-12)


@torch.no_grad()
def test_top_k_with_all_scores_equal_uses_all() -> None:
    module = plain(make(Spec("sparse_top_k", heads=1, kv_heads=1, dim=E, top_k=1)))
    x_BTE = normal(1, 5, E)
    module.q_proj.weight.data.zero_()
    close(module(x_BTE)[0], array(x_BTE[0]).cumsum(axis=0) / np.arange(1, 6)[:, None], 1e-12)


@pytest.mark.parametrize("top_k", [1, 3, 20])
@torch.no_grad()
def test_top_k_without_near_ties_chooses_the_same_with_swaps(top_k: int) -> None:
    """swap_margin (graphs/near_ties.py) changes choices only where scores nearly tie; fewer keys than k are no tie."""
    module = make(replace(TOP_K, top_k=top_k, norm_eps=0.1))
    right = array(module(inputs()))
    module.swap_margin = 1e-9
    close(module(inputs()), right, 1e-12)


@torch.no_grad()
def test_top_k_with_a_near_tie_swaps_it() -> None:
    """Scores 3 2 1.999 and k = 2: with a margin of 1 % the third is used in place of the second."""
    module = plain(make(Spec("sparse_top_k", heads=1, kv_heads=1, dim=E, scale=1.0, top_k=2)))
    x_BTE = torch.zeros(1, 4, E, dtype=torch.float64)
    x_BTE[0, :, 0] = torch.tensor([3.0, 2.0, 1.999, 1.0], dtype=torch.float64)
    x_BTE[0, :3, 1:4] = torch.eye(3)
    module.swap_margin = 0.01
    out, used = module(x_BTE)[0, 3], np.exp([3.0, 1.999])
    close(out[1:4], np.array([used[0], 0.0, used[1]]) / used.sum(), 1e-12)


@pytest.mark.parametrize("spec", [WINDOW, ROPE], ids=["window", "rope"])
def test_a_vanishing_dropout_in_training_changes_nothing(spec: Spec) -> None:
    """Training goes through another function, which must compute the same."""
    module = make(spec).train()
    module.attn_dropout = 1e-12
    close(module(inputs()), expected(spec, torch.float64), TABLE_ATOL)


def test_dropout_with_a_softcap_is_refused() -> None:
    """The function that training goes through has no softcap."""
    linears = [nn.Linear(8, 8) for _ in range(4)]
    with pytest.raises(ValueError, match=r"attn_dropout \(0.1\) must be 0: it is not .* with a softcap"):
        CausalSelfAttention(8, 1, 1, 8, *linears, None, attn_dropout=0.1, softcap=2.0)


@every_softmax
@torch.no_grad()
def test_torchtunes_cache_is_the_formula(spec: Spec) -> None:
    """The KV cache inside the module, in uneven chunks; what is unwritten shows nowhere."""
    module = make(spec)
    module.kv_cache = KVCache(ROWS, CAPACITY, module.num_kv_heads, spec.dim, torch.float64)
    module.kv_cache.k_cache.fill_(POISON)
    module.kv_cache.v_cache.fill_(POISON)
    chunks = torch.arange(TOKENS).split([5, 1, 4, 2])
    found = torch.cat([module(inputs()[:, chunk], input_pos=chunk) for chunk in chunks], dim=1)
    close(found, expected(spec, torch.float64), spec.atol(torch.float64))


# --- Linformer ---------------------------------------------------------------------------------------------------

LONGEST, K_ROWS = 10, 4


def linformer(dtype: torch.dtype = torch.float64) -> LinformerAttention:
    names = ("q_proj", "k_proj", "v_proj", "output_proj")
    linears = {name: nn.Linear(E, E, bias=name == "v_proj") for name in names}
    module = LinformerAttention(E, 3, LONGEST, K_ROWS, **linears)
    fill(module)
    return module.to(dtype)


def loop_linformer(w: Weights, x_TE: np.ndarray, kept: Sequence[bool]) -> np.ndarray:
    """Equation 7: softmax(Q (E K)^T / sqrt(d)) (F V); padding is rows of zeros in K and V, up to LONGEST."""
    dim = E // 3
    mixed = np.zeros(x_TE.shape)
    for h in range(3):
        part = slice(h * dim, (h + 1) * dim)
        keys, values = np.zeros((K_ROWS, dim)), np.zeros((K_ROWS, dim))
        for row in range(K_ROWS):
            for u, x in enumerate(x_TE):
                if kept[u]:
                    keys[row] += w["proj_e"][row, u] * project(w, "k_proj", x)[part]
                    values[row] += w["proj_f"][row, u] * project(w, "v_proj", x)[part]
        for t, x in enumerate(x_TE):
            q = project(w, "q_proj", x)[part]
            scores = [sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(dim) for key in keys]
            total = sum(math.exp(score) for score in scores)
            for score, value in zip(scores, values, strict=True):
                mixed[t, part] += math.exp(score) / total * value
    return np.array([project(w, "output_proj", row) for row in mixed])


@every_dtype
@pytest.mark.parametrize("length", [1, 7, LONGEST])
@torch.no_grad()
def test_linformer_is_its_formula(length: int, dtype: torch.dtype) -> None:
    """A text shorter than the projections, and one as long."""
    module, x_BTE = linformer(dtype), inputs(dtype)[:, :length]
    wanted = [loop_linformer(weights_of(module), row, [True] * length) for row in array(x_BTE)]
    close(module(x_BTE), np.stack(wanted), ATOL[dtype])


@torch.no_grad()
def test_linformer_hides_padding() -> None:
    """A padded row equals the row alone, whatever the padding holds; masking is a formula of its own as well."""
    module, x_BTE = linformer(), inputs()[:, :8].clone()
    kept = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    x_BTE[~kept] = 50.0
    out = module(x_BTE, kept)
    for row, length in enumerate((8, 3, 5)):
        close(out[row : row + 1, :length], array(module(x_BTE[row : row + 1, :length])), 1e-12)
        wanted = loop_linformer(weights_of(module), array(x_BTE[row]), kept[row].tolist())
        close(out[row], wanted, ATOL[torch.float64])
    assert (out - module(x_BTE)).abs().max() > 0.1


def test_linformer_starts_as_the_paper_says() -> None:
    """Section 4: E and F are drawn from N(0, 1/k), apart from each other."""
    linears = {name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    module = LinformerAttention(8, 2, 512, 64, **linears)
    for projection in (module.proj_e, module.proj_f):
        assert projection.shape == (64, 512)
        assert projection.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert not torch.equal(module.proj_e, module.proj_f)


# --- step by step ------------------------------------------------------------------------------------------------

Calls = Sequence[Sequence[int]]  # per call, how many new tokens each row gets


def start(module: Any, rows: int, dtype: torch.dtype, poison: float = POISON, capacity: int = CAPACITY) -> LayerState:
    """The state before the first token; cache slots hold what would show wherever it is read."""
    tensors = module.state(capacity)
    state = tuple(tensor.zeros(rows, dtype) for tensor in tensors)
    for tensor, value in zip(tensors, state, strict=True):
        if tensor.slot_axis is not None:
            value.fill_(poison)
    return state


@torch.no_grad()
def feed(
    module: Any, x_BTE: Tensor, calls: Calls, offsets: Sequence[int], *, extra_slots: int = 0, poison: float = POISON
) -> tuple[list[Tensor], LayerState]:
    """Per row [tokens fed, E], and the state. Row b begins at slot offsets[b]; its padding, on the right, is large.

    Args:
        extra_slots: how much longer than needed the attention mask is.
        poison: what unwritten slots hold.
    """
    rows = len(offsets)
    state = start(module, rows, x_BTE.dtype, poison)
    fed = [0] * rows
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    for number, counts in enumerate(calls):
        length = max(counts)
        x_BSE = 20 * normal(rows, length, E, seed=number).to(x_BTE.dtype)
        write_indices = torch.tensor([offset + done for offset, done in zip(offsets, fed, strict=True)])
        attention_mask = torch.zeros(rows, int(write_indices.max()) + length + extra_slots, dtype=torch.int64)
        for row, count in enumerate(counts):
            x_BSE[row, :count] = x_BTE[row, fed[row] : fed[row] + count]
            attention_mask[row, offsets[row] : int(write_indices[row]) + count] = 1
        context = StepContext(write_indices[:, None] + torch.arange(length), write_indices, attention_mask)
        out, state = module(x_BSE, context=context, past=state)
        assert out.isfinite().all()
        for row, count in enumerate(counts):
            found[row].append(out[row, :count])
            fed[row] += count
    return [torch.cat(parts) for parts in found], state


ONE_BY_ONE = [[1] * ROWS] * TOKENS
SCHEDULES: dict[str, tuple[Calls, tuple[int, ...]]] = {
    "one call": ([[TOKENS] * ROWS], (0, 0, 0)),
    "one by one": (ONE_BY_ONE, (0, 0, 0)),
    "chunks": ([[5] * ROWS, [1] * ROWS, [4] * ROWS, [2] * ROWS], (0, 0, 0)),
    "ragged": ([[8, 3, 1], *[[1, 1, 1]] * 4], (0, 0, 0)),  # the padding of two rows is longer than the window
    "ragged chunks": ([[6, 2, 1], [1, 5, 3], [4, 1, 2], [1, 4, 6]], (0, 0, 0)),
    "offsets": ([[4] * ROWS, [1] * ROWS, [3] * ROWS], (0, 1, 7)),
    "offsets, one by one": (ONE_BY_ONE[:6], (9, 1, 2)),
    "offsets, ragged": ([[2, 6, 1], *[[1, 1, 1]] * 3], (3, 0, 7)),
    "idle": ([[2, 5, 1], [1, 0, 1], [1, 0, 0], [0, 0, 3], [3, 1, 0], [2, 2, 2]], (0, 0, 0)),
    "idle, offsets": ([[2, 5, 1], [1, 0, 1], [0, 0, 4], [3, 1, 0]], (5, 0, 2)),
}
every_schedule = pytest.mark.parametrize(("calls", "offsets"), list(SCHEDULES.values()), ids=list(SCHEDULES))


def check_steps(module: nn.Module, spec: Spec, calls: Calls, offsets: Sequence[int], dtype: torch.dtype) -> None:
    found, _ = feed(module, inputs(dtype), calls, offsets)
    for row, (out, offset) in enumerate(zip(found, offsets, strict=True)):
        close(out, expected(spec, dtype, offset)[row, : len(out)], spec.atol(dtype))


@every_schedule
@every_spec
def test_steps_are_the_formula(spec: Spec, calls: Calls, offsets: Sequence[int]) -> None:
    """Rows of any lengths, each as if it were alone; neither padding nor unwritten slots leave a trace."""
    check_steps(shared_module(spec, torch.float64), spec, calls, offsets, torch.float64)


@pytest.mark.parametrize("name", ["one by one", "ragged", "idle, offsets"])
@every_spec
def test_steps_in_float32(spec: Spec, name: str) -> None:
    check_steps(shared_module(spec, torch.float32), spec, *SCHEDULES[name], torch.float32)


@every_spec
def test_a_longer_mask_changes_nothing(spec: Spec) -> None:
    """T may be longer than what is written: slots that are not seen hold poison."""
    calls, offsets = SCHEDULES["ragged"]
    module = shared_module(spec, torch.float64)
    wanted, state = feed(module, inputs(), calls, offsets)
    found, same_state = feed(module, inputs(), calls, offsets, extra_slots=5)
    for a, b in zip((*found, *same_state), (*wanted, *state), strict=True):
        close(a, array(b), FINE[torch.float64])


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_aft_full_reads_nothing_of_slots_that_nobody_sees(poison: float) -> None:
    calls, offsets = SCHEDULES["offsets, ragged"]
    found, _ = feed(shared_module(AFT_FULL, torch.float64), inputs(), calls, offsets, extra_slots=3, poison=poison)
    for row, (out, offset) in enumerate(zip(found, offsets, strict=True)):
        close(out, expected(AFT_FULL, torch.float64, offset)[row, : len(out)], ATOL[torch.float64])


def test_tokens_beyond_the_mask_are_padding() -> None:
    """attention_mask may end before the slots of rows that are idle or shorter; it says nothing of them."""
    context = StepContext(torch.zeros(3, 3), torch.tensor([0, 3, 7]), torch.tensor([[1, 1, 0, 0], [1] * 4, [1] * 4]))
    assert context.slots_BS.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]
    assert context.valid_BS.tolist() == [[True, True, False], [True, False, False], [False] * 3]


@every_spec
@torch.no_grad()
def test_padding_before_tokens_leaves_no_trace(spec: Spec) -> None:
    """A call of two paddings and a token, in the middle of a text: they take slots, but nobody sees them."""
    module = shared_module(spec, torch.float64)
    x_BTE = inputs()[:1, :6]
    calls = [(x_BTE[:, :3], [1, 1, 1]), (torch.cat((x_BTE[:, 3:5] * 9, x_BTE[:, 3:4]), dim=1), [0, 0, 1])]
    calls.append((x_BTE[:, 4:5], [1]))
    state, mask, found = start(module, 1, torch.float64), [], []
    for x_BSE, seen in calls:
        write_indices = torch.tensor([len(mask)])
        mask += seen
        slots = write_indices[:, None] + torch.arange(len(seen))
        context = StepContext(slots, write_indices, torch.tensor([mask]))
        out, state = module(x_BSE, context=context, past=state)
        found.append(out[0][torch.tensor(seen) == 1])
    slots = [slot for slot, seen in enumerate(mask) if seen]
    formula = loop_aft if spec.is_aft else loop_softmax
    wanted = formula(weights_of(module), array(x_BTE[0, :5]), slots, spec)
    close(torch.cat(found), wanted, spec.atol(torch.float64))


@every_aft
@torch.no_grad()
def test_an_idle_row_keeps_its_state(spec: Spec) -> None:
    """Its own slot is masked: what it is fed changes no sum, and no slot that is seen."""
    module = shared_module(spec, torch.float64)
    _, state = feed(module, inputs(), [[4, 2, 6]], (0, 0, 0))
    lengths = torch.tensor([4, 2, 6])
    mask = (torch.arange(10) < lengths[:, None]).long()
    context = StepContext(lengths[:, None], lengths, mask)
    _, after = module(50 * inputs()[:, :1], context=context, past=state)
    for tensor, a, b in zip(module.state(CAPACITY), after, state, strict=True):
        if tensor.slot_axis is None:
            close(a, array(b), FINE[torch.float64])
        else:
            assert all(torch.equal(a[row, :, :length], b[row, :, :length]) for row, length in enumerate((4, 2, 6)))


@every_aft
def test_state_after_chunks_is_the_state_after_one_call(spec: Spec) -> None:
    """Sums do not depend on how a text was cut, so a state can be compared with another runtime's."""
    module = shared_module(spec, torch.float64)
    _, whole = feed(module, inputs(), [[TOKENS] * ROWS], (0, 0, 0))
    for name in ("one by one", "chunks"):
        _, state = feed(module, inputs(), *SCHEDULES[name])
        for tensor, a, b in zip(module.state(CAPACITY), state, whole, strict=True):
            close(tensor_slots(tensor, a), array(tensor_slots(tensor, b)), FINE[torch.float64])


def tensor_slots(tensor: Any, value: Tensor) -> Tensor:
    """The written slots of a cache; all of a sum."""
    return value if tensor.slot_axis is None else value.narrow(tensor.slot_axis + 1, 0, TOKENS)


@pytest.mark.parametrize("name", ["one call", "one by one", "ragged", "ragged chunks", "offsets, ragged", "idle"])
@pytest.mark.parametrize("rope_type", list(LENGTH_ROPES))
def test_rope_of_the_rows_length_when_a_token_is_fed(rope_type: str, name: str) -> None:
    """Keys stay as they were turned then; padding adds nothing to a row's length."""
    spec = replace(ROPE, rope_type=rope_type)
    module, (calls, offsets) = make(spec), SCHEDULES[name]
    found, _ = feed(module, inputs(), calls, offsets)
    for row, (out, offset) in enumerate(zip(found, offsets, strict=True)):
        lengths: list[int] = []
        for counts in calls:
            lengths += [offset + len(lengths) + counts[row]] * counts[row]
        slots = range(offset, offset + len(out))
        wanted = loop_softmax(weights_of(module), array(inputs()[row, : len(out)]), slots, spec, lengths)
        close(out, wanted, TABLE_ATOL)
    if name == "one call":
        close(module(inputs()), loop(module, inputs(), spec), TABLE_ATOL)
        assert np.abs(loop(module, inputs(), replace(spec, rope_type="default")) - array(module(inputs()))).max() > 0.01


STEP_MUTANTS: dict[str, tuple[Spec, str, str, Any]] = {
    "padding enters sums": (AFT_SIMPLE, "ragged", "valid_BS", property(lambda c: torch.ones_like(c.slots_BS).bool())),
    "padding enters windows": (AFT_LOCAL, "idle", "valid_BS", property(lambda c: torch.ones_like(c.slots_BS).bool())),
    "no causal mask": (SPECS["gqa"], "chunks", "mask_B1ST", property(lambda c: (c.attention_mask != 0)[:, None, None])),
    "attention_mask ignored": (
        SPECS["gqa"],
        "offsets",
        "mask_B1ST",
        property(lambda c: (c.distances_BST >= 0).unsqueeze(1)),
    ),
    "window from the call's first token": (
        WINDOW,
        "chunks",
        "window_mask_B1ST",
        lambda c, window: c.mask_B1ST & ((c.write_indices[:, None] - c.key_slots_T) < window)[:, None, None],
    ),
    "padding sees nothing": (
        WINDOW,
        "ragged",
        "window_mask_B1ST",
        lambda c, window: c.mask_B1ST & (c.distances_BST < window).unsqueeze(1),
    ),
}


@pytest.mark.parametrize(("spec", "schedule", "name", "wrong"), list(STEP_MUTANTS.values()), ids=list(STEP_MUTANTS))
def test_a_mutant_fails_step_by_step(
    spec: Spec, schedule: str, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepContext, name, wrong)
    with pytest.raises(AssertionError):
        check_steps(shared_module(spec, torch.float64), spec, *SCHEDULES[schedule], torch.float64)


# --- state -------------------------------------------------------------------------------------------------------

SUMS = [(name, (E,), None, True) for name in ("numerator", "denominator", "peak")]
STATES: dict[str, tuple[Spec, list[tuple[Any, ...]]]] = {
    "causal": (SPECS["gqa"], [(name, (2, 9, 4), 1, False) for name in ("key", "value")]),
    "sliding_window": (WINDOW, [(name, (2, 9, 4), 1, False) for name in ("key", "value")]),
    "alibi": (SPECS["alibi 12, softcap"], [(name, (12, 9, 2), 1, False) for name in ("key", "value")]),
    "sparse_top_k": (TOP_K, [(name, (2, 9, 4), 1, False) for name in ("key", "value")]),
    "aft_full": (AFT_FULL, [(name, (1, 9, E), 1, False) for name in ("key", "value")]),
    "aft_local": (AFT_LOCAL, [*((name, (2, E), None, False) for name in ("key", "value")), *SUMS]),
    "aft_simple": (AFT_SIMPLE, SUMS),
}


@pytest.mark.parametrize(("spec", "tensors"), list(STATES.values()), ids=list(STATES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_state(spec: Spec, tensors: list[tuple[Any, ...]], dtype: torch.dtype) -> None:
    """Names, shapes, slot axes and dtypes; and what a call returns has them as well."""
    module = make(spec, dtype)
    assert [tuple(tensor) for tensor in module.state(9)] == tensors
    x_BSE = inputs(dtype)[:, :4]
    context = StepContext(torch.arange(4).expand(ROWS, 4), torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, 4))
    out, present = module(x_BSE, context=context, past=start(module, ROWS, dtype, capacity=9))
    assert (out.dtype, out.shape) == (dtype, (ROWS, 4, E))
    for (_, shape, _, wide), tensor in zip(tensors, present, strict=True):
        assert tensor.shape == (ROWS, *shape)
        assert tensor.dtype == (torch.promote_types(dtype, torch.float32) if wide else dtype)


@every_spec
def test_state_that_has_no_slots_does_not_grow(spec: Spec) -> None:
    """AFT-simple and AFT-local hold the same for a text of any length; a cache holds a slot for each token."""
    for short, long in zip(*(make(spec).state(max_len) for max_len in (8, 8000)), strict=True):
        if spec.kind in ("aft_simple", "aft_local"):
            assert short == long
            assert short.slot_axis is None
        else:
            assert (short.shape[short.slot_axis], long.shape[long.slot_axis]) == (8, 8000)


# --- messages ----------------------------------------------------------------------------------------------------


def linears(width: int = E) -> dict[str, Any]:
    return {name: nn.Linear(E, width) for name in ("q_proj", "k_proj", "v_proj")} | {"output_proj": nn.Linear(width, E)}


def softmax(make_it: Any, width: int = E, **changes: Any) -> Any:
    sizes = {"embed_dim": E, "num_heads": 4, "num_kv_heads": 4, "head_dim": 6, "pos_embeddings": None}
    return make_it(**{**sizes, **linears(width), **changes})


def with_cache(module: Any) -> Any:
    module.kv_cache = KVCache(ROWS, 8, 2, 4, torch.float64)
    return module


ANY = torch.zeros(1, 2, E, dtype=torch.float64)
LONG = torch.zeros(1, MAX_SEQ_LEN + 1, E, dtype=torch.float64)
MASK = torch.ones(1, 2, 2, dtype=torch.bool)
CONTEXT = StepContext(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2))
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "heads": (
        lambda: softmax(CausalSelfAttention, num_kv_heads=3),
        "num_heads (4) must be a multiple of num_kv_heads (3)",
    ),
    "no heads": (
        lambda: softmax(CausalSelfAttention, num_kv_heads=0),
        "num_heads (4) must be a multiple of num_kv_heads (0)",
    ),
    "width": (
        lambda: softmax(CausalSelfAttention, num_heads=5, num_kv_heads=5),
        "embed_dim (24) must be a multiple of num_heads (5)",
    ),
    "dropout": (
        lambda: softmax(CausalSelfAttention, attn_dropout=1.5),
        "attn_dropout (1.5) must lie between 0 and 1",
    ),
    "projection": (
        lambda: softmax(CausalSelfAttention, num_kv_heads=2),
        "k_proj gives 24 features, expected 2 heads of 6: 12",
    ),
    "long": (lambda: make(ROPE)(LONG), "seq_len (33) of the input is bigger than max_seq_len (32)"),
    "input_pos": (lambda: make(ROPE)(ANY, input_pos=torch.arange(3)), "input_pos has shape (3,), expected (2,)"),
    "no input_pos": (lambda: with_cache(make(ROPE))(ANY), "a KV cache is set up, but input_pos is missing"),
    "window": (lambda: softmax(SlidingWindowAttention, window=0), "window (0) must be at least 1"),
    "top_k": (lambda: softmax(SparseTopKAttention, top_k=0), "top_k (0) must be at least 1"),
    "top_k, dropout": (
        lambda: softmax(SparseTopKAttention, top_k=2, attn_dropout=0.1),
        "attn_dropout (0.1) must be 0: it is not implemented for sparse top-k",
    ),
    "alibi, rope": (
        lambda: softmax(ALiBiAttention, pos_embeddings=RotaryPositionalEmbeddings(6)),
        "ALiBi takes the place of other positions: pos_embeddings must be None",
    ),
    "alibi, dropout": (
        lambda: softmax(ALiBiAttention, attn_dropout=0.1),
        "attn_dropout (0.1) must be 0: it is not implemented for ALiBi",
    ),
    "aft width": (
        lambda: AFTSimpleAttention(E, **{**linears(), "k_proj": nn.Linear(E, 12)}),
        "k_proj gives 12 features, expected embed_dim: 24",
    ),
    "aft window": (
        lambda: AFTLocalAttention(E, 8, 1, **linears()),
        "window (1) must be at least 2: a token and one before it",
    ),
    **{
        f"{spec.kind} mask": (
            lambda spec=spec: make(spec)(ANY, MASK),
            "attention-free layers are always causal: mask must be None",
        )
        for spec in (AFT_FULL, AFT_LOCAL, AFT_SIMPLE)
    },
    **{
        f"{spec.kind} long": (
            lambda spec=spec: make(spec)(LONG),
            "seq_len (33) of the input is bigger than max_seq_len (32)",
        )
        for spec in (AFT_FULL, AFT_LOCAL)
    },
    "linformer heads": (
        lambda: LinformerAttention(E, 5, 8, 4, **linears()),
        "embed_dim (24) must be a multiple of num_heads (5)",
    ),
    "linformer no k": (
        lambda: LinformerAttention(E, 4, 8, 0, **linears()),
        "k (0) must be at least 1 and at most max_seq_len (8)",
    ),
    "linformer k": (
        lambda: LinformerAttention(E, 4, 8, 9, **linears()),
        "k (9) must be at least 1 and at most max_seq_len (8)",
    ),
    "linformer long": (
        lambda: linformer()(LONG),
        "seq_len (33) of the input is bigger than max_seq_len (10)",
    ),
    "linformer context": (
        lambda: linformer()(ANY, context=CONTEXT),
        "Linformer has no causal incremental form: it cannot be used in a decoder",
    ),
    "linformer past": (
        lambda: linformer()(ANY, past=()),
        "Linformer has no causal incremental form: it cannot be used in a decoder",
    ),
}


@pytest.mark.parametrize(("call", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_message(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# --- decoders ----------------------------------------------------------------------------------------------------

RAW: dict[str, Any] = {
    "model_type": "transformer_decoder",
    "vocab_size": 40,
    "hidden_size": E,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_SEQ_LEN,
    "rope_theta": 50.0,
}


def parse(*attention: str, **changes: Any) -> Any:
    raw = {**RAW, "num_hidden_layers": len(attention), "attention": list(attention), **changes}
    return FAMILIES["transformer_decoder"].parse_config(raw)


NEEDS = {
    "sliding_window": {"sliding_window": 3},
    "aft_local": {"sliding_window": 3},
    "sparse_top_k": {"attention_top_k": 2},
}


def decoder(*attention: str, **changes: Any) -> Any:
    built = build_decoder(parse(*attention, **changes))
    fill(built, seed=3)
    return built.to(torch.float64).eval()


DECODERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "aft between": (("aft_simple", "causal", "aft_local"), {"sliding_window": 3}),
    "window": (("causal", "sliding_window"), {"sliding_window": 3, "rope_interleaved": False}),
    "aft": (("aft_full", "aft_local", "aft_simple"), {"sliding_window": 4, "position_embedding": "learned"}),
    "softmax": (
        ("alibi", "sparse_top_k", "sliding_window"),
        {"sliding_window": 2, "attention_top_k": 2, "attn_logit_softcapping": 2.0},
    ),
    "sinusoidal": (("sparse_top_k", "aft_full"), {"attention_top_k": 3, "position_embedding": "sinusoidal"}),
    "all else": (
        ("causal", "aft_simple"),
        {
            "norm": "layer_norm",
            "qk_norm": True,
            "post_norms": True,
            "hidden_act": "gelu",
            "gated_mlp": False,
            "attention_bias": True,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 3.0,
            "final_logit_softcapping": 5.0,
            "partial_rotary_factor": 0.67,
        },
    ),
}


@torch.no_grad()
def step_logits(built: Any, tokens_BT: Tensor, calls: Calls) -> list[Tensor]:
    """Per row [tokens fed, V], through `step`; rows are padded on the right."""
    rows = len(tokens_BT)
    state = [start(layer.attn, rows, torch.float64) for layer in built.layers]
    fed = torch.zeros(rows, dtype=torch.int64)
    found: list[list[Tensor]] = [[] for _ in range(rows)]
    for counts in map(torch.tensor, calls):
        steps = torch.arange(int(counts.max()))
        slots = fed[:, None] + steps
        ids = tokens_BT.gather(1, slots.clamp(max=tokens_BT.shape[1] - 1)).where(steps < counts[:, None], 1)
        mask = (torch.arange(int(slots.max()) + 1) < (fed + counts)[:, None]).long()
        logits, state = built.step(ids, slots, fed, mask, steps.expand(rows, -1), state)
        for row, count in enumerate(counts):
            found[row].append(logits[row, :count])
        fed = fed + counts
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize(("attention", "changes"), list(DECODERS.values()), ids=list(DECODERS))
@torch.no_grad()
def test_decoder_steps_equal_its_forward(attention: tuple[str, ...], changes: dict[str, Any]) -> None:
    """Layers of several kinds share one context: chunks, ragged rows and idle rows give the logits of one pass."""
    built = decoder(*attention, **changes)
    assert [tuple(layer) for layer in built.state(9)] == [layer.attn.state(9) for layer in built.layers]
    tokens_BT = torch.randint(0, 40, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    wanted = built(tokens_BT)
    for name in ("one call", "one by one", "chunks", "ragged", "ragged chunks", "idle"):
        for row, logits in enumerate(step_logits(built, tokens_BT, SCHEDULES[name][0])):
            close(logits, array(wanted[row, : len(logits)]), ATOL[torch.float64])


@pytest.mark.parametrize("fields", [{"window": (2, 5)}, {"rope": (RopeConfig(theta=9.0, dim=4), None)}], ids=str)
@torch.no_grad()
def test_two_kinds_in_one_decoder_are_kept_apart(fields: dict[str, tuple[Any, Any]]) -> None:
    """What a context shares is shared between equal windows and equal ropes only."""
    config = parse("sliding_window", "sliding_window", sliding_window=3)
    kinds = {"default": config.layer_kinds["sliding_window"]}
    for i, name in enumerate(("first", "second")):
        kinds[name] = replace(kinds["default"], **{field: values[i] for field, values in fields.items()})
    built = build_decoder(replace(config, layer_types=("first", "default", "second"), layer_kinds=kinds))
    fill(built, seed=3)
    built = built.to(torch.float64)
    tokens_BT = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    for row, logits in enumerate(step_logits(built, tokens_BT, [[5, 5], [7, 7]])):
        close(logits, array(built(tokens_BT)[row]), ATOL[torch.float64])


@pytest.mark.parametrize("kind", list(SOFTMAX))
def test_config_reaches_softmax_attention(kind: str) -> None:
    changes: dict[str, Any] = {
        "qk_norm": True,
        "norm": "layer_norm",
        "norm_eps": 0.01,
        "attention_output_bias": True,
        "head_dim": 8,
    }
    changes["attn_logit_softcapping"] = 2.5
    plain = decoder(kind, **NEEDS.get(kind, {})).layers[0].attn
    changed = decoder(kind, **NEEDS.get(kind, {}), **changes).layers[0].attn
    assert (plain.softcap, plain.scale, plain.max_seq_len, plain.q_norm, plain.k_norm) == (0, 6**-0.5, 32, None, None)
    assert (changed.softcap, changed.scale, changed.head_dim) == (2.5, 8**-0.5, 8)
    for norm in (changed.q_norm, changed.k_norm):
        assert (type(norm), norm.eps, norm.scale.shape) == (LayerNorm, 0.01, (8,))
    assert changed.q_norm is not changed.k_norm
    assert [changed.q_proj.bias is None, changed.output_proj.bias is None] == [True, False]


@pytest.mark.parametrize("kind", [*SOFTMAX, *AFT])
def test_config_reaches_projections(kind: str) -> None:
    attention = decoder(kind, attention_bias=True, **NEEDS.get(kind, {})).layers[0].attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.output_proj)
    assert [linear.bias is not None for linear in linears] == [True, True, True, False]
    assert [linear.out_features for linear in linears] == ([E] * 4 if kind in AFT else [E, E // 2, E // 2, E])


def test_kinds_reach_their_layers() -> None:
    built = decoder(*ATTENTION_OF_DECODERS, sliding_window=3, attention_top_k=2, aft_rank=7)
    assert [type(layer.attn) for layer in built.layers] == [*SOFTMAX.values(), *AFT.values()]
    assert [getattr(layer.attn, "window", None) for layer in built.layers] == [None, 3, None, None, None, 3, None]
    assert built.layers[3].attn.top_k == 2
    assert built.layers[4].attn.query_bias.weight.shape == (MAX_SEQ_LEN, 7)
    rotated = [getattr(layer.attn, "pos_embeddings", None) is not None for layer in built.layers]
    assert rotated == [True, True, False, True, False, False, False]


ATTENTION_OF_DECODERS = (*SOFTMAX, *AFT)


@pytest.mark.parametrize(
    ("attention", "changes", "message"),
    [
        (
            ("causal", "linformer"),
            {},
            "attention linformer has no causal incremental form, so there is no decoder with",
        ),
        (
            ("causal", "hyena"),
            {},
            'attention must be one of causal, .*, or a list of them for 2 layers, found ["causal", "hyena"]',
        ),
        (("causal",), {"num_hidden_layers": 3}, 'or a list of them for 3 layers, found ["causal"]'),
        (("causal",), {"attention": 3}, "attention must be one of causal, .*, found 3"),
        (
            ("causal",),
            {"attention": {"kind": "causal"}},
            'attention must be one of causal, .*, found {"kind": "causal"}',
        ),
        (("causal",), {"attention": [["causal"]]}, 'attention must be one of causal, .*, found [["causal"]]'),
        (("sliding_window",), {}, "sliding_window must be an integer from 1 to .*, it is missing"),
        (("sliding_window",), {"sliding_window": 0}, "sliding_window must be an integer from 1 to .*, found 0"),
        (("aft_local",), {"sliding_window": 1}, "sliding_window must be an integer from 2 to .*, found 1"),
        (("causal",), {"sliding_window": 4}, "sliding_window = 4 changes the maths and is not supported"),
        (("sparse_top_k",), {}, "attention_top_k must be an integer from 1 to .*, it is missing"),
        (("aft_full",), {"aft_rank": 0}, "aft_rank must be an integer from 1 to .*, found 0"),
        (
            ("alibi", "aft_full"),
            {"position_embedding": "rope"},
            'position_embedding "rope" turns queries and keys, .*["aft_full", "alibi"].*: expected none, learned, sin',
        ),
        (("causal",), {"position_embedding": "alibi"}, 'position_embedding must be one of "rope", "none", "learned"'),
        (
            ("alibi",),
            {"position_embedding": "sinusoidal", "hidden_size": 25, "num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size (25) must be even for sinusoidal positions",
        ),
        (("causal",), {"norm": "batch_norm"}, 'norm must be one of "rms_norm", "layer_norm", "gemma_rms_norm", found'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_config_message(attention: tuple[str, ...], changes: dict[str, Any], message: str) -> None:
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(CheckpointError, match=pattern):
        parse(*attention, **changes)


def test_linformer_has_no_layer_in_a_decoder() -> None:
    with pytest.raises(CheckpointError, match=r"Export the layer alone, without state: exporter\.stateless"):
        ATTENTION["linformer"](parse("causal"), LayerKind(attention="linformer"), None)


def test_caches_inside_the_module_are_for_keys_and_values() -> None:
    message = "AFTLocalAttention, AFTSimpleAttention has no KV cache: use step, which carries every layer's state"
    with pytest.raises(ValueError, match=f"^{message}$"):
        decoder("aft_simple", "causal", "aft_local", sliding_window=3).setup_caches(1, torch.float64)


@torch.no_grad()
def test_caches_inside_the_module_serve_every_softmax_kind() -> None:
    built = decoder(*SOFTMAX, sliding_window=3, attention_top_k=2)
    tokens_BT = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    wanted = built(tokens_BT)
    built.setup_caches(2, torch.float64)
    chunks = torch.arange(TOKENS).split([5, 1, 6])
    found = torch.cat([built(tokens_BT[:, chunk], input_pos=chunk) for chunk in chunks], dim=1)
    close(found, array(wanted), ATOL[torch.float64])


# --- numbers that are large --------------------------------------------------------------------------------------


def loud(spec: Spec, shift: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With keys of about `shift`, a number for each channel."""
    module: Any = make(replace(spec, bias=True), dtype)
    module.k_proj.bias.data = shift.to(dtype)
    return module


@pytest.mark.parametrize("shift", [60.0, -60.0, "both", 300.0])
@every_aft
@torch.no_grad()
def test_aft_with_large_keys_is_right(spec: Spec, shift: float | str) -> None:
    """exp(60) squared is beyond float32: only differences within a channel may enter an exponential."""
    shifts = torch.linspace(-60, 60, E) if isinstance(shift, str) else torch.full((E,), shift)
    module = loud(spec, shifts)
    x_BTE = inputs(torch.float32)
    wanted = loop(module, x_BTE, spec)
    close(module(x_BTE), wanted, 1e-4)
    for name in ("one by one", "ragged", "idle"):
        found, _ = feed(module, x_BTE, *SCHEDULES[name])
        for row, out in enumerate(found):
            close(out, wanted[row, : len(out)], 1e-4)


@pytest.mark.parametrize(
    ("spec", "size"),
    [(AFT_LOCAL, 70.0), (AFT_LOCAL, -70.0), (AFT_FULL, 300.0)],
    ids=["aft_local 70", "aft_local -70", "aft_full 300"],
)
@torch.no_grad()
def test_aft_with_large_position_biases_is_right(spec: Spec, size: float) -> None:
    """aft_local: biases of size, size + 1 and size + 2; aft_full: of either sign, some hundreds."""
    module: Any = make(spec, torch.float32)
    if spec is AFT_LOCAL:
        module.position_bias.weight.copy_(size + torch.arange(spec.window).expand(MAX_SEQ_LEN, -1))
    else:
        module.query_bias.weight.mul_(size / (module.query_bias.weight @ module.key_bias.weight.T).std())
    x_BTE = inputs(torch.float32)
    wanted = loop(module, x_BTE, spec)
    close(module(x_BTE), wanted, 1e-4)
    found, _ = feed(module, x_BTE, *SCHEDULES["ragged"])
    for row, out in enumerate(found):
        close(out, wanted[row, : len(out)], 1e-4)


@pytest.mark.parametrize("schedule", ["one call", "one by one", "chunks"])
@pytest.mark.parametrize("later", [60.0, -60.0], ids=["rising", "falling"])
@every_aft
@torch.no_grad()
def test_aft_with_a_jump_of_sixty_within_a_channel_is_right(spec: Spec, later: float, schedule: str) -> None:
    """The first six tokens have keys of about 0, the rest of about +60 or -60."""
    module: Any = make(spec, torch.float32)
    x_BTE = inputs(torch.float32)
    x_BTE[:, :, 0] = (torch.arange(TOKENS) >= 6).float()
    module.k_proj.weight.data[:, 0] = later
    wanted = loop(module, x_BTE, spec)
    close(module(x_BTE), wanted, 1e-4)
    found, _ = feed(module, x_BTE, *SCHEDULES[schedule])
    for row, out in enumerate(found):
        close(out, wanted[row], 1e-4)


@pytest.mark.parametrize("later", [1000.0, -1000.0])
@every_aft
@torch.no_grad()
def test_aft_with_any_jump_is_finite_and_right_one_by_one(spec: Spec, later: float) -> None:
    """Beyond what one call holds (graphs/attention/attention_free.py) nothing overflows, and decoding stays right."""
    module: Any = make(spec, torch.float32)
    x_BTE = inputs(torch.float32)
    x_BTE[:, :, 0] = (torch.arange(TOKENS) >= 6).float()
    module.k_proj.weight.data[:, 0] = later
    assert module(x_BTE).isfinite().all()
    found, state = feed(module, x_BTE, *SCHEDULES["one by one"])
    assert all(tensor.isfinite().all() for tensor in state)
    wanted = loop(module, x_BTE, spec)
    for row, out in enumerate(found):
        close(out, wanted[row], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [AFT_LOCAL, AFT_SIMPLE], ids=["aft_local", "aft_simple"])
@torch.no_grad()
def test_aft_sums_in_float32_whatever_the_module_computes_in(spec: Spec, dtype: torch.dtype) -> None:
    """A text of 3000 equal tokens: in 16 bits a sum would stop growing after 2048 (256) of them."""
    module: Any = make(spec, dtype)
    if spec.kind == "aft_local":
        module.position_bias = nn.Embedding.from_pretrained(torch.zeros(3000, spec.window, dtype=dtype))
    slots = torch.arange(3000)[None]
    context = StepContext(slots, slots[:, 0], torch.ones_like(slots))
    _, state = module(torch.full((1, 3000, E), 0.1, dtype=dtype), context=context, past=start(module, 1, dtype))
    sums = dict(zip((tensor.name for tensor in module.state(0)), state, strict=True))
    assert [sums[name].dtype for name in ("numerator", "denominator", "peak")] == [torch.float32] * 3
    left = spec.window - 1 if spec.window else 0  # still in the window
    close(sums["denominator"], np.full((1, E), 3000.0 - left), 0.01)


# rounding turns near ties, and another choice of keys is more than rounding
ROUNDED = {name: spec for name, spec in SPECS.items() if not 0 < spec.top_k < TOKENS}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", list(ROUNDED.values()), ids=list(ROUNDED))
@torch.no_grad()
def test_half_precision_costs_rounding_only(spec: Spec, dtype: torch.dtype) -> None:
    """Against the formula with the same rounded weights and inputs."""
    module, x_BTE = make(spec, dtype), inputs(dtype)
    close(module(x_BTE), loop(module, x_BTE, spec), 16 * torch.finfo(dtype).eps)
