"""An artifact runs with no torch installed, and the three packages import in one direction only."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.artifact import Artifact

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"graphs": {"graphs"}, "runtimes": {"runtimes"}, "exporter": {"exporter", "graphs", "runtimes"}}


def _imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    """graphs and runtimes import nothing of ours but themselves."""
    for path in (ROOT / package).rglob("*.py"):
        ours = _imports(path) & ALLOWED.keys()
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {ours - ALLOWED[package]}"


def test_runtimes_never_name_torch() -> None:
    """Not even inside a function: the eager runner is handed its module, and finds torch through it."""
    for path in (ROOT / "runtimes").rglob("*.py"):
        assert not _imports(path) & {"torch", "onnxscript", "onnx_ir", "transformers", "safetensors"}, path


PROGRAM = """
import sys

class Unimportable:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Unimportable())

import json
from runtimes.artifact import open_artifact
from runtimes.generation import generate, read_stop_ids
from runtimes.runner import open_runner
from runtimes.tokenizer import Tokenizer

artifact = open_artifact(sys.argv[1])
tokenizer = Tokenizer(artifact.folder)
with open_runner(artifact, device="cpu") as runner:
    prompts = [tokenizer.encode(text) for text in sys.argv[2:]]
    result = generate(runner, prompts, 12, stop_ids=read_stop_ids(artifact.folder))
assert "torch" not in sys.modules
print(json.dumps([tokenizer.decode(ids) for ids in result.token_ids]))
"""


def test_an_artifact_runs_without_torch(tiny_artifact: Artifact) -> None:
    """A process in which torch and the exporter's libraries cannot be imported answers the model's tasks."""
    command = [sys.executable, "-c", PROGRAM, str(tiny_artifact.folder), "27+58=", "reverse planet=", "sort 52914="]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["85", "tenalp", "12459"]
