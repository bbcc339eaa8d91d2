"""examples/ci/parity.yml: its own commands, run in the order in which GitHub runs them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "examples" / "ci" / "parity.yml"
WITH_OUR_COMMAND = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


def commands(job: dict[str, Any]) -> list[str]:
    """What its steps run, but for installing and for what runs after a failure only."""
    steps = [step for step in job["steps"] if "run" in step and not step["name"].startswith("Install")]
    return [step["run"] for step in steps if not step.get("if", "").startswith("failure()")]


def test_the_commands_of_both_jobs(workflow: dict[str, Any], tmp_path: Path) -> None:
    """Green on a good checkpoint; the second job needs what the first one uploads, and nothing else."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = WITH_OUR_COMMAND | workflow["env"] | {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    for job in ("export", "check"):
        for command in commands(workflow["jobs"][job]):
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (command, done.stderr)
        (tmp_path / "examples").unlink(missing_ok=True)
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("## Parity of artifact: passed") == 2
    for report in ("parity.xml", "golden.xml"):
        assert list(ElementTree.parse(tmp_path / report).getroot().iter("testcase"))


def test_a_checkpoint_that_is_refused_stops_at_the_plan(workflow: dict[str, Any], tmp_path: Path) -> None:
    """The first command fails, and says why."""
    environment = WITH_OUR_COMMAND | workflow["env"] | {"CHECKPOINT": str(tmp_path)}
    command = commands(workflow["jobs"]["export"])[0]
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "config.json" in done.stdout + done.stderr


def test_what_is_uploaded_is_what_is_written(workflow: dict[str, Any]) -> None:
    """Names in the steps for files, where a slip would go unnoticed until something fails."""
    text = WORKFLOW.read_text()
    jobs = workflow["jobs"]
    uploads = [
        step["with"]["path"]
        for job in jobs.values()
        for step in job["steps"]
        if "load-artifact" in step.get("uses", "")
    ]
    assert uploads == ["parity.xml\ndivergence.html\n", workflow["env"]["ARTIFACT"], workflow["env"]["ARTIFACT"]]
    assert "--html divergence.html" in text
