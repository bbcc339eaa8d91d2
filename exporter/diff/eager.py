"""Is the traced program what eager PyTorch computes? Module by module, row by row, in one pass without a cache.

The graph was made of that program, so a mistake in tracing, or in masks, positions and caches, would be in both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporter.diff.calls import Text
from exporter.diff.errors import Errors
from exporter.diff.lanes import Lane
from exporter.diff.program import Program
from exporter.reference import Reference, RowSight
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family


class ModuleCheck:
    """Keeps what the program makes at the end of every module, and compares it with eager PyTorch afterwards."""

    def __init__(self, program: Program) -> None:
        self.ends = _module_ends(program)
        self._of_node: dict[str, list[str]] = {}
        for path, node in self.ends.items():
            self._of_node.setdefault(node, []).append(path)
        self._texts: list[tuple[Text, dict[str, list[list[Tensor]]]]] = []

    def watch(self, text: Text, node: str, results: list[Any]) -> None:
        """Keep one call's results: (the truth's, those in the target's precision)."""
        if not self._texts or self._texts[-1][0] is not text:
            self._texts.append((text, {}))
        for path in self._of_node.get(node, ()):
            self._texts[-1][1].setdefault(path, []).append(results)

    def compare(
        self, family: Family, config: DecoderConfig, checkpoint: Checkpoint, truth: Lane, rounded_to: torch.dtype
    ) -> dict[str, Errors]:
        """{module: errors of the program}; eager PyTorch is as precise as the truth."""
        assert truth.dtype is not None
        reference = Reference(family, config, checkpoint, truth.dtype, weights_rounded_to=rounded_to)
        eager, found = _EagerModules(reference), dict[str, Errors]()
        for text, traced in self._texts:
            for row in range(text.rows):
                for path, made in eager.run(text, row).items():
                    exact, rounded = (_row_of(traced.get(path, []), side, text, row) for side in (0, 1))
                    if exact is not None and rounded is not None and exact.shape == made.shape:
                        # both lanes share a mistake of the program, so the yardstick is how far they are apart
                        found.setdefault(path, Errors()).add(exact, made, made + (rounded - exact), ignored=None)
        return found


def _module_ends(program: Program) -> dict[str, str]:
    """{module: the operator of the program that makes its result}, of results [B, S, ..], in the order of execution."""
    ends: dict[str, str] = {}
    for node, paths in program.stacks.items():
        for path in paths if program.of_tokens.get(node) == 1 else ():
            ends.pop(path, None)
            ends[path] = node
    return ends


def _row_of(calls: Sequence[Sequence[Tensor]], side: int, text: Text, row: int) -> Tensor | None:
    """One row's real tokens [L, ..] in all calls of a text."""
    if not calls:
        return None
    parts = [
        results[side][row][torch.from_numpy(call.real[row]).to(results[side].device)]
        for results, call in zip(calls, text.calls, strict=True)
    ]
    return torch.cat(parts)


class _EagerModules:
    """Records what every module of a decoder makes of a row."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._made: dict[str, Tensor] = {}
        for path, module in reference.decoder.named_modules():
            if path:
                module.register_forward_hook(self._hook(path))

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                self._made[path] = first

        return record

    @torch.no_grad()
    def run(self, text: Text, row: int) -> dict[str, Tensor]:
        """{module: what it makes of one row's tokens, [L, ..]}, all calls of the text in one pass."""
        self._made.clear()
        parts = [(call.feeds, call.real[row]) for call in text.calls]
        tokens = np.concatenate([feeds["input_ids"][row][real] for feeds, real in parts])
        sizes = tuple(int(real.sum()) for _, real in parts)
        positions = np.arange(len(tokens))
        if "position_ids" in parts[0][0]:
            positions = np.concatenate([feeds["position_ids"][row][real] for feeds, real in parts])
        sight = None
        if text.images is not None:
            seen = [feeds["cross_attention_mask"][row][real] for feeds, real in parts]
            sight = RowSight(text.images, row, np.concatenate(seen))
        self._reference.logits(tokens, positions, sizes, sight)
        return {path: made[0] for path, made in self._made.items() if made.shape[:2] == (1, len(tokens))}
