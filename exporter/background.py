"""Work that goes on while something else is done: copying files while the model is traced."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

TELL_EVERY_S = 0.2

Advance = Callable[[int], None]  # told of bytes that are done
Result = TypeVar("Result")


class StoppedError(Exception):
    """Ends work whose result nobody wants any more."""


@contextmanager
def in_background(work: Callable[[Advance], Result]) -> Iterator[Callable[[Advance], Result]]:
    """Start work(advance) in a thread; yield what waits for its result, or raises its error, and tells how far it is.

    An error in the block stops the work, the next time that it calls `advance`.
    """
    stop, done = threading.Event(), [0]

    def advance(amount: int) -> None:
        if stop.is_set():
            raise StoppedError
        done[0] += amount

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, advance)

        def result(tell: Advance) -> Result:
            told, waits = 0, True
            while waits:
                waits = bool(wait([future], timeout=TELL_EVERY_S).not_done)
                tell(done[0] - told)
                told = done[0]
            return future.result()

        try:
            yield result
        except BaseException:
            stop.set()
            raise
