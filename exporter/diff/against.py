"""One artifact against another: where what their graphs compute parts, on the same tokens.

Graphs of one layout are compared value by value. Those of two layouts have inputs and masks of their own, so only what
each token becomes is compared: results of weights, and residual sums.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.diff.calls import Call, Text
from exporter.diff.compare import DECODER, Found, as_tensors, first_state, kept_part, next_state
from exporter.diff.lanes import Lane, run_lanes
from exporter.diff.program import Program
from exporter.diff.targets import Target
from runtimes.artifact import Manifest


class Side:
    """One artifact's graphs at work on a text."""

    def __init__(self, programs: Sequence[Program], targets: Mapping[str, Target], manifest: Manifest) -> None:
        self.programs, self.targets, self.manifest = programs, targets, manifest
        self._past: dict[str, np.ndarray] = {}
        self._images: dict[str, np.ndarray] = {}

    def start(self, text: Text) -> dict[str, dict[str, np.ndarray]]:
        """Begin a text; values of the graphs that run once for it, {graph: values}."""
        self._past, self._images = first_state(self.programs[-1], text.rows, self.manifest.cache), {}
        values = {}
        for program in self.programs[:-1]:
            assert text.images is not None
            values[program.name] = self.targets[program.name].run(text.images.encoder_feeds())
            self._images = {spec.name: values[program.name][spec.name] for spec in program.signature.outputs}
        return values

    def step(self, call: Call) -> dict[str, np.ndarray]:
        """The decoder's values."""
        values = self.targets[DECODER].run({**call.feeds, **self._images, **self._past})
        self._past = next_state(values, self.manifest.cache)
        return values


class Eager:
    """Eager PyTorch on the same text, in one lane: the yardstick."""

    def __init__(self, programs: Sequence[Program], lane: Lane, manifest: Manifest, device: torch.device) -> None:
        self._programs, self._lane, self._manifest, self._device = programs, lane, manifest, device
        self._past: dict[str, Any] = {}
        self._images: dict[str, Tensor] = {}

    def start(self, text: Text) -> dict[str, dict[str, Tensor]]:
        """As Side.start."""
        self._past, self._images = as_tensors(first_state(self._programs[-1], text.rows, self._manifest.cache)), {}
        values = {}
        for program in self._programs[:-1]:
            assert text.images is not None
            values[program.name], outputs = self._run(program, as_tensors(text.images.encoder_feeds()))
            self._images = dict(zip((spec.name for spec in program.signature.outputs), outputs, strict=True))
        return values

    def step(self, call: Call) -> dict[str, Tensor]:
        """As Side.step."""
        feeds = {**as_tensors(call.feeds), **self._images, **self._past}
        values, (_, *state) = self._run(self._programs[-1], feeds)
        self._past = dict(zip(self._manifest.cache.past_names(), state, strict=True))
        return values

    def _run(self, program: Program, feeds: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        of_node: dict[str, Tensor] = {}

        def visit(node: str, results: list[Any]) -> list[Any]:
            of_node[node] = results[0]
            return results

        (outputs,) = run_lanes(program, [self._lane], [feeds], self._device, visit)
        values = {value: of_node[node] for value, node in program.values.items() if node in of_node}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}, outputs


def compare_graphs(
    mine: Side, other: Side, eager: Eager, texts: tuple[Sequence[Text], Sequence[Text]], device: torch.device
) -> dict[str, dict[str, Found]]:
    """{graph: {value: what was found}}: how far mine is from the other, and eager too."""
    found: dict[str, dict[str, Found]] = {program.name: {} for program in mine.programs}
    alike = mine.manifest.layout == other.manifest.layout
    whole = alike and mine.manifest.cache == other.manifest.cache
    for text, other_text in zip(*texts, strict=False) if alike else [(texts[0][0], texts[1][0])]:
        starts = mine.start(text), other.start(other_text), eager.start(text)
        for program in mine.programs[:-1]:
            call = Call(feeds={}, real=np.ones((text.rows, 1), bool))
            values = [start[program.name] for start in starts]
            _add(found[program.name], program, values, (call, call), set(program.values), device)
        program = mine.programs[-1]
        names = set(program.values) if whole else _of_each_token(program) & _of_each_token(other.programs[-1])
        for call, other_call in _parallel(text, other_text):
            values = [mine.step(call), other.step(other_call), eager.step(call)]
            _add(found[DECODER], program, values, (call, other_call), names, device)
    return found


def _parallel(text: Text, other: Text) -> Iterator[tuple[Call, Call]]:
    """Calls of the same tokens."""
    for call, other_call in zip(text.calls, other.calls, strict=False):
        if (call.real.sum(axis=1) != other_call.real.sum(axis=1)).any():
            return
        yield call, other_call


def _of_each_token(program: Program) -> set[str]:
    """Values that are what weights, or a residual sum, make of each token."""

    def is_sum(node: str) -> bool:
        return node.partition("_")[0] == "add" and program.module(node).rpartition(".")[2].isdigit()

    tokenwise = ((name, node) for name, node in program.values.items() if program.of_tokens.get(node) == 1)
    return {name for name, node in tokenwise if program.reads[node] or is_sum(node)}


def _add(
    found: dict[str, Found],
    program: Program,
    values: Sequence[Mapping[str, Any]],
    calls: tuple[Call, Call],
    names: set[str],
    device: torch.device,
) -> None:
    """Add the errors of one call: (mine, the other's, eager's) values."""
    states = {spec.name for spec in program.signature.outputs if spec.name.startswith("present.")}
    for name in names.intersection(*values):
        node = program.values[name]
        sides = zip(values, (*calls, calls[0]), strict=True)
        parts = [
            kept_part(program, node, name in states, call, device)(torch.as_tensor(side[name]).to(device))
            for side, call in sides
        ]
        if parts[0].shape == parts[1].shape:
            found.setdefault(name, Found()).total.add(*parts, ignored=None)
