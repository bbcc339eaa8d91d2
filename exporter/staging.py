"""Whole or not at all: files are written beside their destination and appear there by renaming.

An export that is killed or interrupted leaves hidden files beside OUT: what it had finished, from which the same
export to OUT goes on, and which any other export to OUT removes.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from exporter.errors import ExportError
from exporter.locking import hold_lock
from exporter.stages import Stages, read_journal, sync_folder
from runtimes.artifact import (
    CLIENT_GRAPH_FILE,
    GENAI_CONFIG,
    GOLDEN_FILE,
    GRAPH_FILES,
    MANIFEST,
    PARITY_FILE,
    foreign_files,
    is_artifact,
    made_by_export,
)

NOTHING_LEFT = "nothing was left behind"
WHAT_IS_DONE_IS_KEPT = "finished stages are kept in {}: the same export goes on from there"

_PARTIAL, _OLD = ".partial", ".old"


class Staging(Protocol):
    """Where the files of an unfinished artifact are written."""

    folder: Path
    stages: Stages

    def path(self, name: str) -> Path:
        """Where to write the file that will be called `name`."""


def check_destination(out: Path, checkpoint: Path, *, reference: bool, force: bool) -> None:
    """Refuse a destination where something of the user's would be lost; ExportError says what to do."""
    same = out.exists() and out.resolve() == checkpoint.resolve()
    if reference:
        if not same:
            raise ExportError(
                f"--weights reference writes the graph beside the checkpoint's own files: pass -o {checkpoint}"
            )
        if not is_artifact(out):
            ours = {*GRAPH_FILES.values(), CLIENT_GRAPH_FILE, GENAI_CONFIG, PARITY_FILE, GOLDEN_FILE, MANIFEST}
            ours -= _journaled(_journal(out, in_place=True))  # which a killed export made
            foreign = sorted(name for name in ours if (out / name).exists())
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
def hold_destination(out: Path, *, in_place: bool) -> Iterator[None]:
    """Be the only one who writes to `out`, below a folder that is made where it is missing.

    Raises:
        ExportError: another process writes to `out`.
    """
    out = _absolute(out)
    with _making(out if in_place else out.parent), hold_lock(_lock(out, in_place=in_place), str(out)):
        yield


@contextmanager
def stage(out: Path, *, in_place: bool, key: str = "") -> Iterator[Staging]:
    """Yield a place to write to; on leaving without an error, everything appears at `out`, else nothing does.

    An error removes what was written, and carries the note NOTHING_LEFT. An interruption (Ctrl-C, SIGTERM) keeps the
    stages that were finished, and is noted with WHAT_IS_DONE_IS_KEPT.

    Args:
        key: of everything that the files are made from; stages that an earlier run with the same key finished are
            taken over. Empty: nothing is kept.
    """
    out = _absolute(out)
    place = _stage_beside(out, key) if in_place else _stage_folder(out, key)
    with place as staging:
        yield staging


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow a link that the rename must replace)


class _Folder:
    """A hidden folder beside OUT, which becomes OUT."""

    def __init__(self, folder: Path, journal: Path, key: str) -> None:
        self.folder = folder
        self.stages = Stages(journal, key, self.path)

    def path(self, name: str) -> Path:
        return self.folder / name


class _Beside:
    """Files under hidden names in a folder that already holds the weights."""

    def __init__(self, folder: Path, journal: Path, key: str) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.stages = Stages(journal, key, self.path)

    def path(self, name: str) -> Path:
        if name not in self.names:
            self.names.append(name)
        return self.folder / _hidden(name)


@contextmanager
def _stage_folder(out: Path, key: str) -> Iterator[_Folder]:
    parent, folder = out.parent, out.parent / _hidden(out.name)
    journal = _journal(out, in_place=False)
    if (old := folder.with_name(folder.name + _OLD)).exists() and not out.exists():
        old.rename(out)  # of an export that was killed between two renames
    if key and (kept := _journaled(journal, key)):
        _remove_others(folder, kept)
    else:
        _remove(folder, journal)
    replaces = out.exists()
    folder.mkdir(exist_ok=True)
    with _noting(lambda: _remove(folder, journal), journal, folder):
        staging = _Folder(folder, journal, key)
        yield staging
        if out.exists() and not replaces:
            raise ExportError(f"OUT ({out}) appeared while this export ran: another one made it, and it is left alone")
        sync_folder(folder)
        _publish(folder, out)
    _remove(folder, journal)  # what was at OUT before
    sync_folder(parent)


def remove_remains(out: Path, *, in_place: bool) -> None:
    """Remove what an export left that was killed when all but that was done."""
    out = _absolute(out)
    journal = _journal(out, in_place=in_place)
    if in_place:
        _remove_beside(out, journal)
    else:
        _remove(out.parent / _hidden(out.name), journal)


def _journal(out: Path, *, in_place: bool) -> Path:
    return out / ".export-llm.journal" if in_place else out.parent / f".{out.name}.journal"


def _lock(out: Path, *, in_place: bool) -> Path:
    return out / ".export-llm.lock" if in_place else out.parent / f".{out.name}.lock"


def _publish(folder: Path, out: Path) -> None:
    """Let `folder` take OUT's place, in one step; what was there is then at `folder`."""
    if not out.exists():
        folder.rename(out)
        return
    if _exchange(folder, out):
        return
    old = folder.with_name(folder.name + _OLD)  # of file systems that cannot exchange names, such as NFS
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    old.rename(folder)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def _stage_beside(folder: Path, key: str) -> Iterator[_Beside]:
    journal = _journal(folder, in_place=True)
    for path in folder.iterdir():  # no export makes links: what is written to one that came along lands elsewhere
        if path.is_symlink() and path.name.startswith(".") and path.name.endswith(_PARTIAL):
            path.unlink()
    if key and (kept := _journaled(journal, key)):
        _hide_again(folder, kept)
    else:
        _remove_beside(folder, journal)
    staging = _Beside(folder, journal, key)
    with _noting(lambda: _remove_beside(folder, journal), journal, folder):
        yield staging
        # from now on a killed export's files may have their own names: the journal tells whose they are
        staging.stages.run("publish", lambda: ([name for name in staging.names if name != MANIFEST], None))
        old = [name for name in made_by_export(folder) if name not in staging.names]
        (folder / MANIFEST).unlink(missing_ok=True)  # without a manifest there is no artifact, while files change
        for name in old:
            (folder / name).unlink(missing_ok=True)
        for name in sorted(staging.names, key=lambda name: name == MANIFEST):
            staging.path(name).rename(folder / name)
        sync_folder(folder)
    journal.unlink(missing_ok=True)


@contextmanager
def _noting(remove: Callable[[], None], journal: Path, folder: Path) -> Iterator[None]:
    """Remove what an error leaves unfinished, and note on it what became of the files."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if read_journal(journal):
            error.add_note(WHAT_IS_DONE_IS_KEPT.format(folder))
        else:
            remove()
            error.add_note(NOTHING_LEFT)
        raise
    except BaseException as error:
        remove()
        error.add_note(NOTHING_LEFT)
        raise


def _hidden(name: str) -> str:
    return f".{name}{_PARTIAL}"


def _journaled(journal: Path, key: str | None = None) -> set[str]:
    """Names of the files that the journal of a killed export lists."""
    names = {name for done in read_journal(journal, key).values() for name in done["files"]}
    return {name for name in names if Path(name).name == name}  # a checkpoint may bring a journal with any


def _hide_again(folder: Path, names: set[str]) -> None:
    """Take back files that an export had begun to give their names when it was killed."""
    if (folder / MANIFEST).exists():
        return
    for name in names:
        if (folder / name).exists() and not (folder / _hidden(name)).exists():
            (folder / name).rename(folder / _hidden(name))


def _remove_beside(folder: Path, journal: Path) -> None:
    if not (folder / MANIFEST).exists():
        for name in _journaled(journal):
            (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(_PARTIAL) and _is_ours(path.name[1 : -len(_PARTIAL)]):
            path.unlink()
    journal.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    """True for the names that an export in place gives files."""
    prefix, _, rest = name.partition(".")
    return name in (MANIFEST, PARITY_FILE, GENAI_CONFIG, GOLDEN_FILE) or (
        prefix in ("decoder", "vision_encoder", "model") and rest != ""
    )


def _remove(folder: Path, journal: Path) -> None:
    journal.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Remove what lies in the folder and is not listed: half of a file, or the artifact that OUT was before."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


@contextmanager
def _making(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on an error, those that were not there and hold nothing are removed again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):  # it holds something
                each.rmdir()
        raise
