"""Whole or not at all: files are written beside their destination and appear there by renaming.

A killed export leaves at most a hidden `.NAME.partial-PID` beside OUT, which the next export to OUT removes.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from exporter.errors import ExportError
from runtimes.artifact import (
    CLIENT_GRAPH_FILE,
    GENAI_CONFIG,
    GRAPH_FILES,
    MANIFEST,
    PARITY_FILE,
    foreign_files,
    is_artifact,
    made_by_export,
)

NOTHING_LEFT = "nothing was left behind"


class Staging(Protocol):
    """Where the files of an unfinished artifact are written."""

    folder: Path

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name


class _Beside:
    """Files under hidden names in a folder that already holds the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def path(self, name: str) -> Path:
        if name not in self.names:
            self.names.append(name)
        return self.folder / _partial_name(name)


def check_destination(out: Path, checkpoint: Path, *, reference: bool, force: bool) -> None:
    """Refuse a destination where something of the user's would be lost; ExportError says what to do."""
    same = out.exists() and out.resolve() == checkpoint.resolve()
    if reference:
        if not same:
            raise ExportError(
                f"--weights reference writes the graph beside the checkpoint's own files: pass -o {checkpoint}"
            )
        if not is_artifact(out):
            ours = (*GRAPH_FILES.values(), CLIENT_GRAPH_FILE, GENAI_CONFIG, PARITY_FILE, MANIFEST)
            foreign = [name for name in ours if (out / name).exists()]
            if foreign:
                raise ExportError(f"{out} holds {', '.join(foreign)}, which no export made: move it away first")
        elif not force:
            raise ExportError(f"{out} already holds an artifact: pass --force to replace it")
        return
    if same or checkpoint.resolve().is_relative_to(out.resolve()):
        raise ExportError(
            f"OUT ({out}) is or holds the checkpoint itself: choose another folder, or --weights reference"
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"OUT ({out}) exists and is no folder: choose another name")
    if out.exists() and any(out.iterdir()):
        if not is_artifact(out):
            raise ExportError(f"OUT ({out}) exists and is not an artifact, so it is left alone: choose another folder")
        if not force:
            raise ExportError(f"OUT ({out}) exists: pass --force to replace that artifact")
        if foreign := foreign_files(out):
            raise ExportError(
                f"OUT ({out}) holds what no export made, and would be lost: {', '.join(foreign[:8])}: move it away"
            )


@contextmanager
def stage(out: Path, *, in_place: bool) -> Iterator[Staging]:
    """Yield a place to write to; on leaving without an error, everything appears at `out`, else nothing does.

    An error that passes through carries the note NOTHING_LEFT.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow a link that the rename must replace)
    try:
        with _stage_beside(out) if in_place else _stage_folder(out) as staging:
            yield staging
    except BaseException as error:
        error.add_note(NOTHING_LEFT)
        raise


@contextmanager
def _stage_folder(out: Path) -> Iterator[_Folder]:
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out.parent, out.name)
    replaces = out.exists()
    folder = out.parent / _partial_name(out.name)
    folder.mkdir()
    try:
        yield _Folder(folder)
        if out.exists() and not replaces:
            raise ExportError(f"OUT ({out}) appeared while this export ran: another one made it, and it is left alone")
        old = out.parent / _partial_name(out.name + ".old")
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stage_beside(folder: Path) -> Iterator[_Beside]:
    staging = _Beside(folder)
    for path in folder.iterdir():
        if (match := _PARTIAL_FILE.match(path.name)) and not _runs(int(match[1])):
            path.unlink()
    try:
        yield staging
        old = [name for name in made_by_export(folder) if name not in staging.names]
        (folder / MANIFEST).unlink(missing_ok=True)  # without a manifest there is no artifact, while files change
        for name in old:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(staging.names, key=lambda name: name == MANIFEST):
            staging.path(name).rename(folder / name)
    finally:
        for name in staging.names:
            staging.path(name).unlink(missing_ok=True)


_PARTIAL_FILE = re.compile(
    r"\.(?:(?:decoder|vision_encoder|model)\..*|(?:manifest|parity|genai_config)\.json)\.partial-(\d+)$"
)


def _partial_name(name: str) -> str:
    return f".{name}.partial-{os.getpid()}"


def _remove_stale(parent: Path, name: str) -> None:
    """Remove what killed exports to the same OUT left, unless their process still runs."""
    pattern = re.compile(re.escape(f".{name}") + r"(?:\.old)?\.partial-(\d+)$")
    for path in parent.iterdir():
        if (match := pattern.match(path.name)) and not _runs(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
