"""A process of its own for one contestant: reads requests from stdin, one JSON object a line, and answers on stdout.

    python -m exporter.bench.worker

It imports nothing but numpy until it is told to, so another interpreter than ours can run it.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
USER_ERRORS = ("ArtifactError", "CheckpointError", "ExportError", "FeedError", "RuntimeMissingError")


class Worker:
    """What the requests act on."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._reader: Any = None

    def missing(self, modules: list[str]) -> list[str]:
        """Which of these cannot be imported here."""
        return [name for name in modules if importlib.util.find_spec(name) is None]

    def prepare(self, engine: str, checkpoint: str, precision: str, folder: str) -> str:
        """Let the engine make its model of the checkpoint; return where it is."""
        module = importlib.import_module(f"exporter.bench.engines.{engine}")
        Path(folder).mkdir(parents=True)
        return str(module.prepare(Path(checkpoint), precision, Path(folder)))

    def load(self, engine: tuple[str, str], model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load a model. The time includes that of importing its library."""
        start = time.perf_counter()
        module, name = engine
        self._engine = getattr(importlib.import_module(f"exporter.bench.engines.{module}"), name)(model, **options)
        return {
            "load_s": time.perf_counter() - start,
            "loaded_bytes": _status_bytes("VmRSS"),
            "description": self._engine.description,
            "weight_bytes": self._engine.weight_bytes,
            "cache_number_bytes": self._engine.cache_number_bytes,
        }

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Continue the prompts by that many tokens; the first comes from the prefill."""
        start = time.perf_counter()
        first = self._engine.prefill(prompts, new_tokens)
        middle = time.perf_counter()
        others = self._engine.decode(new_tokens - 1)
        end = time.perf_counter()
        rows = [list(row) for row in zip(first, *others, strict=True)]
        return {"prefill_s": middle - start, "decode_s": end - middle, "token_ids": rows}

    def peak_bytes(self) -> int:
        """The largest resident set of this process so far, files that it mapped included."""
        return _status_bytes("VmHWM")

    def read_memory(self, threads: int) -> float:
        """Bytes a second."""
        if self._reader is None:
            self._reader = importlib.import_module("exporter.bench.bandwidth").MemoryReader(threads)
        result: float = self._reader.bytes_per_second()
        return result


def _status_bytes(name: str) -> int:
    """A size that the kernel keeps of this process."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{STATUS} has no {name}")


def answer(worker: Worker, line: str) -> dict[str, Any]:
    """{"result"} of the method that a request names, or {"error", "users", "trace"}."""
    request = json.loads(line)
    try:
        method: Callable[..., Any] = getattr(worker, request["do"])
        return {"result": method(**request["arguments"])}
    except Exception as error:
        users = type(error).__name__ in USER_ERRORS
        text = str(error) if users else f"{type(error).__name__}: {error}"
        return {"error": text, "users": users, "trace": traceback.format_exc()}


def main() -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(answer(worker, line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
