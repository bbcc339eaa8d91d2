"""A few exports killed at random moments: `python -m tests.torture.kills` kills fifty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_what_is_killed_is_not_lost() -> None:
    """One kill in every scenario; in a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.torture.kills", "--kills", "5", "--seed", str(os.getpid())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("5 kills; ")
    assert done.stdout.endswith("nothing was lost\n")
