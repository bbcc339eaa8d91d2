"""GGUF files are read as the Hugging Face checkpoints they were made from, number for number, or refused.

Independent truths: the gguf package's own dequantization, transformers' GGUF loader, and the models that the files
were made from. The files are written by gguf_cases.py.
"""

import contextlib
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_cases as cases
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.build import build_decoder
from graphs.checkpoint import Checkpoint, TensorRef, load_tensor, open_checkpoint
from graphs.config import DecoderConfig
from graphs.errors import CheckpointError
from graphs.families import find_family
from graphs.formats.gguf_blocks import GGML_TYPES
from graphs.formats.gguf_header import read_header
from graphs.loading import check_weights, materialise
from graphs.positions import inverse_frequencies
from graphs.transformer import TransformerDecoder

# Both sides compute in float32, logits are of order 1: what differs is the order of additions.
ATOL = 1e-5

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,  # one block of Q6_K
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
TYPES = {kind.name: Type[kind.name] for kind in GGML_TYPES.values()}
MIXED = list(TYPES.values())


def mixed(name: str) -> Type:
    """Every type somewhere in the file."""
    return MIXED[sum(map(ord, name)) % len(MIXED)]


def random_model(model_type: str, rope: dict[str, Any] | None = None, **changes: Any) -> Any:
    """transformers' model, with weights large enough that every part matters, and norms and biases far from 1 and 0."""
    torch.manual_seed(0)
    config_class, model_class = CLASSES[model_type]
    fields = {**SHAPE, **changes}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta"), **(rope or {})}
    model = model_class(config_class(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def convert(out: Path, model: Any, *, architecture: str | None = None, **options: Any) -> Path:
    config = model.config.to_dict()
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    weights = dict(model.state_dict())
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    return cases.convert(out, config, weights, architecture=architecture or config["model_type"], **options)


def load(checkpoint: Checkpoint) -> TransformerDecoder:
    """Our decoder, with every tensor as float32."""
    family = find_family(checkpoint.config, checkpoint.shapes)
    config = family.parse_config(checkpoint.config)
    check_weights(family, config, checkpoint)
    with torch.device("meta"):
        decoder = build_decoder(config)
    names = family.tensor_names(config)
    loaded = {ref: checkpoint.load(ref, torch.float32).float() for ref in set(names.values())}
    materialise(decoder, {ours: loaded[ref] for ours, ref in names.items()})
    return decoder


def parse(checkpoint: Checkpoint) -> DecoderConfig:
    return find_family(checkpoint.config).parse_config(checkpoint.config)


def load_theirs(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own reading of the file, in float32."""
    # it asks for accelerate, and does not need it
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *args: True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def assert_same_logits(ours: TransformerDecoder, theirs: Any) -> None:
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids)
    assert expected.std() > 0.2  # a model whose logits are near zero proves nothing
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_equal_the_gguf_packages_bit_for_bit(kind: str, tmp_path: Path) -> None:
    path = convert(tmp_path / "model.gguf", random_model("llama"), type_of=lambda name: TYPES[kind])
    checkpoint = open_checkpoint(path)
    expected = cases.dequantized(path)
    for gguf_name, heads in (("blk.1.attn_q.weight", 4), ("blk.1.attn_k.weight", 2)):
        rows = expected[gguf_name].shape[0]
        interleaved = expected[gguf_name].reshape(heads, rows // heads // 2, 2, -1)
        expected[gguf_name] = interleaved.swapaxes(1, 2).reshape(rows, -1)
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }
    for gguf_name, name in names.items():
        found = checkpoint.load(TensorRef(name), torch.float32)
        assert torch.equal(found.float(), expected[gguf_name]), name


@pytest.mark.parametrize(("kind", "format"), [("Q4_0", "int4/32"), ("Q8_0", "int8/32"), ("Q6_K", "int8/16")])
def test_blocks_are_taken_over_as_codes_and_scales(kind: str, format: str, tmp_path: Path) -> None:
    path = convert(tmp_path / "model.gguf", random_model("llama"), type_of=lambda name: TYPES[kind])
    checkpoint = open_checkpoint(path)
    packed = checkpoint.packed["model.layers.0.mlp.down_proj.weight"]
    assert (packed.kind, str(packed.format), packed.asymmetric) == (f"GGUF {kind}", format, False)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensor = checkpoint.quantized(TensorRef(name))
        assert tensor is not None
        grid = tensor.format.grid
        assert str(tensor.format) == format
        assert tensor.codes.dtype == torch.int8
        assert grid.lowest <= int(tensor.codes.min()) <= int(tensor.codes.max()) <= 2 ** (grid.bits - 1) - 1
        assert tensor.scales.dtype == torch.float32
        assert tensor.scales.shape == (tensor.shape[0], tensor.format.scales_of(tensor.shape[1]))
        assert not bool((tensor.scales == 0).any())
        codes = tensor.codes.unflatten(1, (tensor.scales.shape[1], -1))
        assert bool(((tensor.scales > 0) | (codes.amin(-1) == grid.lowest)).all())
        if kind != "Q6_K":  # a scale of it is a product
            assert torch.equal(tensor.scales.half().float(), tensor.scales)
        part = checkpoint.quantized(TensorRef(name, (2, 6)))
        assert part is not None
        assert torch.equal(part.codes, tensor.codes[2:6])


def test_q4_1_has_no_format_and_is_computed_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = convert(tmp_path / "model.gguf", random_model("llama"), type_of=lambda name: Type.Q4_1)
    packed = open_checkpoint(path).packed["lm_head.weight"]
    assert packed.format is None
    assert packed.reason == "its blocks have a minimum beside their scale"
    (stored,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output.weight")
    blocks = torch.from_numpy(np.array(stored.data)).reshape(96, 8, 20)
    scale = blocks[..., 0:2].contiguous().view(torch.float16)
    minimum = blocks[..., 2:4].contiguous().view(torch.float16)
    codes = torch.cat((blocks[..., 4:] % 16, blocks[..., 4:] // 16), dim=-1)
    for dtype in (torch.float16, torch.bfloat16):
        expected = scale.to(dtype) * codes.to(dtype) + minimum.to(dtype)
        assert torch.equal(packed.dequantize(dtype), expected.flatten(1))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_numbers_are_mapped_from_the_file_itself(kind: str, tmp_path: Path) -> None:
    model = random_model("llama")
    path = convert(tmp_path / "model.gguf", model, type_of=lambda name: TYPES[kind])
    checkpoint = open_checkpoint(path)
    assert checkpoint.folder == path
    assert checkpoint.config["torch_dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    weights = model.state_dict()
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"):
        stored = checkpoint.tensors[name]
        assert (stored.path, stored.dtype) == (path, kind)
        dtype = load_tensor(stored).dtype
        assert torch.equal(load_tensor(stored), weights[name].to(dtype))
    packed = checkpoint.packed["model.layers.1.self_attn.q_proj.weight"]
    assert (packed.format, packed.dtype) == (None, kind)
    assert torch.equal(packed.dequantize(dtype), weights[packed.name].to(dtype))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "Q6_K"]))
def test_any_bytes_mean_what_the_gguf_package_says(data: st.DataObject, kind: str) -> None:
    """Scales of 0, below 0, infinite and not a number among them."""
    (ggml,) = (ggml for ggml in GGML_TYPES.values() if ggml.name == kind)
    rows, in_row = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2)]))
    raw = data.draw(st.binary(min_size=rows * in_row * ggml.block_bytes, max_size=rows * in_row * ggml.block_bytes))
    blocks = np.frombuffer(bytearray(raw), np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, TYPES[kind])
    stored = torch.from_numpy(blocks).reshape(rows, in_row, -1)
    if ggml.numbers is not None:
        found = ggml.numbers(stored, torch.float32)
    else:
        assert ggml.codes is not None
        codes, scales = ggml.codes(stored)
        found = (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)
    np.testing.assert_array_equal(found.numpy(), expected)


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_transformers_reading_of_the_file(
    model_type: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' loader does not read Qwen 3's head_dim
    model = random_model(model_type, tie_word_embeddings=tied, head_dim=128 if model_type == "qwen3" else 64)
    extra = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(96)], "general.name": "random"}
    path = convert(tmp_path / "model.gguf", model, type_of=mixed, extra=extra)
    checkpoint = open_checkpoint(path)
    assert len({packed.kind for packed in checkpoint.packed.values()}) > 3
    assert ("lm_head.weight" in checkpoint.shapes) == (not tied)
    assert_same_logits(load(checkpoint), load_theirs(path, monkeypatch))


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model type, what config.json says, what the GGUF file's metadata says
    "attention_bias": ("llama", {"attention_bias": True}, {}),
    "mlp_bias": ("llama", {"mlp_bias": True}, {}),
    "wide heads": ("llama", {"head_dim": 96}, {}),
    "narrow heads": ("qwen3", {"head_dim": 32}, {}),
    "no head_dim": (
        "llama",
        {},
        {"llama.attention.key_length": None, "llama.attention.value_length": None, "llama.rope.dimension_count": None},
    ),
    "as many keys as queries": ("llama", {"num_key_value_heads": 4}, {"llama.attention.head_count_kv": None}),
    "large eps": ("llama", {"rms_norm_eps": 0.3}, {}),
    "default theta": ("llama", {}, {"llama.rope.freq_base": None}),
    "linear": (
        "llama",
        {"rope": {"rope_type": "linear", "factor": 2.5}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
    ),
    "linear, old": ("llama", {"rope": {"rope_type": "linear", "factor": 2.5}}, {"llama.rope.scale_linear": 2.5}),
    "yarn": (
        "qwen2",
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4632}},
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 4632,
        },
    ),
    "yarn, steep": (
        "llama",
        {
            "rope": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            }
        },
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "window": ("mistral", {"sliding_window": 8}, {"llama.attention.sliding_window": 8}),
    "values that change nothing": (
        "llama",
        {},
        {"llama.expert_count": 0, "llama.attention.causal": True, "llama.rope.scaling.type": "none"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_model_that_the_file_was_made_from(variant: str, tmp_path: Path) -> None:
    model_type, changes, extra = VARIANTS[variant]
    model = random_model(model_type, **changes)
    path = convert(
        tmp_path / "model.gguf", model, architecture="llama" if model_type == "mistral" else model_type, extra=extra
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["model_type"] == model_type
    assert_same_logits(load(checkpoint), model)


def llama3_factors(head_dim: int, theta: float, factor: float) -> Tensor:
    """rope_freqs.weight as llama.cpp's converter computes it."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_factors(factor: float, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", rope, rope_theta=500_000.0, head_dim=128, max_position_embeddings=131_072)
    factors = llama3_factors(128, 500_000.0, factor)
    checkpoint = open_checkpoint(convert(tmp_path / "model.gguf", model, factors=factors))
    assert checkpoint.config["rope_scaling"] == rope
    assert "rope_freqs.weight" not in checkpoint.shapes
    (kind,) = parse(checkpoint).layer_kinds.values()
    assert kind.rope is not None
    torch.testing.assert_close(inverse_frequencies(kind.rope), model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert_same_logits(load(checkpoint), model)


def test_factors_of_1_scale_nothing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(tmp_path / "model.gguf", random_model("llama"), factors=torch.ones(32)))
    assert checkpoint.config["rope_scaling"] is None


def test_the_shipped_checkpoint_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    config, weights = cases.read_folder(tiny_llama)
    checkpoint = open_checkpoint(cases.convert(tmp_path / "model.gguf", config, weights))
    original = open_checkpoint(tiny_llama)
    assert parse(checkpoint) == parse(original)
    for key in ("bos_token_id", "eos_token_id", "torch_dtype", "rms_norm_eps", "architectures"):
        assert checkpoint.config[key] == original.config[key]
    for name, weight in weights.items():
        assert torch.equal(checkpoint.load(TensorRef(name)), weight)
    assert checkpoint.nbytes == original.nbytes


def test_a_trained_model_as_it_is_downloaded(
    shared_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q4_0 with a better embedding, as llama.cpp's quantizer chooses; 15 million weights."""
    folder = shared_model("stories15m-llama")
    config, weights = cases.read_folder(folder)
    extra = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(32000)], "general.name": "stories"}
    path = cases.convert(
        tmp_path / "model.gguf",
        config,
        weights,
        type_of=lambda name: Type.Q8_0 if name == "token_embd.weight" else Type.Q4_0,
        extra=extra,
    )
    checkpoint = open_checkpoint(path)
    assert parse(checkpoint) == parse(open_checkpoint(folder))
    assert_same_logits(load(checkpoint), load_theirs(path, monkeypatch))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file, small enough to be broken in many ways."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    model = random_model("llama", vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    extra = {
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [0.0, 1.0],
        "tokenizer.ggml.add_bos_token": True,
    }
    return convert(path, model, type_of=lambda name: Type.Q8_0, extra=extra)


def refused(tmp_path: Path, **options: Any) -> str:
    return refusal(convert(tmp_path / "model.gguf", random_model("llama", num_hidden_layers=1), **options))


def test_a_type_that_is_not_supported_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 144), np.uint8), raw_dtype=Type.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (
        "tensor token_embd.weight has the type Q4_K, which is not supported; supported: F32, F16, BF16, Q4_0, Q4_1,"
        " Q8_0, Q6_K. Choose a file of another quantization" in refusal(path)
    )
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<QQI", 256, 4, Type.Q4_K), struct.pack("<QQI", 256, 4, 999)))
    assert "has the type 999, which is not supported" in refusal(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"general.architecture": "falcon"},
            'general.architecture "falcon" is not supported; supported: llama, qwen2, qwen3',
        ),
        ({"general.type": "adapter"}, 'is no language model but: "adapter" (general.type)'),
        ({"split.count": 3}, "is one of 3 parts: merge them with llama-gguf-split --merge"),
        (
            {"llama.expert_count": 8},
            "mixtures of experts are not supported in GGUF (llama.expert_count is 8): export the Hugging Face",
        ),
        ({"llama.block_count": None}, "llama.block_count must be an integer from 1 to 4096, it is missing"),
        ({"llama.block_count": 2**31}, "llama.block_count must be an integer from 1 to 4096, found 2147483648"),
        (
            {"llama.context_length": "long"},
            'llama.context_length must be an integer from 1 to 2147483647, found "long"',
        ),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "must be a number above 0, found NaN"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count = 32 changes the maths"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5 is not supported: it may change the maths"),
        ({"llama.attention.causal": False}, "llama.attention.causal = false is not supported"),
        (
            {"llama.rope.scaling.type": "longrope"},
            'llama.rope.scaling.type "longrope" is not supported; supported: none, linear, yarn',
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_attn_factor": 0.7,
            },
            "llama.rope.scaling.yarn_attn_factor = 0.7 is not supported",
        ),
        (
            {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 3},
            "hidden_size (256) must be a multiple of num_attention_heads (3)",
        ),
        ({"llama.attention.head_count": 8}, "tensor blk.0.attn_q.weight has 256 rows, expected 8 heads of 64"),
        ({"general.alignment": 7}, "general.alignment is 7, expected a multiple of 8"),
    ],
)
def test_what_is_not_supported_is_named(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = refused(tmp_path, extra=extra)
    assert message in text
    assert str(tmp_path / "model.gguf") in text


def test_factors_that_are_not_llama3s_are_refused(tmp_path: Path) -> None:
    factors = torch.linspace(1, 4, 32)
    assert (
        "rope_freqs.weight [32] has other factors than Llama 3.1's and 3.2's (8, 32, of 32 frequencies): not supported"
    ) in refused(tmp_path, factors=factors)
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert 'rope_freqs.weight beside llama.rope.scaling.type "linear" is not supported' in refused(
        tmp_path, factors=factors, extra=extra
    )


def test_biases_beside_a_window_are_refused(tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1, attention_bias=True)
    path = convert(tmp_path / "model.gguf", model, extra={"llama.attention.sliding_window": 8})
    assert "biases beside a sliding window are not supported" in refusal(path)


def test_a_file_without_an_embedding_is_refused(tmp_path: Path) -> None:
    config = {**SHAPE, "num_hidden_layers": 1}
    path = cases.convert(tmp_path / "model.gguf", config, {"model.norm.weight": torch.ones(256)})
    assert "holds no token_embd.weight: not a language model, or one of several parts" in refusal(path)


def test_tensors_with_no_place_in_the_model_are_refused_when_weights_are_checked(tmp_path: Path) -> None:
    model = random_model("qwen2")
    checkpoint = open_checkpoint(convert(tmp_path / "model.gguf", model, extra={"qwen2.block_count": 1}))
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert "unexpected: blk.1.attn_k.weight [128, 256]" in str(caught.value)


def test_gguf_package_missing(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(tiny_file) == "reading GGUF files needs the gguf package: pip install 'export-llm[gguf]'"


def test_every_truncation_is_noticed(tiny_file: Path, tmp_path: Path) -> None:
    raw = tiny_file.read_bytes()
    header_bytes = min(tensor.offset for tensor in read_header(tiny_file).tensors)
    path = tmp_path / "model.gguf"
    for end in {*range(0, header_bytes, 7), *range(header_bytes, len(raw), 997), len(raw) - 40}:
        path.write_bytes(raw[:end])
        assert "model.gguf" in refusal(path)
    path.write_bytes(raw)
    open_checkpoint(path)


@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_read(tiny_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever it claims, there is no other error, and no long wait."""
    raw = bytearray(tiny_file.read_bytes())
    header_bytes = min(tensor.offset for tensor in read_header(tiny_file).tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        size = data.draw(st.sampled_from([1, 4, 8]))
        at = data.draw(st.integers(0, header_bytes - size))
        raw[at : at + size] = data.draw(
            st.one_of(st.binary(min_size=size, max_size=size), st.just(b"\xff" * size), st.just(b"\0" * size))
        )
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        load(open_checkpoint(path))


def edited(tiny_file: Path, tmp_path: Path, old: bytes, new: bytes) -> str:
    """What is said of the file with one place of it changed."""
    raw = tiny_file.read_bytes()
    assert raw.count(old) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.replace(old, new))
    return refusal(path)


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def test_a_file_that_is_no_gguf(tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + bytes(100))
    assert "is damaged or not a GGUF file (truncated download?): it begins with b'PK\\x03\\x04'" in refusal(path)
    path.write_bytes(b"")
    assert "cannot be read" in refusal(path)
    raw = tiny_file.read_bytes()
    path.write_bytes(raw[:4] + struct.pack("<I", 1) + raw[8:])
    assert "is GGUF version 1; supported: 2, 3, little-endian" in refusal(path)
    path.write_bytes(raw[:4] + struct.pack(">I", 3) + raw[8:])
    assert "is GGUF version 50331648: written for big-endian machines" in refusal(path)


def test_damaged_metadata(tiny_file: Path, tmp_path: Path) -> None:
    name = key("general.architecture") + struct.pack("<I", 8)
    no_text = key("llama")[:-1] + b"\xff"
    assert "general.architecture is not text in UTF-8" in edited(
        tiny_file, tmp_path, name + key("llama"), name + no_text
    )
    add = key("tokenizer.ggml.add_bos_token")
    old = add + struct.pack("<I", 7)
    assert "has a value of type 13, which does not exist" in edited(
        tiny_file, tmp_path, old, add + struct.pack("<I", 13)
    )
    tokens = key("tokenizer.ggml.tokens") + struct.pack("<I", 9)
    assert "is an array of values of type 9, which is not supported" in edited(
        tiny_file, tmp_path, tokens + struct.pack("<I", 8), tokens + struct.pack("<I", 9)
    )
    first, second = key("tokenizer.ggml.bos_token_id"), key("tokenizer.ggml.eos_token_id")
    assert '"tokenizer.ggml.eos_token_id" is there twice' in edited(tiny_file, tmp_path, first, second)


@pytest.mark.parametrize("length", [3, 2**20, 2**62, 2**64 - 1])
def test_lying_lengths(length: int, tiny_file: Path, tmp_path: Path) -> None:
    lie = struct.pack("<Q", length)
    tokens = key("tokenizer.ggml.tokens") + struct.pack("<II", 9, 8)
    assert "is damaged" in edited(tiny_file, tmp_path, tokens + struct.pack("<Q", 2), tokens + lie)
    scores = key("tokenizer.ggml.scores") + struct.pack("<II", 9, 6)
    assert "is damaged" in edited(tiny_file, tmp_path, scores + struct.pack("<Q", 2), scores + lie)
    name = key("general.architecture")
    assert "is damaged" in edited(tiny_file, tmp_path, name, lie + name[8:])
    raw = tiny_file.read_bytes()
    for counts in (raw[8:16] + lie, lie + raw[16:24]) if length > 3 else ():
        assert "is damaged" in edited(tiny_file, tmp_path, raw[:24], raw[:8] + counts)


def test_lying_tensors(tiny_file: Path, tmp_path: Path) -> None:
    name = key("token_embd.weight")
    raw = tiny_file.read_bytes()
    at = raw.index(name) + len(name)
    dims, width, height, kind, offset = struct.unpack_from("<IQQIQ", raw, at)
    assert (dims, width, height, kind) == (2, 32, 32, Type.Q8_0)
    old = name + raw[at : at + 32]

    def said(*fields: int) -> str:
        return edited(tiny_file, tmp_path, old, name + struct.pack("<IQQIQ", *fields))

    end = len(raw) // 32 * 32
    assert "is damaged (truncated download?): tensor token_embd.weight would end at" in said(2, 32, 32, kind, end)
    assert "overlap" in said(2, 32, 32, kind, offset + 32)
    assert f"token_embd.weight lies at {offset + 1}, expected a multiple of 32" in said(2, 32, 32, kind, offset + 1)
    assert "would end at" in said(2, 32, 32, kind, 2**64 - 32)
    assert "would end at" in said(2, 2**30, 2**30, kind, offset)
    assert "has the shape [32, 4294967296]" in said(2, 2**32, 32, kind, offset)
    assert "has the shape [32, 0]" in said(2, 0, 32, kind, offset)
    assert "has 9 dimensions, expected 1 to 4" in said(9, 32, 32, kind, offset)
    assert "cannot be Q8_0: rows of blocks of 32 were expected" in said(2, 16, 64, kind, offset)
    twice = key("blk.0.attn_v.weight")
    assert "two of its tensors have the same name" in edited(tiny_file, tmp_path, twice, key("blk.0.attn_k.weight"))


def test_tensors_that_would_get_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    config = {**SHAPE, "num_hidden_layers": 1}
    embedding = torch.zeros(96, 256)
    cases.convert(path, config, {"model.embed_tokens.weight": embedding, "output_norm.weight": torch.ones(256)})
    raw = path.read_bytes()
    padding = b"\0" * 100  # where a longer name finds room
    assert padding in raw
    old, new = key("output_norm.weight"), key("model.embed_tokens.weight")
    assert raw.count(old) == 1
    at = raw.index(old)
    end = raw.index(padding, at)
    path.write_bytes(raw[:at] + new + raw[at + len(old) : end] + raw[end + len(new) - len(old) :])
    assert "holds tensors under both llama.cpp's and Hugging Face's names" in refusal(path)
