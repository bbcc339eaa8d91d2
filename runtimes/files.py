"""Which files of an artifact are read: plain ones, of a size that fits what they are, and none by a link out of it."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from runtimes.errors import ArtifactError

MAX_JSON_BYTES = 32 << 20  # a manifest has some 100 kB


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


def leads_out(path: Path, folder: Path) -> bool:
    """True where a link on the way to `path` leads out of `folder`.

    The Hugging Face hub's cache is a folder of its own here: it holds snapshots/REVISION/FILE, which are links to
    blobs/HASH beside `snapshots`.
    """
    folder, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # which a loop does not disturb
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return not any(target.is_relative_to(place) for place in (folder, *blobs))


def require_inside(path: Path) -> None:
    """ArtifactError where a file is a link out of its folder."""
    if os.path.islink(path) and leads_out(path, path.parent):  # noqa: PTH114  (it takes names of any length)
        raise ArtifactError(
            f"{path} is a link that leads out of its folder, to {os.path.realpath(path)}: put the file itself there, if"
            " you trust it"
        )


def read_text(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a small file.

    Raises:
        ArtifactError: it is absent, no plain file, a link out of its folder, too large, or not text in UTF-8.
    """
    require_inside(path)
    if reason := why_no_file(path):
        raise ArtifactError(f"{path} cannot be read: {reason}")
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise ArtifactError(f"{path} has {size:,} bytes, expected at most {most_bytes:,}: it is damaged")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; ArtifactError as read_text, and where it holds none."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an endless number
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} must hold a JSON object, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A JSON value as it may stand in a message."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 80 else text[:77] + "..."
