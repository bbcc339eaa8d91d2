"""What the commands say of an artifact on a GPU: its golden tensors, and its first divergence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diff_faults import PORTABLE, break_graph

from exporter.diff.run import diff_artifact
from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, open_artifact

pytestmark = pytest.mark.cuda
PRECISIONS = ("fp32", "fp16", "bf16", "int4")


@pytest.fixture(scope="module", params=PRECISIONS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Artifact:
    """tiny_llama in a precision, verified on the GPU."""
    out = tmp_path_factory.mktemp("gpu") / request.param
    export(ExportRequest(checkpoint=tiny_llama, out=out, precision=request.param))
    return open_artifact(out)


def test_the_export_was_verified_on_the_gpu(exported: Artifact) -> None:
    """By default, where there is one."""
    reports = json.loads(exported.path("parity.json").read_text())["reports"]
    assert all(report["passed"] for report in reports)
    assert any("CUDA" in report["runtime"] for report in reports)


def test_golden_tensors(exported: Artifact, x_run: Callable[..., Any]) -> None:
    """They hold on the GPU, and on a CPU where that computes alike."""
    ran = x_run("verify", exported.folder, "--golden", "--device", "cuda", "--json")
    assert ran.code == 0, ran.out + ran.err
    on_cpu = x_run("verify", exported.folder, "--golden", "--device", "cpu", "--json")
    if exported.manifest.precision in ("fp32", "fp16"):
        assert on_cpu.code == 0, on_cpu.out + on_cpu.err
    else:
        on_cpu.refused("verify where PyTorch is installed")


def test_nothing_diverges_in_what_is_right(exported: Artifact) -> None:
    """Every layer is looked at."""
    report = diff_artifact(exported, None, device="cuda")
    assert report.passed, [comparison.sentence() for comparison in report.comparisons]
    for comparison in report.comparisons:
        assert {"layer 0", "layer 1", "layer 2"} <= {row.layer for row in comparison.rows}


def test_a_fault_is_named(exported: Artifact, tmp_path: Path) -> None:
    """With its module."""
    if exported.manifest.precision != "fp32":
        pytest.skip("the faults are those of a float32 graph")
    fault = next(iter(PORTABLE.values()))
    report = diff_artifact(break_graph(exported, tmp_path / "broken", fault.change), None, device="cuda")
    assert report.first is not None
    assert report.first.module == fault.module
