"""Progress on stderr: bars on a terminal, plain lines elsewhere, nothing when quiet."""

import time
from types import TracebackType
from typing import Any, Protocol

PLAIN_INTERVAL_S = 5.0


class Progress(Protocol):
    """What long work tells of itself."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A new stage begins, of `total` steps or bytes if that is known."""

    def advance(self, amount: int) -> None:
        """That much of the stage is done."""


class Quiet:
    """Says nothing."""

    def start(self, stage: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Plain(Quiet):
    """One line per stage when it begins, and one every few seconds while it goes on; for logs."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._stage = ""
        self._total: int | None = None
        self._done = 0
        self._printed_s = 0.0

    def start(self, stage: str, total: int | None = None) -> None:
        self._stage, self._total, self._done = stage, total, 0
        self._say(stage)

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._total and time.monotonic() - self._printed_s > PLAIN_INTERVAL_S:
            self._say(f"{self._stage} {min(100, 100 * self._done // self._total)} %")

    def _say(self, text: str) -> None:
        self._printed_s = time.monotonic()
        self._console.print(text, highlight=False, markup=False)


class Bars(Quiet):
    """A rich progress bar; finished stages stay above it, with their time."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: Any = None

    def start(self, stage: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._progress.add_task(stage, total=total)

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, amount)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()


def make_progress(console: Any, quiet: bool) -> Quiet:
    """The progress display for a rich console on stderr; use it in a `with` block."""
    if quiet:
        return Quiet()
    return Bars(console) if console.is_terminal else Plain(console)
