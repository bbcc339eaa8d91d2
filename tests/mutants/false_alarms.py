"""Whether the gate cries wolf: artifacts that nobody touched, of every family, precision and layout, many seeds."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import mllama_cases
import test_families
from support import save

from exporter.errors import ExportError
from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export
from exporter.precision import AS_STORED, PRECISIONS
from exporter.verify import verify_artifact
from graphs.families import FAMILIES
from runtimes.artifact import Artifact, open_artifact
from runtimes.verification import artifact_targets

SEEDS = 20
LAYOUT_PRECISION = "fp32"  # in which layouts other than the default are tried
MAX_LENS = {"mllama": mllama_cases.MAX_LEN}


@dataclasses.dataclass(frozen=True)
class Good:
    """An artifact as it was exported."""

    family: str
    precision: str
    layout: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """One verification, and the rungs that failed."""

    good: Good
    seed: int
    failed: tuple[str, ...]


def all_good() -> list[Good]:
    """Every family in every precision, and in every layout."""
    precisions = [precision for precision in PRECISIONS if precision != AS_STORED]
    others = [layout for layout in LAYOUTS if layout != "portable"]
    found = [Good(family, precision, "portable") for family in FAMILIES for precision in precisions]
    return found + [Good(family, LAYOUT_PRECISION, layout) for family in FAMILIES for layout in others]


def export_good(good: Good, folder: Path) -> Artifact | None:
    """The artifact, not verified; None where the layout is not for this model."""
    checkpoint = folder / good.family
    if not checkpoint.exists():
        save(good.family, checkpoint)
    request = ExportRequest(
        checkpoint=checkpoint,
        out=folder / "artifact",
        precision=good.precision,
        layout=good.layout,
        max_len=MAX_LENS.get(good.family, test_families.MAX_LEN),
        verify=False,
    )
    try:
        export(request)
    except ExportError:
        return None
    return open_artifact(request.out)


def verify_many(goods: list[Good], seeds: range, folder: Path) -> Iterator[Verified]:
    """Each artifact with each seed, compared with its checkpoint."""
    for good in goods:
        artifact = export_good(good, folder)
        if artifact is None:
            continue
        for seed in seeds:
            summary = verify_artifact(artifact, artifact_targets(artifact, "cpu"), folder / good.family, seed=seed)
            rungs = (rung for report in summary.reports for rung in report.rungs if not rung.passed)
            yield Verified(good, seed, tuple(rung.name for rung in rungs))
        shutil.rmtree(artifact.folder)
