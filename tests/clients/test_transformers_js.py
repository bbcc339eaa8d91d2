"""--layout dynamic --client transformers-js in transformers.js under Node.js."""

import json
from collections.abc import Callable

import onnx
import pytest
from client_cases import (
    TEXTS,
    TRAINED_CASES,
    Batched,
    Drive,
    assert_same_ids,
    assert_same_texts,
    our_ids,
    together,
)

from runtimes.artifact import Artifact
from runtimes.generation import read_stop_ids
from runtimes.tokenizer import Tokenizer

Exported = Callable[..., Artifact]
CLIENT = "transformers-js"
# {precision: (its name there, the graph's file)}
DTYPES = {
    "fp32": ("fp32", "model.onnx"),
    "fp16": ("fp16", "model_fp16.onnx"),
    "int8": ("int8", "model_int8.onnx"),
    "int4": ("q4", "model_q4.onnx"),
}


@pytest.mark.parametrize("model", TEXTS)
def test_texts(transformers_js: Drive, exported: Exported, model: str) -> None:
    artifact = exported(model, "dynamic", "fp32", client=CLIENT)
    answer = assert_same_texts(transformers_js, artifact, model, TEXTS[model], dtype="fp32")
    tokenizer = Tokenizer(artifact.folder)
    rows = [tokenizer.encode(text) for text in TEXTS[model]]
    (ours,) = our_ids(artifact, together(rows), stop_ids=read_stop_ids(artifact.folder))
    assert answer["continued"] == [tokenizer.decode(row + new) for row, new in zip(rows, ours, strict=True)]


@pytest.mark.parametrize("precision", DTYPES)
def test_ids(transformers_js: Drive, exported: Exported, precision: str) -> None:
    artifact = exported("tiny_llama", "dynamic", precision, client=CLIENT)
    assert_same_ids(transformers_js, artifact, "tiny_llama", dtype=DTYPES[precision][0])


@pytest.mark.parametrize(("precision", "in_float32", "batched"), TRAINED_CASES)
def test_ids_of_a_trained_model(
    transformers_js: Drive, exported: Exported, precision: str, in_float32: bool, batched: Batched
) -> None:
    artifact = exported("stories15m-llama", "dynamic", precision, client=CLIENT)
    dtype = DTYPES[precision][0]
    assert_same_ids(transformers_js, artifact, "stories15m-llama", batched, in_float32=in_float32, dtype=dtype)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_browser_finds_the_weights(exported: Exported, precision: str) -> None:
    """Node.js opens whatever file the graph names; a browser fetches what config.json announces, under these names."""
    artifact = exported("tiny_llama", "dynamic", precision, client=CLIENT)
    name = DTYPES[precision][1]
    assert sorted(path.name for path in (artifact.folder / "onnx").iterdir()) == [name, f"{name}_data"]
    graph = onnx.load(artifact.folder / "onnx" / name, load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    assert {entry.value for entry in entries if entry.key == "location"} == {f"{name}_data"}
    config = json.loads((artifact.folder / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {name: 1}
