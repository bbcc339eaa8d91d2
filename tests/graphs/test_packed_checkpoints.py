"""Checkpoints of GPTQ and AWQ: every weight is (code - zero) * scale of what was packed, exactly, or a refusal.

The packers (packed_cases.py) are written from the formats' definitions, one number at a time; LIBRARY_BYTES ties them
to the libraries that write such checkpoints.
"""

import dataclasses
import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_cases import Layer, layer, library_layer, named, pack_awq, pack_gptq
from safetensors.torch import save_file
from torch import Tensor

from graphs.checkpoint import Checkpoint, StoredTensor, TensorRef, open_checkpoint
from graphs.errors import CheckpointError
from graphs.families import find_family
from graphs.formats.int32 import read_words
from graphs.loading import check_weights, expected_shapes
from graphs.quantization import WeightFormat

# sha256 of what the libraries' own packers make of library_layer(bits): qweight, then qzeros.
# AutoGPTQ 0.7.1: auto_gptq.nn_modules.qlinear.qlinear_cuda_old.QuantLinear(bits, 16, 32, 32, False).pack
# AutoAWQ 0.2.9: awq.modules.linear.gemm.WQLinear_GEMM.from_linear(linear, 4, 16, scales=.., zeros=..)
LIBRARY_BYTES = {
    ("gptq", 4): "f2b42b4289d9c4107e3dff91767c322ca7033ded233dbf08b42348faaf32f464",
    ("gptq", 8): "355995a893e0cafcd9e8a627dca0150218c628777743476e30a6765abec3053f",
    ("awq", 4): "e03aaab6d0b898140ebcf6fef579fcc61e6c0cd8357ffaf9ddf409558e9c2d20",
}


def write(folder: Path, tensors: dict[str, Tensor], quantization: Mapping[str, Any], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def gptq_config(layer: Layer | None = None, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4 if layer is None else layer.bits, "group_size": group, **more}


def awq_config(group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **more}


def check_exact(checkpoint: Checkpoint, name: str, layer: Layer, format: WeightFormat) -> None:
    """The packed tensor is the layer: code for code, and number for number."""
    packed = checkpoint.packed[f"{name}.weight"]
    assert (packed.shape, packed.format, packed.reason, packed.numbers) == (layer.codes.shape, format, "", None)
    assert packed.read is not None
    tensor = packed.read()
    middle = 2 ** (layer.bits - 1)
    zeros = torch.from_numpy(layer.zeros[:, layer.groups[:: format.block or len(layer.groups)]] - middle)
    assert tensor.format == format
    assert tensor.codes.dtype == torch.int8
    assert torch.equal(tensor.codes.long(), torch.from_numpy(layer.codes - middle))
    assert packed.asymmetric == bool(zeros.any())
    if packed.asymmetric:
        assert tensor.zero_points is not None
        assert tensor.zero_points.dtype == torch.int8
        assert torch.equal(tensor.zero_points.long(), zeros)
    else:
        assert tensor.zero_points is None
    assert (tensor.scales.dtype, tensor.tensor_scale) == (torch.float32, 1.0)
    check_numbers(checkpoint, name, layer)


def check_numbers(checkpoint: Checkpoint, name: str, layer: Layer) -> None:
    """Each number is the exact one, rounded to the dtype that was asked for."""
    ref = TensorRef(f"{name}.weight")
    assert torch.equal(checkpoint.load(ref, torch.float64), layer.weight)
    assert torch.equal(checkpoint.load(ref), layer.weight.float())
    if layer.scales.dtype == torch.float16:
        assert torch.equal(checkpoint.load(ref, torch.float16), layer.weight.half())


def refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)


# --- the layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "bits"), LIBRARY_BYTES)
def test_the_packers_here_make_the_libraries_bytes(method: str, bits: int) -> None:
    made = library_layer(bits)
    parts = pack_gptq(made) if method == "gptq" else pack_awq(made)
    digest = hashlib.sha256(parts["qweight"].numpy().tobytes() + parts["qzeros"].numpy().tobytes())
    assert digest.hexdigest() == LIBRARY_BYTES[method, bits]


def test_a_gptq_word_by_hand(tmp_path: Path) -> None:
    """Eight inputs of one output, the first in the lowest bits, and eight outputs' zeros."""
    tensors = named(
        "x",
        {
            "qweight": torch.tensor([[0x76543210] * 8, [-1] * 8], dtype=torch.int32),
            "qzeros": torch.tensor([[0x76543210]], dtype=torch.int32),
            "scales": torch.ones(1, 8),
            "g_idx": torch.zeros(16, dtype=torch.int32),
        },
    )
    for version, zero in (("gptq", 1), ("gptq_v2", 0)):
        checkpoint = open_checkpoint(write(tmp_path, tensors, gptq_config(group=16, checkpoint_format=version)))
        weight = checkpoint.load(TensorRef("x.weight"))
        codes = torch.tensor([*range(8), *[15] * 8])
        assert torch.equal(weight, (codes - (torch.arange(8) + zero)[:, None]).float())


def test_an_awq_word_by_hand(tmp_path: Path) -> None:
    """Eight outputs of one input: the even ones in the lower half of the word."""
    tensors = named(
        "x",
        {
            "qweight": torch.tensor([[0x75316420]] * 16, dtype=torch.int32),
            "qzeros": torch.zeros(1, 1, dtype=torch.int32),
            "scales": torch.ones(1, 8),
        },
    )
    weight = open_checkpoint(write(tmp_path, tensors, awq_config(group=16))).load(TensorRef("x.weight"))
    assert torch.equal(weight, torch.arange(8.0)[:, None].expand(8, 16))


# --- GPTQ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_taken_over_code_for_code(tmp_path: Path, bits: int, version: str, symmetric: bool, group: int) -> None:
    """A scale of more inputs than a block may have is repeated; 8 bits have a format for one scale an output."""
    made = layer(8, 512, group=group, bits=bits, symmetric=symmetric)
    config = gptq_config(made, group, checkpoint_format=version, sym=symmetric, desc_act=False)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made, version)), config))
    block = 0 if (bits, group) == (8, -1) else 128 if group in (-1, 256) else group
    check_exact(checkpoint, "x", made, WeightFormat(name=f"int{bits}", block=block))
    packed = checkpoint.packed["x.weight"]
    assert packed.kind == f"GPTQ, {bits} bits, " + ("one scale an output" if group == -1 else f"blocks of {group}")
    assert (packed.dtype, packed.nbytes) == ("F16", (tmp_path / "model.safetensors").stat().st_size - header(tmp_path))
    assert (dict(checkpoint.tensors), dict(checkpoint.config)) == ({}, {})


def header(folder: Path) -> int:
    """Bytes before the first tensor."""
    return 8 + int(struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0])


@pytest.mark.parametrize("inputs", [16, 48, 96])
def test_blocks_divide_the_inputs_as_well_as_the_groups(tmp_path: Path, inputs: int) -> None:
    """The last of GPTQ's groups may be smaller."""
    made = layer(8, inputs, group=64)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(group=64)))
    check_exact(checkpoint, "x", made, WeightFormat(name="int4", block=32 if inputs == 96 else 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_float_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = layer(dtype=dtype)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config()))
    check_exact(checkpoint, "x", made, WeightFormat(name="int4", block=32))
    assert checkpoint.dtype == {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]


def test_a_zero_of_16_makes_8_bits_of_4(tmp_path: Path) -> None:
    """It is no int4, but code - zero is an int8."""
    made = layer(symmetric=True)
    made.zeros[3, 1] = 16
    made.zeros[4, :] = 15
    made.codes[3, 32:34] = (0, 15)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config()))
    packed = checkpoint.packed["x.weight"]
    assert (packed.format, packed.asymmetric) == (WeightFormat(name="int8", block=32), False)
    assert packed.read is not None
    tensor = packed.read()
    assert tensor.zero_points is None
    assert tensor.codes[3, 32:34].tolist() == [-16, -1]
    check_numbers(checkpoint, "x", made)


def test_a_zero_of_16_with_one_scale_an_output(tmp_path: Path) -> None:
    made = layer(group=-1)
    made.zeros[0, 0] = 16
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(group=-1)))
    assert checkpoint.packed["x.weight"].format == WeightFormat(name="int8", block=0)
    check_numbers(checkpoint, "x", made)


def test_a_zero_of_256_leaves_only_numbers(tmp_path: Path) -> None:
    made = layer(bits=8)
    made.zeros[3, 1] = 256
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(made)))
    packed = checkpoint.packed["x.weight"]
    assert (packed.format, packed.read) == (None, None)
    assert packed.reason == "it has zero points of 256, which 8 bits cannot express"
    assert checkpoint.quantized(TensorRef("x.weight")) is None
    check_numbers(checkpoint, "x", made)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_0_that_gptqmodel_stored_less_one(tmp_path: Path, bits: int) -> None:
    """It subtracts one from every zero of a word at once, and so borrows from the next zero."""
    made = layer(bits=bits)
    made.zeros[::3] = 0
    parts = pack_gptq(made, "gptq_v2")
    ones = sum(1 << bit for bit in range(0, 32, bits))
    stored = (parts["qzeros"].numpy().view(np.uint32).astype(np.int64) - ones) % 2**32
    parts["qzeros"] = torch.from_numpy(stored.astype(np.uint32).view(np.int32))
    meta = {"quantizer": ["optimum:1.24.0", "gptqmodel:2.0.0"]}
    folder = write(tmp_path, named("x", parts), gptq_config(made, sym=False, checkpoint_format="gptq", meta=meta))
    check_exact(open_checkpoint(folder), "x", made, WeightFormat(name=f"int{bits}", block=32))
    one_name = write(tmp_path, named("x", parts), gptq_config(made, meta={"quantizer": "gptqmodel:5.0.0"}))
    check_exact(open_checkpoint(one_name), "x", made, WeightFormat(name=f"int{bits}", block=32))
    others = write(tmp_path, named("x", parts), gptq_config(made, meta={"quantizer": ["auto_gptq:0.7.1"]}))
    format = open_checkpoint(others).packed["x.weight"].format
    assert format == (WeightFormat(name="int8", block=32) if bits == 4 else None)  # zeros of 16, and of 256


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_leaves_only_numbers(tmp_path: Path, bits: int) -> None:
    made = dataclasses.replace(layer(bits=bits), groups=np.random.default_rng(1).permutation(np.arange(128) // 32))
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(made, desc_act=True)))
    packed = checkpoint.packed["x.weight"]
    assert (packed.shape, packed.format, packed.read) == ((16, 128), None, None)
    assert packed.reason == "inputs that share a scale do not lie together (act-order, desc_act)"
    assert packed.kind == f"GPTQ, {bits} bits, blocks of 32"
    check_numbers(checkpoint, "x", made)


def test_desc_act_that_left_no_trace_is_exact(tmp_path: Path) -> None:
    """g_idx decides; and where whole blocks change places, each is still of one group."""
    made = layer()
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(desc_act=True)))
    check_exact(checkpoint, "x", made, WeightFormat(name="int4", block=32))
    moved = dataclasses.replace(layer(), groups=np.repeat([2, 0, 3, 1, 1, 3, 0, 2], 16))
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(moved)), gptq_config(desc_act=False)))
    check_exact(checkpoint, "x", moved, WeightFormat(name="int4", block=16))


def test_groups_smaller_than_a_block_leave_only_numbers(tmp_path: Path) -> None:
    made = layer(group=8)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(group=8)))
    packed = checkpoint.packed["x.weight"]
    assert (packed.format, packed.reason) == (None, "its groups of inputs are no multiples of 16")
    check_numbers(checkpoint, "x", made)


def test_sizes_that_fill_no_word(tmp_path: Path) -> None:
    made = layer(13, 36, group=-1)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config(group=-1)))
    assert checkpoint.packed["x.weight"].shape == (13, 36)
    check_numbers(checkpoint, "x", made)


def test_layers_with_other_settings(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the tensors tell what each layer has."""
    four, eight, plain = layer(), layer(bits=8, group=64), torch.randn(16, 128)
    tensors = named("x", pack_gptq(four)) | named("y", pack_gptq(eight)) | {"z.weight": plain}
    dynamic = {r"+:.*y.*": {"bits": 8, "group_size": 64}, r"-:.*z.*": {}}
    checkpoint = open_checkpoint(write(tmp_path, tensors, gptq_config(dynamic=dynamic, sym=True)))
    check_exact(checkpoint, "x", four, WeightFormat(name="int4", block=32))
    check_exact(checkpoint, "y", eight, WeightFormat(name="int8", block=64))
    assert torch.equal(checkpoint.load(TensorRef("z.weight")), plain)
    refused(
        write(tmp_path, tensors, gptq_config(dynamic={"-:.*z.*": {}})),
        "y.qweight is I32 [32, 16], expected I32 [16, 16]: 128 inputs (g_idx), 16 outputs (scales), 4 bits,"
        " group_size 32",
    )


# --- AWQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_is_taken_over_code_for_code(tmp_path: Path, symmetric: bool, group: int) -> None:
    made = layer(24, 256, group=group, symmetric=symmetric)
    if not symmetric:
        made.zeros[::5] = 0
    tensors = named("x", pack_awq(made)) | {"x.bias": torch.ones(24)}
    checkpoint = open_checkpoint(write(tmp_path, tensors, awq_config(group, zero_point=not symmetric)))
    check_exact(checkpoint, "x", made, WeightFormat(name="int4", block=128 if group == -1 else group))
    packed = checkpoint.packed["x.weight"]
    assert packed.kind == "AWQ, 4 bits, " + ("one scale an output" if group == -1 else f"blocks of {group}")
    assert torch.equal(checkpoint.load(TensorRef("x.bias")), torch.ones(24))


def test_awq_as_it_is_written_by_default(tmp_path: Path) -> None:
    made = layer(group=128)
    tensors = named("x", pack_awq(made))
    for config in ({}, {"version": "GEMM"}, {"format": "gemm", "checkpoint_format": "gemm", "version": "gemm"}):
        checkpoint = open_checkpoint(write(tmp_path, tensors, {"quant_method": "awq", **config}))
        check_exact(checkpoint, "x", made, WeightFormat(name="int4", block=128))


# --- whole models ------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
PHI3 = {**LLAMA, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def write_model(
    folder: Path, config: dict[str, Any], pack: Callable[[Layer], dict[str, Tensor]], quantization: dict[str, Any]
) -> tuple[Path, dict[str, Layer], dict[str, Tensor]]:
    """A checkpoint as transformers names its tensors: the blocks' matrices are quantized, nothing else is."""
    family = find_family(config)
    layers, plain = {}, {}
    for seed, (name, shape) in enumerate(expected_shapes(family, family.parse_config(config)).items()):
        if name.endswith("_proj.weight"):
            layers[name.removesuffix(".weight")] = layer(*shape, seed=seed)
        else:
            plain[name] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()
    quantized = {key: tensor for name, made in layers.items() for key, tensor in named(name, pack(made)).items()}
    return write(folder, plain | quantized, quantization, **config), layers, plain


@pytest.mark.parametrize("config", [LLAMA, PHI3, QWEN2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize(("pack", "quantization"), [(pack_gptq, gptq_config()), (pack_awq, awq_config())])
def test_a_model_opens_and_each_parameter_finds_its_numbers(
    tmp_path: Path,
    config: dict[str, Any],
    pack: Callable[[Layer], dict[str, Tensor]],
    quantization: dict[str, Any],
) -> None:
    """Phi-3's parameters are rows of what was quantized as one matrix; Qwen2's layers have biases."""
    folder, layers, plain = write_model(tmp_path, config, pack, quantization)
    checkpoint = open_checkpoint(folder)
    assert dict(checkpoint.config) == config
    assert checkpoint.tensors.keys() == plain.keys()
    assert checkpoint.packed.keys() == {f"{name}.weight" for name in layers}
    assert checkpoint.dtype == "F16"
    family = find_family(checkpoint.config, checkpoint.shapes)
    parsed = family.parse_config(checkpoint.config)
    check_weights(family, parsed, checkpoint)
    expected = expected_shapes(family, parsed)
    assert checkpoint.shapes == expected
    assert checkpoint.parameter_count(expected) == sum(int(np.prod(shape)) for shape in expected.values())
    weights = {f"{name}.weight": made.weight for name, made in layers.items()}
    for ref in family.all_refs(parsed):
        if ref.name in plain:
            assert checkpoint.quantized(ref) is None
            assert torch.equal(checkpoint.load(ref), plain[ref.name])
            continue
        weight = weights[ref.name] if ref.rows is None else weights[ref.name][slice(*ref.rows)]
        tensor = checkpoint.quantized(ref)
        assert tensor is not None
        assert tensor.shape == tuple(weight.shape)
        assert torch.equal(tensor.dequantize(torch.float64), weight)
        assert torch.equal(checkpoint.load(ref, torch.float64), weight)


def test_rows_of_a_matrix_in_act_order(tmp_path: Path) -> None:
    made = dataclasses.replace(layer(), groups=np.random.default_rng(1).permutation(np.arange(128) // 32))
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(made)), gptq_config()))
    ref = TensorRef("x.weight", (4, 9))
    assert checkpoint.quantized(ref) is None
    assert torch.equal(checkpoint.load(ref, torch.float64), made.weight[4:9])


def test_codes_are_not_read_before_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(part: StoredTensor) -> np.ndarray:
        read.append(part.name)
        return read_words(part)

    monkeypatch.setattr("graphs.formats.gptq.read_words", spy)
    checkpoint = open_checkpoint(write(tmp_path, named("x", pack_gptq(layer())), gptq_config()))
    assert set(read) == {"x.g_idx", "x.qzeros"}
    checkpoint.load(TensorRef("x.weight"))
    assert "x.qweight" in read


# --- what is refused ---------------------------------------------------------------------------------------------

GPTQ, AWQ = gptq_config(sym=False), awq_config()
WHERE = "config.json: quantization_config"
SETTINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GPTQ, {"bits": 3}, f"{WHERE}: bits must be one of 4, 8, found 3"),
    (GPTQ, {"bits": 2}, f"{WHERE}: bits must be one of 4, 8, found 2"),
    (GPTQ, {"bits": None}, f"{WHERE}: bits must be one of 4, 8, it is missing"),
    (AWQ, {"bits": 8}, f"{WHERE}: bits must be one of 4, found 8"),
    (GPTQ, {"group_size": 0}, f"{WHERE}: group_size must be a number of inputs or -1 (all of them), found 0"),
    (GPTQ, {"group_size": -2}, f"{WHERE}: group_size must be an integer from -1 to 2147483647, found -2"),
    (GPTQ, {"group_size": 10**30}, f"{WHERE}: group_size must be an integer from -1 to 2147483647, found 1"),
    (GPTQ, {"group_size": "32"}, f"{WHERE}: group_size must be an integer"),
    (GPTQ, {"checkpoint_format": "gptq_p"}, f'{WHERE}.checkpoint_format "gptq_p" is not supported; supported: gptq, '),
    (GPTQ, {"format": "marlin"}, f'{WHERE}.format "marlin" is not supported; supported: gptq, gptq_v2'),
    (GPTQ, {"format": ["gptq"]}, f'{WHERE}.format ["gptq"] is not supported'),
    (
        GPTQ,
        {"format": "gptq", "checkpoint_format": "gptq_v2"},
        f"{WHERE}: checkpoint_format and format contradict each other",
    ),
    (GPTQ, {"is_marlin_format": True}, f"{WHERE}: is_marlin_format must be one of null, false, found true"),
    (GPTQ, {"pack_dtype": "int64"}, f'{WHERE}: pack_dtype must be one of null, "int32", found "int64"'),
    (GPTQ, {"rotation": "hadamard"}, f'{WHERE}: rotation must be one of null, found "hadamard"'),
    (GPTQ, {"adapter": {"name": "lora"}}, f"{WHERE}: adapter must be one of null, found"),
    (GPTQ, {"dynamic": ["x"]}, f'{WHERE}: dynamic must be an object, found ["x"]'),
    (AWQ, {"dynamic": {"x": {"bits": 8}}}, f'{WHERE}: dynamic = {{"x": {{"bits": 8}}}} is not supported for AWQ'),
    (AWQ, {"version": "gemv"}, f'{WHERE}.version "gemv" is not supported; supported: gemm'),
    (AWQ, {"version": "gemv_fast"}, f'{WHERE}.version "gemv_fast" is not supported'),
    (AWQ, {"version": "marlin"}, f'{WHERE}.version "marlin" is not supported'),
    (AWQ, {"version": "exllama"}, f'{WHERE}.version "exllama" is not supported'),
    (AWQ, {"backend": "llm-awq"}, f'{WHERE}.version "llm-awq" is not supported'),
]


@pytest.mark.parametrize(("config", "changes", "message"), SETTINGS)
def test_settings_that_are_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    parts = pack_gptq(layer()) if config is GPTQ else pack_awq(layer())
    refused(write(tmp_path, named("x", parts), {**config, **changes}), message)


def test_keys_that_change_nothing_and_unknown_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = named("x", pack_gptq(layer()))
    harmless = {"damp_percent": 0.01, "true_sequential": True, "lm_head": False, "dynamic": None, "adapter": None}
    with caplog.at_level(logging.WARNING):
        open_checkpoint(write(tmp_path, tensors, {**GPTQ, **harmless, "pack_dtype": "int32"}))
        assert caplog.text == ""
        open_checkpoint(write(tmp_path, tensors, {**GPTQ, "wormhole": 1}))
    assert f"{WHERE}: unknown keys are ignored: wormhole" in caplog.text


Change = Callable[[dict[str, Tensor]], object]
LEGEND = ": 128 inputs (g_idx), 16 outputs (scales), 4 bits, group_size 32"
AWQ_LEGEND = ": 128 inputs and 16 outputs (qweight), group_size 32"
BROKEN: list[tuple[dict[str, Any], Change, str]] = [
    (GPTQ, lambda t: t.pop("x.qweight"), "x has qzeros, scales, g_idx, but no qweight"),
    (GPTQ, lambda t: t.pop("x.qzeros"), "x has qweight, scales, g_idx, but no qzeros"),
    (GPTQ, lambda t: t.pop("x.scales"), "x has qweight, qzeros, g_idx, but no scales"),
    (GPTQ, lambda t: t.pop("x.g_idx"), "x has qweight, qzeros, scales, but no g_idx"),
    (AWQ, lambda t: t.pop("x.qzeros"), "x has qweight, scales, but no qzeros"),
    (GPTQ, lambda t: t.update({"x.weight": torch.ones(16, 128)}), "holds both x.weight and x.qweight: remove one"),
    (
        GPTQ,
        lambda t: t.update({"x.qweight": t["x.qweight"][:-1].clone()}),
        f"x.qweight is I32 [15, 16], expected I32 [16, 16]{LEGEND}",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.qweight": t["x.qweight"].float()}),
        f"x.qweight is F32 [16, 16], expected I32 [16, 16]{LEGEND}",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.qzeros": t["x.qzeros"].t().contiguous()}),
        f"x.qzeros is I32 [2, 4], expected I32 [4, 2]{LEGEND}",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.scales": t["x.scales"].double()}),
        f"x.scales is F64 [4, 16], expected F32 or F16 or BF16 [4, 16]{LEGEND}",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.scales": t["x.scales"][:2].clone()}),
        f"x.scales is F16 [2, 16], expected F32 or F16 or BF16 [4, 16]{LEGEND}",
    ),
    (GPTQ, lambda t: t.update({"x.scales": torch.ones(16)}), "x.scales is F32 [16], expected two dimensions"),
    (GPTQ, lambda t: t.update({"x.qweight": torch.ones(16)}), "x.qweight is F32 [16], expected two dimensions"),
    (
        GPTQ,
        lambda t: t.update({"x.g_idx": t["x.g_idx"].long()}),
        "x.g_idx is I64 [128], expected I32 [128]: the group of each input",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.g_idx": t["x.g_idx"][None].clone()}),
        "x.g_idx is I32 [1, 128], expected I32 [1]: the group of each input",
    ),
    (
        GPTQ,
        lambda t: t.update({"x.g_idx": torch.tensor(1, dtype=torch.int32)}),
        "x.g_idx is I32 [], expected I32 [0]: the group of each input",
    ),
    (GPTQ, lambda t: t["x.g_idx"].__setitem__(5, 4), "x.g_idx holds 0 to 4, expected groups from 0 to 3"),
    (GPTQ, lambda t: t["x.g_idx"].__setitem__(5, -1), "x.g_idx holds -1 to 3, expected groups from 0 to 3"),
    (
        GPTQ,
        lambda t: t.update({"x.g_idx": torch.zeros(0, dtype=torch.int32)}),
        "x.g_idx is I32 [0], expected no dimension of 0",
    ),
    (
        AWQ,
        lambda t: t.update({"x.qweight": t["x.qweight"].long()}),
        f"x.qweight is I64 [128, 2], expected I32 [128, 2]{AWQ_LEGEND}",
    ),
    (AWQ, lambda t: t.update({"x.qweight": torch.ones(3)}), "x.qweight is F32 [3], expected two dimensions"),
    (
        AWQ,
        lambda t: t.update({"x.qzeros": t["x.qzeros"][:3].clone()}),
        f"x.qzeros is I32 [3, 2], expected I32 [4, 2]{AWQ_LEGEND}",
    ),
    (
        AWQ,
        lambda t: t.update({"x.scales": t["x.scales"].t().contiguous()}),
        f"x.scales is F16 [16, 4], expected F32 or F16 or BF16 [4, 16]{AWQ_LEGEND}",
    ),
]


@pytest.mark.parametrize(("config", "change", "message"), BROKEN)
def test_tensors_that_are_refused(tmp_path: Path, config: dict[str, Any], change: Change, message: str) -> None:
    tensors = named("x", pack_gptq(layer()) if config is GPTQ else pack_awq(layer()))
    change(tensors)
    refused(write(tmp_path, tensors, config), message, str(tmp_path))


@pytest.mark.parametrize("shape", [(0, 10**12), (10**12, 0)])
@pytest.mark.parametrize("config", [GPTQ, AWQ])
def test_sizes_without_bytes_behind_them_are_refused(
    tmp_path: Path, config: dict[str, Any], shape: tuple[int, int]
) -> None:
    """safetensors allows them: they take no bytes of the file."""
    dtypes = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
    names = dtypes if config is GPTQ else ("qweight", "qzeros", "scales")
    entries = {
        f"x.{name}": {
            "dtype": dtypes[name],
            "shape": list(shape)[: 1 if name == "g_idx" else 2],
            "data_offsets": [0, 0],
        }
        for name in names
    }
    if "x.g_idx" in entries:
        entries["x.g_idx"]["shape"] = [0]
    text = json.dumps(entries).encode()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(tmp_path, "expected no dimension of 0")


def test_symmetric_settings_contradict_other_zeros(tmp_path: Path) -> None:
    """As where zeros are stored as gptq_v2 has them, but config.json says gptq: all weights would be wrong."""
    made = layer(symmetric=True)
    folder = write(tmp_path, named("x", pack_gptq(made, "gptq_v2")), gptq_config(sym=True))
    refused(
        folder,
        "x.qzeros holds zero points of 9, expected 8, because config.json: quantization_config.sym is true: correct"
        ' sym, or checkpoint_format: "gptq" stores 1 less, "gptq_v2" not',
    )
    made.zeros[0, 0] = 3
    refused(write(tmp_path, named("x", pack_gptq(made)), gptq_config(sym=True)), "holds zero points from 3 to 8")
    refused(
        write(tmp_path, named("x", pack_awq(made)), awq_config(zero_point=False)),
        "expected 8, because config.json: quantization_config.zero_point is false: correct zero_point",
    )


@pytest.mark.parametrize("config", [GPTQ, AWQ])
def test_a_quantization_config_without_quantized_tensors(tmp_path: Path, config: dict[str, Any]) -> None:
    refused(
        write(tmp_path, {"x.weight": torch.ones(2, 2)}, config),
        "no tensor is called *.qweight, but config.json has a quantization_config: remove it if the weights are plain",
    )


def test_a_layer_is_checked_against_what_the_family_needs(tmp_path: Path) -> None:
    folder, _, _ = write_model(tmp_path, LLAMA, pack_gptq, gptq_config())
    checkpoint = open_checkpoint(folder)
    family = find_family({**LLAMA, "intermediate_size": 128})
    with pytest.raises(CheckpointError, match=r"wrong shape: model.layers.0.mlp.down_proj.weight is \[64, 96\]"):
        check_weights(family, family.parse_config({**LLAMA, "intermediate_size": 128}), checkpoint)
