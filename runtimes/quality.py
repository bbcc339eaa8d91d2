"""What rounding weights costs: how far their next-token distributions lie from those of the original weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

PERCENTILE = 99.9  # of the KL divergence: what the worst token of a page of text may look like
WORST_LAYERS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """What one layer's weights alone change: root mean square of the difference in what it adds to its input, relative
    to what it adds."""

    layer: str
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Share (0 to 1) of a task's problems that are answered exactly, greedily."""

    problems: int
    original: float
    stored: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityReport:
    """Original weights (float32) against the weights as stored, both in eager PyTorch in float32.

    KL divergence is of the stored weights' next-token distribution from the original's, in nats: sum p log(p / q).
    """

    text: str  # where the tokens come from
    tokens: int
    kl_mean: float
    kl_p999: float  # 99.9th percentile over tokens
    top1_agreement: float  # share of tokens after which both predict the same
    perplexity_original: float
    perplexity_stored: float
    worst_layers: tuple[LayerError, ...]
    tasks: Mapping[str, TaskScore]
    bytes_per_weight: float  # of all weights' bytes, scales included

    @property
    def perplexity_difference(self) -> float:
        """Perplexity of the stored weights less that of the originals."""
        return self.perplexity_stored - self.perplexity_original

    def to_dict(self) -> dict[str, Any]:
        """As plain data; figures are rounded to four digits, so that the same export writes the same bytes."""
        data: dict[str, Any] = _rounded(dataclasses.asdict(self))
        return data | {"perplexity_difference": _rounded(self.perplexity_difference)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QualityReport":
        """The inverse of to_dict; KeyError, TypeError or ValueError where something is missing or wrong."""
        names = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in data.items() if key in names}
        numbers = kept.keys() - {"text", "tokens", "worst_layers", "tasks"}
        return cls(
            **kept
            | {name: _number(kept[name]) for name in numbers}
            | {
                "worst_layers": tuple(
                    LayerError(layer=str(each["layer"]), error=_number(each["error"])) for each in data["worst_layers"]
                ),
                "tasks": {
                    name: TaskScore(
                        problems=int(each["problems"]),
                        original=_number(each["original"]),
                        stored=_number(each["stored"]),
                    )
                    for name, each in data["tasks"].items()
                },
            }
        )


def _number(value: Any) -> float:
    """A number of a report; NaN for null, as which what is not finite is written. TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"{type(value).__name__} instead of a number")
    return math.nan if value is None else float(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.3e}") if math.isfinite(value) else None
    return value
