"""TransformerDecoder, CausalSelfAttention and KVCache behave as torchtune's documentation says they do."""

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.attention.causal import CausalSelfAttention
from graphs.kv_cache import KVCache
from graphs.layers import FeedForward, RMSNorm
from graphs.positions import RotaryPositionalEmbeddings
from graphs.transformer import TransformerDecoder, TransformerDecoderLayer

VOCAB, EMBED, HEADS, HEAD_DIM, HIDDEN, MAX_SEQ_LEN = 31, 32, 4, 8, 48, 16
KV_HEADS = [pytest.param(4, id="mha"), pytest.param(2, id="gqa"), pytest.param(1, id="mqa")]
every_kind = pytest.mark.parametrize("kv_heads", KV_HEADS)


def attention(
    kv_heads: int = 2, *, bias: bool = False, interleaved: bool = True, **changes: Any
) -> CausalSelfAttention:
    arguments: dict[str, Any] = {
        "embed_dim": EMBED,
        "num_heads": HEADS,
        "num_kv_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "q_proj": nn.Linear(EMBED, HEADS * HEAD_DIM, bias=bias),
        "k_proj": nn.Linear(EMBED, kv_heads * HEAD_DIM, bias=bias),
        "v_proj": nn.Linear(EMBED, kv_heads * HEAD_DIM, bias=bias),
        "output_proj": nn.Linear(HEADS * HEAD_DIM, EMBED, bias=bias),
        "pos_embeddings": RotaryPositionalEmbeddings(HEAD_DIM, MAX_SEQ_LEN, interleaved=interleaved),
        "max_seq_len": MAX_SEQ_LEN,
    }
    return CausalSelfAttention(**{**arguments, **changes})


def decoder_layer(attn: CausalSelfAttention) -> TransformerDecoderLayer:
    mlp = FeedForward(
        gate_proj=nn.Linear(EMBED, HIDDEN, bias=False),
        down_proj=nn.Linear(HIDDEN, EMBED, bias=False),
        up_proj=nn.Linear(EMBED, HIDDEN, bias=False),
    )
    return TransformerDecoderLayer(attn=attn, mlp=mlp, sa_norm=RMSNorm(EMBED), mlp_norm=RMSNorm(EMBED))


def decoder(kv_heads: int = 2, num_layers: int = 2, *, seed: int = 0, **changes: Any) -> TransformerDecoder:
    """A decoder as torchtune's builders make it, with random norms so that a forgotten scale shows."""
    torch.manual_seed(seed)
    model = TransformerDecoder(
        tok_embeddings=nn.Embedding(VOCAB, EMBED),
        layer=decoder_layer(attention(kv_heads, **changes)),
        num_layers=num_layers,
        max_seq_len=MAX_SEQ_LEN,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        norm=RMSNorm(EMBED),
        output=nn.Linear(EMBED, VOCAB, bias=False),
    )
    with torch.no_grad():
        for parameter in model.parameters():  # the layers are copies of one: make them differ
            scale = 0.5 + torch.rand(parameter.shape) if parameter.dim() == 1 else None
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5 if scale is None else scale)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hidden(batch: int, length: int, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, EMBED, generator=torch.Generator().manual_seed(seed))


def loop_attention(attn: CausalSelfAttention, x_BSE: Tensor, allowed: np.ndarray | None = None) -> np.ndarray:
    """The whole layer in float64, query by query, from the formula; `allowed` is [b, s, s], causal when absent."""

    def project(linear: nn.Linear, row: np.ndarray) -> np.ndarray:
        weight = linear.weight.detach().double().numpy()
        return weight @ row + (0 if linear.bias is None else linear.bias.detach().double().numpy())

    def turn(head: np.ndarray, position: int) -> np.ndarray:
        pairs = head[0::2] + 1j * head[1::2]
        angles = position * 10_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        return np.stack(((pairs * np.exp(1j * angles)).real, (pairs * np.exp(1j * angles)).imag), -1).reshape(-1)

    x = x_BSE.double().numpy()
    batch, length, _ = x.shape
    out = np.empty((batch, length, attn.output_proj.weight.shape[0]))
    for b in range(batch):
        q = [project(attn.q_proj, row).reshape(HEADS, -1) for row in x[b]]
        k = [project(attn.k_proj, row).reshape(attn.num_kv_heads, -1) for row in x[b]]
        v = [project(attn.v_proj, row).reshape(attn.num_kv_heads, -1) for row in x[b]]
        for s in range(length):
            heads = []
            for h in range(HEADS):
                g = h * attn.num_kv_heads // HEADS
                keys = [t for t in range(length) if (t <= s if allowed is None else allowed[b, s, t])]
                scores = [turn(q[s][h], s) @ turn(k[t][g], t) / math.sqrt(HEAD_DIM) for t in keys]
                weights = np.exp(np.array(scores) - max(scores))
                heads.append(sum(w * v[t][g] for w, t in zip(weights / weights.sum(), keys, strict=True)))
            out[b, s] = project(attn.output_proj, np.concatenate(heads))
    return out


def assert_equals_loop(found: Tensor, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=0, atol=2e-6)


# --- signatures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "documented"),
    [
        (
            TransformerDecoder.__init__,
            "tok_embeddings layer=None num_layers=None max_seq_len=None num_heads=None head_dim=None norm=None"
            " output=None",
        ),
        (TransformerDecoder.forward, "tokens input_pos=None"),
        (TransformerDecoder.setup_caches, "batch_size dtype"),
        (TransformerDecoder.reset_caches, ""),
        (TransformerDecoderLayer.__init__, "attn mlp sa_norm mlp_norm"),
        (TransformerDecoderLayer.forward, "x mask=None input_pos=None"),
        (
            CausalSelfAttention.__init__,
            "embed_dim num_heads num_kv_heads head_dim q_proj k_proj v_proj output_proj pos_embeddings"
            " kv_cache=None max_seq_len=4096 attn_dropout=0.0",
        ),
        (CausalSelfAttention.forward, "x mask=None input_pos=None"),
        (KVCache.__init__, "batch_size max_seq_len num_heads head_dim dtype"),
        (KVCache.update, "input_pos k_val v_val"),
        (RotaryPositionalEmbeddings.forward, "x input_pos=None"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else None,
)
def test_arguments_are_torchtunes_in_name_order_and_default(function: Any, documented: str) -> None:
    """What is added to torchtune's call can be given by keyword only, and has a default."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in positional]
    assert written == documented.split()
    added = [p for p in parameters if p not in positional]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty for p in added)


# --- CausalSelfAttention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@every_kind
def test_attention_layer_is_its_formula(kv_heads: int, bias: bool) -> None:
    """Projections, rotary embedding, grouped heads, causal softmax, output projection."""
    torch.manual_seed(1)
    attn, x = attention(kv_heads, bias=bias), hidden(2, 6)
    out = attn(x)
    assert out.shape == x.shape
    assert_equals_loop(out, loop_attention(attn, x))


@pytest.mark.parametrize("shape", ["b s s", "b 1 s s", "1 s s", "1 1 s s", "s s"])
def test_attention_takes_masks(shape: str) -> None:
    """True is seen. The masks here let tokens see later ones: the mask replaces causality."""
    torch.manual_seed(1)
    attn, x = attention(), hidden(3, 5)
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(3 if shape.startswith("b") else 1, 5, 5, generator=generator) < 0.5
    allowed |= torch.eye(5, dtype=torch.bool)
    assert allowed.triu(1).any()
    given = {
        "b s s": allowed,
        "b 1 s s": allowed[:, None],
        "1 s s": allowed,
        "1 1 s s": allowed[None],
        "s s": allowed[0],
    }
    expected = loop_attention(attn, x, allowed.expand(3, 5, 5).numpy())
    assert_equals_loop(attn(x, mask=given[shape]), expected)


def test_attention_without_a_mask_is_causal() -> None:
    """Changing the last token changes the last output only."""
    torch.manual_seed(1)
    attn, x = attention(), hidden(1, 6)
    changed = x.clone()
    changed[:, -1] += 1
    difference = (attn(changed) - attn(x)).abs().amax(dim=(0, 2))
    assert (difference[:-1] == 0).all()
    assert difference[-1] > 1e-3


@every_kind
def test_attention_with_a_cache_equals_attention_without(kv_heads: int) -> None:
    """A cache given to the constructor, as documented; three calls against one."""
    torch.manual_seed(1)
    attn, x = attention(kv_heads), hidden(2, 7)
    expected = attn(x)
    attn.kv_cache = KVCache(2, MAX_SEQ_LEN, kv_heads, HEAD_DIM, torch.float32)
    parts = [attn(x[:, part], input_pos=part) for part in torch.arange(7).split([4, 1, 2])]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=2e-6)


def test_attention_takes_its_cache_in_the_constructor() -> None:
    cache = KVCache(1, MAX_SEQ_LEN, 2, HEAD_DIM, torch.float32)
    attn = attention(kv_cache=cache)
    attn(hidden(1, 3), input_pos=torch.arange(3))
    assert cache.k_cache[:, :, :3].abs().min() > 0
    assert cache.k_cache[:, :, 3:].abs().max() == 0


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(1)
    plain, dropping, x = attention(), attention(attn_dropout=0.5), hidden(2, 6)
    dropping.load_state_dict(plain.state_dict())
    expected = plain.eval()(x)
    assert torch.equal(dropping.eval()(x), expected)
    torch.testing.assert_close(plain.train()(x), expected, rtol=0, atol=2e-6)
    dropping.train()
    assert not torch.allclose(dropping(x), expected, atol=1e-3)
    assert not torch.allclose(dropping(x), dropping(x), atol=1e-3)


@every_kind
def test_training_with_dropout_computes_the_same_attention(kv_heads: int) -> None:
    """A dropout too small to drop anything gives the formula's numbers; one of 1 drops every value."""
    torch.manual_seed(1)
    attn, x = attention(kv_heads, attn_dropout=1e-12).train(), hidden(2, 6)
    assert_equals_loop(attn(x), loop_attention(attn, x))
    attn.attn_dropout = 1.0
    assert attn(x).abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
        ({"num_heads": 2, "num_kv_heads": 4}, "num_heads (2) must be a multiple of num_kv_heads (4)"),
        ({"embed_dim": 30, "num_heads": 4}, "embed_dim (30) must be a multiple of num_heads (4)"),
        ({"attn_dropout": -0.1}, "attn_dropout (-0.1) must lie between 0 and 1"),
        ({"attn_dropout": 1.1}, "attn_dropout (1.1) must lie between 0 and 1"),
        ({"attn_dropout": math.nan}, "attn_dropout (nan) must lie between 0 and 1"),
    ],
)
def test_attention_refuses_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**changes)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_attention_takes_dropouts_at_the_ends_of_the_range(dropout: float) -> None:
    assert attention(attn_dropout=dropout).attn_dropout == dropout


def test_attention_refuses_a_sequence_above_max_seq_len() -> None:
    attn = attention(max_seq_len=5)
    assert attn(hidden(1, 5)).shape == (1, 5, EMBED)
    with pytest.raises(ValueError, match=r"seq_len \(6\) of the input is bigger than max_seq_len \(5\)"):
        attn(hidden(1, 6))


def test_attention_with_a_cache_needs_positions() -> None:
    attn = attention(kv_cache=KVCache(1, MAX_SEQ_LEN, 2, HEAD_DIM, torch.float32))
    with pytest.raises(ValueError, match="a KV cache is set up, but input_pos is missing"):
        attn(hidden(1, 3))


# --- KVCache -----------------------------------------------------------------------------------------------------


def test_kv_cache_writes_at_positions_and_returns_the_whole_cache() -> None:
    cache = KVCache(batch_size=3, max_seq_len=6, num_heads=2, head_dim=4, dtype=torch.float64)
    k, v = torch.rand(2, 2, 2, 4, dtype=torch.float64), torch.rand(2, 2, 2, 4, dtype=torch.float64)
    k_all, v_all = cache.update(torch.tensor([1, 4]), k, v)
    for whole, new in ((k_all, k), (v_all, v)):
        expected = torch.zeros(2, 2, 6, 4, dtype=torch.float64)
        expected[:, :, 1], expected[:, :, 4] = new[:, :, 0], new[:, :, 1]
        assert torch.equal(whole, expected)
    cache.reset()
    assert cache.k_cache.abs().max() == 0
    assert cache.v_cache.abs().max() == 0
    assert not cache.state_dict()


@pytest.mark.parametrize(
    ("rows", "positions", "message"),
    [
        (4, [0, 1], "the KV cache holds 3 rows, got a batch of 4"),
        (2, [0, 1, 2], "input_pos has shape (3,), expected (2,)"),
        (2, [0], "input_pos has shape (1,), expected (2,)"),
        (2, [[0, 1], [0, 1]], "input_pos has shape (2, 2), expected (2,)"),
    ],
)
def test_kv_cache_refuses_what_does_not_fit(rows: int, positions: list[Any], message: str) -> None:
    cache = KVCache(3, 6, 2, 4, torch.float32)
    new = torch.ones(rows, 2, 2, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.update(torch.tensor(positions), new, new)
    assert cache.k_cache.abs().max() == 0


# --- TransformerDecoder ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, MAX_SEQ_LEN)])
def test_decoder_gives_logits_of_every_token(shape: tuple[int, int], kv_heads: int) -> None:
    """[b, s] -> [b, s, v], and not all alike."""
    logits = decoder(kv_heads)(tokens(*shape))
    assert logits.shape == (*shape, VOCAB)
    assert logits.std() > 0.1


@every_kind
def test_decoder_is_its_formula(kv_heads: int) -> None:
    """Pre-norm residual blocks of attention and SwiGLU in float64, on top of the attention layer's loop."""
    model, ids = decoder(kv_heads), tokens(2, 5)

    def norm(x: np.ndarray, module: RMSNorm) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + module.eps) * module.scale.detach().double().numpy()

    def linear(x: np.ndarray, module: nn.Module) -> np.ndarray:
        return x @ module.weight.detach().double().numpy().T

    h = model.tok_embeddings.weight.detach().double().numpy()[ids.numpy()]
    for layer in model.layers:
        h = h + loop_attention(layer.attn, torch.from_numpy(norm(h, layer.sa_norm)))
        x = norm(h, layer.mlp_norm)
        gate = linear(x, layer.mlp.w1)
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, layer.mlp.w3), layer.mlp.w2)
    expected = linear(norm(h, model.norm), model.output)
    np.testing.assert_allclose(model(ids).detach().double().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "parts", [[1] * 8, [5, 1, 1, 1], [3, 4, 1], [8]], ids=["token by token", "prefill and decode", "chunks", "at once"]
)
@every_kind
@torch.no_grad()
def test_cached_passes_equal_the_full_pass(parts: list[int], kv_heads: int) -> None:
    model, ids = decoder(kv_heads), tokens(2, 8)
    expected = model(ids)
    model.setup_caches(batch_size=2, dtype=torch.float32)
    logits = [model(ids[:, part], input_pos=part) for part in torch.arange(8).split(parts)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_cache_can_be_filled_to_the_last_slot() -> None:
    model, ids = decoder(), tokens(1, MAX_SEQ_LEN)
    expected = model(ids)
    model.setup_caches(1, torch.float32)
    model(ids[:, :-1], torch.arange(MAX_SEQ_LEN - 1))
    last = model(ids[:, -1:], torch.tensor([MAX_SEQ_LEN - 1]))
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_batch_may_be_smaller_than_the_cache() -> None:
    """Rows that are not in the batch keep what they hold."""
    model, ids = decoder(), tokens(3, 6)
    expected = model(ids)
    model.setup_caches(3, torch.float32)
    model(ids[:, :5], torch.arange(5))
    before = model.layers[1].attn.kv_cache.v_cache[2].clone()
    small = model(ids[:2, 5:], torch.tensor([5]))
    torch.testing.assert_close(small, expected[:2, 5:], rtol=0, atol=1e-5)
    assert torch.equal(model.layers[1].attn.kv_cache.v_cache[2], before)


@torch.no_grad()
def test_reset_caches_forgets() -> None:
    model, ids = decoder(), tokens(2, 6)
    model.setup_caches(2, torch.float32)
    first = model(ids, torch.arange(6))
    model.reset_caches()
    assert all(layer.attn.kv_cache.k_cache.abs().max() == 0 for layer in model.layers)
    assert all(layer.attn.kv_cache.v_cache.abs().max() == 0 for layer in model.layers)
    assert torch.equal(model(ids, torch.arange(6)), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_setup_caches_makes_one_cache_per_layer(kv_heads: int, dtype: torch.dtype) -> None:
    """[b, n_kv, m_s, h_d]: caches of grouped queries hold key/value heads only."""
    model = decoder(kv_heads)
    model.setup_caches(3, dtype)
    caches = [layer.attn.kv_cache for layer in model.layers]
    for buffer in [c.k_cache for c in caches] + [c.v_cache for c in caches]:
        assert buffer.shape == (3, kv_heads, MAX_SEQ_LEN, HEAD_DIM)
        assert buffer.dtype == dtype
    assert len({id(c) for c in caches}) == len(caches)


@torch.no_grad()
def test_bfloat16_decoder_with_bfloat16_caches() -> None:
    model, ids = decoder(), tokens(2, 6)
    expected = model(ids)
    model.to(torch.bfloat16).setup_caches(2, torch.bfloat16)
    logits = torch.cat([model(ids[:, p : p + 1], torch.tensor([p])) for p in range(6)], dim=1)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.15
    assert expected.abs().max() > 1


@torch.no_grad()
def test_only_distances_between_positions_matter() -> None:
    """Without caches input_pos moves the tokens: a shift changes nothing, a gap does."""
    model, ids = decoder(), tokens(1, 5)
    expected = model(ids)
    torch.testing.assert_close(model(ids, torch.arange(5) + 7), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(model(ids, torch.tensor([0, 1, 5, 6, 7])), expected, atol=1e-3)


def test_layer_is_copied() -> None:
    """num_layers independent copies; the layer that was given is not one of them."""
    given = decoder_layer(attention())
    norm, output = RMSNorm(EMBED), nn.Linear(EMBED, VOCAB, bias=False)
    model = TransformerDecoder(nn.Embedding(VOCAB, EMBED), given, 3, MAX_SEQ_LEN, HEADS, HEAD_DIM, norm, output)
    assert len(model.layers) == 3
    weights = [given.attn.q_proj.weight, *(layer.attn.q_proj.weight for layer in model.layers)]
    assert len({weight.data_ptr() for weight in weights}) == 4
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    with torch.no_grad():
        weights[1].zero_()
    assert all(weight.abs().max() > 0 for weight in (weights[0], *weights[2:]))
    assert model(tokens(1, 3)).shape == (1, 3, VOCAB)


def test_layers_may_be_given_one_by_one() -> None:
    layers = [decoder_layer(attention()) for _ in range(2)]
    rest = (MAX_SEQ_LEN, HEADS, HEAD_DIM, RMSNorm(EMBED), nn.Linear(EMBED, VOCAB, bias=False))
    model = TransformerDecoder(nn.Embedding(VOCAB, EMBED), layers, 2, *rest)
    assert [id(layer) for layer in model.layers] == [id(layer) for layer in layers]
    with pytest.raises(ValueError, match=r"num_layers \(3\) does not match the 2 layers given"):
        TransformerDecoder(nn.Embedding(VOCAB, EMBED), layers, 3, *rest)


def decoder_arguments(**changes: Any) -> dict[str, Any]:
    """By name, as newer torchtune calls it; a change to None leaves an argument out."""
    arguments = {
        "tok_embeddings": nn.Embedding(VOCAB, EMBED),
        "layers": [decoder_layer(attention()) for _ in range(2)],
        "max_seq_len": MAX_SEQ_LEN,
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "norm": RMSNorm(EMBED),
        "output": nn.Linear(EMBED, VOCAB, bias=False),
    }
    return {name: value for name, value in (arguments | changes).items() if value is not None}


def test_layers_are_torchtunes_newer_name() -> None:
    """A list of them needs no num_layers; one layer is copied, as before."""
    given = decoder_arguments()
    model = TransformerDecoder(**given)
    assert [id(layer) for layer in model.layers] == [id(layer) for layer in given["layers"]]
    copied = TransformerDecoder(**decoder_arguments(layers=decoder_layer(attention()), num_layers=3))
    assert len({layer.attn.q_proj.weight.data_ptr() for layer in copied.layers}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": None}, "pass the decoder's layers once: as layer or as layers"),
        ({"layer": [], "num_layers": 2}, "pass the decoder's layers once: as layer or as layers"),
        ({"num_layers": 3}, r"num_layers \(3\) does not match the 2 layers given"),
        ({"layers": nn.Identity()}, "num_layers must be given where one layer is to be copied"),
        *(({name: None}, f"{name}.* must be given") for name in ("num_heads", "head_dim", "norm", "output")),
    ],
)
def test_what_torchtune_requires_is_required(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerDecoder(**decoder_arguments(**changes))


def test_parameter_names_are_torchtunes() -> None:
    """A torchtune checkpoint loads as it is; buffers and caches are no part of it."""
    expected = {"tok_embeddings.weight", "norm.scale", "output.weight"}
    for i in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            expected.add(f"layers.{i}.attn.{name}.weight")
        for name in ("mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight", "sa_norm.scale", "mlp_norm.scale"):
            expected.add(f"layers.{i}.{name}")
    model = decoder()
    model.setup_caches(1, torch.float32)
    assert set(model.state_dict()) == expected
    assert model.layers[0].mlp.w1.weight.shape == (HIDDEN, EMBED)
    assert model.layers[0].mlp.w2.weight.shape == (EMBED, HIDDEN)
    assert model.layers[0].mlp.w3.weight.shape == (HIDDEN, EMBED)


def test_tied_output_is_the_embedding() -> None:
    output = nn.Linear(EMBED, VOCAB, bias=False)
    model = TransformerDecoder(
        nn.Embedding(VOCAB, EMBED),
        decoder_layer(attention()),
        1,
        MAX_SEQ_LEN,
        HEADS,
        HEAD_DIM,
        RMSNorm(EMBED),
        output,
        tie_word_embeddings=True,
    )
    assert model.output.weight is model.tok_embeddings.weight


# --- what the decoder refuses ------------------------------------------------------------------------------------


def test_caches_need_positions() -> None:
    model = decoder()
    model.setup_caches(2, torch.float32)
    with pytest.raises(ValueError, match=r"caches are set up, but .* \(input_pos\) are missing"):
        model(tokens(2, 3))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("attention_max", [MAX_SEQ_LEN, 4096])
def test_decoder_refuses_a_sequence_above_max_seq_len(attention_max: int, cached: bool) -> None:
    """Its own max_seq_len, also where the layers were built with CausalSelfAttention's default of 4096."""
    model = decoder(max_seq_len=attention_max)
    if cached:
        model.setup_caches(1, torch.float32)
    with pytest.raises(ValueError, match=rf"seq_len \({MAX_SEQ_LEN + 1}\) .* max_seq_len \({MAX_SEQ_LEN}\)"):
        model(tokens(1, MAX_SEQ_LEN + 1), torch.arange(MAX_SEQ_LEN + 1) if cached else None)


@pytest.mark.parametrize("positions", [[0], [0, 1, 2, 3], [[0, 1, 2], [0, 1, 2]]], ids=["short", "long", "2d"])
def test_decoder_with_caches_refuses_positions_of_another_shape(positions: list[Any]) -> None:
    model = decoder()
    model.setup_caches(2, torch.float32)
    shape = tuple(torch.tensor(positions).shape)
    with pytest.raises(ValueError, match=re.escape(f"input_pos has shape {shape}, expected (3,)")):
        model(tokens(2, 3), torch.tensor(positions))


def test_decoder_refuses_a_batch_larger_than_the_caches() -> None:
    model = decoder()
    model.setup_caches(2, torch.float32)
    with pytest.raises(ValueError, match="the KV cache holds 2 rows, got a batch of 3"):
        model(tokens(3, 4), torch.arange(4))


def test_reset_needs_caches() -> None:
    with pytest.raises(ValueError, match="no KV caches are set up: call setup_caches first"):
        decoder().reset_caches()


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@every_kind
def test_every_parameter_gets_a_gradient(kv_heads: int, dropout: float) -> None:
    model = decoder(kv_heads, attn_dropout=dropout).train()
    ids = torch.arange(VOCAB)[None, :MAX_SEQ_LEN]
    nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_lowers_the_loss() -> None:
    model, ids = decoder().train(), tokens(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_kind
def test_loss_and_gradients_equal_those_of_transformers(kv_heads: int) -> None:
    model = decoder(kv_heads, interleaved=False).train()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=EMBED,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
        )
    ).train()
    names = {"tok_embeddings.weight": "model.embed_tokens", "norm.scale": "model.norm", "output.weight": "lm_head"}
    parts = {
        "attn.output_proj": "self_attn.o_proj",
        "sa_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    parts |= {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"}
    parts |= {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}
    for i in range(2):
        for ours, hf in parts.items():
            names[f"layers.{i}.{ours}.{'scale' if 'norm' in ours else 'weight'}"] = f"model.layers.{i}.{hf}"
    ours = dict(model.named_parameters())
    assert set(ours) == set(names)
    pairs = {name: (parameter, theirs.get_submodule(names[name]).weight) for name, parameter in ours.items()}
    with torch.no_grad():
        for parameter, other in pairs.values():
            other.copy_(parameter)

    ids = tokens(3, 12)
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    loss.backward()
    expected.backward()
    for name, (parameter, other) in pairs.items():
        assert other.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-3, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_attention_refuses_projections_and_positions_that_do_not_fit() -> None:
    """Named when it is built, or when it is called, and not from inside a reshape."""
    wide, narrow = nn.Linear(EMBED, HEADS * HEAD_DIM), nn.Linear(EMBED, HEAD_DIM)
    parts = {"q_proj": wide, "k_proj": wide, "v_proj": wide, "output_proj": nn.Linear(HEADS * HEAD_DIM, EMBED)}
    rope = RotaryPositionalEmbeddings(HEAD_DIM)
    with pytest.raises(ValueError, match=rf"k_proj gives {HEAD_DIM} features, expected {HEADS} heads of {HEAD_DIM}"):
        CausalSelfAttention(EMBED, HEADS, HEADS, HEAD_DIM, **parts | {"k_proj": narrow}, pos_embeddings=rope)
    with pytest.raises(ValueError, match=rf"num_heads \({HEADS}\) must be a multiple of num_kv_heads \(0\)"):
        CausalSelfAttention(EMBED, HEADS, 0, HEAD_DIM, **parts, pos_embeddings=rope)
    layer = CausalSelfAttention(EMBED, HEADS, None, HEAD_DIM, **parts, pos_embeddings=rope)
    assert layer.num_kv_heads == HEADS  # None is multi-head
    with pytest.raises(ValueError, match=r"input_pos has shape \(4,\), expected \(3,\)"):
        layer(torch.zeros(1, 3, EMBED), input_pos=torch.arange(4))
