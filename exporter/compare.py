"""Artifacts of one model side by side: what each costs in bytes, and in quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExportError
from runtimes.artifact import PARITY_FILE, open_artifact
from runtimes.errors import RuntimeMissingError
from runtimes.files import read_json
from runtimes.quality import QualityReport


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One artifact; `quality` is None where no weight was rounded."""

    name: str
    precision: str
    quantizer: str
    weight_bytes: int
    bytes_per_weight: float | None
    passed: bool
    quality: QualityReport | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        facts = {field: getattr(self, field) for field in ("name", "precision", "quantizer", "weight_bytes")}
        quality = None if self.quality is None else self.quality.to_dict()
        return facts | {"bytes_per_weight": self.bytes_per_weight, "passed": self.passed, "quality": quality}


def compare_artifacts(folders: Sequence[Path]) -> list[Compared]:
    """Read each artifact's manifest and quality report.

    Raises:
        ArtifactError: one is no artifact, or damaged.
        ExportError: one was not verified, or they are of different models.
    """
    compared = []
    kinds = {}
    for folder in folders:
        manifest = open_artifact(folder).manifest
        if PARITY_FILE not in manifest.files or manifest.parity is None:
            raise ExportError(f"{folder} holds no {PARITY_FILE}: it was exported with --no-verify; export it again")
        kinds[folder] = {key: manifest.config[key] for key in ("model_type", "hidden_size", "num_hidden_layers")}
        data = read_json(folder / PARITY_FILE).get("quality")
        try:
            quality = None if data is None else QualityReport.from_dict(data)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ExportError(f"{folder / PARITY_FILE} is damaged: {type(error).__name__}: {error}") from None
        compared.append(
            Compared(
                name=folder.name,
                precision=manifest.precision,
                quantizer=(manifest.quantization or {}).get("quantizer", ""),
                weight_bytes=sum(each.bytes for name, each in manifest.files.items() if name.endswith(".safetensors")),
                bytes_per_weight=None if quality is None else quality.bytes_per_weight,
                passed=bool(manifest.parity["passed"]),
                quality=quality,
            )
        )
    first, *others = kinds
    for other in others:
        if kinds[other] != kinds[first]:
            raise ExportError(f"{other} is another model than {first}: only artifacts of one model can be compared")
    return compared


def draw(compared: Sequence[Compared], path: Path) -> None:
    """One picture of quality against bytes per weight, in the format that the file's ending names.

    Raises:
        RuntimeMissingError: matplotlib is not installed.
        ExportError: there is nothing to draw, or the ending is none that matplotlib writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeMissingError("the picture needs matplotlib: pip install 'export-llm[plot]'") from None
    points = [(each, each.quality) for each in compared if each.quality is not None]
    if not points:
        raise ExportError("there is nothing to draw: none of these artifacts has a quality report")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for each, quality in points:
        axes.plot(quality.bytes_per_weight, quality.kl_mean, "o")
        label = f"{each.precision} {each.quantizer}".strip()
        axes.annotate(label, (quality.bytes_per_weight, quality.kl_mean), (6, 4), textcoords="offset points", size=8)
    axes.set(
        xlabel="bytes per weight, scales included",
        ylabel="mean KL divergence from float32 weights, nats per token",
        yscale="log",
    )
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ExportError(f"{path} cannot be drawn: {error}") from None
