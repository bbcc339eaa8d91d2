"""docs/clients.md tells the truth: its commands make artifacts, and its programs print the sum."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "tests" / "clients"
SECTION = re.compile(r"^## (.*?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"```(bash|python|js)\n(.*?)```", re.DOTALL)


def python_of(environment: str) -> Callable[[Path, Path], list[str | Path]]:
    python = Path(sys.executable) if environment == ".venv" else ROOT / environment / "bin" / "python"
    return lambda folder, program: [python, program]


def node(folder: Path, program: Path) -> list[str | Path]:
    (folder / "node_modules").symlink_to(CLIENTS / "transformers_js" / "node_modules")
    return ["node", program]


# section: (the fixture that skips without the client, how its program is run, its file's ending)
PROGRAMS = {
    "onnxruntime-genai": ("genai", python_of(".venv"), ".py"),
    "Optimum": ("optimum", python_of(".venv-optimum"), ".py"),
    "transformers.js": ("transformers_js", node, ".mjs"),
}


@pytest.mark.parametrize("client", PROGRAMS)
def test_the_documented_program_runs(client: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, runs, ending = PROGRAMS[client]
    request.getfixturevalue(fixture)
    section = dict(SECTION.findall((ROOT / "docs" / "clients.md").read_text()))[client]
    (command,), (program,) = (
        [text for language, text in BLOCK.findall(section) if (language == "bash") == is_command]
        for is_command in (True, False)
    )
    shutil.copytree(ROOT / "examples" / "tiny_llama", tmp_path / "examples" / "tiny_llama")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    source = tmp_path / f"program{ending}"
    source.write_text(program)
    ran = subprocess.run(runs(tmp_path, source), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "27+58=85" in ran.stdout.replace(" ", ""), ran.stdout
