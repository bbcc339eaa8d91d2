"""--layout dynamic in Optimum."""

from collections.abc import Callable

import pytest
from client_cases import TEXTS, TRAINED_CASES, Batched, Drive, assert_same_ids, assert_same_texts

from runtimes.artifact import Artifact

Exported = Callable[..., Artifact]
PRECISIONS = ("fp32", "fp16", "int4")


@pytest.mark.parametrize("model", TEXTS)
def test_texts(optimum: Drive, exported: Exported, model: str) -> None:
    assert_same_texts(optimum, exported(model, "dynamic", "fp32"), model, TEXTS[model])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids(optimum: Drive, exported: Exported, precision: str) -> None:
    artifact = exported("tiny_llama", "dynamic", precision)
    assert_same_ids(optimum, artifact, "tiny_llama")


@pytest.mark.parametrize(("precision", "in_float32", "batched"), TRAINED_CASES)
def test_ids_of_a_trained_model(
    optimum: Drive, exported: Exported, precision: str, in_float32: bool, batched: Batched
) -> None:
    artifact = exported("stories15m-llama", "dynamic", precision)
    assert_same_ids(optimum, artifact, "stories15m-llama", batched, in_float32=in_float32)
