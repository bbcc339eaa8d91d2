"""Run the target and its reference on the same calls, and compare what every operator made.

Four lanes compute the traced program beside the target: the truth (a step more precise than the target) and eager
PyTorch in the target's precision; each goes on from its own results, and each once more from the target's, operator by
operator. The latter two tell what an operator adds by itself from what came to it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.diff.calls import Call, Text
from exporter.diff.errors import Errors
from exporter.diff.lanes import Lane, run_lanes
from exporter.diff.program import Program
from exporter.diff.targets import Target
from runtimes.signature import CacheSpec
from runtimes.tolerances import POISON

FREE, FORCED = slice(0, 2), slice(2, 4)  # lanes: (truth, eager) of their own results, and of the target's
DECODER = "decoder"
Watch = Callable[[Text, str, list[Any]], None]


@dataclass
class Found:
    """Errors of one value, added up and by itself."""

    total: Errors = field(default_factory=Errors)
    own: Errors = field(default_factory=Errors)
    note: str = ""


def compare_texts(
    programs: Sequence[Program],
    targets: Mapping[str, Target],
    lanes: tuple[Lane, Lane],
    texts: Sequence[Text],
    cache: CacheSpec,
    device: torch.device,
    whole: Target | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, dict[str, Found]]:
    """{graph: {value: what was found}}.

    Args:
        programs, targets: of every graph; the decoder is the last.
        lanes: truth, and eager in the target's precision.
        whole: the decoder's graph without values shown; what it makes of its own is found as "logits" of "".
        watch: told of every text, operator of the decoder, and its results in the free lanes, call by call.
    """
    found: dict[str, dict[str, Found]] = {program.name: {} for program in programs}
    found[""] = {}
    for text in texts:
        shown: list[dict[str, Any]] = [{} for _ in range(4)]  # per lane: keys and values of the text's images
        for program in programs[:-1]:
            assert text.images is not None
            shown = _run_encoder(program, targets[program.name], lanes, text, device, found[program.name])
        seen = functools.partial(watch, text)
        _run_text(programs[-1], targets[DECODER], lanes, text, shown, cache, device, found, whole, seen)
    return found


def _run_encoder(
    program: Program,
    target: Target,
    lanes: tuple[Lane, Lane],
    text: Text,
    device: torch.device,
    found: dict[str, Found],
) -> list[dict[str, Any]]:
    """Encode the text's images; per lane, what the decoder reads of them. The last is the target's own."""
    assert text.images is not None
    feeds = {name: np.asarray(array) for name, array in text.images.encoder_feeds().items()}
    values = target.run(feeds)
    call = Call(feeds=feeds, real=np.ones((text.rows, 1), bool))
    outputs = _run_call(program, values, lanes, [as_tensors(feeds)] * 4, call, device, found, None)
    names = [spec.name for spec in program.signature.outputs]
    mine = {name: values[name] for name in names}
    return [*(dict(zip(names, each, strict=True)) for each in outputs[FREE]), mine, mine]


def _run_text(
    program: Program,
    target: Target,
    lanes: tuple[Lane, Lane],
    text: Text,
    shown: list[dict[str, Any]],
    cache: CacheSpec,
    device: torch.device,
    found: dict[str, dict[str, Found]],
    whole: Target | None,
    watch: Callable[[str, list[Any]], None],
) -> None:
    """All calls of a text on the decoder, each with the state that the one before has left."""
    past = first_state(program, text.rows, cache)
    states: list[dict[str, Any]] = [as_tensors(past) for _ in lanes]
    mine, wholly = dict(past), dict(past)
    images = {name: np.asarray(value) for name, value in shown[-1].items()}
    for call in text.calls:
        values = target.run({**call.feeds, **images, **mine})
        forced = as_tensors({**call.feeds, **images, **mine})
        free = [
            {**as_tensors(call.feeds), **as_tensors(of_images), **state}
            for of_images, state in zip(shown[FREE], states, strict=True)
        ]
        outputs = _run_call(program, values, lanes, [*free, forced, forced], call, device, found[DECODER], cache, watch)
        if whole is not None:
            alone = whole.run({**call.feeds, **images, **wholly})
            logits = [torch.from_numpy(alone["logits"]).to(device), *(each[0] for each in outputs[FREE])]
            found[""].setdefault("logits", Found()).total.add(*logits, ignored=None)
            wholly = next_state(alone, cache)
        mine = next_state(values, cache)
        states = [dict(zip(cache.past_names(), each[1:], strict=True)) for each in outputs[FREE]]


def _run_call(
    program: Program,
    values: Mapping[str, np.ndarray],
    lanes: tuple[Lane, Lane],
    feeds: list[dict[str, Tensor]],
    call: Call,
    device: torch.device,
    found: dict[str, Found],
    cache: CacheSpec | None,
    watch: Callable[[str, list[Any]], None] = lambda *_: None,
) -> list[list[Tensor]]:
    """One call in all lanes; errors are added to `found`."""
    of_node: dict[str, list[str]] = {}
    for value, node in program.values.items():
        if value in values:
            of_node.setdefault(node, []).append(value)
    states = set() if cache is None else set(cache.present_names())
    poison = None if cache is None else POISON[cache.dtype]

    def visit(node: str, results: list[Any]) -> list[Any]:
        watch(node, results[FREE])
        for value in of_node.get(node, ()) if isinstance(results[0], Tensor) else ():
            target = torch.from_numpy(values[value]).to(device)
            entry = found.setdefault(value, Found())
            if target.shape != results[0].shape:
                entry.note = f"has shape {list(target.shape)}, expected {list(results[0].shape)}"
                continue
            kept = kept_part(program, node, value in states, call, device)
            compared = [kept(each) for each in (target, *results)]
            entry.total.add(compared[0], *compared[1:3], ignored=poison)
            entry.own.add(compared[0], *compared[3:5], ignored=poison)
            results = [*results[FREE], *(target.to(result.dtype) for result in results[FORCED])]
        return results

    return run_lanes(program, (*lanes, *lanes), feeds, device, visit)


def kept_part(program: Program, node: str, is_state: bool, call: Call, device: torch.device) -> Any:
    """Takes of a value what means something: real tokens, written slots."""
    if is_state and call.slots is not None:
        slots = torch.from_numpy(call.slots).to(device)
        return lambda value: value.transpose(1, 2)[:, : slots.shape[1]][slots]
    if node in program.of_tokens:
        axis, real = program.of_tokens[node], torch.from_numpy(call.real).to(device)
        return lambda value: value.movedim(axis, 1)[real]
    return lambda value: value


def first_state(program: Program, rows: int, cache: CacheSpec) -> dict[str, np.ndarray]:
    """Before the first call: caches full of what nobody may read, or without room for anything; sums of zero."""
    specs = {spec.name: spec for spec in program.signature.inputs}
    state = {}
    for name, tensor in zip(cache.past_names(), cache.tensors, strict=True):
        shape = [rows, *(0 if isinstance(size, str) else size for size in specs[name].shape[1:])]
        state[name] = np.full(shape, 0.0 if tensor.slot_axis is None else POISON[cache.dtype], np.float32)
    return state


def next_state(values: Mapping[str, np.ndarray], cache: CacheSpec) -> dict[str, np.ndarray]:
    """What the next call is fed of this one's results."""
    names = zip(cache.past_names(), cache.present_names(), strict=True)
    return {past: values[present] for past, present in names}


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays as tensors of the same memory."""
    return {name: torch.as_tensor(array) for name, array in arrays.items()}
