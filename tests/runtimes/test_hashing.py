"""Digests by chunks: hashlib on the whole bytes is the truth, holes or not."""

import hashlib
from pathlib import Path

import pytest

from runtimes.hashing import PIECE_BYTES, sha256_of, sha256_of_chunks, sha256_of_each

CHUNK = 3 * PIECE_BYTES


def digest_by_hand(data: bytes) -> str:
    """SHA-256 of the SHA-256 of every CHUNK bytes."""
    chunks = (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + PIECE_BYTES + 5])
def test_it_is_the_digest_of_digests(tmp_path: Path, size: int) -> None:
    """At sizes around every border; and the plain one is hashlib's."""
    data = hashlib.shake_128(b"seed").digest(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert sha256_of_chunks(path, chunk=CHUNK) == digest_by_hand(data)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert sha256_of_each([path]) == {path: hashlib.sha256(data).hexdigest()}


def sparse(path: Path, parts: dict[int, bytes], size: int) -> bytes:
    """A file that stores these parts only; its bytes."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
    return path.read_bytes()


@pytest.mark.parametrize(
    "parts", [{}, {0: b"a"}, {CHUNK * 2 + 7: b"b" * 9}, {CHUNK - 2: b"over the border"}, {5 * CHUNK - 1: b"z"}]
)
def test_holes_count_as_zeros(tmp_path: Path, parts: dict[int, bytes]) -> None:
    """The digest of a sparse file is that of a copy without holes; nothing of a hole is looked at."""
    path, seen = tmp_path / "sparse", []
    data = sparse(path, parts, 5 * CHUNK)
    assert sha256_of_chunks(path, lambda offset, view, mine: seen.append(mine), chunk=CHUNK) == digest_by_hand(data)
    (tmp_path / "dense").write_bytes(data)
    assert sha256_of_chunks(tmp_path / "dense", chunk=CHUNK) == digest_by_hand(data)
    if path.stat().st_blocks * 512 < CHUNK:  # the file system keeps holes
        assert sum(seen) <= 2 * CHUNK


def test_every_byte_is_looked_at_once(tmp_path: Path) -> None:
    """In pieces that show a few bytes of the next."""
    data = hashlib.shake_128(b"look").digest(2 * CHUNK + 11)
    (tmp_path / "file").write_bytes(data)
    found, done = {}, []

    def look(offset: int, view: memoryview, mine: int) -> None:
        assert bytes(view) == data[offset : offset + len(view)]
        assert len(view) in (mine, mine + 8) or offset + len(view) == len(data)
        found[offset] = bytes(view[:mine])

    sha256_of_chunks(tmp_path / "file", look, done.append, chunk=CHUNK)
    assert b"".join(found[offset] for offset in sorted(found)) == data
    assert sum(done) == len(data)
