"""A checkpoint folder is checked before use: what is wrong is named, nothing is unpickled, values arrive exactly."""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from graphs.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, load_tensor, open_checkpoint, read_header
from graphs.errors import CheckpointError
from graphs.families import find_family
from graphs.loading import check_weights, expected_shapes, load_decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
}
LAYER = {
    "input_layernorm": [8],
    "post_attention_layernorm": [8],
    "self_attn.q_proj": [12, 8],
    "self_attn.k_proj": [6, 8],
    "self_attn.v_proj": [6, 8],
    "self_attn.o_proj": [8, 12],
    "mlp.gate_proj": [10, 8],
    "mlp.up_proj": [10, 8],
    "mlp.down_proj": [8, 10],
}
# What Hugging Face calls the tensors of such a Llama, and their shapes: rows are outputs.
SHAPES: dict[str, list[int]] = {
    "model.embed_tokens.weight": [12, 8],
    "model.norm.weight": [8],
    "lm_head.weight": [12, 8],
    **{f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()},
}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights() if tensors is None else tensors, folder / SINGLE_FILE)
    return folder


def write_sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file_name, tensors in shards.items():
        save_file(tensors, folder / file_name)
    listed = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": listed if weight_map is None else weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def two_shards() -> dict[str, dict[str, Tensor]]:
    tensors = list(weights().items())
    return {
        "model-00001-of-00002.safetensors": dict(tensors[:9]),
        "model-00002-of-00002.safetensors": dict(tensors[9:]),
    }


def raw_file(path: Path, header: Any, data: bytes = b"", padding: bytes = b"") -> Path:
    """A safetensors file whose header is written as it is."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def check(checkpoint: Checkpoint) -> None:
    family = find_family(checkpoint.config)
    check_weights(family, family.parse_config(checkpoint.config), checkpoint)


def problems(folder: Path) -> list[str]:
    """The lines of the one message that check_weights gives, after its first."""
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        check(checkpoint)
    first, *lines = str(caught.value).split("\n")
    assert first == f"{folder} does not hold the tensors that its config.json describes:"
    return [line.removeprefix("  ") for line in lines]


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


# --- the folder --------------------------------------------------------------------------------------------------


def test_a_good_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path))
    assert checkpoint.config == CONFIG
    assert {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()} == SHAPES
    elements = sum(tensor.numel() for tensor in weights().values())
    assert checkpoint.nbytes == 4 * elements
    assert checkpoint.dtype == "F32"
    assert checkpoint.parameter_count(SHAPES) == elements
    assert checkpoint.parameter_count(["model.norm.weight", "model.norm.weight"]) == 8
    check(checkpoint)


def test_expected_shapes_are_hugging_faces() -> None:
    family = find_family(CONFIG)
    found = expected_shapes(family, family.parse_config(CONFIG))
    assert {name: list(shape) for name, shape in found.items()} == SHAPES


def test_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    """Norms are often kept in float32 beside bfloat16 weights; they are many, but small."""
    tensors = {f"norm.{i}": torch.ones(2) for i in range(5)} | {"weight": torch.ones(100, dtype=torch.bfloat16)}
    assert open_checkpoint(write(tmp_path, tensors)).dtype == "BF16"
    assert open_checkpoint(write(tmp_path, {**tensors, "norm.5": torch.ones(100)})).dtype == "F32"


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path / "absent", r"absent does not exist: pass the folder that holds config\.json and model\.safetensors"
    )


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path)
    refused(tmp_path / SINGLE_FILE, r"model\.safetensors is a file: pass the folder that holds config\.json")


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, r"is not a checkpoint: it holds no config\.json")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (write(tmp_path) / SINGLE_FILE).unlink()
    refused(tmp_path, r"holds neither model\.safetensors nor model\.safetensors\.index\.json$")


class Bomb:
    """Unpickling this writes a file: proof that somebody unpickled it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(name: str, tmp_path: Path) -> None:
    """Alone they are refused with a hint, beside safetensors they are ignored."""
    proof = tmp_path / "proof"
    folder = write(tmp_path / "checkpoint")
    with (folder / name).open("wb") as file:
        pickle.dump(Bomb(proof), file)
    check(open_checkpoint(folder))
    load_decoder(find_family(CONFIG), find_family(CONFIG).parse_config(CONFIG), open_checkpoint(folder))
    (folder / SINGLE_FILE).unlink()
    refused(
        folder, rf"\({re.escape(name)} would have to be unpickled, which is never done: convert it to safetensors\)"
    )
    assert not proof.exists()
    with (folder / name).open("rb") as file:
        pickle.load(file)
    assert proof.exists()  # the bomb works


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    (folder / SINGLE_FILE).write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    refused(folder, r"model\.safetensors is damaged or not a safetensors file")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}"], ids=["cut", "list", "deep"]
)
def test_a_broken_config_is_refused(content: str, tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").write_text(content)
    refused(tmp_path, r"config\.json (cannot be read as JSON|holds a list, expected a JSON object)")


# --- one file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -1, -4, -1000])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    """Cut anywhere: in the length, in the header, in the data."""
    path = write(tmp_path) / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, r"model\.safetensors is damaged or not a safetensors file \(truncated download\?\): ")


def test_a_file_with_bytes_to_spare_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / SINGLE_FILE
    path.write_bytes(path.read_bytes() + b"\0")
    refused(tmp_path, r"model\.safetensors is damaged")


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": entry(shape=(3,))}, id="shape larger than the bytes"),
        pytest.param({"a": entry(shape=(1,))}, id="shape smaller than the bytes"),
        pytest.param({"a": entry(dtype="F16")}, id="dtype of another size"),
        pytest.param({"a": entry(dtype="F33")}, id="unknown dtype"),
        pytest.param({"a": entry(offsets=(0, 16))}, id="end beyond the file"),
        pytest.param({"a": entry(offsets=(8, 0))}, id="end before the start"),
        pytest.param({"a": entry(offsets=(-8, 0))}, id="negative offset"),
        pytest.param({"a": entry(offsets=(2**63, 2**63 + 8))}, id="offset of 64 bits"),
        pytest.param({"a": entry(offsets=(0,))}, id="one offset"),
        pytest.param({"a": entry(shape=(-2,))}, id="negative shape"),
        pytest.param({"a": entry(shape=(2**62, 4))}, id="shape that overflows"),
        pytest.param({"a": entry(), "b": entry()}, id="overlap"),
        pytest.param({"a": entry(shape=(1,), offsets=(4, 8))}, id="hole"),
        pytest.param({"a": {"dtype": "F32"}}, id="no shape"),
        pytest.param({"a": 1}, id="number for an entry"),
        pytest.param({"__metadata__": [1], "a": entry()}, id="metadata that is a list"),
        pytest.param([], id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"\xff": 1}', id="not utf-8"),
        pytest.param(b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", id="deep"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, tmp_path: Path) -> None:
    write(tmp_path)
    raw_file(tmp_path / SINGLE_FILE, header, bytes(8))
    refused(tmp_path, r"model\.safetensors is damaged or not a safetensors file")


@pytest.mark.parametrize("length", [10**6, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    refused(tmp_path, r"model\.safetensors is damaged")


@pytest.mark.parametrize(
    "content", [b"hello, this is not a checkpoint", b"\x00" * 64, b"PK\x03\x04" + bytes(60), bytes(range(256)) * 4]
)
def test_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (write(tmp_path) / SINGLE_FILE).write_bytes(content)
    refused(tmp_path, r"model\.safetensors is damaged or not a safetensors file")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (write(tmp_path) / SINGLE_FILE).unlink()
    (tmp_path / SINGLE_FILE).mkdir()
    refused(tmp_path, r"model\.safetensors is damaged")


@pytest.mark.parametrize("position", range(0, 260, 13))
def test_a_flipped_byte_of_the_header_is_noticed_or_harmless(position: int, tmp_path: Path) -> None:
    """Whatever one wrong byte makes of the header: an error, a problem named, or a tensor of the right size."""
    path = write(tmp_path) / SINGLE_FILE
    content = bytearray(path.read_bytes())
    for value in (0x00, ord("0"), ord('"'), ord("9"), 0xFF):
        path.write_bytes(bytes(content[:position]) + bytes([value]) + bytes(content[position + 1 :]))
        try:
            checkpoint = open_checkpoint(tmp_path)
            check(checkpoint)
        except CheckpointError:
            continue
        for tensor in checkpoint.tensors.values():
            assert load_tensor(tensor).shape == tensor.shape


# --- shards ------------------------------------------------------------------------------------------------------


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sharded(tmp_path, two_shards()))
    check(checkpoint)
    for name, tensor in weights().items():
        assert torch.equal(load_tensor(checkpoint.tensors[name]), tensor)
    assert len({tensor.path.name for tensor in checkpoint.tensors.values()}) == 2


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path, two_shards()) / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"lacks 1 of the shards that its index lists: model-00002-of-00002\.safetensors$")


def test_many_missing_shards_are_counted(tmp_path: Path) -> None:
    weight_map = {name: f"model-{i:05}.safetensors" for i, name in enumerate(SHAPES)}
    write_sharded(tmp_path, {}, weight_map)
    refused(
        tmp_path, rf"lacks {len(SHAPES)} of the shards .*: model-00000\.safetensors, .* and {len(SHAPES) - 8} more$"
    )


def test_a_folder_in_the_place_of_a_shard_is_a_missing_shard(tmp_path: Path) -> None:
    path = write_sharded(tmp_path, two_shards()) / "model-00002-of-00002.safetensors"
    path.unlink()
    path.mkdir()
    refused(tmp_path, r"lacks 1 of the shards that its index lists: model-00002")


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    path = write_sharded(tmp_path, two_shards()) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, r"model-00002-of-00002\.safetensors is damaged or not a safetensors file")


@pytest.mark.parametrize(
    "file_name", ["{outside}", "../outside.safetensors", "sub/x.safetensors", "./x", "", ".", "..", 3]
)
def test_index_may_not_point_outside_the_folder(file_name: Any, tmp_path: Path) -> None:
    """Not even to a file that exists and would fit."""
    outside = tmp_path / "outside.safetensors"
    save_file(weights(), outside)
    folder = tmp_path / "checkpoint"
    file_name = str(outside) if file_name == "{outside}" else file_name
    (folder / "sub").mkdir(parents=True)
    save_file(weights(), folder / "sub" / "x.safetensors")
    save_file(weights(), folder / "x")
    write_sharded(folder, {}, dict.fromkeys(SHAPES, file_name))
    message = (
        f"model.embed_tokens.weight points outside the checkpoint folder ({file_name!r}); expected a plain file name"
    )
    refused(folder, re.escape(message))


def test_index_with_lists_for_names_is_refused(tmp_path: Path) -> None:
    """As deep as the parser lets pass: the message must be able to quote it."""
    folder = write_sharded(tmp_path, two_shards())
    for depth in range(700, 1000):
        (folder / INDEX_FILE).write_text('{"weight_map": {"a": ' + "[" * depth + "]" * depth + "}}")
        refused(folder, r"a points outside the checkpoint folder|cannot be read as JSON")


@pytest.mark.parametrize("file_name", ["x" * 300, "x\0y", "\ud800", "a\nb", "config.json"])
def test_index_with_a_name_that_no_shard_has(file_name: str, tmp_path: Path) -> None:
    """Names too long for the file system, with zero bytes, that are no Unicode, or of another kind of file."""
    write_sharded(tmp_path, {}, {"model.norm.weight": file_name})
    refused(tmp_path, r"lacks 1 of the shards that its index lists: |config\.json is damaged or not a safetensors file")


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_index_without_weight_map_is_refused(weight_map: Any, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, two_shards())
    message = r"index\.json: weight_map must be an object that names the file of each tensor"
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, message)
    (folder / INDEX_FILE).write_text("{}")
    refused(folder, message)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "holds a list, expected")])
def test_broken_index_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (write_sharded(tmp_path, two_shards()) / INDEX_FILE).write_text(content)
    refused(tmp_path, rf"model\.safetensors\.index\.json {message}")


def test_index_that_lists_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    shards = two_shards()
    del shards["model-00001-of-00002.safetensors"]["model.norm.weight"]
    first = dict.fromkeys(shards["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors")
    second = dict.fromkeys(shards["model-00002-of-00002.safetensors"], "model-00002-of-00002.safetensors")
    message = r"index\.json lists tensors that their shard does not hold: model\.norm\.weight$"
    absent = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    refused(write_sharded(tmp_path, shards, {**first, **second, **absent}), message)
    shards["model-00002-of-00002.safetensors"]["model.norm.weight"] = torch.zeros(8)  # in the other shard
    refused(write_sharded(tmp_path, shards, {**first, **second, **absent}), message)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = two_shards()
    weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
    shards["model-00002-of-00002.safetensors"]["model.norm.weight"] = torch.zeros(8)
    write_sharded(tmp_path, shards, weight_map)
    refused(
        tmp_path,
        r"model-00001-of-00002\.safetensors and model-00002-of-00002\.safetensors both hold model\.norm\.weight$",
    )


# --- the tensors -------------------------------------------------------------------------------------------------


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    """One message, with what was found and what was expected of each."""
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6)
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(8)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(12, 8)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(10, 8)
    tensors["lm_head.weight"] = torch.ones(12, 8, dtype=torch.int8)
    tensors["model.embed_tokens.weight"] = torch.ones(8, 12, dtype=torch.float64)
    assert problems(write(tmp_path, tensors)) == [
        "missing: model.layers.1.mlp.up_proj.weight [10, 8]",
        "missing: model.norm.weight [8]",
        "unexpected: model.layers.0.self_attn.q_norm.weight [6]",
        "unexpected: model.layers.2.input_layernorm.weight [8]",
        "wrong dtype: lm_head.weight is I8, expected one of F32, F16, BF16",
        "wrong shape: model.embed_tokens.weight is [8, 12], expected [12, 8]",
        "wrong dtype: model.embed_tokens.weight is F64, expected one of F32, F16, BF16",
        "wrong shape: model.layers.0.mlp.down_proj.weight is [10, 8], expected [8, 10]",
        "wrong shape: model.layers.0.self_attn.k_proj.weight is [12, 8], expected [6, 8]",
    ]


def test_load_decoder_checks_first(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"model.norm.weight": torch.ones(8)}))
    family = find_family(CONFIG)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight \[12, 8\]"):
        load_decoder(family, family.parse_config(CONFIG), checkpoint)


def test_biases_are_expected_when_config_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, None, attention_bias=True, mlp_bias=True)
    expected = [
        f"missing: model.layers.{i}.{name}.bias [{shape[0]}]"
        for i in range(2)
        for name, shape in sorted(LAYER.items())
        if "norm" not in name
    ]
    assert problems(folder) == expected


def test_biases_are_refused_when_config_does_not_say_so(tmp_path: Path) -> None:
    """A bias that is not used would change the numbers in silence."""
    tensors = {**weights(), "model.layers.1.self_attn.q_proj.bias": torch.ones(12)}
    assert problems(write(tmp_path, tensors)) == ["unexpected: model.layers.1.self_attn.q_proj.bias [12]"]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_tables_are_ignored(name: str, tmp_path: Path) -> None:
    check(open_checkpoint(write(tmp_path, {**weights(), name: torch.ones(3)})))


def test_tied_head_may_be_absent_or_equal(tmp_path: Path) -> None:
    tensors = weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    check(open_checkpoint(write(tmp_path, tensors, tie_word_embeddings=True)))
    del tensors["lm_head.weight"]
    check(open_checkpoint(write(tmp_path, tensors, tie_word_embeddings=True)))
    assert problems(write(tmp_path, tensors, tie_word_embeddings=False)) == ["missing: lm_head.weight [12, 8]"]


@pytest.mark.parametrize("change", ["last value", "dtype", "shape", "same bytes, dtype", "same bytes, shape"])
def test_tied_head_that_differs_is_refused(change: str, tmp_path: Path) -> None:
    """config.json and the tensors contradict each other; the message says how to decide."""
    tensors = weights()
    head = tensors["model.embed_tokens.weight"].clone()
    if change == "last value":
        head[-1, -1] += 1e-6
    others = {
        "dtype": head.to(torch.float16),
        "shape": head[:-1],
        "same bytes, dtype": head.view(torch.int32),
        "same bytes, shape": head.reshape(8, 12),
    }
    tensors["lm_head.weight"] = others.get(change, head)
    assert problems(write(tmp_path, tensors, tie_word_embeddings=True)) == [
        "contradiction: config.json ties lm_head.weight to model.embed_tokens.weight, but they differ:"
        " set tie_word_embeddings to false to use lm_head.weight, or remove it"
    ]


def test_tied_head_in_another_shard(tmp_path: Path) -> None:
    shards = two_shards()
    shards["model-00003.safetensors"] = {"lm_head.weight": weights()["model.embed_tokens.weight"]}
    del shards["model-00001-of-00002.safetensors"]["lm_head.weight"]
    folder = write_sharded(tmp_path, shards)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    check(open_checkpoint(folder))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_arrive_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also infinities, NaN with a payload, subnormal numbers and negative zero."""
    bits = np.random.default_rng(0).integers(0, 256, 24 * 4, dtype=np.uint8)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-42, 6e-8, 1.0, -2.5]).to(dtype)
    tensors = {
        "random": torch.from_numpy(bits).view(dtype).reshape(-1, 4),
        "special": special,
        "scalar": special[7].clone(),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    for name, expected in tensors.items():
        found = load_tensor(header[name])
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_values_by_hand(tmp_path: Path) -> None:
    """Little-endian: 1.0 is 0x3f800000 in float32, 0x3c00 in float16, 0x3f80 in bfloat16."""
    header = {
        "f32": entry("F32", (2,), (0, 8)),
        "f16": entry("F16", (1, 2), (8, 12)),
        "bf16": entry("BF16", (2, 1), (12, 16)),
    }
    data = struct.pack("<2f", 1.0, -2.5) + struct.pack("<2H", 0x3C00, 0xC100) + struct.pack("<2H", 0x3F80, 0xC020)
    tensors = read_header(raw_file(tmp_path / "x.safetensors", header, data))
    assert load_tensor(tensors["f32"]).tolist() == [1.0, -2.5]
    assert load_tensor(tensors["f16"]).tolist() == [[1.0, -2.5]]
    assert load_tensor(tensors["bf16"]).tolist() == [[1.0], [-2.5]]


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unaligned_data_loads_right(dtype: torch.dtype, padding: int, tmp_path: Path) -> None:
    """A header of any length: the data may start at any address."""
    expected = torch.arange(6).to(dtype).reshape(2, 3)
    content = save({"x": expected})
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    stored = read_header(raw_file(tmp_path / "x.safetensors", header, data, b" " * padding))["x"]
    assert stored.offset == 8 + len(header) + padding
    found = load_tensor(stored)
    assert found.data_ptr() % found.element_size() == 0  # some kernels need aligned data
    assert torch.equal(found, expected)
    assert torch.equal(found @ found.T, expected @ expected.T)


def test_metadata_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 4), "one": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = read_header(tmp_path / "x.safetensors")
    assert set(tensors) == {"none", "one"}
    assert load_tensor(tensors["none"]).shape == (0, 4)
    assert load_tensor(tensors["one"]).tolist() == [1.0]


@pytest.mark.parametrize("sharded", [False, True])
def test_symlinked_weights_load(sharded: bool, tmp_path: Path) -> None:
    """The Hugging Face cache is made of links to ../../blobs/<hash>."""
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    write_sharded(folder, two_shards()) if sharded else write(folder)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / f"{i:064x}")
        path.symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    checkpoint = open_checkpoint(folder)
    family = find_family(checkpoint.config)
    decoder = load_decoder(family, family.parse_config(checkpoint.config), checkpoint)
    assert torch.equal(decoder.layers[1].mlp.w2.weight, weights()["model.layers.1.mlp.down_proj.weight"])


def test_a_link_to_nowhere_is_a_missing_shard(tmp_path: Path) -> None:
    path = write_sharded(tmp_path, two_shards()) / "model-00002-of-00002.safetensors"
    path.unlink()
    path.symlink_to("nowhere")
    refused(tmp_path, r"lacks 1 of the shards that its index lists: model-00002-of-00002\.safetensors$")


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    """Mapped copy on write, and writable without a warning."""
    path = write(tmp_path) / SINGLE_FILE
    before = path.read_bytes()
    tensor = load_tensor(open_checkpoint(tmp_path).tensors["model.norm.weight"])
    tensor.add_(1)
    assert torch.equal(tensor, weights()["model.norm.weight"] + 1)
    assert path.read_bytes() == before
    assert torch.equal(
        load_tensor(open_checkpoint(tmp_path).tensors["model.norm.weight"]), weights()["model.norm.weight"]
    )


def test_every_parameter_gets_its_own_tensor(tmp_path: Path) -> None:
    """All names of a layer, spelled out: gate, down and up are w1, w2 and w3."""
    checkpoint = open_checkpoint(write(tmp_path))
    family = find_family(CONFIG)
    decoder = load_decoder(family, family.parse_config(CONFIG), checkpoint)
    theirs = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for i in range(2):
        ours, hf = f"layers.{i}", f"model.layers.{i}"
        theirs |= {
            f"{ours}.sa_norm.scale": f"{hf}.input_layernorm.weight",
            f"{ours}.mlp_norm.scale": f"{hf}.post_attention_layernorm.weight",
            f"{ours}.attn.q_proj.weight": f"{hf}.self_attn.q_proj.weight",
            f"{ours}.attn.k_proj.weight": f"{hf}.self_attn.k_proj.weight",
            f"{ours}.attn.v_proj.weight": f"{hf}.self_attn.v_proj.weight",
            f"{ours}.attn.output_proj.weight": f"{hf}.self_attn.o_proj.weight",
            f"{ours}.mlp.w1.weight": f"{hf}.mlp.gate_proj.weight",
            f"{ours}.mlp.w2.weight": f"{hf}.mlp.down_proj.weight",
            f"{ours}.mlp.w3.weight": f"{hf}.mlp.up_proj.weight",
        }
    parameters, stored = dict(decoder.named_parameters()), weights()
    assert set(parameters) == set(theirs)
    for ours, name in theirs.items():
        assert torch.equal(parameters[ours], stored[name]), ours
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert all(tensor.device.type == "cpu" for tensor in [*parameters.values(), *decoder.buffers()])
