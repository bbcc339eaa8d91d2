"""--precision: what it may say, what it means, and what is refused."""

from pathlib import Path

import pytest

from exporter.errors import ExportError
from exporter.precision import FLOAT_TYPES, PRECISIONS, Precision, find_precision, fit_block
from graphs.checkpoint import Checkpoint, StoredTensor, TensorRef
from graphs.quantization import GRIDS, WeightFormat


def stored_in(dtype: str) -> Checkpoint:
    tensor = StoredTensor(name="t", dtype=dtype, shape=(2, 2), path=Path("none"), offset=0, nbytes=16)
    return Checkpoint(folder=Path("none"), config={}, tensors={"t": tensor})


def parse(text: str | None, dtype: str = "F32") -> Precision:
    return find_precision(text, stored_in(dtype))


@pytest.mark.parametrize(("dtype", "name"), [("F32", "fp32"), ("F16", "fp16"), ("BF16", "bf16")])
def test_without_one_it_is_as_the_checkpoint_is_stored(dtype: str, name: str) -> None:
    assert parse(None, dtype).name == parse("stored", dtype).name == name
    assert parse(None, dtype).weights is None


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("stored", "compute"), [("F32", "float32"), ("F16", "float16"), ("BF16", "float16")])
def test_quantized_ones_compute_in_floats_that_every_runtime_has(name: str, stored: str, compute: str) -> None:
    assert parse(name, stored).dtype == compute
    assert parse(f"{name}:dtype=bf16", stored).dtype == "bfloat16"


def test_overrides_the_last_match_counts() -> None:
    precision = parse("int4:block=64,model.layers.*=int8,model.layers.0.*=fp16,lm_head=int4/128,embed=fp32")
    layer = "model.layers.{}.mlp.up_proj.weight"

    def choose(parameter: str, name: str, multiplies: bool = True) -> str:
        return str(getattr(precision.choose(parameter, TensorRef(name), multiplies=multiplies)[0], "name", None))

    assert choose("layers.0.mlp.w3.weight", layer.format(0)) == "fp16"
    assert choose("layers.1.mlp.w3.weight", layer.format(1)) == "int8"
    assert choose("layers.1.mlp_norm.scale", "model.layers.1.norm.weight", multiplies=False) == "fp32"
    assert choose("tok_embeddings.weight", "model.embed_tokens.weight", multiplies=False) == "fp32"
    head, asked = precision.choose("output.weight", TensorRef("lm_head.weight"), multiplies=True)
    assert (str(head), asked) == ("int4/128", True)
    assert str(precision.weights) == "int4/64"


def test_4_bits_leave_8_to_the_head_and_16_to_the_embedding() -> None:
    for name, head in (("int4", "int8"), ("nvfp4", "fp8"), ("int8", "int8"), ("fp8", "fp8")):
        choice, _ = parse(name).choose("output.weight", TensorRef("lm_head.weight"), multiplies=True)
        assert isinstance(choice, WeightFormat)
        assert choice.name == head
        embedding, _ = parse(name).choose("tok_embeddings.weight", TensorRef("e.weight"), multiplies=False)
        assert embedding == FLOAT_TYPES["fp16"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int3", ["precision 'int3' is not supported", *PRECISIONS]),
        ("int4:block=48", ["'block=48'", "block of int4 must be one of 16, 32, 64, 128, got '48'"]),
        ("int4:block=x", ["got 'x'"]),
        ("int4:block=-32", ["got '-32'"]),
        ("fp16:block=32", ["fp16 has no blocks"]),
        ("int4:size=32", ["unknown key 'size'", "block, dtype, embed, lm_head"]),
        ("int4:block", ["is not KEY=VALUE"]),
        ("int4:", []),
        ("int4:,", ["is not KEY=VALUE"]),
        ("int4:block=", ["is not KEY=VALUE"]),
        ("int4:block=32,block=64", ["given twice"]),
        ("int4:dtype=int8", ["dtype must be one of fp32, fp16, bf16"]),
        ("bf16:dtype=fp16", ["bf16 computes in bf16"]),
        ("int4:lm_head=q4", ["expected one of fp32, fp16, bf16, int8, int4, fp8, nvfp4"]),
        ("int4:lm_head=int4/31", ["block of int4 must be one of"]),
        ("int4:embed=int8", ["embeddings are looked up"]),
    ],
)
def test_what_is_wrong_is_named(text: str, words: list[str]) -> None:
    if not words:
        assert parse(text).weights == WeightFormat(name="int4", block=32)
        return
    with pytest.raises(ExportError) as error:
        parse(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("format", "inputs", "expected"),
    [
        ("int4/32", 288, "int4/32"),
        ("int4/64", 288, "int4/32"),
        ("int4/128", 1040, "int4/16"),
        ("int4/32", 588, "int8"),  # no block divides it: 588 = 4 * 147
        ("int8", 588, "int8"),
        ("int8/128", 192, "int8/64"),
        ("nvfp4/16", 588, "int8"),
        ("fp8", 588, "fp8"),
    ],
)
def test_blocks_divide_the_inputs(format: str, inputs: int, expected: str) -> None:
    name, _, block = format.partition("/")
    assert str(fit_block(WeightFormat(name=name, block=int(block or 0)), inputs)) == expected
