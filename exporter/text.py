"""Tokens to calibrate on and to measure quality on: from the user's text, or sampled from the model itself."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import ExportError
from exporter.progress import Progress
from exporter.reference import Reference
from exporter.source import Source
from runtimes.tokenizer import Tokenizer

MOST_CHARACTERS = 64  # of a token, on average: no more of a file is read than rows can be made of
STATE_BYTES = 1 << 30  # of the rows that are sampled together


def find_tokens(
    source: Source,
    text: Path | None,
    samples: int,
    length: int,
    seed: int,
    purpose: str,
    progress: Progress,
    model: Reference | None = None,
) -> Tensor:
    """int64 [samples, length] of the user's text, or without one of what the model makes up; shorter where texts are.

    Args:
        purpose: what the text is for, in words.
        model: the source's, in float32, where there is one already.

    Raises:
        ExportError: the text is too short, or not text.
    """
    length = min(length, source.config.max_position_embeddings)
    if text is not None:
        return read_tokens(text, Tokenizer(source.files), samples, length)
    progress.start(f"sample text to {purpose}", samples * (length - 1))
    model = model or Reference(source.family, source.config, source.checkpoint, torch.float32)
    bos = read_bos(source.checkpoint.config, source.config.vocab_size)
    return sample_tokens(model, samples, length, seed, bos, progress)


def read_tokens(path: Path, tokenizer: Tokenizer, samples: int, length: int) -> Tensor:
    """The beginning of a UTF-8 text as int64 [up to `samples`, length]; a shorter text gives one shorter row.

    Each row begins as the tokenizer begins a text.

    Raises:
        ExportError: the file cannot be read as text, or holds too little.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(samples * length * MOST_CHARACTERS)
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not text in UTF-8: {error}") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from None
    start, ids = tokenizer.encode(""), tokenizer.encode(text)
    if ids[: len(start)] == start:
        ids = ids[len(start) :]
    if len(ids) < 2:
        raise ExportError(f"{path} holds {len(ids)} tokens: too little to predict one from another")
    step = max(1, length - len(start))
    rows = min(samples, len(ids) // step) or 1
    return torch.tensor([start + ids[row * step : (row + 1) * step] for row in range(rows)])


def sample_tokens(
    model: Reference, samples: int, length: int, seed: int, bos_token_id: int | None, progress: Progress
) -> Tensor:
    """Text that the model itself makes up: int64 [samples, length].

    Rows begin with bos_token_id, or with random tokens where there is none.
    """
    layers = model.decoder.state(length)
    row_bytes = sum(4 * math.prod(tensor.shape) for layer in layers for tensor in layer)
    batch = max(1, min(samples, STATE_BYTES // max(1, row_bytes)))
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        first = torch.randint(model.config.vocab_size, (rows,), generator=rng)
        if bos_token_id is not None:
            first = torch.full((rows,), bos_token_id)
        parts.append(model.sample(first, length, rng, functools.partial(progress.advance, rows)))
    return torch.cat(parts)


def read_bos(config: Mapping[str, Any], vocab_size: int) -> int | None:
    """config.json's bos_token_id, where it is a token."""
    bos = config.get("bos_token_id")
    return bos if isinstance(bos, int) and 0 <= bos < vocab_size else None
