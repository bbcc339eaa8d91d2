"""--layout genai and --layout dynamic in onnxruntime-genai."""

from collections.abc import Callable

import pytest
from client_cases import TEXTS, TRAINED_CASES, Batched, Drive, assert_same_ids, assert_same_texts

from runtimes.artifact import Artifact

Exported = Callable[..., Artifact]
LAYOUTS = ("genai", "dynamic")
PRECISIONS = ("fp32", "fp16", "int4")
# Its tokenizer knows the spaces of byte-level and SentencePiece vocabularies. tiny_llama's is neither: ids are given.
READABLE = TEXTS | {"tiny_llama": [text for text in TEXTS["tiny_llama"] if " " not in text]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", READABLE)
def test_texts(genai: Drive, exported: Exported, model: str, layout: str) -> None:
    assert_same_texts(genai, exported(model, layout, "fp32"), model, READABLE[model])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids(genai: Drive, exported: Exported, precision: str, layout: str) -> None:
    artifact = exported("tiny_llama", layout, precision)
    assert_same_ids(genai, artifact, "tiny_llama")


@pytest.mark.parametrize(("precision", "in_float32", "batched"), TRAINED_CASES)
def test_ids_of_a_trained_model(
    genai: Drive, exported: Exported, precision: str, in_float32: bool, batched: Batched
) -> None:
    artifact = exported("stories15m-llama", "dynamic", precision)
    assert_same_ids(genai, artifact, "stories15m-llama", batched, in_float32=in_float32)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_ids_of_a_trained_model_from_fused_operators(genai: Drive, exported: Exported, precision: str) -> None:
    artifact = exported("stories15m-llama", "genai", precision)
    assert_same_ids(genai, artifact, "stories15m-llama")
