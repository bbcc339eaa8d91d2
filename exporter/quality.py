"""Measure what rounding weights costs: the original and the stored weights side by side, layer by layer.

Both decoders run in eager PyTorch in float32 with their weights streamed, so memory is that of a layer and of what is
computed; how well a runtime computes with the stored weights is the business of parity.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exporter.errors import ExportError
from exporter.progress import Progress
from exporter.reference import Reference
from graphs.checkpoint import Checkpoint
from graphs.config import DecoderConfig
from graphs.families import Family
from runtimes.files import is_file, read_text
from runtimes.generation import read_stop_ids
from runtimes.quality import PERCENTILE, WORST_LAYERS, LayerError, QualityReport, TaskScore
from runtimes.tokenizer import Tokenizer

TASKS_FILE = "tasks.jsonl"
LOGIT_BYTES = 128 << 20  # of logits, in float64, that are held at once
MOST_PROBLEMS, MOST_PROBLEM_CHARACTERS = 4096, 4096
LOCAL_ROWS = 2  # of the text, that layers are compared on one by one


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One line of tasks.jsonl: {"task": .., "prompt": .., "answer": ..}."""

    task: str
    prompt: str
    answer: str


class Pair(NamedTuple):
    """The model with its original weights, and with those that are stored."""

    original: Reference
    stored: Reference


def open_pair(
    family: Family,
    config: DecoderConfig,
    original: Checkpoint,
    stored: Checkpoint,
    rounded_to: torch.dtype | None = None,
) -> Pair:
    """Both models, streamed; the stored one's plain weights are rounded to that dtype."""
    return Pair(
        Reference(family, config, original, torch.float32),
        Reference(family, config, stored, torch.float32, weights_rounded_to=rounded_to),
    )


def measure_quality(
    pair: Pair, tokens: np.ndarray, text: str, folder: Path, bytes_per_weight: float, progress: Progress
) -> QualityReport:
    """Compare on `tokens` [rows, length], and on the checkpoint's own tasks if it has some.

    Args:
        text: where the tokens come from, in words.
        folder: the checkpoint's, which may hold tasks.jsonl and a tokenizer.
    """
    problems = read_tasks(folder)
    progress.start("quality of the stored weights", len(pair.original.decoder.layers) * (2 if problems else 1))
    worst: list[LayerError] = []
    hidden = _run(pair, torch.from_numpy(tokens), progress, worst)
    kl, same, losses = [], [], []
    for original, stored, following in _logits(pair, hidden, torch.from_numpy(tokens)):
        p, q = (logits.double().log_softmax(dim=-1) for logits in (original, stored))
        kl.append((p.exp() * (p - q)).sum(dim=-1).clamp(min=0))
        same.append(p.argmax(dim=-1) == q.argmax(dim=-1))
        known = following >= 0
        index = following[known][:, None]
        losses.append(torch.cat((-p[known].gather(1, index), -q[known].gather(1, index)), dim=1))
    divergence, loss = torch.cat(kl), torch.cat(losses).mean(dim=0)
    return QualityReport(
        text=text,
        tokens=tokens.size,
        kl_mean=float(divergence.mean()),
        kl_p999=float(torch.quantile(divergence, PERCENTILE / 100)),
        top1_agreement=float(torch.cat(same).double().mean()),
        perplexity_original=math.exp(float(loss[0])),
        perplexity_stored=math.exp(float(loss[1])),
        worst_layers=tuple(sorted(worst, key=lambda each: -each.error)[:WORST_LAYERS]),
        tasks=_score(pair, problems, folder, progress) if problems else {},
        bytes_per_weight=bytes_per_weight,
    )


def read_tasks(folder: Path) -> list[Problem]:
    """The problems in tasks.jsonl; none where there is no such file. ExportError where a line is wrong."""
    path = folder / TASKS_FILE
    if not is_file(path):
        return []
    problems: list[Problem] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if number > MOST_PROBLEMS or len(line) > MOST_PROBLEM_CHARACTERS:
            raise ExportError(
                f"{path}, line {number}: expected at most {MOST_PROBLEMS} lines of {MOST_PROBLEM_CHARACTERS}"
                " characters: all of them are computed at once"
            )
        try:
            entry = json.loads(line)
            problem = Problem(task=entry["task"], prompt=entry["prompt"], answer=entry["answer"])
            if not all(isinstance(each, str) for each in (problem.task, problem.prompt, problem.answer)):
                raise TypeError("not text")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ExportError(
                f'{path}, line {number}: expected {{"task": "..", "prompt": "..", "answer": ".."}}'
            ) from None
        problems.append(problem)
    return problems


def _score(pair: Pair, problems: Sequence[Problem], folder: Path, progress: Progress) -> dict[str, TaskScore]:
    """Share of each task's problems that are answered exactly: every token of the answer, and the stop id behind it, is
    the likeliest one after the right tokens before it. That is what greedy decoding would answer."""
    tokenizer = Tokenizer(folder)
    (stop_id, *_) = [*read_stop_ids(folder), None]
    rows, starts = [], []
    for problem in problems:
        prompt, whole = tokenizer.encode(problem.prompt), tokenizer.encode(problem.prompt + problem.answer)
        rows.append(whole + ([] if stop_id is None else [stop_id]))
        starts.append(len(prompt))
    longest = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), longest), dtype=torch.int64)
    wanted = torch.full((len(rows), longest), -1)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        wanted[index, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    hidden = _run(pair, tokens, progress, [])
    right = [torch.ones(len(rows), longest, dtype=torch.bool).flatten() for _ in pair]
    start = 0
    for *both, _ in _logits(pair, hidden, tokens):
        part = slice(start, start + len(both[0]))
        start = part.stop
        expected = wanted.flatten()[part]
        for of_model, logits in zip(right, both, strict=True):
            of_model[part] = (expected < 0) | (logits.argmax(dim=-1) == expected)
    answered = [of_model.reshape(len(rows), longest).all(dim=1) for of_model in right]
    scores = {}
    for task in dict.fromkeys(problem.task for problem in problems):
        of_task = torch.tensor([problem.task == task for problem in problems])
        original, stored = (float(each[of_task].double().mean()) for each in answered)
        scores[task] = TaskScore(problems=int(of_task.sum()), original=original, stored=stored)
    return scores


def _run(pair: Pair, tokens: Tensor, progress: Progress, errors: list[LayerError]) -> tuple[Tensor, Tensor]:
    """What the last layer of each model yields for tokens [B, L]: [B, L, hidden]; and each layer's own error."""
    device = pair.original.device
    tokens = tokens.to(device)
    positions = torch.arange(tokens.shape[1], device=device)
    for model in pair:
        model.fed_at_once(tokens.shape[1])
    with torch.no_grad():
        original, stored = (model.decoder.embed(tokens, positions) for model in pair)
        layers = zip(pair.original.decoder.layers, pair.stored.decoder.layers, strict=True)
        for index, (first, second) in enumerate(layers):
            before = original[:LOCAL_ROWS]
            alone = second(before, None, positions)
            original, stored = first(original, None, positions), second(stored, None, positions)
            added = rms(original[:LOCAL_ROWS] - before)
            difference = rms(alone - original[:LOCAL_ROWS])
            errors.append(LayerError(layer=f"layers.{index}", error=difference / added if added else 0.0))
            progress.advance(1)
    return original, stored


def _logits(pair: Pair, hidden: tuple[Tensor, Tensor], tokens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(logits of the original, of the stored weights, the tokens that follow; -1 at ends of rows), some tokens at a
    time, row by row."""
    following = torch.full_like(tokens, -1)
    following[:, :-1] = tokens[:, 1:]
    flat = [each.flatten(0, 1) for each in hidden]
    step = max(1, LOGIT_BYTES // (8 * pair.original.config.vocab_size))
    with torch.no_grad():
        for start in range(0, len(flat[0]), step):
            part = slice(start, start + step)
            original, stored = (
                model.decoder.logits(each[None, part])[0].cpu() for model, each in zip(pair, flat, strict=True)
            )
            yield original, stored, following.flatten()[part]


def rms(x: Tensor) -> float:
    """Root mean square; 0 of no numbers."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
