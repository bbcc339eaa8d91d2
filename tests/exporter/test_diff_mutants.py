"""Diff names the layer of mutants: a handful of other families than tiny_llama; all of them in diff_mutants.py."""

from pathlib import Path

import diff_mutants
import pytest

from tests.mutants.catalog import MUTANTS
from tests.mutants.subjects import Workshop

NAMES = (
    "softcap of attention missing",
    "long rope begins a token late",
    "one layer without its window",
    "one expert's output taken for another's",
    "two experts stored under each other's name",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Makes each artifact once."""
    return Workshop(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_of_a_mutant_is_named(name: str, workshop: Workshop, tmp_path: Path) -> None:
    """In the graph, or in the weights."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    row = diff_mutants.first_divergence(mutant, workshop, tmp_path / "mutant")
    assert diff_mutants.names_layer(mutant, row), row
    assert not diff_mutants.names_layer(mutant, None)
