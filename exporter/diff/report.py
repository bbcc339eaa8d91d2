"""What a comparison found, as data."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

MOST_WEIGHTS = 2  # that a sentence names: experts have dozens


@dataclass(frozen=True, kw_only=True)
class Row:
    """One value of a graph. Errors are absolute, and the largest of all numbers.

    `error` is what has added up since the inputs; `own_error` is what the operator itself adds: the distance from what
    it should make of the very inputs that it was given.
    """

    graph: str
    layer: str  # "layer 3", or the module outside of layers; "" outside of any
    module: str
    operator: str  # of ONNX
    computes: str  # what it is in the model: linear, attention, experts; "" where that is not known
    node: str
    value: str
    weights: tuple[str, ...]
    behind: tuple[str, ...]
    error: float
    limit: float
    own_error: float
    own_limit: float
    magnitude: float  # largest absolute number of the value itself
    passed: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One runtime against the reference; rows are in the order of execution."""

    runtime: str
    reference: str
    computes_in: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row | None:
        """The first divergence."""
        return next((row for row in self.rows if not row.passed), None)

    def sentence(self) -> str:
        """The finding in words."""
        first = self.first
        if first is None:
            return f"no divergence on {self.runtime}: {len(self.rows)} values are within their limits"
        where = first.module or first.layer or "outside of any module"
        graph = "" if first.graph == "decoder" else f" of the {first.graph.replace('_', ' ')}"
        computes = f" ({first.computes})" if first.computes and first.computes != first.operator.lower() else ""
        node = f"node {first.node}" if first.node else "no single node"
        return (
            f"first divergence on {self.runtime}: {where}{graph}, operator {first.operator}{computes} ({node}"
            f"{_weights(first)}): its own error is {first.own_error:.1e}, limit {first.own_limit:.1e}"
            + (f"; {first.note}" if first.note else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        first = self.first
        rows = [{key: _plain(value) for key, value in dataclasses.asdict(row).items()} for row in self.rows]
        return {
            "runtime": self.runtime,
            "reference": self.reference,
            "computes_in": self.computes_in,
            "passed": first is None,
            "sentence": self.sentence(),
            "first": None if first is None else rows[self.rows.index(first)],
            "rows": rows,
        }


@dataclass(frozen=True, kw_only=True)
class DiffReport:
    """All comparisons of an artifact, the most exact one first."""

    artifact: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """True when nothing diverges anywhere."""
        return all(comparison.first is None for comparison in self.comparisons)

    @property
    def first(self) -> Row | None:
        """The first divergence of the most exact comparison that has one."""
        return next((each.first for each in self.comparisons if each.first is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "artifact": self.artifact,
            "passed": self.passed,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


def _weights(row: Row) -> str:
    """The first weights that it reads."""
    more = len(row.weights) - MOST_WEIGHTS
    names = " and ".join(row.weights[:MOST_WEIGHTS]) + (f" and {more} more" if more > 0 else "")
    return f", weight {names}" if names else ""


def layer_of(module: str) -> str:
    """`layers.3.attn.q_proj` is in "layer 3"; outside of layers, the module itself."""
    parts = module.split(".")
    index = next((at for at, part in enumerate(parts[:-1]) if part == "layers" and parts[at + 1].isdigit()), None)
    if index is None:
        return module
    before = ".".join(parts[:index])
    return f"{before} layer {parts[index + 1]}".strip()


def _plain(value: Any) -> Any:
    """JSON has no infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
