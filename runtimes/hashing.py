"""Digests of files: SHA-256, on all cores, without reading what a sparse file does not store.

Small and written files have their plain SHA-256, which any tool can check. A checkpoint's own files, which are hashed
to know what an export was made of, have the SHA-256 of the SHA-256 digests of their chunks: chunks are hashed side by
side, and the holes of a sparse file are not read.
"""

import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 64 << 20  # of digests by chunks
PIECE_BYTES = 4 << 20  # read at a time
WHOLE_PIECE_BYTES = 16 << 20  # ... of a file whose plain digest is wanted
OVERLAP_BYTES = 8  # that a piece shows of the next: no number is wider
MOST_THREADS = 8  # a disk gives no more to more

Look = Callable[[int, memoryview, int], None]  # (offset in the file, bytes, how many of them belong to this piece)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file.

    In large pieces: whoever hashes while another thread computes in Python waits for the interpreter after each.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(max(1, min(WHOLE_PIECE_BYTES, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[Path]) -> Mapping[Path, str]:
    """Hex SHA-256 of every file, several at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(paths, pool.map(sha256_of, paths), strict=True))


def sha256_of_chunks(
    path: Path, look: Look | None = None, advance: Callable[[int], None] = lambda _: None, *, chunk: int = CHUNK_BYTES
) -> str:
    """Hex SHA-256 of the SHA-256 digests, 32 bytes each, of the file's chunks of `chunk` bytes.

    Args:
        look: shown every byte that the file stores, from several threads; holes are all zeros, and left out.
        advance: told of bytes that are done.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_threads()) as pool:
        stored = _stored_chunks(file.fileno(), size, chunk)
        futures = []
        for start in range(0, size, chunk):
            length = min(chunk, size - start)
            if start // chunk not in stored:
                futures.append(pool.submit(_digest_of_zeros, length))
                advance(length)
            else:
                futures.append(pool.submit(_digest_of_chunk, file.fileno(), start, length, look, advance))
        try:
            return hashlib.sha256(b"".join(future.result() for future in futures)).hexdigest()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@functools.lru_cache(maxsize=4)
def _digest_of_zeros(length: int) -> bytes:
    return hashlib.sha256(bytes(length)).digest()


def _digest_of_chunk(fd: int, start: int, length: int, look: Look | None, advance: Callable[[int], None]) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES + OVERLAP_BYTES))
    for offset in range(start, start + length, PIECE_BYTES):
        mine = min(PIECE_BYTES, start + length - offset)
        found = os.preadv(fd, [buffer[: mine + OVERLAP_BYTES]], offset)
        if found < mine:
            raise OSError(errno.EIO, "a file became shorter while it was read")
        digest.update(buffer[:mine])
        if look is not None:
            look(offset, buffer[:found], mine)
        advance(mine)
    return digest.digest()


def _stored_chunks(fd: int, size: int, chunk: int) -> set[int]:
    """Numbers of the chunks of which the file stores something."""
    stored: set[int] = set()
    for first, end in _stored_ranges(fd, size):
        stored.update(range(first // chunk, -(-end // chunk)))
    return stored


def _stored_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of what lies between holes; all of it where the file system does not tell."""
    position = 0
    while position < size:
        try:
            first = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: a hole up to the end
                yield position, size
            return
        position = os.lseek(fd, first, os.SEEK_HOLE)
        yield first, position


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))
