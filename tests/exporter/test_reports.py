"""Verdicts for continuous integration: parsed as its programs parse them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from exporter.reports import to_junit, to_markdown
from runtimes.parity import ParityReport, ParitySummary, Rung

GOOD = Rung(
    name="prefill logits",
    max_error=1e-6,
    rms_error=1e-7,
    eager_max_error=1e-6,
    eager_rms_error=1e-7,
    max_limit=5e-6,
    rms_limit=3e-7,
    passed=True,
)
BAD = Rung(
    **{**vars(GOOD), "name": "8 | steps", "max_error": float("inf"), "passed": False, "note": "<b>\x00no & number"}
)


def summary(*rungs: Rung) -> ParitySummary:
    report = ParityReport(
        runtime="onnxruntime 1 (CPU)",
        reference="eager",
        precision="float32",
        prompt_lengths=(3,),
        decode_steps=8,
        rungs=rungs,
    )
    return ParitySummary(reports=(report,), not_run={"tensorrt": "no GPU"})


def test_junit() -> None:
    """Counts, names, the failure's reason, and what was skipped; characters that XML cannot hold are replaced."""
    root = ElementTree.fromstring(to_junit(summary(GOOD, BAD), "out"))
    first, second = root.findall("testsuite")
    assert (first.get("tests"), first.get("failures"), first.get("skipped")) == ("2", "1", "0")
    assert [case.get("name") for case in first] == ["prefill logits", "8 | steps"]
    (failure,) = first.iter("failure")
    assert failure.get("message") == "<b>?no & number"
    assert "largest error inf, allowed 5e-06" in (failure.text or "")
    assert (second.get("name"), second.get("skipped")) == ("tensorrt", "1")
    assert [each.get("message") for each in second.iter("skipped")] == ["no GPU"]


def test_markdown() -> None:
    """The verdict first; a bar in a cell begins no other cell, and a tag is text."""
    lines = to_markdown(summary(GOOD, BAD), "out").splitlines()
    assert lines[0] == "## Parity of out: FAILED"
    (row,) = (line for line in lines if "steps" in line)
    assert row.startswith("| 8 \\| steps | not finite |")
    assert "&lt;b>" in row
    assert "- not run on tensorrt: no GPU" in lines
    assert to_markdown(summary(GOOD), "out").splitlines()[0] == "## Parity of out: passed"


def test_the_commands_write_them(x_artifact: Path, x_run: Callable[..., Any], tmp_path: Path) -> None:
    """`verify --report` three times over; JSON is parity.json's."""
    files = [tmp_path / name for name in ("parity.xml", "parity.md", "parity.json")]
    ran = x_run("verify", x_artifact, "--golden", *(arg for file in files for arg in ("--report", file)))
    assert ran.code == 0, ran.err
    assert ElementTree.parse(files[0]).getroot().tag == "testsuites"
    assert f"Parity of {x_artifact}: passed" in files[1].read_text()
    assert json.loads(files[2].read_text())["passed"]


@pytest.mark.parametrize(
    ("name", "words"), [("parity.html", "must end in .xml, .md, .json"), ("no/such/p.xml", "there is no folder")]
)
def test_a_report_that_cannot_be_written(x_artifact: Path, x_run: Callable[..., Any], name: str, words: str) -> None:
    """Refused before any work."""
    ran = x_run("verify", x_artifact, "--report", name)
    ran.refused(words)
    assert "check hashes" not in ran.err


def test_golden_and_reference_exclude_each_other(x_artifact: Path, x_tiny: Path, x_run: Callable[..., Any]) -> None:
    """The message says what to do."""
    x_run("verify", x_artifact, "--golden", "--reference", x_tiny).refused("leave one of them out")
