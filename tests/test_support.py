"""docs/support.md says what happens: every family in every precision is exported, verified and built."""

import importlib.util
from pathlib import Path

import pytest
import support

from graphs.families import FAMILIES

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def rows() -> dict[str, list[str]]:
    lines = support.DOCUMENT.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert tuple(cells[0]) == ("model_type", *support.COLUMNS)
    return {row[0]: row[1:] for row in cells[1:]}


def test_the_page_lists_every_family() -> None:
    assert list(rows()) == list(FAMILIES)
    text = support.DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(support.HEAD)


@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_is_true(family: str, tmp_path: Path) -> None:
    checkpoint = support.save(family, tmp_path / "checkpoint")
    traced: support.Traced = {}
    for precision, written in zip(support.COLUMNS, rows()[family], strict=True):
        cell, note = support.outcome(checkpoint, precision, tmp_path / "out", traced)
        assert written.split(" (")[0] == cell, (precision, note)
