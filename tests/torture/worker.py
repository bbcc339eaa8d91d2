"""A process that reads hostile input, so that one which crashes or hangs takes nobody with it.

    python -m tests.torture.worker SEEDS SCRATCH

Reads {"reader", "seed", "first", "count"} from stdin, one JSON object a line, and says on stdout which case begins and
what became of it.
"""

import io
import json
import os
import random
import shutil
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from exporter.errors import ExportError
from graphs.errors import CheckpointError
from runtimes.errors import ArtifactError, FeedError, RuntimeMissingError
from tests.torture.guard import Guard, limit_memory, peak_bytes
from tests.torture.odd_files import OUTSIDE
from tests.torture.readers import READERS, SEEDS, Reader

USER_ERRORS = (ArtifactError, CheckpointError, ExportError, FeedError, RuntimeMissingError)
LONGEST_MESSAGE = 21_000  # characters


def prepare(name: str, seed: int, case: int, seeds: Path, folder: Path) -> None:
    """Put a case's files into an empty folder; `case` -1: the valid ones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if case < 0:
        shutil.copytree(seeds / SEEDS[name], folder, dirs_exist_ok=True)
        if name == "images":
            shutil.copy(folder / "a.png", folder / "picture")
    else:
        READERS[name].make(random.Random(f"{name}:{seed}:{case}"), seeds, folder)


def judge(reader: Reader, folder: Path, guard: Guard) -> tuple[str, str]:
    """(accepted, refused, escaped or crashed; why) of one case."""
    before = peak_bytes()
    verdict, text = "accepted", ""
    with guard.watching(folder, reader.follows), redirect_stdout(io.StringIO()):
        try:
            reader.read(folder)
        except USER_ERRORS as error:
            verdict, text = "refused", str(error)
        except BaseException:  # of Rust, a panic is no Exception
            verdict, text = "crashed", traceback.format_exc(limit=-6)
    if guard.problems:
        return "escaped", "; ".join(guard.problems)
    if verdict == "refused" and not text.strip():
        return "crashed", "an error without a message"
    if verdict == "refused" and len(text) > LONGEST_MESSAGE:
        return "crashed", f"a message of {len(text)} characters: {text[:300]}"
    if verdict == "refused" and any(not (c.isprintable() or c == "\n") for c in text):
        return "crashed", f"a message that is no plain text: {text[:1000]!r}"
    if (grown := peak_bytes() - before) > reader.peak_bytes:
        return "crashed", f"took {grown >> 20} MiB more than any case before ({verdict}: {text[:300]})"
    return verdict, text


def main() -> None:
    """Answer until stdin ends."""
    seeds, scratch = (Path(each) for each in sys.argv[1:])
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    folder = scratch / "case"
    shutil.copytree(seeds / "checkpoint", scratch / OUTSIDE, dirs_exist_ok=True)
    for name in ("sharded/model.safetensors.index.json", "portable/manifest.json", "text/text.txt", "text/tasks.jsonl"):
        shutil.copy(seeds / name, scratch / OUTSIDE)
    for name in ("gguf/model.gguf", "prefix/saved.prefix", "package/decoder.pt2", "genai/genai_config.json"):
        shutil.copy(seeds / name, scratch / OUTSIDE)
    shutil.copy(seeds / "images" / "a.png", scratch / OUTSIDE / "picture")
    shutil.copy(seeds / "parity" / "parity.json", scratch / OUTSIDE)
    shutil.copy(seeds / "images" / "preprocessor_config.json", scratch / OUTSIDE)
    guard = Guard()
    warm: set[str] = set()
    limit_memory()

    def say(**data: Any) -> None:
        print(json.dumps(data), file=replies, flush=True)

    for line in sys.stdin:
        job = json.loads(line)
        reader = READERS[job["reader"]]
        if job["reader"] not in warm:  # what is imported late is imported now
            say(begins=-1)
            prepare(job["reader"], 0, -1, seeds, folder)
            verdict, text = _first(reader, folder)
            if job["reader"] == "config.json":  # each family imports its own
                for config in (seeds / "configs").iterdir():
                    shutil.copy(config, folder / "config.json")
                    _first(reader, folder)
            say(ends=-1, verdict=verdict, text=text)
            warm.add(job["reader"])
        for case in range(job["first"], job["first"] + job["count"]):
            say(begins=case)
            prepare(job["reader"], job["seed"], case, seeds, folder)
            verdict, text = judge(reader, folder, guard)
            say(ends=case, verdict=verdict, text=text[:4000])
        say(done=True)


def _first(reader: Reader, folder: Path) -> tuple[str, str]:
    """The valid input, which must be accepted; modules that are imported late are read here, unwatched."""
    try:
        with redirect_stdout(io.StringIO()):
            reader.read(folder)
    except BaseException:
        return "crashed", f"the valid input was not accepted:\n{traceback.format_exc(limit=-6)}"
    return "accepted", ""


if __name__ == "__main__":
    main()
