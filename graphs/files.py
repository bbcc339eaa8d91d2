"""Which files of a checkpoint are read: plain ones, of a size that fits what they are, and none by a link out of it."""

import os
import stat
from pathlib import Path

MAX_JSON_BYTES = 32 << 20  # the index of the largest mixtures of experts has some 10 MB


def is_file(path: Path) -> bool:
    """True for a plain file, or a link to one."""
    return not why_no_file(path)


def why_no_file(path: Path) -> str:
    """Why `path` is no plain file, nor a link to one, in words; empty where it is."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: the file system cannot even express the name
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode):
        return ""
    return "Is a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device, expected a plain file"


def leads_out(path: Path) -> bool:
    """True for a link to something outside of its folder.

    The Hugging Face hub's cache is a folder of its own here: it holds snapshots/REVISION/FILE, which are links to
    blobs/HASH beside `snapshots`.
    """
    if not os.path.islink(path):  # noqa: PTH114  (it takes names of any length)
        return False
    folder, target = path.parent.resolve(), Path(os.path.realpath(path))  # which a loop does not disturb
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return not any(target.is_relative_to(place) for place in (folder, *blobs))
