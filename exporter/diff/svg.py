"""Errors along the depth, drawn as SVG that takes its colours from the page it stands in."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from exporter.diff.report import Comparison, Row

WIDTH, HEIGHT = 1100, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 60  # margins
SMALLEST = 1e-12  # of its value's largest number: where an error of zero is drawn
LABEL_ROOM = 46  # between the names of two layers


def draw(comparison: Comparison) -> str:
    """The errors of every operator, in parts of the largest number of its value, on a logarithmic scale."""
    rows = [row for row in comparison.rows if row.node]
    if not rows:
        return ""
    added, limits, own = (
        [_relative(getattr(row, name), row) for row in rows] for name in ("error", "limit", "own_error")
    )
    low, high = _decades([*added, *limits, *own])

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(rows)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(max(value, 10.0**low))) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="errors along the depth">',
        *_grid(low, high, y),
        *_layers(rows, x),
        _line("limit", limits, x, y),
        _line("added", added, x, y),
        *(_dot(row, x(index), y(own[index])) for index, row in enumerate(rows)),
        "</svg>",
    ]
    return "\n".join(parts)


def _relative(number: float, row: Row) -> float:
    if not math.isfinite(number):
        return 1e3
    return max(number / row.magnitude if row.magnitude else number, SMALLEST)


def _decades(numbers: Sequence[float]) -> tuple[int, int]:
    drawn = [number for number in numbers if number > SMALLEST] or [1.0]
    return math.floor(math.log10(min(drawn))) - 1, math.ceil(math.log10(max(drawn))) + 1


def _grid(low: int, high: int, y: Callable[[float], float]) -> Iterable[str]:
    for power in range(low, high + 1):
        at = y(10.0**power)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="axis" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>'


def _layers(rows: Sequence[Row], x: Callable[[float], float]) -> Iterable[str]:
    """A line where a layer begins, and its name where there is room."""
    before, labelled = None, -math.inf
    for index, row in enumerate(rows):
        if row.layer == before:
            continue
        before, at = row.layer, x(index - 0.5)
        yield f'<line class="layer" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        if row.layer and at - labelled > LABEL_ROOM:
            labelled = at
            name = row.layer.rpartition(".")[2].removeprefix("layers ")
            place = f'x="{at + 2:.1f}" y="{HEIGHT - BOTTOM + 14}"'
            turn = f"rotate(20 {at + 2:.1f} {HEIGHT - BOTTOM + 14})"
            yield f'<text class="axis" {place} transform="{turn}">{escape(name)}</text>'


def _line(kind: str, values: Sequence[float], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
    return f'<polyline class="{kind}" points="{points}"/>'


def _dot(row: Row, x: float, y: float) -> str:
    kind, radius = ("own", 2) if row.passed else ("bad", 6)
    title = f"{row.node}: own error {row.own_error:.1e}, limit {row.own_limit:.1e}; added up {row.error:.1e}"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'
