"""Work in a thread: its result, its error, its progress, and its end when it is not wanted any more."""

import threading
from collections.abc import Callable

import pytest

from exporter.background import StoppedError, in_background


def test_both_go_on_at_once() -> None:
    """The work waits for the block, and the block for the work: neither could if they took turns."""
    ours, theirs = threading.Event(), threading.Event()

    def work(advance: Callable[[int], None]) -> str:
        theirs.set()
        assert ours.wait(30)
        advance(3)
        advance(4)
        return "done"

    told: list[int] = []
    with in_background(work) as result:
        assert theirs.wait(30)
        ours.set()
        assert result(told.append) == "done"
    assert sum(told) == 7


def test_its_error_is_ours() -> None:
    """It is raised where the result is asked for."""

    def work(advance: Callable[[int], None]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), in_background(work) as result:
        result(lambda amount: None)


def test_an_error_of_ours_stops_it() -> None:
    """At its next step, and not at its end; the error is the one that is seen."""
    ended: list[BaseException] = []
    failed = threading.Event()

    def work(advance: Callable[[int], None]) -> None:
        try:
            assert failed.wait(30)
            for _ in range(10**9):
                advance(1)
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(KeyboardInterrupt), in_background(work):  # noqa: PT012
        failed.set()
        raise KeyboardInterrupt
    assert [type(error) for error in ended] == [StoppedError]
