"""Measuring contestants in turn, so that whatever else the machine does hits all of them alike."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exporter.bench.contestants import Contestant
from exporter.bench.plan import Plan
from exporter.progress import Progress

LOADS = 3
SETTLE_S = 0.02  # threads that still spin for more work after a run must not take the next contestant's cores


class Process(Protocol):
    """What measuring needs of exporter.bench.process.WorkerProcess."""

    def ask(self, do: str, **arguments: Any) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """One prompt continued."""

    prefill_s: float  # from the token ids to the first new one
    decode_s: float  # for all others
    token_ids: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that was measured of one contestant; warm-ups and runs by prompt length."""

    contestant: Contestant
    description: str
    weight_bytes: int | None
    cache_number_bytes: int | None
    load_s: list[float]
    loaded_bytes: int
    peak_bytes: int
    warmup_s: Mapping[int, float]
    runs: Mapping[int, list[Run]]


def measure(
    contestants: Sequence[Contestant],
    plan: Plan,
    vocab_size: int,
    start: Callable[[Contestant], Process],
    start_reader: Callable[[], Process],
    progress: Progress,
) -> tuple[list[Measured], dict[int, list[float]]]:
    """Load every contestant, then run them in turn; (what was measured, bytes a second of memory by prompt length).

    Args:
        vocab_size: prompts are token ids below it.
        start: a worker's process for a contestant.
        start_reader: one that reads memory, once a round.
    """
    warmups: list[dict[int, float]] = [{} for _ in contestants]
    runs: list[dict[int, list[Run]]] = [{length: [] for length in plan.prompt_tokens} for _ in contestants]
    bandwidth: dict[int, list[float]] = {length: [] for length in plan.prompt_tokens}
    with contextlib.ExitStack() as stack:
        processes, loads = _load_all(contestants, start, stack, progress)
        reader = stack.enter_context(contextlib.closing(start_reader()))
        for length in plan.prompt_tokens:
            request = {"prompts": plan.prompts(length, vocab_size), "new_tokens": plan.new_tokens}
            progress.start(f"warm up, {length} tokens", len(contestants))
            for index, process in enumerate(processes):
                run = _run(process, request)
                warmups[index][length] = run.prefill_s + run.decode_s
                progress.advance(1)
            progress.start(f"measure, {length} tokens", plan.repeats * len(contestants))
            for _ in range(plan.repeats):
                bandwidth[length].append(reader.ask("read_memory", threads=plan.threads))
                for index, process in enumerate(processes):
                    runs[index][length].append(_run(process, request))
                    progress.advance(1)
        peaks = [process.ask("peak_bytes") for process in processes]
    measured = [
        Measured(
            contestant=contestant,
            description=loads[index][-1]["description"],
            weight_bytes=loads[index][-1]["weight_bytes"],
            cache_number_bytes=loads[index][-1]["cache_number_bytes"],
            load_s=[load["load_s"] for load in loads[index]],
            loaded_bytes=loads[index][-1]["loaded_bytes"],
            peak_bytes=peaks[index],
            warmup_s=warmups[index],
            runs=runs[index],
        )
        for index, contestant in enumerate(contestants)
    ]
    return measured, bandwidth


def _load_all(
    contestants: Sequence[Contestant],
    start: Callable[[Contestant], Process],
    stack: contextlib.ExitStack,
    progress: Progress,
) -> tuple[list[Process], list[list[dict[str, Any]]]]:
    """Load each several times, in a process of its own each time; the last ones stay."""
    loads: list[list[dict[str, Any]]] = [[] for _ in contestants]
    processes: list[Process] = []
    progress.start("load", LOADS * len(contestants))
    for turn in range(LOADS):
        for index, contestant in enumerate(contestants):
            with contextlib.ExitStack() as own:
                process = own.enter_context(contextlib.closing(start(contestant)))
                options = dict(contestant.options)
                loads[index].append(
                    process.ask("load", engine=contestant.engine, model=str(contestant.model), options=options)
                )
                if turn == LOADS - 1:
                    stack.push(own.pop_all())
                    processes.append(process)
            progress.advance(1)
    return processes, loads


def _run(process: Process, request: Mapping[str, Any]) -> Run:
    time.sleep(SETTLE_S)
    return Run(**process.ask("run", **request))
