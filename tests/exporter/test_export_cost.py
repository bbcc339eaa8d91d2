"""benchmarks/export_cost.py: what it measures, and the checkpoints that take no room."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from graphs.checkpoint import open_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MB = 1_000_000


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


HOLD = "import time; data = bytearray({size}); data[::4096] = b'x' * len(data[::4096]); {then}; time.sleep(0.8)"


def test_peak_is_that_of_the_whole_tree() -> None:
    """A process that holds 80 MB and a child that holds 120 MB at the same time; and what is said on stderr."""
    child = HOLD.format(size=120 * MB, then="print('held', file=__import__('sys').stderr, flush=True)")
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    parent = HOLD.format(size=80 * MB, then=start)
    cost = load("process_cost").run_measured([sys.executable, "-c", parent])
    assert 200 * MB < cost.peak_bytes < 260 * MB
    assert [line for _, line in cost.progress] == ["held"]
    assert cost.seconds > 0.3


def test_the_callers_own_memory_does_not_count() -> None:
    """A process that is started from a large one begins with its peak, for getrusage."""
    code = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from process_cost import run_measured
held = bytearray({300 * MB})
held[::4096] = b"x" * len(held[::4096])
print(run_measured([sys.executable, "-c", "import time; time.sleep(0.2)"]).peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * MB


def test_a_failure_is_told() -> None:
    """With the status, and what the command said."""
    command = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match=r"failed with status 3:\nno such thing"):
        load("process_cost").run_measured(command)


@pytest.mark.parametrize(("shape", "parameters", "shards"), [("8b", 8_030_261_248, 4), ("70b", 70_553_706_496, 30)])
def test_sparse_checkpoints_are_whole_and_take_no_room(
    shape: str, parameters: int, shards: int, tmp_path: Path
) -> None:
    """Meta's own numbers of parameters; as many shards as its checkpoints on the hub have; under a megabyte of disk."""
    assert load("sparse_checkpoint").write_sparse_checkpoint(tmp_path, shape) == parameters
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.nbytes == 2 * parameters
    assert len({tensor.path for tensor in checkpoint.tensors.values()}) == shards
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < MB
