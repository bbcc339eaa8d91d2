"""llama3_2_vision_decoder has torchtune's arguments and parameter names, and computes what Mllama's text model does.

torchtune cannot be installed beside current packages, so its rules are written out here: its parameter names, the rule
for tokens that see nothing, the encoder's cache. Numbers come from transformers' text model with the same weights.
"""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from graphs.llama3_2_vision import llama3_2_vision_decoder
from graphs.transformer import TransformerDecoder

ATOL = 1e-5
SIZES: dict[str, Any] = {
    "vocab_size": 51,
    "num_layers": 5,
    "fusion_interval": 2,
    "num_special_tokens": 8,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 48,
    "max_seq_len": 24,
    "encoder_max_seq_len": 20,
    "intermediate_dim": 64,
}
HEAD_DIM = 8
LENGTH, SEEN = 9, 11


def build(**changes: Any) -> TransformerDecoder:
    """Weights large enough that every part matters; gates start at zero, and are set far from it."""
    decoder = llama3_2_vision_decoder(**SIZES | changes).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("ca_scale.scale", "mlp_scale.scale")):
                parameter.uniform_(0.4, 1.2)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> TransformerDecoder:
    return build()


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Special tokens among them."""
    return torch.randint(0, 59, (batch, length), generator=torch.Generator().manual_seed(3))


def encoded(batch: int = 2, length: int = SEEN) -> Tensor:
    return torch.randn(batch, length, SIZES["embed_dim"], generator=torch.Generator().manual_seed(4))


def sight(batch: int = 2) -> Tensor:
    """Random, but every token sees something."""
    mask = torch.rand(batch, LENGTH, SEEN, generator=torch.Generator().manual_seed(5)) < 0.4
    mask[..., 0] |= ~mask.any(dim=-1)
    return mask


def test_arguments_are_torchtunes() -> None:
    """All by keyword."""
    parameters = inspect.signature(llama3_2_vision_decoder).parameters
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "rope_base": 500_000,
        "intermediate_dim": None,
    }
    assert list(parameters) == [
        "vocab_size",
        "num_layers",
        "fusion_interval",
        "num_special_tokens",
        "num_heads",
        "num_kv_heads",
        "embed_dim",
        "max_seq_len",
        "encoder_max_seq_len",
        "rope_base",
        "intermediate_dim",
    ]


def test_parameter_names_and_shapes(decoder: TransformerDecoder) -> None:
    """Those of torchtune 0.6.1's state dict."""
    attention = {"q_proj": (48, 48), "k_proj": (16, 48), "v_proj": (16, 48), "output_proj": (48, 48)}
    mlp = {"mlp.w1.weight": (64, 48), "mlp.w2.weight": (48, 64), "mlp.w3.weight": (64, 48)}
    of_self = {f"attn.{name}.weight": shape for name, shape in attention.items()} | mlp
    of_self |= {"sa_norm.scale": (48,), "mlp_norm.scale": (48,)}
    fused = {f"attn.{name}.weight": shape for name, shape in attention.items()} | mlp
    fused |= {"attn.q_norm.scale": (8,), "attn.k_norm.scale": (8,), "ca_norm.scale": (48,), "mlp_norm.scale": (48,)}
    fused |= {"ca_scale.scale": (1,), "mlp_scale.scale": (1,)}
    expected = {
        "tok_embeddings.weight": (51, 48),
        "tok_embeddings.fusion_embedding.weight": (8, 48),
        "norm.scale": (48,),
        "output.weight": (51, 48),
    }
    for layer in range(5):
        expected |= {f"layers.{layer}.{name}": shape for name, shape in of_self.items()}
    for layer in (1, 3):  # every second one, counted from 1
        expected |= {f"layers.{layer}.fusion_layer.{name}": shape for name, shape in fused.items()}
    assert {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()} == expected


def test_defaults() -> None:
    """Gates start at zero; the feed-forward width is 8/3 of embed_dim, rounded up to a multiple of 256."""
    decoder = llama3_2_vision_decoder(**SIZES | {"intermediate_dim": None})
    assert decoder.layers[0].mlp.w1.weight.shape == (256, 48)
    assert llama3_2_vision_decoder(**SIZES | {"intermediate_dim": None, "embed_dim": 192}).layers[
        1
    ].fusion_layer.mlp.w1.weight.shape == (512, 192)
    gates = [parameter for name, parameter in decoder.named_parameters() if "_scale.scale" in name]
    assert len(gates) == 4
    assert all(gate.item() == 0 for gate in gates)


def test_closed_gates_are_no_layer_at_all() -> None:
    """With zero gates, what is seen changes nothing."""
    decoder = build()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "_scale.scale" in name:
                parameter.zero_()
        assert torch.equal(decoder(tokens(), encoder_input=encoded()), decoder(tokens()))


def rotated_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection for neighbouring pairs, in the order that Hugging Face's halves need."""
    return weight.unflatten(0, (heads, HEAD_DIM // 2, 2)).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def theirs(decoder: TransformerDecoder) -> MllamaForCausalLM:
    """transformers' text model with the same weights."""
    config = MllamaTextConfig(
        vocab_size=51,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        cross_attention_layers=[1, 4],
        rms_norm_eps=1e-5,
        max_position_embeddings=24,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        attn_implementation="eager",
    )
    model = MllamaForCausalLM(config).eval()
    ours, weights = decoder.state_dict(), {}
    weights["model.embed_tokens.weight"] = torch.cat(
        (ours["tok_embeddings.weight"], ours["tok_embeddings.fusion_embedding.weight"])
    )
    weights["model.norm.weight"], weights["lm_head.weight"] = ours["norm.scale"], ours["output.weight"]
    mlp = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    cross = {"ca_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    of_self = {"sa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    places = iter(range(7))
    for layer in range(5):
        if layer in (1, 3):
            prefix, to = f"layers.{layer}.fusion_layer", f"model.layers.{next(places)}"
            weights |= {f"{to}.{b}.weight": ours[f"{prefix}.{a}.scale"] for a, b in cross.items()}
            weights |= {f"{to}.mlp.{b}.weight": ours[f"{prefix}.mlp.{a}.weight"] for a, b in mlp.items()}
            for a, b in {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}.items():
                weights[f"{to}.cross_attn.{b}.weight"] = ours[f"{prefix}.attn.{a}.weight"]
            for name in ("q_norm", "k_norm"):
                weights[f"{to}.cross_attn.{name}.weight"] = ours[f"{prefix}.attn.{name}.scale"]
            weights[f"{to}.cross_attn_attn_gate"] = ours[f"{prefix}.ca_scale.scale"]
            weights[f"{to}.cross_attn_mlp_gate"] = ours[f"{prefix}.mlp_scale.scale"]
        prefix, to = f"layers.{layer}", f"model.layers.{next(places)}"
        weights |= {f"{to}.{b}.weight": ours[f"{prefix}.{a}.scale"] for a, b in of_self.items()}
        weights |= {f"{to}.mlp.{b}.weight": ours[f"{prefix}.mlp.{a}.weight"] for a, b in mlp.items()}
        weights[f"{to}.self_attn.q_proj.weight"] = rotated_rows(ours[f"{prefix}.attn.q_proj.weight"], 6)
        weights[f"{to}.self_attn.k_proj.weight"] = rotated_rows(ours[f"{prefix}.attn.k_proj.weight"], 2)
        weights[f"{to}.self_attn.v_proj.weight"] = ours[f"{prefix}.attn.v_proj.weight"]
        weights[f"{to}.self_attn.o_proj.weight"] = ours[f"{prefix}.attn.output_proj.weight"]
    model.load_state_dict(weights)
    for layer in (1, 4):  # torchtune's norms in front of the fused layers have an eps of their own
        model.model.layers[layer].input_layernorm.variance_epsilon = 1e-6
        model.model.layers[layer].post_attention_layernorm.variance_epsilon = 1e-6
    return model


@torch.no_grad()
def test_equals_transformers_with_the_same_weights(decoder: TransformerDecoder, theirs: MllamaForCausalLM) -> None:
    """With what some tokens see, and without anything to see."""
    additive = torch.zeros(sight().shape).masked_fill(~sight(), torch.finfo(torch.float32).min).unsqueeze(1)
    expected = theirs(tokens(), cross_attention_states=encoded(), cross_attention_mask=additive).logits
    found = decoder(tokens(), encoder_input=encoded(), encoder_mask=sight())
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(decoder(tokens()), theirs(tokens()).logits, rtol=0, atol=ATOL)
    assert (found - decoder(tokens())).abs().max() > 0.1


@torch.no_grad()
def test_a_token_that_sees_nothing_skips_the_fused_layers(decoder: TransformerDecoder) -> None:
    """Its row of the encoder mask is all False: the layer neither adds attention nor feed-forward for it."""
    mask = sight()
    mask[0], mask[1, :3] = False, False
    found = decoder(tokens(), encoder_input=encoded(), encoder_mask=mask)
    torch.testing.assert_close(found[0], decoder(tokens())[0], rtol=0, atol=ATOL)
    torch.testing.assert_close(found[1, :3], decoder(tokens())[1, :3], rtol=0, atol=ATOL)
    assert (found[1, 3:] - decoder(tokens())[1, 3:]).abs().max() > 0.1


@torch.no_grad()
def test_the_encoders_output_is_cached() -> None:
    """It is given once; later calls read keys and values from the cache, until the caches are reset."""
    decoder = build()
    mask = sight()
    mask[1, 4] = False
    expected = decoder(tokens(), encoder_input=encoded(), encoder_mask=mask)
    decoder.setup_caches(3, torch.float32)
    wide = torch.nn.functional.pad(mask, (0, 20 - SEEN))  # as torchtune's callers make it: for the whole cache
    for _ in range(2):
        found = [decoder(tokens()[:, :5], torch.arange(5), encoder_input=encoded(), encoder_mask=wide[:, :5])]
        found += [
            decoder(tokens()[:, i : i + 1], torch.tensor([i]), encoder_mask=wide[:, i : i + 1])
            for i in range(5, LENGTH)
        ]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=ATOL)
        decoder.reset_caches()
        text = decoder(tokens()[:, :1], torch.arange(1))
        torch.testing.assert_close(text, build()(tokens()[:, :1]), rtol=0, atol=ATOL)
        decoder.reset_caches()


@torch.no_grad()
def test_the_exported_call(decoder: TransformerDecoder) -> None:
    """`step` with keys and values of the encoder's output computed beforehand, one token at a time."""
    mask = sight()
    mask[0, 2] = False
    expected = decoder(tokens(), encoder_input=encoded(), encoder_mask=mask)
    key_values = [layer.attn.keys_values(encoded()) for layer in decoder.cross_layers]
    assert len(key_values) == 2
    state = [tuple(tensor.zeros(2, torch.float32) for tensor in layer) for layer in decoder.state(LENGTH)]
    ints = mask.long() * 2 - 1
    for i in range(LENGTH):
        positions = torch.full((2, 1), i)
        logits, state = decoder.step(
            tokens()[:, i : i + 1],
            positions,
            positions[:, 0],
            torch.ones(2, i + 1).long(),
            torch.zeros(2, 1).long(),
            state,
            ints[:, i : i + 1, None],
            key_values,
        )
        torch.testing.assert_close(logits[:, 0], expected[:, i], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads (6) must be a multiple of num_kv_heads (4)"),
        ({"embed_dim": 50}, "embed_dim (50) must be a multiple of num_heads (6)"),
        ({"fusion_interval": 0}, "fusion_interval (0) must be at least 1"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        llama3_2_vision_decoder(**SIZES | changes)


def test_too_much_to_see(decoder: TransformerDecoder) -> None:
    """More than encoder_max_seq_len, or than the cache was made for."""
    with pytest.raises(ValueError, match=r"encoder_input has 21 tokens, more than encoder_max_seq_len \(20\)"):
        decoder(tokens(), encoder_input=encoded(length=21))
    small = build()
    small.setup_caches(2, torch.float32, encoder_max_seq_len=10)
    with pytest.raises(ValueError, match="the encoder's output has 11 tokens, the cache holds 10"):
        small(tokens(), torch.arange(LENGTH), encoder_input=encoded(), encoder_mask=sight())
