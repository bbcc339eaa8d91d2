"""What a reader may not do while it reads: leave its folder, start a program, use the network, unpickle, take memory.

An audit hook sees what Python code opens. Libraries in other languages are not seen by it; that they follow no link or
path outwards is tested one by one (test_torture.py).
"""

import os
import resource
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "socket.",
    "pickle.find_class",
)
# What changes files, by the number of its arguments that are paths.
WRITES = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2, "os.chmod": 1}
WRITES |= {"os.truncate": 1, "shutil.rmtree": 1, "os.utime": 1}
ADDRESS_SPACE_BYTES = 4 << 30  # above what the process has when it begins: what asks for more fails at once

# Python, its packages and the system's: read by imports that come late, and by libraries that look at the machine
_SYSTEM = tuple(
    {
        *(os.path.realpath(path) for path in sysconfig.get_paths().values()),
        *(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])),
        *("/usr", "/lib", "/lib64", "/sys/devices", "/sys/fs", "/proc/self/status", "/proc/cpuinfo", "/proc/meminfo"),
        *("/etc/ld.so.cache", "/dev/urandom", "/dev/null", "/etc/localtime", "/etc/mime.types"),
    }
)


class Guard:
    """Notes what is done in `with guard.watching(folder):` that must not be."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self._followed: tuple[str, ...] = ()
        self.problems: list[str] = []
        sys.addaudithook(self._see)

    @contextmanager
    def watching(self, folder: Path, followed: tuple[str, ...] = ()) -> Iterator[None]:
        """Watch what happens inside.

        Args:
            followed: endings of files that are read wherever they lead: those that the user names, and weights.
        """
        self.problems = []
        self._followed = followed
        self._folder = os.path.realpath(folder)
        try:
            yield
        finally:
            self._folder = None

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event.startswith(FORBIDDEN):
            self.problems.append(f"{event} {args!r:.200}")
        elif event == "open":
            path, mode, flags = (*args, None, None)[:3]
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR)) or any(letter in (mode or "") for letter in "wax+")
            self._check_path("open", path, writes=writes)
        elif event in WRITES:
            for path in args[: WRITES[event]]:
                self._check_path(event, path, writes=True)

    def _check_path(self, event: str, path: Any, *, writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        folder, self._folder = self._folder, None  # looking at a path is not to be seen
        assert folder is not None
        try:
            real = os.path.realpath(os.fsdecode(path))
        except (ValueError, OSError):  # no path at all
            return
        finally:
            self._folder = folder
        inside = _is_below(real, folder)
        system = not writes and any(_is_below(real, place) for place in _SYSTEM)
        named = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  (the link itself is meant)
        followed = not writes and named.endswith(self._followed or ("\n",)) and _is_below(named, folder)
        if not (inside or system or followed):
            self.problems.append(f"{event} {real!r:.200}{' for writing' if writes else ''}")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def limit_memory() -> None:
    """Let an allocation that a small file asks for fail, and not the machine."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak_bytes() -> int:
    """The largest resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
