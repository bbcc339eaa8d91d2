"""Does diff name the layer of every mutant? By the artifact's own weights, or, where those are wrong, the checkpoint's.

PYTHONPATH=.:tests python tests/exporter/diff_mutants.py    # some minutes: one line for each, then the count
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from exporter.diff.report import Row
from exporter.diff.run import diff_artifact
from tests.mutants.catalog import MUTANTS
from tests.mutants.inject import inject
from tests.mutants.mutant import Mutant
from tests.mutants.subjects import Workshop

KINDS = ("graph", "weights")  # a runner's fault is in no operator


def first_divergence(mutant: Mutant, workshop: Workshop, folder: Path) -> Row | None:
    """What diff names; `folder` is made for the mutant and removed again."""
    artifact = inject(mutant, workshop.artifact(mutant.artifact), folder)
    against = workshop.reference(mutant.artifact) if mutant.kind == "weights" else None
    try:
        return diff_artifact(artifact, against).first
    finally:
        shutil.rmtree(folder)


def names_layer(mutant: Mutant, row: Row | None) -> bool:
    """Whether it is the mutant's layer, in its graph; of a fault outside of layers, any place outside of them."""
    if row is None or row.graph != mutant.graph:
        return False
    number = re.search(r"layer (\d+)$", row.layer)
    return (None if number is None else int(number[1])) == mutant.layer


def count(mutants: Iterable[Mutant], folder: Path, report: Callable[[str], None]) -> tuple[int, int]:
    """(how often it was the right layer, of how many)."""
    workshop, right, total = Workshop(folder), 0, 0
    for mutant in mutants:
        row = first_divergence(mutant, workshop, folder / "mutant")
        named = names_layer(mutant, row)
        right, total = right + named, total + 1
        found = "nothing" if row is None else f"{row.layer or row.graph}: {row.node or row.operator}"
        report(f"{'ok   ' if named else 'WRONG'} {mutant.artifact}: {mutant.name} ({mutant.where}): {found}")
    return right, total


if __name__ == "__main__":
    wanted = [mutant for mutant in MUTANTS if mutant.kind in KINDS]
    with tempfile.TemporaryDirectory() as scratch:
        hits, tried = count(wanted, Path(scratch), lambda line: print(line, flush=True))
    print(f"diff named the right layer for {hits} of {tried} mutants in graphs and weights")
    sys.exit(hits != tried)
