"""Every model family in every precision, exported for real: what docs/support.md says.

    python tests/support.py            # writes docs/support.md; some minutes

Each cell is a small random checkpoint of odd sizes that transformers saved, exported, verified on ONNX Runtime, and
built by TensorRT-RTX for a GPU that it names itself.
"""

import functools
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mllama_cases
import onnx_ir as ir
import test_families
import test_transformer_decoder

from exporter import pipeline
from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.precision import AS_STORED, PRECISIONS
from exporter.verify import verify_artifact
from graphs.families import FAMILIES
from runtimes.artifact import Artifact, open_artifact
from runtimes.signature import GraphSignature
from runtimes.verification import artifact_targets

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "support.md"
COLUMNS = tuple(name for name in PRECISIONS if name != AS_STORED)
RUNS, REFUSED = "✓", "✗"
HEAD = f"""# What is supported

Every model family in every precision, as `python tests/support.py` found it: a small random checkpoint of odd sizes was
exported, and its parity with eager PyTorch passed on ONNX Runtime (CPU); then TensorRT-RTX built an engine of the same
file, without a GPU. `{RUNS} {RUNS}` is both of them; a number stands for a note below the table. A test keeps this page
true.

Engines of the decoder and, for mllama, of the vision encoder. nvfp4 runs on ONNX Runtime's CPU provider as the same
numbers in int8 (it has no float4 kernels), bf16 in float32.
"""


def save(family: str, folder: Path) -> Path:
    """A small random checkpoint of the family."""
    if family == "mllama":
        return mllama_cases.save(next(iter(mllama_cases.CASES.values())).make_model(), folder)
    if family == "transformer_decoder":
        return test_transformer_decoder.save_decoder(folder, **test_transformer_decoder.DECODERS["mixed"])
    test_families.CASES[family].make_model().save_pretrained(folder)
    return folder


Traced = dict[str, ir.Model]  # graphs of one checkpoint, by what decides them


def outcome(checkpoint: Path, precision: str, out: Path, traced: Traced) -> tuple[str, str]:
    """(cell, note): whether it passes on ONNX Runtime, and whether TensorRT-RTX builds it, with the reason if not.

    Precisions that compute in the same dtype have the same graph before its weights are put in: it is traced once.
    """
    with (
        mock.patch.object(pipeline, "trace", functools.partial(_once, traced, pipeline.trace)),
        mock.patch.object(pipeline, "trace_encoder", functools.partial(_once, traced, pipeline.trace_encoder)),
    ):
        return _outcome(checkpoint, precision, out)


def _once(traced: Traced, trace: Callable[..., ir.Model], *args: Any, **options: Any) -> ir.Model:
    key = str([each for each in args if isinstance(each, GraphSignature | dict)])
    if key not in traced:
        traced[key] = trace(*args, **options)
    return traced[key].clone()


def _outcome(checkpoint: Path, precision: str, out: Path) -> tuple[str, str]:
    note = ""

    def run(*targets: str) -> Artifact:
        shutil.rmtree(out, ignore_errors=True)
        request = ExportRequest(checkpoint=checkpoint, out=out, precision=precision, targets=targets, verify=False)
        export(request)
        return open_artifact(out)

    try:
        artifact = run("tensorrt-rtx")
    except ExportError as error:
        note = " ".join(str(error).split())
        artifact = run("onnx")
    passed = verify_artifact(artifact, artifact_targets(artifact, "cpu")).passed
    return f"{RUNS if passed else REFUSED} {REFUSED if note else RUNS}", note


def table(cells: dict[str, dict[str, tuple[str, str]]]) -> str:
    """The page, from {family: {precision: (cell, note)}}."""
    notes = list(dict.fromkeys(note for row in cells.values() for _, note in row.values() if note))
    lines = [HEAD, "| model_type | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, row in cells.items():
        texts = [cell + (f" ({notes.index(note) + 1})" if note else "") for cell, note in row.values()]
        lines.append(f"| {family} | " + " | ".join(texts) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def collect(report: Callable[[str], None]) -> dict[str, dict[str, tuple[str, str]]]:
    """Every cell."""
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            checkpoint = save(family, Path(scratch) / family)
            cells[family] = {}
            traced: Traced = {}
            for precision in COLUMNS:
                cells[family][precision] = outcome(checkpoint, precision, Path(scratch) / "out", traced)
                report(f"{family} {precision}: {' '.join(cells[family][precision])}")
    return cells


if __name__ == "__main__":
    DOCUMENT.write_text(table(collect(lambda line: print(line, file=sys.stderr))), encoding="utf-8")
