"""Files that a benchmark leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path

from exporter.bench.picture import draw, require_matplotlib
from exporter.bench.report import Report
from exporter.errors import ExportError


def check_writable(outs: Sequence[Path]) -> None:
    """Fail before minutes of measuring, and not after them.

    Raises:
        ExportError: a folder does not exist.
        RuntimeMissingError: a picture is wanted, and matplotlib is not installed.
    """
    for out in outs:
        if not out.resolve().parent.is_dir():
            raise ExportError(f"{out} cannot be written: {out.parent} is no folder")
        if not _is_json(out):
            require_matplotlib()


def write(report: Report, out: Path) -> None:
    """JSON where the file's name ends so, and a picture otherwise."""
    if _is_json(out):
        out.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    else:
        draw(report, out)


def _is_json(out: Path) -> bool:
    return out.suffix == ".json"
