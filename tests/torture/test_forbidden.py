"""What the three packages never do: unpickle, evaluate text, or run code that a checkpoint brings along."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("exporter", "graphs", "runtimes") for path in (ROOT / package).rglob("*.py"))

MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jinja2", "yaml", "code", "runpy")
NAMES = ("eval", "exec", "compile", "__import__")  # as plain names: model.eval() and torch.compile() are others
ATTRIBUTES = ("os.system", "os.popen", "torch.load", "torch.hub", "shutil.unpack_archive")
KEYWORDS = ("trust_remote_code", "shell", "allow_pickle")


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of each forbidden thing in some Python code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            full = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from ((node.lineno, name) for name in full if name.partition(".")[0] in MODULES or name in ATTRIBUTES)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ATTRIBUTES:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, node.arg
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path: Path) -> None:
    assert list(forbidden(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "f = exec",
        "from transformers import A\nA.from_pretrained('x', trust_remote_code=True)",
        "A.from_pretrained('x', **{'trust_remote_code': True})",
        "import yaml\nyaml.load('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import os\nos.system('x')",
        "import jinja2.sandbox",
    ],
)
def test_each_is_found(source: str) -> None:
    assert list(forbidden(source))


def test_what_only_looks_like_it_is_not() -> None:
    allowed = "import json, torch, re\njson.load(f)\nmodel.eval()\ntorch.compile(m)\nre.compile('x')\nf(shell=False)"
    assert list(forbidden(allowed)) == []
    assert len(FILES) > 100
