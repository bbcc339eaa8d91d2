"""A part of the mutation suite, for every run of the tests; `make mutants` is all of it."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exporter.verify import verify_artifact
from runtimes.verification import artifact_targets
from tests.mutants.__main__ import passed, score, table
from tests.mutants.catalog import MUTANTS
from tests.mutants.false_alarms import Good, Verified, all_good
from tests.mutants.gate import Gate, Verdict, make_gate
from tests.mutants.inject import Stored
from tests.mutants.mutant import KINDS, Mutant
from tests.mutants.operators import operators_once
from tests.mutants.subjects import SUBJECTS, Workshop

# A graph, a vision model and quantized weights; of each, one mutant in six.
ARTIFACTS = ("llama-fp32", "llama-int4", "vision-fp32")
# What the gate did not catch at first.
MENDED = {
    "cache rows swapped on reorder",
    "pictures left behind on reorder",
    "rows sent where they should be fetched from, dynamic",
    "logits in bf16 before they are fp32, fp16",
}
SAMPLE = {mutant.name for mutant in [each for each in MUTANTS if each.artifact in ARTIFACTS][::6]}
CHOSEN = [mutant for mutant in MUTANTS if mutant.name in SAMPLE | MENDED]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with operators_once():
        yield make_gate(tmp_path_factory.mktemp("mutants"))


def test_the_catalog_is_broad() -> None:
    """At least 60 mutants of every kind, with names of their own, in every precision and layout that is a subject."""
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.artifact for mutant in MUTANTS} == SUBJECTS.keys()
    kinds = Counter(mutant.kind for mutant in MUTANTS)
    assert kinds.keys() == set(KINDS)
    assert min(kinds.values()) >= 15
    assert {mutant.graph for mutant in MUTANTS} == {"decoder", "vision_encoder"}


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, gate: Gate) -> None:
    """A smoke test lets it pass, and the gate does not."""
    verdict = gate.judge(mutant)
    assert verdict.counts, verdict.smoke
    assert verdict.caught


@pytest.mark.parametrize("artifact", ARTIFACTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_good_artifact_is_not(artifact: str, seed: int, gate: Gate) -> None:
    """What mutants are made of passes."""
    good = gate.workshop.artifact(artifact)
    reference = gate.workshop.reference(artifact)
    assert verify_artifact(good, artifact_targets(good, "cpu"), reference, seed=seed).passed


def test_a_smoke_test_sees_what_is_plain(gate: Gate) -> None:
    """A fault that anyone would see does not count as a mutant, and is not shown to the gate."""

    def spoil(stored: Stored) -> None:
        stored["model.norm.weight"][3] = np.nan

    plain = Mutant(name="x", kind="weights", artifact="llama-fp32", apply=spoil, layer=None, where="norm")
    verdict = gate.judge(plain)
    assert not verdict.counts
    assert "not finite" in verdict.smoke
    assert not verdict.caught


def test_what_is_no_fault_is_not_caught(gate: Gate) -> None:
    """A mutant that changes nothing is missed: a verdict is not a matter of having been copied."""
    nothing = Mutant(name="x", kind="graph", artifact="llama-fp32", apply=lambda model: None, layer=None, where="")
    verdict = gate.judge(nothing)
    assert verdict.counts
    assert verdict.same_text
    assert not verdict.caught


def test_a_mutant_leaves_the_good_artifact_as_it_was(gate: Gate) -> None:
    """Faults are put into copies."""
    good = gate.workshop.artifact("llama-fp32")
    before = {path.name: path.read_bytes() for path in good.folder.iterdir()}
    for kind in ("graph", "weights"):
        gate.judge(next(each for each in MUTANTS if each.artifact == "llama-fp32" and each.kind == kind))
    assert {path.name: path.read_bytes() for path in good.folder.iterdir()} == before


def test_the_score() -> None:
    """Both counts, and success only where both are full."""
    good = Verdict(mutant=MUTANTS[0], smoke="", same_text=True, failed=("prefill logits",))
    missed = dataclasses.replace(good, failed=())
    seen = dataclasses.replace(good, smoke="logits are not finite", failed=())
    quiet = Verified(Good("llama", "fp32", "portable"), 0, ())
    alarm = dataclasses.replace(quiet, failed=("prefill logits",))
    assert score([good, good], [quiet] * 1240) == "caught 2 of 2 (0 missed); false alarms 0 of 1,240 verifications"
    assert score([good, missed], [quiet, alarm]) == "caught 1 of 2 (1 missed); false alarms 1 of 2 verifications"
    assert passed([good], [quiet])
    assert not any((passed([missed], [quiet]), passed([seen], [quiet]), passed([good], [alarm])))
    assert table([good, missed]).splitlines()[1].split() == ["graph", "2", "1", "1", "2"]


def test_every_family_and_precision_is_watched() -> None:
    """Families that are added are watched for false alarms without being asked to."""
    from exporter.layouts import LAYOUTS
    from exporter.precision import AS_STORED, PRECISIONS
    from graphs.families import FAMILIES

    watched = {(each.family, each.precision) for each in all_good() if each.layout == "portable"}
    assert watched == {(family, each) for family in FAMILIES for each in PRECISIONS if each != AS_STORED}
    assert {(each.family, each.layout) for each in all_good()} == {
        (family, each) for family in FAMILIES for each in LAYOUTS
    }


def test_checkpoints_are_made_once(tmp_path: Path) -> None:
    """Artifacts of one checkpoint are compared with the same one."""
    workshop = Workshop(tmp_path)
    assert workshop.reference("outlier-fp16") == workshop.reference("outlier-fp16")
    assert workshop.reference("llama-fp32") == workshop.reference("llama-int8")
