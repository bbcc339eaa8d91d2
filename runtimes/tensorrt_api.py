"""The `tensorrt` and `tensorrt_rtx` modules behind one door: they have the same interface and different purposes."""

import dataclasses
import functools
import importlib
import logging
from typing import Any

from runtimes.errors import RuntimeMissingError

log = logging.getLogger("runtimes.tensorrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flavor:
    """One of the two libraries."""

    target: str  # its name on the command line and in the manifest
    module: str
    extra: str  # of export-llm, that installs it
    builds_without_gpu: bool


FLAVORS: dict[str, Flavor] = {
    "tensorrt": Flavor(target="tensorrt", module="tensorrt", extra="tensorrt", builds_without_gpu=False),
    "tensorrt-rtx": Flavor(target="tensorrt-rtx", module="tensorrt_rtx", extra="tensorrt-rtx", builds_without_gpu=True),
}


def import_tensorrt(target: str) -> Any:
    """The library's module; RuntimeMissingError says how to install it."""
    flavor = FLAVORS[target]
    try:
        module = importlib.import_module(flavor.module)
        module.Builder  # noqa: B018  (PyPI's `tensorrt` may be a placeholder with nothing inside)
    except Exception as error:  # a missing shared library surfaces as anything from ImportError to OSError
        raise RuntimeMissingError(
            f"target {target} needs the {flavor.module} library, which cannot be imported ({error}):"
            f" pip install 'export-llm[{flavor.extra}]'"
        ) from None
    return module


@functools.cache
def get_logger(target: str) -> Any:
    """The library's one logger: it keeps only the first that it is given in a process, so everyone shares this one.

    It passes messages on to Python's logging and keeps warnings and errors in `messages` for whoever reads them.
    """
    trt = import_tensorrt(target)
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in levels:
                self.messages.append(message)
                if levels[severity] == logging.ERROR:
                    self.errors.append(message)
            log.debug("%s: %s", severity, message)

        def clear(self) -> None:
            self.messages.clear()
            self.errors.clear()

    return Logger()
