"""A parity verdict for continuous integration: JUnit XML, Markdown or JSON, by the file's suffix."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from exporter.errors import ExportError
from runtimes.parity import ParityReport, ParitySummary, Rung

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_reports(paths: Sequence[Path]) -> None:
    """ExportError, before any work, for a report that could not be written."""
    for path in paths:
        if path.suffix not in FORMATS:
            raise ExportError(f"--report {path}: its name must end in {', '.join(FORMATS)}")
        if not path.absolute().parent.is_dir():
            raise ExportError(f"--report {path}: there is no folder {path.parent}")


def write_reports(summary: ParitySummary, title: str, paths: Sequence[Path]) -> None:
    """Write the verdict on `title` to every path."""
    for path in paths:
        path.write_text(FORMATS[path.suffix](summary, title), encoding="utf-8")


def to_junit(summary: ParitySummary, title: str) -> str:
    """A test suite for each runtime and a test case for each rung; a runtime that could not run is skipped."""
    root = ElementTree.Element("testsuites", name=_text(f"parity of {title}"))
    for report in summary.reports:
        failures = sum(not rung.passed for rung in report.rungs)
        suite = _suite(root, report.runtime, tests=len(report.rungs), failures=failures, skipped=0)
        for rung in report.rungs:
            case = ElementTree.SubElement(suite, "testcase", classname=_text(report.runtime), name=_text(rung.name))
            if not rung.passed:
                failure = ElementTree.SubElement(case, "failure", message=_text(rung.note or _words(rung)))
                failure.text = _text(f"{_words(rung)}\nreference: {report.reference}")
    for runtime, reason in summary.not_run.items():
        suite = _suite(root, runtime, tests=1, failures=0, skipped=1)
        case = ElementTree.SubElement(suite, "testcase", classname=_text(runtime), name="parity")
        ElementTree.SubElement(case, "skipped", message=_text(reason))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: ElementTree.Element, name: str, **counts: int) -> ElementTree.Element:
    numbers = {key: str(count) for key, count in counts.items()}
    return ElementTree.SubElement(root, "testsuite", {"name": _text(name), "errors": "0", **numbers})


def _text(text: str) -> str:
    """Without the characters that XML cannot express."""
    return _NOT_XML.sub("?", text)


def _words(rung: Rung) -> str:
    return (
        f"largest error {rung.max_error:.3g}, allowed {rung.max_limit:.3g}; root mean square {rung.rms_error:.3g},"
        f" allowed {rung.rms_limit:.3g}; eager's own largest {rung.eager_max_error:.3g}"
    )


def to_markdown(summary: ParitySummary, title: str) -> str:
    """A heading with the verdict, a table for each runtime, and what was not run."""
    lines = [f"## Parity of {_cell(title)}: {_verdict(summary.passed)}", ""]
    for report in summary.reports:
        lines += _markdown_table(report)
    lines += [f"- not run on {_cell(runtime)}: {_cell(reason)}" for runtime, reason in summary.not_run.items()]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(report: ParityReport) -> list[str]:
    head = ["rung", "max error", "limit", "rms error", "limit", ""]
    lines = [f"### {_cell(report.runtime)}: {_verdict(report.passed)}", "", _row(head), "|---" * len(head) + "|"]
    for rung in report.rungs:
        numbers = (rung.max_error, rung.max_limit, rung.rms_error, rung.rms_limit)
        shown = [f"{n:.1e}" if math.isfinite(n) else "not finite" for n in numbers]
        lines.append(_row([rung.name, *shown, "ok" if rung.passed else f"**FAILED** {rung.note}".rstrip()]))
    return [*lines, "", f"reference: {_cell(report.reference)}", ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """On one line, with no bar that would begin another cell and no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


FORMATS: dict[str, Callable[[ParitySummary, str], str]] = {
    ".xml": to_junit,
    ".md": to_markdown,
    ".json": lambda summary, title: summary.to_json(),
}
