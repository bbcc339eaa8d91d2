"""Our own runner generates the same ids from every layout."""

from collections.abc import Callable

import pytest
from client_cases import our_ids, prompt_ids, together

from runtimes.artifact import Artifact

CASES = [
    ("tiny_llama", "fp32"),
    ("tiny_llama", "fp16"),
    ("tiny_llama", "int4"),
    ("stories15m-llama", "fp32"),
    ("stories15m-llama", "int4"),
]


@pytest.mark.parametrize("layout", ["dynamic", "genai"])
@pytest.mark.parametrize(("model", "precision"), CASES)
def test_ids(exported: Callable[..., Artifact], model: str, precision: str, layout: str) -> None:
    """Weights of 4 bits are multiplied in float32, so that the operators' order of sums does not show."""
    artifact, portable = exported(model, layout, precision), exported(model, "portable", precision)
    batch = together(prompt_ids(artifact, model))
    ours, theirs = (our_ids(each, batch, in_float32=precision == "int4") for each in (artifact, portable))
    assert ours == theirs
