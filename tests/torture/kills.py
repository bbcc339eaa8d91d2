"""SIGKILL at random points of an export: what is at OUT is a whole artifact or none, and the next run finishes.

    python -m tests.torture.kills --kills 50

What the next run makes must be, byte for byte, what an export makes that nobody stopped.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from exporter.inputs import program_digest
from exporter.pipeline import ExportRequest, export
from exporter.progress import Quiet
from runtimes.artifact import is_artifact, open_artifact

Snapshot = dict[str, bytes]
Moment = tuple[int, float]  # (number of a step, seconds into it)


@dataclass(frozen=True)
class Scenario:
    """One way to export, and what is at OUT before."""

    options: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False
    replaces: bool = False


SCENARIOS: dict[str, Scenario] = {
    "fp16, a new OUT": Scenario({"precision": "fp16"}),
    "int4, another artifact replaced": Scenario({"precision": "int4:block=32", "force": True}, replaces=True),
    "in place": Scenario({"weights": "reference"}, in_place=True),
    "in place, another artifact replaced": Scenario({"weights": "reference", "force": True}, True, True),
    "dynamic, for transformers.js": Scenario({"layout": "dynamic", "client": "transformers-js"}),
}


@dataclass
class Score:
    """How the runs ended."""

    kills: int = 0
    found: Counter[str] = field(default_factory=Counter)  # what was at OUT after a kill
    taken_over: int = 0  # next runs that did not begin from nothing
    problems: list[str] = field(default_factory=list)


def torture(kills: int, seed: int, checkpoint: Callable[[Path], Path], report: Callable[[str], None]) -> Score:
    """Kill so many exports.

    Args:
        checkpoint: makes one in a folder.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not got
    program_digest()  # known to all processes: somebody may be editing the program
    chance, score = random.Random(seed), Score()
    with tempfile.TemporaryDirectory() as scratch:
        expected, events = {}, {}
        for number, (name, scenario) in enumerate(SCENARIOS.items()):
            place = Path(scratch) / f"whole{number}"
            events[name] = []
            assert _run(_request(checkpoint, place, scenario), events[name]) == 0, name
            expected[name] = _snapshot(place)
        names = list(SCENARIOS)
        for kill in range(kills):
            name = names[kill % len(names)]
            event = chance.randrange(len(events[name]))
            moment = (event, chance.uniform(0, events[name][event]))
            _one(name, Path(scratch) / f"kill{kill}", moment, checkpoint, expected[name], score)
            report(f"{kill + 1} {name}, step {event}: {len(score.problems)} problems")
    return score


def _one(
    name: str, place: Path, moment: Moment, checkpoint: Callable[[Path], Path], expected: Snapshot, score: Score
) -> None:
    scenario = SCENARIOS[name]
    request = _request(checkpoint, place, scenario)
    before = _snapshot(request.out) if scenario.replaces else {}
    _run(request, kill_at=moment)
    score.kills += 1
    score.found[_look_at(request.out, before, score)] += 1
    if not scenario.replaces and is_artifact(request.out):  # it had finished: the next run has nothing to do
        request = _request(lambda folder: folder, place, scenario)
    journaled = any(place.rglob(".*journal"))
    score.taken_over += journaled
    if (code := _run(request)) != 0:
        score.problems.append(f"{name}: the run after the kill at {moment} ended with {code}")
        return
    found = _snapshot(place)
    if found != expected:
        names = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        score.problems.append(f"{name}: after the kill at {moment} these differ: {', '.join(names)}")


def _look_at(out: Path, before: Snapshot, score: Score) -> str:
    """What is at OUT: none, or a whole artifact; anything else is a problem."""
    if not is_artifact(out):
        return "none"
    try:
        open_artifact(out)
    except Exception as error:
        score.problems.append(f"half an artifact: {error}")
        return "half"
    visible = {name: data for name, data in _snapshot(out).items() if not name.startswith(".")}
    return "the old one, whole" if before and visible == before else "the new one, whole"


def _request(checkpoint: Callable[[Path], Path], place: Path, scenario: Scenario) -> ExportRequest:
    folder = checkpoint(place / "checkpoint")
    out = folder if scenario.in_place else place / "out"
    if scenario.replaces:
        reference = {"weights": "reference"} if scenario.in_place else {}
        assert _run(ExportRequest(checkpoint=folder, out=out, verify=False, max_len=64, force=True, **reference)) == 0
    return ExportRequest(checkpoint=folder, out=out, **scenario.options)


class _Reporting(Quiet):
    """Tells another process when a step begins."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def start(self, stage: str, total: int | None = None) -> None:
        os.write(self._pipe, b".")


def _run(request: ExportRequest, events: list[float] | None = None, kill_at: Moment | None = None) -> int:
    """Export in a process of its own; its exit status, negative for a signal.

    Args:
        events: gets the seconds of each step.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 70
        try:
            result = export(request, _Reporting(writer))
            code = 0 if result.parity is None or result.parity.passed else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writer)
    started: list[float] = []
    while os.read(reader, 1):
        started.append(time.monotonic())
        if kill_at is not None and len(started) == kill_at[0] + 1:
            time.sleep(kill_at[1])
            os.kill(child, signal.SIGKILL)
    ended = time.monotonic()
    os.close(reader)
    if events is not None:
        events += [after - before for before, after in itertools.pairwise([*started, ended])]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _snapshot(folder: Path) -> Snapshot:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tiny_checkpoint(folder: Path) -> Path:
    """A small random Llama; where it is already, it is left alone."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> int:
    """Print the score; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    score = torture(asked.kills, asked.seed, tiny_checkpoint, lambda line: print(line, file=sys.stderr))
    found = ", ".join(f"{what} {count} times" for what, count in sorted(score.found.items()))
    print(f"{score.kills} kills; at OUT was {found}; {score.taken_over} next runs went on from finished stages")
    for problem in score.problems:
        print(f"PROBLEM {problem}")
    print("nothing was lost" if not score.problems else f"{len(score.problems)} problems")
    return 1 if score.problems else 0


if __name__ == "__main__":
    sys.exit(main())
