"""Are the tables that tokens and pictures are looked up in those of the checkpoint, in every row?

A parity case looks up a few rows of them. Where another weight reads the same table (a tied output projection), or all
of it is read in each call, the case sees the rest; a table by itself is compared here, number by number.
"""

import torch
from torch import Tensor, nn

from exporter.source import Source
from graphs.checkpoint import Checkpoint, TensorRef
from graphs.loading import build_on_meta, named_models
from runtimes.parity import Rung

CHUNK_ROWS = 4096  # of a table that are cast and compared at a time


def check_tables(source: Source, stored: Checkpoint) -> Rung:
    """Every row of every table, cast to what the graph computes in, must be what is stored: nothing else is rounded."""
    dtype = getattr(torch, source.precision.dtype)
    errors = {ref: _largest_error(source.checkpoint.load(ref), stored.load(ref), dtype) for ref in _tables(source)}
    worst = max(errors, key=lambda ref: errors[ref])
    return Rung(
        name="rows of embeddings",
        max_error=errors[worst],
        rms_error=errors[worst],
        eager_max_error=0.0,
        eager_rms_error=0.0,
        max_limit=0.0,
        rms_limit=0.0,
        passed=errors[worst] == 0.0,
        note=f"worst: {worst.label}",
    )


def _tables(source: Source) -> list[TensorRef]:
    found = []
    for root, names in named_models(source.family, source.config, *build_on_meta(source.config)):
        paths = [path for path, module in root.named_modules() if isinstance(module, nn.Embedding)]
        found += [names[f"{path}.weight"] for path in paths if f"{path}.weight" in names]
    return found


def _largest_error(original: Tensor, stored: Tensor, dtype: torch.dtype) -> float:
    """Infinity where a number is no number in one of them only."""
    worst = 0.0
    for first in range(0, len(original), CHUNK_ROWS):
        ours, theirs = (each[first : first + CHUNK_ROWS].to(dtype).double() for each in (stored, original))
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        error = torch.where(same, 0.0, ours - theirs).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        worst = max(worst, float(error.max()))
    return worst
