"""The middle of repeated measurements, and how far they lie apart."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, quartiles and extremes; `samples` are in the order of measurement."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    samples: tuple[float, ...]


def spread_of(samples: Sequence[float]) -> Spread:
    """Quartiles interpolate linearly between the measurements, as numpy's percentiles do."""
    lone = len(samples) == 1  # which has no quartiles of its own before Python 3.13
    q1, median, q3 = [samples[0]] * 3 if lone else statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median=median, q1=q1, q3=q3, min=min(samples), max=max(samples), samples=tuple(samples))
