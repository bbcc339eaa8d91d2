"""What of an unfinished export is done: a journal, from which the same export goes on after it was killed.

A stage that is finished is written down with the digests of its files, under a key that stands for everything the
export is made from and by. The next run with that key takes over the stages whose files are still what was written
down, and repeats the others.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtimes.artifact import FileEntry, file_entry

Make = Callable[[], tuple[Sequence[str], Any]]  # makes a stage's files: (their names, what else to remember, for JSON)


class Stages:
    """The journal of one export."""

    def __init__(self, journal: Path, key: str, path: Callable[[str], Path]) -> None:
        """Take over what an earlier run with this key wrote down.

        Args:
            path: where a staged file of that name lies.
        """
        self._journal = journal
        self._key = key
        self._path = path
        self._done: dict[str, dict[str, Any]] = read_journal(journal, key)
        self._hashed: dict[str, FileEntry] = {}
        self.taken_over: list[str] = []  # stages that did not have to be repeated

    @property
    def nbytes(self) -> int:
        """Bytes of the files of finished stages."""
        return sum(entry["bytes"] for done in self._done.values() for entry in done["files"].values())

    def has(self, stage: str) -> bool:
        """Whether `stage` was finished by an earlier run, and its files are still as they were."""
        if stage not in self._done:
            return False
        for name, entry in self._done[stage]["files"].items():
            path = self._path(name)
            if name not in self._hashed and path.is_file():
                self._hashed[name] = file_entry(path)
            if name not in self._hashed or self._hashed[name].to_json() != entry:
                del self._done[stage]
                return False
        return True

    def run(self, stage: str, make: Make) -> tuple[list[str], Any]:
        """(names of the stage's files, what else was remembered), made now or by an earlier run."""
        if self.has(stage):
            self.taken_over.append(stage)
        else:
            names, result = make()
            self._hashed |= {name: _settle(self._path(name)) for name in names}
            files = {name: self._hashed[name].to_json() for name in names}
            self._done[stage] = {"files": files, "result": result}
            write_journal(self._journal, self._key, self._done)
        done = self._done[stage]
        return list(done["files"]), done["result"]

    def entry(self, name: str) -> FileEntry:
        """What a staged file is; digests that are known are not computed again."""
        return self._hashed.get(name) or file_entry(self._path(name))


def read_journal(journal: Path, key: str | None = None) -> dict[str, dict[str, Any]]:
    """The finished stages that it lists: {stage: {"files": {name: entry}, "result"}}; none if it is of another key, or
    was not written here: one that came along with a checkpoint could pass off any graph as ours."""
    try:
        data = json.loads(journal.read_text(encoding="utf-8"))
        if data["inode"] != journal.stat(follow_symlinks=False).st_ino or key not in (None, data["key"]):
            return {}
        return {
            stage: {"files": dict(done["files"]), "result": done["result"]} for stage, done in data["stages"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # it was never there, or is not whole: everything is done again


def write_journal(path: Path, key: str, stages: dict[str, dict[str, Any]]) -> None:
    """Replace the journal; after a power cut it is the old one or the new one, whole."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)  # which may be a link that a checkpoint brought along
    with partial.open("x", encoding="utf-8") as file:
        # whoever packs a checkpoint cannot know which number the file system will give to a file of it
        json.dump({"key": key, "stages": stages, "inode": os.fstat(file.fileno()).st_ino}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(path: Path) -> FileEntry:
    """Bring a file to the disk, and meanwhile say what it is."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        on_disk = pool.submit(os.fsync, file.fileno())
        entry = file_entry(path)
        on_disk.result()
    return entry
