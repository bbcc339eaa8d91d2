"""Each boundary operator against a loop in float64 written from its formula, its fake shapes and its gradient."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphs import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Sample = Callable[[torch.dtype], tuple[Any, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def array(x: Tensor) -> np.ndarray:
    """float64, exactly: every dtype used here fits."""
    return x.detach().to(torch.float64).numpy()


def close(found: Tensor, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(array(found), expected, rtol=0, atol=atol)


# --- the formulas as loops ---------------------------------------------------------------------------------------


def loop_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for row in np.ndindex(x.shape[:-1]):
        mean_square = sum(value * value for value in x[row]) / len(x[row])
        for i, value in enumerate(x[row]):
            out[(*row, i)] = value / math.sqrt(mean_square + eps) * weight[i]
    return out


def loop_rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    out = x.copy()
    batch, heads, steps, _ = x.shape
    dim = 2 * cos.shape[-1]  # the rest of each head is left alone
    for b, h, s, i in np.ndindex(batch, heads, steps, dim // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        turn = complex(cos[b, s, i], sin[b, s, i])  # multiplying by it turns the pair, seen as a complex number
        turned = complex(x[b, h, s, first], x[b, h, s, second]) * turn
        out[b, h, s, first], out[b, h, s, second] = turned.real, turned.imag
    return out


def loop_update(cache: np.ndarray, new: np.ndarray, write_indices: list[int]) -> np.ndarray:
    out = cache.copy()
    for b, k, s, d in np.ndindex(new.shape):
        out[b, k, write_indices[b] + s, d] = new[b, k, s, d]
    return out


def loop_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    scale: float,
    softcap: float = 0.0,
    top_k: int = 0,
    slopes: np.ndarray | None = None,
    distances: np.ndarray | None = None,
) -> np.ndarray:
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, heads, queries, v.shape[-1]))
    for b, h, s in np.ndindex(batch, heads, queries):
        kv, seen = h // group, mask[b if mask.shape[0] > 1 else 0, 0, s]
        keys = [t for t in range(mask.shape[-1]) if seen[t]]
        scores = [scale * sum(a * c for a, c in zip(q[b, h, s], k[b, kv, t], strict=True)) for t in keys]
        if softcap:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        if slopes is not None and distances is not None:
            scores = [score - slopes[h] * distances[b, s, t] for score, t in zip(scores, keys, strict=True)]
        least = sorted(scores)[-top_k:][0] if top_k else -math.inf
        weights = [math.exp(score - max(scores)) if score >= least else 0.0 for score in scores]
        for weight, t in zip(weights, keys, strict=True):
            out[b, h, s] += weight / sum(weights) * v[b, kv, t]
    return out


# --- arguments ---------------------------------------------------------------------------------------------------


def causal(queries: int, keys: int, batch: int = 1) -> Tensor:
    """Query s, the last of `queries`, sees keys up to its own; one row in a batch misses a key in the middle."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, 1, -1, -1).clone()
    if batch > 1:
        mask[1, :, :, 1] = False
    return mask


def attention_args(
    dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, queries: int = 3, active: int = 5, capacity: int = 7
) -> tuple[Any, ...]:
    q, k, v = normal(2, heads, queries, 4), normal(2, kv_heads, capacity, 4, seed=1), normal(2, kv_heads, capacity, 6)
    return q.to(dtype), k.to(dtype), v.to(dtype), causal(queries, active, batch=2), 0.5


def slopes_and_distances(dtype: torch.dtype, heads: int = 4) -> tuple[Tensor, Tensor]:
    """For attention_args: a slope for each head, and how far keys lie before queries (in row 1, one farther)."""
    distances = torch.arange(3)[:, None] + 2 - torch.arange(5)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:heads]
    return slopes.to(torch.promote_types(dtype, torch.float32)), torch.stack((distances, distances + 1))


def rotary_args(
    dtype: torch.dtype, interleaved: bool, shape: tuple[int, ...] = (2, 3, 5, 8), turned: int | None = None
) -> tuple[Any, ...]:
    angles = normal(shape[0], shape[2], (turned or shape[3]) // 2, seed=2) * 3
    return normal(*shape, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype), interleaved


# For every operator, arguments with the shapes that models use: many tokens, one token, one head, strided views.
SAMPLES: dict[Any, dict[str, Sample]] = {
    ops.rms_norm: {
        "3d": lambda dtype: (normal(2, 5, 8, dtype=dtype), normal(8, dtype=dtype), 1e-5),
        "one token": lambda dtype: (normal(1, 1, 8, dtype=dtype), normal(8, dtype=dtype), 1e-5),
        "strided": lambda dtype: (normal(5, 2, 8, dtype=dtype).transpose(0, 1), normal(8, dtype=dtype), 1e-5),
    },
    ops.rotary: {
        "half": lambda dtype: rotary_args(dtype, False),
        "interleaved": lambda dtype: rotary_args(dtype, True),
        "one token": lambda dtype: rotary_args(dtype, False, (2, 3, 1, 8)),
        "one pair": lambda dtype: rotary_args(dtype, True, (2, 1, 3, 2)),
        "part of each head, half": lambda dtype: rotary_args(dtype, False, turned=6),
        "part of each head, interleaved": lambda dtype: rotary_args(dtype, True, turned=2),
        # what RotaryPositionalEmbeddings.forward passes
        "strided": lambda dtype: (normal(2, 5, 3, 8, dtype=dtype).transpose(1, 2), *rotary_args(dtype, False)[1:]),
    },
    ops.update_kv_cache: {
        "three": lambda dtype: (
            normal(3, 2, 7, 4, dtype=dtype),
            normal(3, 2, 3, 4, dtype=dtype, seed=1),
            torch.tensor([0, 2, 4]),
        ),
        "one token": lambda dtype: (
            normal(2, 1, 7, 4, dtype=dtype),
            normal(2, 1, 1, 4, dtype=dtype, seed=1),
            torch.tensor([6, 0]),
        ),
        "whole": lambda dtype: (
            normal(1, 2, 3, 4, dtype=dtype),
            normal(1, 2, 3, 4, dtype=dtype, seed=1),
            torch.tensor([0]),
        ),
    },
    ops.attention: {
        "mha": lambda dtype: attention_args(dtype, heads=4, kv_heads=4),
        "gqa": lambda dtype: attention_args(dtype, heads=4, kv_heads=2),
        "mqa": lambda dtype: attention_args(dtype, heads=4, kv_heads=1),
        "six heads in two groups": lambda dtype: attention_args(dtype, heads=6, kv_heads=2),
        "one token": lambda dtype: attention_args(dtype, queries=1),
        "whole cache": lambda dtype: attention_args(dtype, active=7, capacity=7),
        "shared mask": lambda dtype: (*attention_args(dtype)[:3], causal(3, 5), 0.5),
        "softcap": lambda dtype: (*attention_args(dtype), 0.7),
        "two best keys": lambda dtype: (*attention_args(dtype), 0.0, 2),
        "more best keys than there are": lambda dtype: (*attention_args(dtype), 0.0, 9),
        "slopes": lambda dtype: (*attention_args(dtype), 0.0, 0, *slopes_and_distances(dtype)),
        "all of these": lambda dtype: (*attention_args(dtype), 0.7, 2, *slopes_and_distances(dtype)),
    },
    ops.split_heads: {
        "three": lambda dtype: (normal(2, 5, 12, dtype=dtype), 4),
        "one token": lambda dtype: (normal(2, 1, 12, dtype=dtype), 4),
        "one head": lambda dtype: (normal(2, 5, 4, dtype=dtype), 4),
    },
    ops.merge_heads: {
        "three": lambda dtype: (normal(2, 3, 5, 4, dtype=dtype),),
        "one token": lambda dtype: (normal(2, 3, 1, 4, dtype=dtype),),
        "one head": lambda dtype: (normal(2, 1, 5, 4, dtype=dtype),),
        "strided": lambda dtype: (normal(2, 5, 3, 4, dtype=dtype).transpose(1, 2),),
    },
}
EVERY_SAMPLE = [
    pytest.param(op, sample, id=f"{op._name}-{name}")
    for op, samples in SAMPLES.items()
    for name, sample in samples.items()
]
every_sample = pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
SLOW_CHECKS = {ops.rotary: "interleaved", ops.attention: "gqa"}  # one sample of each; the first where unnamed
one_sample_each = pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, samples[SLOW_CHECKS.get(op, next(iter(samples)))], id=op._name)
        for op, samples in SAMPLES.items()
    ],
)


def samples_of(op: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", list(SAMPLES[op].values()), ids=list(SAMPLES[op]))


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments; the floating-point tensors ask for gradients."""
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def test_every_operator_is_tested() -> None:
    """A new boundary operator needs samples in this file."""
    assert set(SAMPLES) == set(ops.REFERENCES)


# --- numbers -----------------------------------------------------------------------------------------------------


@samples_of(ops.rms_norm)
def test_rms_norm_is_its_formula(sample: Sample) -> None:
    x, weight, eps = sample(torch.float64)
    close(ops.rms_norm(x, weight, eps), loop_rms_norm(array(x), array(weight), eps), atol=1e-12)
    x, weight, eps = sample(torch.float32)
    close(ops.rms_norm(x, weight, eps), loop_rms_norm(array(x), array(weight), eps), atol=2e-6)


def test_rms_norm_by_hand() -> None:
    """rms([3, 4, 0, 0]) = 2.5; with eps = 18.75 added to the mean square of 6.25 the divisor is 5."""
    x, weight = torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-12), torch.tensor([1.2, 3.2, 0.0, 0.0]))
    torch.testing.assert_close(ops.rms_norm(x, weight, 18.75), torch.tensor([0.6, 1.6, 0.0, 0.0]))


@pytest.mark.parametrize("size", [1000.0, 60000.0])
def test_rms_norm_does_not_overflow_fp16(size: float) -> None:
    """1000 squared is above fp16's largest number, 65504."""
    x = torch.full((1, 64), size, dtype=torch.float16)
    x[:, ::2] *= -1
    weight = torch.linspace(0.5, 2.0, 64).to(torch.float16)
    expected = weight.clone()
    expected[::2] *= -1
    assert torch.equal(ops.rms_norm(x, weight, 1e-5)[0], expected)


def test_rms_norm_of_zero_is_zero() -> None:
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


@samples_of(ops.rotary)
def test_rotary_is_its_formula(sample: Sample) -> None:
    x, cos, sin, interleaved = sample(torch.float64)
    close(ops.rotary(x, cos, sin, interleaved), loop_rotary(array(x), array(cos), array(sin), interleaved), atol=1e-14)
    x, cos, sin, interleaved = sample(torch.float32)
    close(ops.rotary(x, cos, sin, interleaved), loop_rotary(array(x), array(cos), array(sin), interleaved), atol=1e-6)


@pytest.mark.parametrize(
    ("interleaved", "expected"),
    [pytest.param(False, [-3.0, -4.0, 1.0, 2.0], id="half"), pytest.param(True, [-2.0, 1.0, -4.0, 3.0], id="pairs")],
)
def test_rotary_by_hand(interleaved: bool, expected: list[float]) -> None:
    """A quarter turn takes (a, b) to (-b, a); the angle 0 changes nothing."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert ops.rotary(x, zero, one, interleaved).flatten().tolist() == expected
    assert torch.equal(ops.rotary(x, one, zero, interleaved), x)


def test_rotary_turns_every_row_and_token_by_its_own_angle() -> None:
    """With a quarter turn at row 1, token 2 only, nothing else changes."""
    x = normal(2, 3, 4, 6, dtype=torch.float32)
    cos, sin = torch.ones(2, 4, 3), torch.zeros(2, 4, 3)
    cos[1, 2], sin[1, 2] = 0.0, 1.0
    out = ops.rotary(x, cos, sin, False)
    assert torch.equal(out[1, :, 2], torch.cat((-x[1, :, 2, 3:], x[1, :, 2, :3]), dim=-1))
    out[1, :, 2] = x[1, :, 2]
    assert torch.equal(out, x)


@samples_of(ops.update_kv_cache)
def test_update_kv_cache_writes_each_row_at_its_own_index(sample: Sample) -> None:
    """Bit for bit, and the cache that was passed stays as it was."""
    cache, new, write_indices = sample(torch.float32)
    before = cache.clone()
    out = ops.update_kv_cache(cache, new, write_indices)
    assert np.array_equal(array(out), loop_update(array(cache), array(new), write_indices.tolist()))
    assert torch.equal(cache, before)


def test_update_kv_cache_by_hand() -> None:
    cache = torch.zeros(2, 1, 4, 1)
    new = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(2, 1, 2, 1)
    out = ops.update_kv_cache(cache, new, torch.tensor([2, 0]))
    assert out.reshape(2, 4).tolist() == [[0, 0, 1, 2], [3, 4, 0, 0]]


def test_update_kv_cache_copies_special_values() -> None:
    """Writing is copying: infinities, NaN and negative zero arrive, and neighbours stay clean."""
    cache = torch.zeros(1, 1, 4, 4)
    new = torch.tensor([math.inf, -math.inf, math.nan, -0.0]).reshape(1, 1, 1, 4)
    out = ops.update_kv_cache(cache, new, torch.tensor([1]))
    assert torch.equal(out[0, 0, 1].view(torch.int32), new[0, 0, 0].view(torch.int32))
    assert torch.equal(out[0, 0, [0, 2, 3]], torch.zeros(3, 4))


@samples_of(ops.attention)
def test_attention_is_its_formula(sample: Sample) -> None:
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        args = sample(dtype)
        close(ops.attention(*args), loop_attention(*(a.numpy() if isinstance(a, Tensor) else a for a in args)), atol)


def test_every_argument_of_attention_matters() -> None:
    """The samples above differ from plain attention, and from each other."""
    names = ("gqa", "softcap", "two best keys", "slopes", "all of these")
    results = [ops.attention(*SAMPLES[ops.attention][name](torch.float64)) for name in names]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert (first - second).abs().max() > 1e-2


def test_attention_by_hand() -> None:
    """Scores log 1, log 3 give weights 1/4 and 3/4; the scale multiplies the scores."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, math.log(3.0)]).reshape(1, 1, 2, 1)
    v = torch.tensor([[4.0, 0.0], [0.0, 8.0]]).reshape(1, 1, 2, 2)
    both = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    torch.testing.assert_close(ops.attention(q, k, v, both, 1.0).flatten(), torch.tensor([1.0, 6.0]))
    torch.testing.assert_close(ops.attention(q, k, v, both, 0.0).flatten(), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(ops.attention(q, k, v, both, 2.0).flatten(), torch.tensor([0.4, 7.2]))
    second = torch.tensor([False, True]).reshape(1, 1, 1, 2)
    assert ops.attention(q, k, v, second, 1.0).flatten().tolist() == [0.0, 8.0]


def test_attention_reads_nothing_beyond_the_mask() -> None:
    """Only the first T slots of the cache are read: even NaN in the others leaves no trace."""
    q, k, v, mask, scale = attention_args(torch.float32)
    expected = ops.attention(q, k, v, mask, scale)
    k[:, :, 5:], v[:, :, 5:] = math.nan, math.nan
    assert torch.equal(ops.attention(q, k, v, mask, scale), expected)
    assert expected.isfinite().all()


def test_attention_gives_masked_keys_no_weight() -> None:
    """A key that no query may see can hold the largest number there is."""
    q, k, v, mask, scale = attention_args(torch.float32)
    mask[:, :, :, 2] = False
    expected = loop_attention(array(q), array(k), array(v), mask.numpy(), scale)
    k[:, :, 2], v[:, :, 2] = 1e30, 1e30
    close(ops.attention(q, k, v, mask, scale), expected, atol=2e-6)


def test_attention_scores_do_not_overflow_fp16() -> None:
    """q . k = 64 * 100 * 100 = 640000 is above 65504; the result is the value of the key that matches."""
    q = torch.full((1, 1, 1, 64), 100.0, dtype=torch.float16)
    k = torch.stack((-q[0, 0], q[0, 0]), dim=1).reshape(1, 1, 2, 64)
    v = torch.tensor([[1.0], [2.0]], dtype=torch.float16).reshape(1, 1, 2, 1)
    out = ops.attention(q, k, v, torch.ones(1, 1, 1, 2, dtype=torch.bool), 1.0)
    assert out.item() == 2.0


@samples_of(ops.split_heads)
def test_split_heads_gives_head_h_its_columns(sample: Sample) -> None:
    x, dim = sample(torch.float32)
    out = ops.split_heads(x, dim)
    assert out.shape == (x.shape[0], x.shape[2] // dim, x.shape[1], dim)
    for b, h, s, d in np.ndindex(*out.shape):
        assert out[b, h, s, d] == x[b, s, h * dim + d]


@samples_of(ops.merge_heads)
def test_merge_heads_gives_head_h_its_columns(sample: Sample) -> None:
    (x,) = sample(torch.float32)
    out = ops.merge_heads(x)
    heads, dim = x.shape[1], x.shape[3]
    assert out.shape == (x.shape[0], x.shape[2], heads * dim)
    for b, h, s, d in np.ndindex(*x.shape):
        assert out[b, s, h * dim + d] == x[b, h, s, d]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("heads", [1, 3])
def test_split_and_merge_are_inverse(length: int, heads: int) -> None:
    x = normal(2, length, heads * 4)
    assert torch.equal(ops.merge_heads(ops.split_heads(x, 4)), x)
    y = normal(2, heads, length, 4)
    assert torch.equal(ops.split_heads(ops.merge_heads(y), 4), y)


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@every_sample
def test_operator_equals_its_reference(op: Any, sample: Sample, dtype: torch.dtype) -> None:
    """Bit for bit, with the dtype of the first argument, and in memory of its own."""
    args = sample(dtype)
    out, expected = op(*args), ops.REFERENCES[op](*args)
    assert out.dtype == args[0].dtype
    assert out.shape == expected.shape
    assert torch.equal(out, expected)
    owned = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    assert out.untyped_storage().data_ptr() not in owned


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_costs_rounding_only(dtype: torch.dtype) -> None:
    """Against the loops on the same rounded inputs: an error of a few roundings of the result, no more."""
    ulp = torch.finfo(dtype).eps
    tiny = 4 * torch.finfo(dtype).tiny * ulp  # a few of the smallest subnormal numbers

    x, weight, eps = normal(2, 5, 256, dtype=dtype), normal(256, dtype=dtype), 1e-5
    expected = loop_rms_norm(array(x), array(weight), eps)
    error = np.abs(array(ops.rms_norm(x, weight, eps)) - expected)
    assert (
        error <= 1.01 * ulp * np.abs(expected) + tiny
    ).all()  # two roundings: the normalised value, then the product

    q, k, v, mask, scale = attention_args(dtype, active=7)
    expected = loop_attention(array(q), array(k), array(v), mask.numpy(), scale)
    error = np.abs(array(ops.attention(q, k, v, mask, scale)) - expected)
    assert (error <= 0.51 * ulp * np.abs(expected) + 1e-6).all()  # one rounding, at the end

    x, cos, sin, interleaved = rotary_args(dtype, True)
    expected = loop_rotary(array(x), array(cos), array(sin), interleaved)
    length = np.sqrt((array(x).reshape(2, 3, 5, 4, 2) ** 2).sum(-1)).repeat(2, axis=-1)  # of each pair
    error = np.abs(array(ops.rotary(x, cos, sin, interleaved)) - expected)
    assert (error <= 1.5 * ulp * length).all()  # two products and a sum are rounded


def test_rms_norm_keeps_the_dtype_of_x_beside_a_wider_weight() -> None:
    """Checkpoints may store norm weights in float32 and the rest in bfloat16."""
    x, weight = normal(2, 8, dtype=torch.bfloat16), normal(8, dtype=torch.float32)
    out = ops.rms_norm(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    torch.library.opcheck(ops.rms_norm, (x, weight, 1e-5), test_utils="test_faketensor")


# --- registration ------------------------------------------------------------------------------------------------


@one_sample_each
def test_opcheck(op: Any, sample: Sample) -> None:
    """Schema, fake implementation (shape, dtype, strides), autograd registration, AOT dispatch."""
    torch.library.opcheck(op, with_gradients(sample(torch.float32)))


@every_sample
def test_fake_implementation_and_schema(op: Any, sample: Sample) -> None:
    """The fake result has the real one's shape, dtype and strides; no result shares memory with an input."""
    torch.library.opcheck(op, sample(torch.float32), test_utils=("test_schema", "test_faketensor"))


# --- gradients ---------------------------------------------------------------------------------------------------


@every_sample
def test_gradients_equal_those_of_the_reference(op: Any, sample: Sample) -> None:
    ours, theirs = with_gradients(sample(torch.float64)), with_gradients(sample(torch.float64))
    out, expected = op(*ours), ops.REFERENCES[op](*theirs)
    grad = normal(*expected.shape, seed=9)
    out.backward(grad)
    expected.backward(grad)
    asked = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor) and a.requires_grad]
    assert asked
    for a, b in asked:
        assert torch.equal(a.grad, b.grad)


@one_sample_each
def test_gradients_equal_finite_differences(op: Any, sample: Sample) -> None:
    assert torch.autograd.gradcheck(op, with_gradients(sample(torch.float64)), fast_mode=True)


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_gradient_of_one_input_alone(asked: int) -> None:
    """Inputs that need no gradient get none, and do not shift the others' places."""
    args = list(attention_args(torch.float64))
    args[asked].requires_grad_()
    ops.attention(*args).square().sum().backward()
    assert [isinstance(a, Tensor) and a.grad is not None for a in args[:3]] == [i == asked for i in range(3)]
    assert torch.autograd.gradcheck(ops.attention, tuple(args), fast_mode=True)


# --- experts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", list(ops.ACTIVATION_FUNCTIONS))
def test_experts(act: str, gated: bool) -> None:
    """A plain loop over tokens and experts in float64; what overflows in an expert of weight 0 is not used."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    w1, w3 = (list(torch.randn(3, 5, 4, generator=rng, dtype=torch.float64)) for _ in range(2))
    w2 = list(torch.randn(3, 4, 5, generator=rng, dtype=torch.float64))
    weights = torch.rand(2, 3, 3, generator=rng, dtype=torch.float64)
    weights[..., 1] = 0
    w2[1] = torch.full_like(w2[1], float("inf"))
    found = ops.experts(x, weights, w1, w2, w3 if gated else [], act)
    for b in range(2):
        for s in range(3):
            expected = torch.zeros(4, dtype=torch.float64)
            for e in (0, 2):
                h = ops.ACTIVATION_FUNCTIONS[act](w1[e] @ x[b, s]) * (w3[e] @ x[b, s] if gated else 1)
                expected += weights[b, s, e] * (w2[e] @ h)
            torch.testing.assert_close(found[b, s], expected)
