"""The boundary operators: the places where runtimes have fused kernels, as operators of our own.

Each has a plain PyTorch reference (its eager implementation and its gradient), a fake implementation that gives
shapes only, and one lowering per ONNX layout (exporter/layouts/). The model calls these, so lowering is a table
look-up and never pattern matching.

Letters in shapes: B batch, S new tokens, T keys that may be seen, M cache capacity, H query heads, K key/value heads,
D head dimension. Sums (norms, scores, averages) are at least float32 inside, whatever the dtype; single products are in
the dtype of their factors, as in Hugging Face. Results have the dtype of the first argument.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_SCORES = 1 << 26  # that the reference of attention holds at once, if they are of more heads than one


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; RMSNorm, arXiv:1910.07467.

    The normalised value is rounded to x's dtype before the weight multiplies it, as in Hugging Face's Llama and in
    ONNX RMSNormalization-23.
    """
    wide = x.to(_compute_dtype(x))  # at least fp32: the mean of squares overflows fp16
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normal.to(x.dtype) * weight).to(x.dtype)


def rotary_reference(x_BHSD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of x by the angles whose cos and sin are given, [B, S, R/2]; RoFormer, arXiv:2104.09864.

    Pairs are (i, i + R/2), or (2i, 2i + 1) when `interleaved`: ONNX RotaryEmbedding-23's two conventions. Only the
    first R numbers of each head turn, R <= D.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x_BHSD[..., : 2 * cos.shape[-1]], x_BHSD[..., 2 * cos.shape[-1] :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def update_kv_cache_reference(cache_BKMD: Tensor, new_BKSD: Tensor, write_indices: Tensor) -> Tensor:
    """Write row b's new keys (or values) at write_indices[b]; the cache shape is unchanged. ONNX TensorScatter-24."""
    steps = torch.arange(new_BKSD.shape[2], device=write_indices.device)
    slots_BS = write_indices[:, None] + steps
    index = slots_BS[:, None, :, None].expand(new_BKSD.shape)
    return cache_BKMD.scatter(2, index, new_BKSD)


def attention_reference(
    q_BHSD: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    top_k: int = 0,
    slopes: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T, over keys where mask is True) v; grouped queries share key/value heads, arXiv:2305.13245.

    `mask` is bool, [B, 1, S, T] or with a batch of 1, and every query must see one key at least. Only the first T
    slots of k and v are read, T <= M: cost follows the active length, not the capacity. ONNX Slice + Attention-23.

    What ONNX Attention cannot say, or not every runtime takes, is computed with plain operators:
        softcap: scores become softcap * tanh(scores / softcap); Gemma 2, arXiv:2408.00118 section 2. 0: they do not.
        top_k: of the keys it sees, a query uses the top_k best, and those that tie with the last of them. 0: all.
        slopes [H], distances [B, S, T]: scores lose slope * distance; ALiBi, arXiv:2108.12409.
    """
    batch, heads, queries, dim = q_BHSD.shape
    kv_heads, active = k_BKMD.shape[1], mask.shape[-1]
    k_BKTD, v_BKTD = k_BKMD[:, :, :active], v_BKMD[:, :, :active]
    dtype = _compute_dtype(q_BHSD)
    # query head h uses key/value head h // group: heads of one group are neighbours
    group = heads // kv_heads
    q = q_BHSD.to(dtype).reshape(batch, kv_heads, group, queries, dim)
    k, v = k_BKTD.to(dtype).unsqueeze(2), v_BKTD.to(dtype).unsqueeze(2)

    def attend(of: slice) -> Tensor:
        scores = (q[:, of] @ k[:, of].transpose(-1, -2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None and distances is not None:
            slope = slopes.to(dtype).reshape(kv_heads, group, 1, 1)[of]
            scores = scores - slope * distances.to(dtype)[:, None, None]
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        if top_k:
            padded = F.pad(scores, (0, top_k), value=float("-inf"))  # there may be fewer keys than top_k
            scores = scores.masked_fill(scores < padded.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
        return torch.softmax(scores, dim=-1) @ v[:, of]

    if torch.compiler.is_compiling() or batch * heads * queries * active <= MOST_SCORES:
        out = attend(slice(None))
    else:  # a picture of thousands of tokens: head by head, or its scores alone would fill the memory
        out = torch.cat([attend(slice(head, head + 1)) for head in range(kv_heads)], dim=1)
    return out.reshape(batch, heads, queries, v_BKTD.shape[-1]).to(q_BHSD.dtype)


def split_heads_reference(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, heads * D] -> [B, heads, S, D]; head h is columns h * D to (h + 1) * D."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads_reference(x_BHSD: Tensor) -> Tensor:
    """[B, heads, S, D] -> [B, S, heads * D], the inverse of split_heads."""
    return x_BHSD.transpose(1, 2).flatten(2)


def group_query_attention_reference(
    q_BSE: Tensor,
    k_BSE: Tensor,
    v_BSE: Tensor,
    past_key_BKPD: Tensor,
    past_value_BKPD: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    interleaved: bool,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output [B, S, heads * D], key, value [B, K, P + S, D]): rotary, update_kv_cache and attention in one, causal.

    Row b ends at slot seqlens_k[b], int32 [B], with its S new tokens; in a first call, rows may be padded on the right
    and end before. cos and sin, [max positions, R/2], are those of each slot; without them nothing turns. A query sees
    `window` slots, its own included; 0: all before it. ONNX Runtime's com.microsoft.GroupQueryAttention, which writes
    in place where past and present are one buffer.
    """
    q, k, v = (split_heads_reference(x, head_dim) for x in (q_BSE, k_BSE, v_BSE))
    queries, past = q.shape[2], past_key_BKPD.shape[2]
    begins = (seqlens_k.to(torch.int64) + 1 - queries).clamp(min=0)
    slots_BS = begins[:, None] + torch.arange(queries, device=q.device)
    if cos is not None and sin is not None:
        q, k = (rotary_reference(x, cos[slots_BS], sin[slots_BS], interleaved) for x in (q, k))
    room = past_key_BKPD.new_zeros(*past_key_BKPD.shape[:2], queries, head_dim)
    key = update_kv_cache_reference(torch.cat((past_key_BKPD, room), dim=2), k, begins)
    value = update_kv_cache_reference(torch.cat((past_value_BKPD, room), dim=2), v, begins)
    distances_BST = slots_BS.unsqueeze(-1) - torch.arange(past + queries, device=q.device)
    mask = (distances_BST >= 0) & (distances_BST < (window or past + queries))
    out = attention_reference(q, key, value, mask.unsqueeze(1), scale, softcap)
    return merge_heads_reference(out), key, value


# hidden_act, under Hugging Face's names
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),  # arXiv:1606.08415 section 2
    "relu": F.relu,
}


def experts_reference(
    x: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], act: str
) -> Tensor:
    """sum_e weights_e * w2_e(act(w1_e(x)) * w3_e(x)): every expert on every token; Mixtral, arXiv:2401.04088.

    weights [B, S, E] are at least float32, and 0 for experts that a token does not get, whose result is not used even
    if it overflows. Without w3 (an empty list), experts are w2_e(act(w1_e(x))).
    """
    out = torch.zeros_like(x, dtype=weights.dtype)
    for index in range(len(w1)):
        h = ACTIVATION_FUNCTIONS[act](F.linear(x, w1[index]))
        h = h * F.linear(x, w3[index]) if w3 else h
        weight = weights[..., index : index + 1]
        out = out + torch.where(weight > 0, F.linear(h, w2[index]).to(weights.dtype) * weight, 0.0)
    return out.to(x.dtype)


def _copy(view: Tensor) -> Tensor:
    """Contiguous memory of its own: an operator's result must not share its inputs' memory."""
    return view.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("export_llm::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(x, weight, eps).contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("export_llm::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotary_reference(x, cos, sin, interleaved).contiguous()


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("export_llm::update_kv_cache", mutates_args=())
def update_kv_cache(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return update_kv_cache_reference(cache, new, write_indices).contiguous()


@update_kv_cache.register_fake
def _(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return cache.new_empty(cache.shape)


@torch.library.custom_op("export_llm::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    top_k: int = 0,
    slopes: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    return _copy(attention_reference(q, k, v, mask, scale, softcap, top_k, slopes, distances))


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    top_k: int = 0,
    slopes: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("export_llm::group_query_attention", mutates_args=())
def group_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    interleaved: bool,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    out, key, value = group_query_attention_reference(
        q,
        k,
        v,
        past_key,
        past_value,
        seqlens_k,
        total_sequence_length,
        cos,
        sin,
        head_dim,
        interleaved,
        scale,
        softcap,
        window,
    )
    return _copy(out), key, value


@group_query_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    interleaved: bool,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, past, dim = past_key.shape
    present = (batch, heads, past + q.shape[1], dim)
    return q.new_empty(q.shape), past_key.new_empty(present), past_value.new_empty(present)


# Reshapes have no fused kernel, but as operators of ours they lower to two nodes with constant shapes, where a traced
# reshape computes its shape anew in every layer.
@torch.library.custom_op("export_llm::split_heads", mutates_args=())
def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return _copy(split_heads_reference(x, head_dim))


@split_heads.register_fake
def _(x: Tensor, head_dim: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim))


@torch.library.custom_op("export_llm::merge_heads", mutates_args=())
def merge_heads(x: Tensor) -> Tensor:
    return _copy(merge_heads_reference(x))


@merge_heads.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1] * x.shape[3]))


# Hundreds of experts are hundreds of nodes in the graph, but one when the decoder is traced, which takes time for each.
@torch.library.custom_op("export_llm::experts", mutates_args=())
def experts(x: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], act: str) -> Tensor:
    return _copy(experts_reference(x, weights, w1, w2, w3, act))


@experts.register_fake
def _(x: Tensor, weights: Tensor, w1: list[Tensor], w2: list[Tensor], w3: list[Tensor], act: str) -> Tensor:
    return x.new_empty(x.shape)


REFERENCES: dict[Any, Callable[..., Tensor]] = {
    rms_norm: rms_norm_reference,
    rotary: rotary_reference,
    update_kv_cache: update_kv_cache_reference,
    attention: attention_reference,
    split_heads: split_heads_reference,
    merge_heads: merge_heads_reference,
}


def _register_gradient(op: Any, reference: Callable[..., Tensor]) -> None:
    """Give `op` the gradient of its reference, by recomputing it; so that the decoder can be trained as well."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # inputs hold the defaults of arguments that were not passed, needs_input_grad has no entry for them
        given = zip(ctx.inputs, ctx.needs_input_grad, strict=False)
        needed = [isinstance(a, Tensor) and wanted for a, wanted in given]
        needed += [False] * (len(ctx.inputs) - len(needed))
        with torch.enable_grad():
            inputs = [
                a.detach().requires_grad_(n) if isinstance(a, Tensor) else a
                for a, n in zip(ctx.inputs, needed, strict=True)
            ]
            wanted = [a for a, n in zip(inputs, needed, strict=True) if n]
            grads = iter(torch.autograd.grad(reference(*inputs), wanted, grad))
        return tuple(next(grads) if n else None for n in needed)

    op.register_autograd(backward, setup_context=setup_context)


for _op, _reference in REFERENCES.items():
    _register_gradient(_op, _reference)
