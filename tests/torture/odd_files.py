"""What may lie where a file is expected: links out of the folder, devices, pipes, folders, or nothing."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

OUTSIDE = "outside"  # the folder beside the case's that nothing may be read from or written to


def put_odd(rng: Random, path: Path) -> None:
    """Replace a file by something odd."""
    path.unlink(missing_ok=True)
    rng.choice(_ODD)(path)


def link_out(path: Path) -> None:
    """A link to a whole file of that name outside."""
    path.symlink_to(outside_of(path) / path.name)


def outside_of(path: Path) -> Path:
    """The folder outside, of a file in the case's folder."""
    return next(parent.parent / OUTSIDE for parent in path.parents if parent.name == "case")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
        except OSError:  # the path is too long for a socket
            os.mkfifo(path)


_ODD: tuple[Callable[[Path], None], ...] = (
    link_out,
    link_out,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/proc/self/mem"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("."),
    lambda path: path.mkdir(),
    os.mkfifo,
    _socket,
    lambda path: path.write_bytes(b""),
    lambda path: None,
)
