"""One export at a time to one place: a lock that the operating system takes back from a process that dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import ExportError


@contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, which is there only meanwhile; ExportError if another process holds it."""
    file = _acquire(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours: who opened it before finds it gone, and makes another
        os.close(file)


def _acquire(path: Path, what: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            os.close(file)
            raise ExportError(f"another export is writing to {what}: wait for it, or choose another OUT") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """False when the file was removed after it was opened."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
