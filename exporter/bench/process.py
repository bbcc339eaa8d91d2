"""Our end of a worker: starts it in some interpreter, asks, and turns what goes wrong into one message."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import exporter
import graphs
import runtimes
from exporter.errors import ExportError
from runtimes.errors import RuntimeMissingError

LAST_WORDS = 400  # characters of a worker's stderr that a message shows


class WorkerProcess:
    """One worker. Use it in a `with` block."""

    def __init__(self, name: str, scratch: Path, *, python: str | None = None, threads: int) -> None:
        """Start it.

        Args:
            name: of the contestant, for messages.
            scratch: a folder for its log, and for what it imports of ours.
            python: another interpreter than this one.
            threads: what libraries that ask the environment use.

        Raises:
            RuntimeMissingError: there is no such interpreter.
        """
        self.name = name
        self._log = (scratch / f"{name.replace('/', '_')}.log").open("a+", encoding="utf-8", errors="replace")
        paths = [str(_package_folder(scratch)), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",  # the memory is read by threads of our own
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONSAFEPATH": "1",  # nothing is imported from the working directory
        }
        command = [python or sys.executable, "-m", "exporter.bench.worker"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, text=True
            )
        except OSError as error:
            self._log.close()
            raise RuntimeMissingError(
                f"{python} cannot be started: {error.strerror}; --peer-python is an interpreter"
            ) from None

    def ask(self, do: str, **arguments: Any) -> Any:
        """The result of one request.

        Raises:
            ExportError: the contestant refuses or fails, or its process ends.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, "arguments": arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise ExportError(f"{self.name} ended with status {status} when asked to {do}: {self._last_words()}")
        reply = json.loads(line)
        if "error" not in reply:
            return reply["result"]
        if reply["users"]:
            raise ExportError(f"{self.name}: {reply['error']}")
        raise ExportError(f"{self.name} could not {do}: {reply['error']}") from RuntimeError(reply["trace"])

    @property
    def process_id(self) -> int:
        """Of the operating system."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()[-LAST_WORDS:] or "it printed nothing"


def _package_folder(scratch: Path) -> Path:
    """A folder that holds our packages and nothing else: another interpreter must not find our libraries there."""
    folder = scratch / "packages"
    folder.mkdir(exist_ok=True)
    for package in (exporter, graphs, runtimes):
        link = folder / package.__name__
        if not link.exists():
            link.symlink_to(Path(package.__path__[0]).resolve())
    return folder
