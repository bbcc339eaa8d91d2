"""A comparison as text: one line for each layer, and one for every operator that diverges."""

from collections.abc import Iterable

from exporter.diff.report import Comparison, Row

COLUMNS = ("layer", "worst operator", "own error", "limit", "added up", "limit", "")


def depth_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Lines of the table along the depth: of each layer, the operators that diverge, or else the one nearest to it."""
    layers: dict[tuple[str, str], list[Row]] = {}
    for row in comparison.rows:
        layers.setdefault((row.graph, row.layer), []).append(row)
    return [_line(row) for rows in layers.values() for row in _shown(rows)]


def _shown(rows: list[Row]) -> Iterable[Row]:
    return [row for row in rows if not row.passed] or [max(rows, key=nearness)]


def nearness(row: Row) -> float:
    """The operator's own error in units of its limit."""
    return row.own_error / row.own_limit if row.own_limit else float("inf") if row.own_error else 0.0


def _line(row: Row) -> tuple[str, ...]:
    layer = row.layer or row.graph
    if row.graph != "decoder" and row.layer:
        layer = f"{row.graph}: {row.layer}"
    numbers = (row.own_error, row.own_limit, row.error, row.limit)
    verdict = "ok" if row.passed else f"DIVERGES {row.note}".rstrip()
    return (layer, row.node or row.operator, *(f"{number:.1e}" for number in numbers), verdict)
