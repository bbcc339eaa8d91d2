"""What is fed to both sides: texts of several rows, as the calls of a layout's graph.

Prompts have different lengths, so there is padding, which nobody should see; after them come single tokens, and where
the layout takes that, several at a time. In the portable layout another text begins in the middle of the cache, and its
rows hide slots from each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.verify import fitting_case
from graphs.config import DecoderConfig
from runtimes.artifact import Manifest
from runtimes.images import ImageBatch
from runtimes.parity import DECODE_STEPS, Case

MOST_ROWS = 2  # of different lengths: what one row shows, more rows show no better
STEPS = 2  # of one token, after a prompt
LONG_STEPS = DECODE_STEPS  # where rotary angles depend on a row's length, some row has to cross a border
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """One run of a graph, its state apart."""

    feeds: Mapping[str, np.ndarray]
    real: np.ndarray  # bool [B, S]: tokens; the others are padding, whose results mean nothing
    slots: np.ndarray | None = None  # bool [B, T]: which slots of present hold tokens; None: all of present is compared


@dataclass(frozen=True, kw_only=True)
class Text:
    """Calls one after another: each goes on from the state that the one before has left."""

    rows: int
    calls: tuple[Call, ...]
    images: ImageBatch | None = None


def make_texts(manifest: Manifest, config: DecoderConfig) -> list[Text]:
    """Texts of random tokens, always the same, that fit the artifact."""
    rows = min(MOST_ROWS, manifest.graphs["decoder"].signature.dims["batch_size"].max)
    encoder = None if manifest.vision is None else manifest.graphs["vision_encoder"].signature
    case = fitting_case(config, manifest.layout, manifest.cache, rows, encoder, SEED)
    by_length = any(kind.rope is not None and kind.rope.depends_on_length for kind in config.kinds)
    return CALLS[manifest.layout](case, min(LONG_STEPS if by_length else STEPS, case.forced.shape[1]))


def _portable(case: Case, steps: int) -> list[Text]:
    return [_static_text(case, steps), _chunked_text(case)]


def _static_text(case: Case, steps: int) -> Text:
    """Prompts padded on the right, then single tokens."""
    lengths = np.array([len(prompt) for prompt in case.prompts])
    tokens = _padded(case.prompts, left=False)
    rows, longest = tokens.shape
    slots = np.arange(longest)
    real = slots < lengths[:, None]
    positions = np.tile(slots, (rows, 1))
    calls = [
        Call(
            feeds=_feeds(tokens, positions, np.zeros(rows, np.int64), real, (lengths - 1)[:, None])
            | _sight(case.images, slice(0, longest)),
            real=real,
        )
    ]
    for step in range(steps):
        ends = lengths + step
        mask = np.arange(ends.max() + 1) <= ends[:, None]
        one = case.forced[:, step : step + 1]
        last = _sight(case.images, None, lengths - 1)
        feeds = _feeds(one, ends[:, None], ends, mask, np.zeros((rows, 1), np.int64)) | last
        calls.append(Call(feeds=feeds, real=np.ones((rows, 1), bool)))
    return Text(rows=rows, calls=tuple(calls), images=case.images)


def _chunked_text(case: Case) -> Text:
    """Rows that begin at slots of their own, in chunks, the last token ahead of its slot."""
    chunks = case.chunks
    rows, calls, start = len(chunks.slots), [], 0
    for size in chunks.sizes:
        part = slice(start, start + size)
        written = chunks.slots[:, : part.stop]
        mask = np.zeros((rows, int(written.max()) + 1), bool)
        np.put_along_axis(mask, written, True, axis=1)
        every = np.tile(np.arange(size), (rows, 1))
        feeds = _feeds(chunks.tokens[:, part], chunks.positions[:, part], chunks.slots[:, start], mask, every)
        calls.append(Call(feeds=feeds | _sight(chunks.images, part), real=np.ones((rows, size), bool)))
        start += size
    return Text(rows=rows, calls=tuple(calls), images=chunks.images)


def _dynamic(case: Case, steps: int) -> list[Text]:
    """Prompts padded on the left, then single tokens, then several; positions count a row's own tokens."""
    lengths = np.array([len(prompt) for prompt in case.prompts])
    tokens = _padded(case.prompts, left=True)
    rows, longest = tokens.shape
    parts = [tokens, *(case.forced[:, at : at + 1] for at in range(steps)), case.forced[:, steps:]]
    calls, total = [], 0
    for part in parts:
        if not part.shape[1]:
            continue
        slots = np.arange(total, total + part.shape[1])
        total += part.shape[1]
        positions = slots - (longest - lengths)[:, None]
        mask = np.arange(total) >= (longest - lengths)[:, None]
        feeds = {"input_ids": part, "attention_mask": mask, "position_ids": np.maximum(positions, 0)}
        calls.append(Call(feeds=_int64(feeds), real=positions >= 0))
    return [Text(rows=rows, calls=tuple(calls))]


def _genai(case: Case, steps: int) -> list[Text]:
    """Prompts padded on the right, then single tokens; one row in chunks; and a long one, that windows may end in."""
    lengths = np.array([len(prompt) for prompt in case.prompts])
    texts = [_gapless_text([_padded(case.prompts, left=False), *case.forced.T[:steps, :, None]], lengths)]
    texts.append(_gapless_text([np.array([case.far_prompt])], np.array([len(case.far_prompt)])))
    whole = np.array([case.row(0)])
    middle = len(case.prompts[0]) // 2
    if middle:
        texts.append(_gapless_text([whole[:, :middle], whole[:, middle:]], np.array([middle])))
    return texts


def _gapless_text(parts: Sequence[np.ndarray], lengths: np.ndarray) -> Text:
    """The first part may be padded on the right."""
    calls, ends = [], lengths
    for index, part in enumerate(parts):
        size = part.shape[1]
        real = np.arange(size) < lengths[:, None] if index == 0 else np.ones_like(part, bool)
        ends = lengths if index == 0 else ends + size
        columns = parts[0].shape[1] if index == 0 else ends.max()
        mask = np.arange(columns) < ends[:, None]
        last = (real.sum(axis=1) - 1)[:, None]
        feeds = {"input_ids": part, "attention_mask": mask, "logit_indices": last}
        calls.append(Call(feeds=_int64(feeds), real=real, slots=mask))
    return Text(rows=len(lengths), calls=tuple(calls))


# {layout: the texts}
CALLS: Mapping[str, Callable[[Case, int], list[Text]]] = {"portable": _portable, "dynamic": _dynamic, "genai": _genai}


def _feeds(
    tokens: np.ndarray, positions: np.ndarray, write_indices: np.ndarray, mask: np.ndarray, logits: np.ndarray
) -> dict[str, np.ndarray]:
    return _int64(
        {
            "input_ids": tokens,
            "position_ids": positions,
            "write_indices": write_indices,
            "attention_mask": mask,
            "logit_indices": logits,
        }
    )


def _int64(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, np.int64) for name, array in arrays.items()}


def _sight(images: ImageBatch | None, part: slice | None, at: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """cross_attention_mask of some tokens of every row, or of one of each."""
    if images is None:
        return {}
    mask = images.cross_attention_mask
    return _int64({"cross_attention_mask": mask[:, part] if at is None else mask[np.arange(len(at)), at][:, None]})


def _padded(prompts: Sequence[Sequence[int]], *, left: bool) -> np.ndarray:
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, slice(-len(prompt), None) if left else slice(len(prompt))] = prompt
    return tokens
