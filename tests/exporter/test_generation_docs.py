"""docs/generation.md tells the truth: its commands and its program are run, in order."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)


def test_every_command_and_program_runs(
    x_run: Callable[..., Any], x_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that has the examples, without the exports' parity; greedy commands answer."""
    (tmp_path / "examples").symlink_to(x_root / "examples")
    monkeypatch.chdir(tmp_path)
    answers = []
    for language, text in BLOCK.findall((x_root / "docs" / "generation.md").read_text()):
        if language == "python":
            exec(compile(text, "docs/generation.md", "exec"), {})
            continue
        for command in text.splitlines():
            program, *words = shlex.split(command)
            assert program == "export-llm"
            ran = x_run(*words, *(["--no-verify"] if words[0] == "export" else []))
            assert ran.code == 0, (command, ran.err)
            answers.append(ran.out)
    assert sum("tenalp" in answer for answer in answers) >= 4
