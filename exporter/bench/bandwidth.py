"""How fast this machine reads memory, with as many threads as the contestants have."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUFFER_BYTES = 512 << 20  # far more than the caches hold
PASSES = 3


class MemoryReader:
    """Reads one large buffer; what decoding does with the weights is no more than that."""

    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(BUFFER_BYTES // 4, np.int32), threads)
        self._pool = ThreadPoolExecutor(threads)

    def bytes_per_second(self) -> float:
        """The best of a few passes."""
        seconds = []
        for _ in range(PASSES):
            start = time.perf_counter()
            # The largest number: numpy lets go of the interpreter's lock, and compares faster than memory delivers.
            list(self._pool.map(np.max, self._parts))
            seconds.append(time.perf_counter() - start)
        return BUFFER_BYTES / min(seconds)
