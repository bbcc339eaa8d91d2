"""The README tells the truth: its commands and programs are run, in order, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(bash|python|text)\n(.*?)```", re.DOTALL)
SETUP = ("pip install", "make test", "git clone", "export-llm completion", "eval ", "python3 -m venv")


def _blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text())


def _environment() -> dict[str, str]:
    """The console script of this interpreter comes first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": "120"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone to the README's commands; what they write does not touch the real one."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in ("examples", "exporter", "graphs", "runtimes", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_command_and_program_runs(project: Path) -> None:
    """Line by line; installing is what brought us here, and `make demo` has a test of its own."""
    ran = 0
    for language, text in _blocks():
        if language == "python":
            done = subprocess.run([sys.executable, "-c", text], cwd=project, env=_environment(), check=False)
            assert done.returncode == 0, text
            ran += 1
        elif language == "bash":
            for command in text.replace("\\\n", " ").splitlines():
                command = command.partition("  #")[0].strip()
                if not command or command.startswith((*SETUP, "make demo", "#")):
                    continue
                done = subprocess.run(command, shell=True, cwd=project, env=_environment(), check=False)
                assert done.returncode == 0, command
                ran += 1
    assert ran >= 6


def test_make_demo_does_the_main_job(tmp_path: Path) -> None:
    """Inspect, export with an engine, verify, generate; each visible."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("make demo uses .venv, and this is another environment: it would install into it")
    command = ["make", "demo", f"OUT={tmp_path / 'demo'}"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in (
        "456,064",
        "decoder.tensorrt-rtx.engine",
        "parity passed on onnxruntime",
        "85",
        "tenalp",
        "bottom right",
    ):
        assert expected in done.stdout, done.stdout


def test_the_session_shown_is_real(tmp_path: Path) -> None:
    """What the README prints of a session is what the commands print: every line but those with timings or sizes."""
    (session,) = (text for language, text in _blocks() if language == "text" and "$ export-llm" in text)
    commands = [line[2:] for line in session.splitlines() if line.startswith("$ ")]
    printed = ""
    for command in commands:
        command = command.replace("demo-out", str(tmp_path / "demo-out"))
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout.replace(str(tmp_path / "demo-out"), "demo-out")
    shown = [line.split() for line in session.splitlines() if line.strip() and not line.startswith("$ ")]
    numbers = re.compile(r"[\d.,]+(e[+-]?\d+)?")
    stable = [[numbers.sub("#", word) for word in line] for line in shown]
    actual = [[numbers.sub("#", word) for word in line.split()] for line in printed.splitlines()]
    missing = [" ".join(line) for line in stable if line not in actual]
    assert not missing
