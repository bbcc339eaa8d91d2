"""Faults in what feeds a graph, keeps its cache and hands over its logits. The artifact itself is good.

A fault is put into an opened runner. Those in what is fed go past the runner's own checks, as a runner that is wrong
would: what the checks refuse is no proof of parity.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from runtimes.runner import Feeds
from tests.mutants.mutant import Mutant

Fed = dict[str, np.ndarray]
Change = Callable[[Fed, Any], Fed]  # the inputs that are to be others, given all of them and the runner


def _runner(name: str, artifact: str, where: str, apply: Callable[[Any], None]) -> Mutant:
    return Mutant(name=name, kind="runner", artifact=artifact, apply=apply, layer=None, where=where)


def _feeds(change: Change) -> Callable[[Any], None]:
    """The graph runs on other inputs than the runner was given."""

    def apply(runner: Any) -> None:
        unchecked = getattr(runner, "_run_graph", runner.step)

        def step(feeds: Feeds) -> np.ndarray:
            return unchecked({**feeds, **change(dict(feeds), runner)})

        runner.step = step

    return apply


def _logits(change: Callable[[np.ndarray, Fed], np.ndarray]) -> Callable[[Any], None]:
    """The runner hands over other logits than the graph gave."""

    def apply(runner: Any) -> None:
        step = runner.step
        runner.step = lambda feeds: change(step(feeds), dict(feeds))

    return apply


def _order(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """Rows are taken in another order than asked for."""

    def apply(runner: Any) -> None:
        reorder = runner.reorder_rows
        runner.reorder_rows = lambda rows: reorder(change(rows))

    return apply


def _images(change: Callable[[Fed], Fed]) -> Callable[[Any], None]:
    """The vision encoder runs on other inputs than the runner was given."""

    def apply(runner: Any) -> None:
        encode = runner.encode_images
        runner.encode_images = lambda feeds: encode({**feeds, **change(dict(feeds))})

    return apply


def _is_step(fed: Fed) -> bool:
    return fed["input_ids"].shape[1] == 1


def _one_row_at_a_time(runner: Any) -> None:
    """Rows are moved in place, one by one, so that a row is read after another was written over it."""

    def reorder(rows: np.ndarray) -> None:
        for index in range(len(runner.cache_spec.tensors)):
            array = runner.read_cache(index)
            for row, source in enumerate(rows):
                array[row] = array[source]
            runner.write_cache(index, array)

    runner.reorder_rows = reorder


def _keys_only(runner: Any) -> None:
    """Values stay where they are."""

    def reorder(rows: np.ndarray) -> None:
        for index, tensor in enumerate(runner.cache_spec.tensors):
            if tensor.name == "key":
                runner.write_cache(index, runner.read_cache(index)[rows])

    runner.reorder_rows = reorder


def _images_stay(runner: Any) -> None:
    """The cache follows the rows, pictures do not."""

    def reorder(rows: np.ndarray) -> None:
        for index in range(len(runner.cache_spec.tensors)):
            runner.write_cache(index, runner.read_cache(index)[rows])

    runner.reorder_rows = reorder


def _cache_in_half(runner: Any) -> None:
    """What one layer's values were is rounded to fp16 before each step."""
    step = runner.step

    def rounding(feeds: Feeds) -> np.ndarray:
        index = 3
        runner.write_cache(index, runner.read_cache(index).astype(np.float16).astype(np.float32))
        return step(feeds)

    runner.step = rounding


def _stale_slot(fed: Fed, runner: Any) -> Fed:
    """One slot beyond those that were written."""
    total = min(fed["attention_mask"].shape[1] + 1, runner.cache_spec.max_len)
    ones = np.ones((len(fed["attention_mask"]), total), np.int64)
    return {"attention_mask": ones, "position_ids": np.minimum(fed["position_ids"] + 1, total - 1)}


def _stale_padding(fed: Fed, runner: Any) -> Fed:
    """Shorter rows see the padding behind their prompt, in decode steps."""
    if not _is_step(fed):
        return {}
    return {"attention_mask": np.ones_like(fed["attention_mask"])}


def _last_row_early(fed: Fed, runner: Any) -> Fed:
    """The last of several rows writes one slot early."""
    slots = fed["write_indices"].copy()
    if len(slots) > 1 and _is_step(fed):
        slots[-1] = max(slots[-1] - 1, 0)
    return {"write_indices": slots}


def _forget_first(fed: Fed, runner: Any) -> Fed:
    """Of rows beyond 32 slots, the first slot is no longer seen."""
    mask = fed["attention_mask"].copy()
    if mask.shape[1] > 32:
        mask[:, 0] = 0
    return {"attention_mask": mask}


def _clamped(fed: Fed, runner: Any) -> Fed:
    """Positions end at 30 for slots that follow; the far end has its own."""
    positions = fed["position_ids"]
    return {"position_ids": np.where((positions > 30) & (positions < 36), 30, positions)}


def _first_row(name: str) -> Change:
    return lambda fed, runner: {name: np.repeat(fed[name][:1], len(fed[name]), 0)}


def _padded_logits(fed: Fed, runner: Any) -> Fed:
    """Answers for the last column of every row, padding or not."""
    return {"logit_indices": np.full_like(fed["logit_indices"], fed["input_ids"].shape[1] - 1)}


def _swap_tiles(fed: Fed) -> Fed:
    """The first two tiles of every picture change places."""
    pixels = fed["pixel_values"].copy()
    if pixels.shape[2] > 1:
        pixels[:, :, [0, 1]] = pixels[:, :, [1, 0]]
    return {"pixel_values": pixels}


def _swap_images(fed: Fed) -> Fed:
    """The two pictures of a row change places, their sizes do not."""
    return {"pixel_values": np.ascontiguousarray(fed["pixel_values"][:, ::-1])}


def _all_tiles(fed: Fed) -> Fed:
    """Padding tiles are taken for tiles of the picture."""
    return {"aspect_ratio_mask": np.ones_like(fed["aspect_ratio_mask"])}


def _late_sight(fed: Fed, runner: Any) -> Fed:
    """Each token sees what the token before it sees."""
    sight = fed["cross_attention_mask"]
    return {"cross_attention_mask": np.concatenate([sight[:, :1], sight[:, :-1]], axis=1)}


def _stale_offsets(runner: Any) -> None:
    """The columns of the first row stand for those of all."""
    mask_of = runner._mask_of_columns
    runner._mask_of_columns = lambda seen, columns: np.repeat(mask_of(seen, columns)[:1], len(seen), 0)


RUNNER_MUTANTS: tuple[Mutant, ...] = (
    _runner(
        "positions of decode steps off by one",
        "llama-fp32",
        "step",
        _feeds(lambda fed, _: {"position_ids": fed["position_ids"] + int(_is_step(fed))}),
    ),
    _runner(
        "write index of decode steps off by one",
        "llama-fp32",
        "step",
        _feeds(lambda fed, _: {"write_indices": np.maximum(fed["write_indices"] - int(_is_step(fed)), 0)}),
    ),
    _runner("write index of the last row off by one", "llama-fp32", "step", _feeds(_last_row_early)),
    _runner("one stale slot of the cache's tail read", "llama-fp32", "step", _feeds(_stale_slot)),
    _runner("padding behind a prompt seen by later tokens", "llama-fp32", "step", _feeds(_stale_padding)),
    _runner("logit_indices ignored", "llama-fp32", "step", _feeds(_padded_logits)),
    _runner(
        "first of logit_indices for all",
        "llama-fp32",
        "step",
        _feeds(
            lambda fed, _: {
                "logit_indices": np.repeat(fed["logit_indices"][:, :1], fed["logit_indices"].shape[1], axis=1)
            }
        ),
    ),
    _runner("mask of the first row for all", "llama-fp32", "step", _feeds(_first_row("attention_mask"))),
    _runner("write index of the first row for all", "llama-fp32", "step", _feeds(_first_row("write_indices"))),
    _runner(
        "positions are slots",
        "llama-fp32",
        "step",
        _feeds(lambda fed, _: {"position_ids": fed["write_indices"][:, None] + np.arange(fed["input_ids"].shape[1])}),
    ),
    _runner("positions clamped in the middle", "llama-fp32", "step", _feeds(_clamped)),
    _runner("first token forgotten beyond 32", "llama-fp32", "step", _feeds(_forget_first)),
    _runner(
        "cache rows swapped on reorder",
        "llama-fp32",
        "reorder_rows",
        _order(lambda rows: np.r_[rows[1::-1], rows[2:]]),
    ),
    _runner("rows are sent where they should be fetched from", "llama-fp32", "reorder_rows", _order(np.argsort)),
    _runner("rows overwritten while they are reordered", "llama-fp32", "reorder_rows", _one_row_at_a_time),
    _runner("keys reordered without values", "llama-fp32", "reorder_rows", _keys_only),
    _runner("one layer's cached values rounded to fp16", "llama-fp32", "step", _cache_in_half),
    _runner(
        "logits of two rows swapped in batches of more than three",
        "llama-fp32",
        "step",
        _logits(lambda logits, _: logits[np.r_[1, 0, 2 : len(logits)]] if len(logits) > 3 else logits),
    ),
    _runner(
        "logits rounded to fp16",
        "llama-fp32",
        "step",
        _logits(lambda logits, _: logits.astype(np.float16).astype(np.float32)),
    ),
    _runner(
        "fp16: write index of decode steps off by one",
        "llama-fp16",
        "step",
        _feeds(lambda fed, _: {"write_indices": np.maximum(fed["write_indices"] - int(_is_step(fed)), 0)}),
    ),
    _runner("int4: cache rows swapped on reorder", "llama-int4", "reorder_rows", _order(lambda rows: rows[::-1])),
    _runner("mask of columns of the first row for all, dynamic", "llama-dynamic", "step", _stale_offsets),
    _runner(
        "rows sent where they should be fetched from, dynamic", "llama-dynamic", "reorder_rows", _order(np.argsort)
    ),
    _runner("rows sent where they should be fetched from, fused", "llama-genai", "reorder_rows", _order(np.argsort)),
    _runner("image tiles reordered", "vision-fp32", "encode_images", _images(_swap_tiles)),
    _runner("two pictures of a row swapped", "vision-fp32", "encode_images", _images(_swap_images)),
    _runner("padding tiles taken for the picture's", "vision-fp32", "encode_images", _images(_all_tiles)),
    _runner("sight of the first row for all", "vision-fp32", "step", _feeds(_first_row("cross_attention_mask"))),
    _runner("each token sees what the one before it sees", "vision-fp32", "step", _feeds(_late_sight)),
    _runner("pictures left behind on reorder", "vision-fp32", "reorder_rows", _images_stay),
)
