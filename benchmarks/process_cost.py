"""What a command costs: wall time, and the most memory that it and its children held at a time."""

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.02
MESSAGE_BYTES = 4000  # of what a failed command said, that are shown


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One run."""

    seconds: float
    peak_bytes: int
    progress: tuple[tuple[float, str], ...]  # (seconds since the start, what it wrote to stderr), line by line


def run_measured(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Cost:
    """Run a command; SystemExit with what it said where it fails.

    The peak is the largest sum of resident sets, mapped files included, of the process and its children at one time;
    and at least VmHWM, the kernel's own largest one of each. (ru_maxrss would not do: a process that is started from a
    large one begins with that one's peak.)
    """
    with tempfile.TemporaryFile("w+b") as stdout, tempfile.TemporaryFile("w+b") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=folder)
        peak, lines, seen = 0, [], 0
        while process.poll() is None:
            now = [_memory(pid) for pid in _tree(process.pid)]
            peak = max([peak, sum(resident for resident, _ in now), *(highest for _, highest in now)])
            text = os.pread(stderr.fileno(), 1 << 16, seen)
            whole = text[: text.rfind(b"\n") + 1]
            seen += len(whole)
            elapsed = time.perf_counter() - start
            lines += [(elapsed, line) for line in whole.decode(errors="replace").splitlines()]
            time.sleep(POLL_S)
        seconds = time.perf_counter() - start
        if process.returncode:
            said = b"".join(_end_of(file.fileno()) for file in (stdout, stderr)).decode(errors="replace")
            raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}:\n{said}")
    return Cost(seconds=seconds, peak_bytes=peak, progress=tuple(lines))


def _end_of(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, MESSAGE_BYTES, max(0, size - MESSAGE_BYTES))


def _tree(root: int) -> list[int]:
    """The process and all of its descendants that are there."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(resident bytes, the most there ever were) of a process; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return tuple(1024 * int(sizes.get(key, "0 kB").split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
