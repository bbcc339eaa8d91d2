"""Runs cases in worker processes, which may crash or hang, and counts what became of them."""

import collections
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 10.0  # a case takes milliseconds; other work on the machine may slow it down
START_S = 120.0  # imports, and the first, valid input
VERDICTS = ("accepted", "refused", "escaped", "crashed", "hung")
BUGS = ("escaped", "crashed", "hung")
BATCH = 500  # cases of one reader that a worker does in turn
MOST_SHOWN = 5  # bugs of one reader


@dataclass
class Tally:
    """What became of one reader's cases."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    bugs: list[tuple[int, str, str]] = field(default_factory=list)  # (case, verdict, why)
    messages: dict[int, tuple[str, str]] = field(default_factory=dict)  # what was said of each case

    def add(self, case: int, verdict: str, text: str) -> None:
        if case >= 0:
            self.counts[verdict] += 1
            self.messages[case] = (verdict, text)
        if verdict in BUGS:
            self.bugs.append((case, verdict, text))


class Worker:
    """One worker process, started again after a crash."""

    def __init__(self, seeds: Path, scratch: Path) -> None:
        self._command = [sys.executable, "-m", "tests.torture.worker", str(seeds), str(scratch)]
        self._log = scratch / "worker.log"
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        scratch.mkdir(parents=True, exist_ok=True)

    def run(self, reader: str, seed: int, cases: range, tally: Tally) -> None:
        """Do these cases; one that kills the worker is counted, and the rest goes on in another."""
        first = cases.start
        while first < cases.stop:
            self._ask({"reader": reader, "seed": seed, "first": first, "count": cases.stop - first})
            current, started = first, False
            while True:
                line = self._next(HANG_S if started else START_S)
                if isinstance(line, str):
                    reply = json.loads(line)
                    if "done" in reply:
                        return
                    if "begins" in reply:
                        current, started = reply["begins"], reply["begins"] >= 0
                    else:
                        tally.add(reply["ends"], reply["verdict"], reply["text"])
                        first = reply["ends"] + 1
                        started = False
                    continue
                why = "no answer in time" if line is None else f"the process ended: {self._process_end()}"
                tally.add(current, "hung" if line is None else "crashed", f"{why}\n{self._tail()}")
                self.close()
                first = max(first, current + 1)
                if current < 0:
                    return  # not even the valid input
                break

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, job: dict[str, Any]) -> None:
        if self._process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log.open("w"),
                text=True,
                cwd=ROOT,
                env=environment,
            )
            self._lines = queue.Queue()
            threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _next(self, timeout_s: float) -> str | bool | None:
        """A line; False: the process has ended; None: it says nothing."""
        try:
            return self._lines.get(timeout=timeout_s) or False
        except queue.Empty:
            return None

    def _process_end(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


def _pump(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def run(names: Sequence[str], cases: range, seed: int, seeds: Path, scratch: Path, processes: int) -> dict[str, Tally]:
    """{reader: what became of its cases}, done by that many processes."""
    tallies = {name: Tally() for name in names}
    jobs: queue.SimpleQueue[tuple[str, range]] = queue.SimpleQueue()
    for start in range(cases.start, cases.stop, BATCH):
        for name in names:
            jobs.put((name, range(start, min(start + BATCH, cases.stop))))

    def work(number: int) -> None:
        worker = Worker(seeds, scratch / f"worker{number}")
        try:
            while True:
                name, part = jobs.get_nowait()
                worker.run(name, seed, part, tallies[name])
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """The counts, a line for each reader."""
    widths = max(map(len, tallies))
    lines = [f"{'reader':{widths}}  {'cases':>8}" + "".join(f"{verdict:>10}" for verdict in VERDICTS)]
    for name, tally in tallies.items():
        counts = "".join(f"{tally.counts[verdict]:>10}" for verdict in VERDICTS)
        lines.append(f"{name:{widths}}  {tally.counts.total():>8}{counts}")
    return "\n".join(lines)


def bugs(tallies: dict[str, Tally], seed: int) -> str:
    """What went wrong, with the command that does it again; empty: nothing."""
    parts = []
    for name, tally in tallies.items():
        shown: dict[str, tuple[int, str, str]] = {}
        for case, verdict, text in sorted(tally.bugs):
            shown.setdefault(text.strip().splitlines()[-1][:60] if text.strip() else "", (case, verdict, text))
        for case, verdict, text in list(shown.values())[:MOST_SHOWN]:
            again = f"python -m tests.torture --reader {name!r} --seed {seed} --case {case}"
            parts.append(f"{name}, case {case}: {verdict}\n  again: {again}\n  {text.strip()}")
        if len(shown) > MOST_SHOWN:
            parts.append(f"{name}: and {len(shown) - MOST_SHOWN} other kinds of bugs")
    return "\n\n".join(parts)
