"""Parity: is what a runtime computes the model that eager PyTorch computes, up to rounding?

A `Case` says what to run, `run_case` runs it on any runner and yields a `Trace`, and `judge` compares the trace with
two reference traces: the truth, and eager in the target's precision (the yardstick; see tolerances.py). Where
reference traces come from is the caller's business, so nothing here needs torch.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtimes.decoding import Decoding
from runtimes.errors import ArtifactError
from runtimes.images import ImageBatch
from runtimes.quality import QualityReport
from runtimes.runner import Feeds, Runner
from runtimes.signature import CacheSpec, GraphSignature
from runtimes.tolerances import (
    FLOOR_ULPS,
    MACHINE_EPSILON,
    MAX_MULTIPLE,
    POISON,
    RMS_MULTIPLE,
    TOP1_GAP_MULTIPLE,
)

PROMPT_LENGTHS = (27, 12, 1)  # ragged; with DECODE_STEPS they cross 16 and 32, where kernels change their blocks
DECODE_STEPS = 8
GREEDY_STEPS = 8
FAR_TOKENS = 6
GAPLESS_FAR_TOKENS = 200  # where the far end can only be reached from slot 0 on
CHUNK_ROWS = 4
CHUNK_TOKENS = 12
CHUNK_OFFSETS = (300, 0, 1000, 5)  # not in order, and far apart: a row that uses another's mask or slot is far off
LAST_POSITION_AHEAD = 7
WINDOW_MARGIN = 2  # how far before the end of a window the tokens stand that see its first slots fall out
CACHE_BYTES = 4 << 30  # a cache of more than one row stays below this
IMAGE_COUNTS = (2, 1, 0)  # of the rows, as far as the artifact takes so many; the last row reads text only
FIRST_SIGHT = 3  # tokens of the first row before its first image: they see nothing
CHUNK_IMAGES = (1, 2, 1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: ragged prompts, tokens forced after them, and a short prompt at the far end of the cache."""

    prompts: tuple[tuple[int, ...], ...]
    forced: np.ndarray  # int64 [B, steps]
    greedy_steps: int
    far_prompt: tuple[int, ...]
    far_position: int  # position and cache slot of its first token
    chunks: "Chunks"
    images: ImageBatch | None = None  # what the prompts show, for models that see

    def row(self, index: int) -> list[int]:
        """All the tokens that row `index` is fed."""
        return [*self.prompts[index], *self.forced[index].tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Rows that begin at cache slots of their own, fed in chunks, with logits asked of every token.

    Slots that hold none of a row's tokens are hidden from it. Each token's position is its slot, but for the last one,
    which is fed alone, at a position ahead of its slot where the model allows that.
    """

    tokens: np.ndarray  # int64 [rows, L]
    sizes: tuple[int, ...]  # of the chunks, L in all; the last is 1
    slots: np.ndarray  # int64 [rows, L]; neighbours within a chunk
    positions: np.ndarray  # int64 [rows, L]
    images: ImageBatch | None = None  # each token sees tiles of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What was computed for a case."""

    logits: list[np.ndarray]  # per row [1 + steps, V]: after the prompt, and after each forced token
    cache: list[list[np.ndarray]]  # per row, per tensor of the state: its written slots, or all of a sum
    far_logits: np.ndarray  # [V], after the far prompt
    chunk_logits: list[np.ndarray]  # per row of the chunks [L, V], after each token
    images: list[list[np.ndarray]] = dataclasses.field(
        default_factory=list
    )  # per row, per tensor of VisionSpec.names()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetTrace(Trace):
    """A runner's trace, with what only a runner can show."""

    greedy: list[list[int]]  # per row, the tokens it chose
    tail_intact: bool  # slots that no call wrote still hold what was there before
    cache_names: tuple[str, ...]  # of each entry of `cache`
    image_names: tuple[str, ...] = ()  # of each entry of `images`


@dataclasses.dataclass(frozen=True)
class Spread:
    """How large eager's own errors are; not finite where it overflows."""

    max: float
    rms: float

    @property
    def finite(self) -> bool:
        """False when eager itself overflows: an infinite yardstick would let everything pass."""
        return math.isfinite(self.max) and math.isfinite(self.rms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yardstick:
    """Eager's own errors in a target's precision, by which the target's are judged."""

    logits: Spread  # of all logits; `rms` is the worst position's
    cache: tuple[Spread, ...]  # of each tensor of the state
    images: tuple[Spread, ...]  # of each tensor of VisionSpec.names()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """One comparison. Errors are absolute; the eager ones are the yardstick's own."""

    name: str
    max_error: float
    rms_error: float
    eager_max_error: float
    eager_rms_error: float
    max_limit: float
    rms_limit: float
    passed: bool
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The verdict and what it rests on."""

    runtime: str
    reference: str
    precision: str
    prompt_lengths: tuple[int, ...]
    decode_steps: int
    rungs: tuple[Rung, ...]

    @property
    def passed(self) -> bool:
        """True when every rung passed, and there was one."""
        return bool(self.rungs) and all(rung.passed for rung in self.rungs)

    def with_rung(self, rung: Rung) -> "ParityReport":
        """The report with one more comparison."""
        return dataclasses.replace(self, rungs=(*self.rungs, rung))

    def to_dict(self) -> dict[str, Any]:
        """As plain data; figures are rounded to three digits, so that the same export writes the same bytes."""
        data = dataclasses.asdict(self) | {"passed": self.passed}
        data["rungs"] = [{key: _rounded(value) for key, value in rung.items()} for rung in data["rungs"]]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ParityReport":
        """The inverse of to_dict, up to its rounding; KeyError or TypeError where something is missing."""
        rungs = tuple(Rung(**{key: _restored(value) for key, value in rung.items()}) for rung in data["rungs"])
        kept = {key: value for key, value in data.items() if key != "passed"}
        return cls(**kept | {"rungs": rungs, "prompt_lengths": tuple(data["prompt_lengths"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParitySummary:
    """The reports of all runtimes that an artifact was checked on, and why others were not."""

    reports: tuple[ParityReport, ...]
    not_run: Mapping[str, str]  # {runtime: reason}
    quality: QualityReport | None = None  # of weights that were rounded

    @property
    def passed(self) -> bool:
        """True when something was checked and everything checked passed."""
        return bool(self.reports) and all(report.passed for report in self.reports)

    def short(self) -> dict[str, Any]:
        """What the manifest records."""
        return {
            "passed": self.passed,
            "runtimes": [report.runtime for report in self.reports],
            "not_run": dict(self.not_run),
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        quality = None if self.quality is None else self.quality.to_dict()
        return self.short() | {"reports": [report.to_dict() for report in self.reports], "quality": quality}

    def to_json(self) -> str:
        """The text of parity.json."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ParitySummary":
        """Read parity.json's text; ArtifactError when it is damaged."""
        try:
            data = json.loads(text)
            quality = data["quality"]
            return cls(
                reports=tuple(ParityReport.from_dict(each) for each in data["reports"]),
                not_run=dict(data["not_run"]),
                quality=None if quality is None else QualityReport.from_dict(quality),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ArtifactError(f"parity.json is damaged: {type(error).__name__}: {error}") from None


def _restored(value: Any) -> Any:
    return float("inf") if value is None else value


def _rounded(value: Any) -> Any:
    """Three digits of a float; None for an infinity, which JSON cannot express."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.2e}") if math.isfinite(value) else None


def make_case(
    vocab_size: int,
    cache_spec: CacheSpec,
    max_batch: int,
    seed: int = 0,
    *,
    window: int | None = None,
    free_positions: bool = True,
    gapless: bool = False,
    encoder: GraphSignature | None = None,
) -> Case:
    """A case that fits the artifact: random tokens from `seed`, and as many rows as CACHE_BYTES has room for.

    Args:
        window: of sliding-window layers; the first chunked row then leaves slots out, so that it reaches beyond.
        free_positions: a token's position may differ from its slot.
        gapless: a row's tokens fill its cache from slot 0 on; the far prompt is then a long one.
        encoder: the vision encoder's, for a model that sees; rows then have two images, one and none.
    """
    rng = np.random.default_rng(seed)
    max_len = cache_spec.max_len
    steps = min(DECODE_STEPS, max_len - 1)
    room = CACHE_BYTES // cache_spec.nbytes(1)
    lengths = [min(length, max_len - steps) for length in PROMPT_LENGTHS[: max(1, min(max_batch, room))]]
    far_tokens = min(GAPLESS_FAR_TOKENS if gapless else FAR_TOKENS, max_len)
    chunk_rows = max(1, min(CHUNK_ROWS, max_batch, room))
    offsets = [0] * chunk_rows if gapless else CHUNK_OFFSETS[:chunk_rows]
    chunks = _make_chunks(vocab_size, max_len, offsets, rng, window, free_positions and not gapless, encoder)
    return Case(
        prompts=tuple(tuple(rng.integers(0, vocab_size, length).tolist()) for length in lengths),
        forced=rng.integers(0, vocab_size, (len(lengths), steps)),
        greedy_steps=min(GREEDY_STEPS, max_len - max(lengths) + 1),
        far_prompt=tuple(rng.integers(0, vocab_size, far_tokens).tolist()),
        far_position=0 if gapless else max_len - far_tokens,
        chunks=chunks,
        images=None if encoder is None else _make_images(encoder, lengths, rng),
    )


def _make_images(encoder: GraphSignature, lengths: Sequence[int], rng: np.random.Generator) -> ImageBatch:
    """Random pictures, seen as the image processor has it: from a token on, until the next picture.

    The first row's first tokens see none, and so attend to all tiles of its pictures; the others' see from the start.
    """
    most = encoder.dims["num_images"].max
    counts = [min(count, most) for count in IMAGE_COUNTS[: len(lengths)]]
    pixels, ids, mask = _make_pictures(encoder, counts, rng)
    sight = np.full((len(lengths), max(lengths), *mask.shape[1:]), -1, np.int64)
    for row, count in enumerate(counts):
        start = min(FIRST_SIGHT, lengths[row] - 1) if row == 0 else 0
        sight[row, :, :count] = 0
        for image, first in enumerate(np.linspace(start, lengths[row], count, endpoint=False, dtype=np.int64)):
            sight[row, first:, :image] = 0
            sight[row, first:, image] = mask[row, image]
    return ImageBatch(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask, cross_attention_mask=sight)


def _make_pictures(
    encoder: GraphSignature, counts: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, aspect ratio ids and real tiles of so many pictures a row; the first has all tiles, the next fewer."""
    specs = {spec.name: spec for spec in encoder.inputs}
    most = encoder.dims["num_tiles"].max
    shape = (len(counts), max(1, *counts), most)
    mask = np.zeros(shape, np.int64)
    mask[..., 0] = 1  # a padding image's first tile counts as one
    ids = np.zeros(shape[:2], np.int64)
    for row, count in enumerate(counts):
        ids[row, :count] = rng.integers(1, encoder.limits["aspect_ratio_ids"], count)
        for image in range(count):
            mask[row, image, : max(1, most - row - image)] = 1
    tile_shape = [int(size) for size in specs["pixel_values"].shape[3:]]
    pixels = rng.standard_normal((*shape, *tile_shape), np.float32)
    pixels *= (mask * (ids > 0)[..., None]).reshape(*shape, 1, 1, 1)  # padding is black
    return pixels, ids, mask


def _make_chunks(
    vocab_size: int,
    max_len: int,
    offsets: Sequence[int],
    rng: np.random.Generator,
    window: int | None,
    free_positions: bool,
    encoder: GraphSignature | None,
) -> Chunks:
    length = min(CHUNK_TOKENS, max_len)
    half = length // 2
    sizes = tuple(size for size in (half, length - 1 - half, 1) if size > 0)
    rows = len(offsets)
    slots = np.array([[min(offset, max_len - length)] for offset in offsets], np.int64) + np.arange(length)
    if window is not None and length <= window < max_len:
        # as many tokens as would fill the window would take long: the first chunk stands a window before the second
        gap = min(window - WINDOW_MARGIN, max_len - (length - half)) - half
        slots[0] = min(offsets[0], max_len - length - gap) + np.arange(length)
        slots[0, half:] += gap
    positions = slots.copy()
    if free_positions:
        positions[:, -1] = np.minimum(positions[:, -1] + LAST_POSITION_AHEAD, max_len - 1)
    tokens = rng.integers(0, vocab_size, (rows, length))
    images = None
    if encoder is not None:
        counts = [min(count, encoder.dims["num_images"].max) for count in CHUNK_IMAGES[:rows]]
        pixels, ids, mask = _make_pictures(encoder, counts, rng)
        sight = rng.integers(-1, 2, (rows, length, *mask.shape[1:]))
        sight[:, ::4] = np.minimum(sight[:, ::4], 0)  # of these tokens, what is not hidden is not seen either
        for row, count in enumerate(counts):
            sight[row, :, count:] = -1
        images = ImageBatch(
            pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask, cross_attention_mask=sight
        )
    return Chunks(tokens=tokens, sizes=sizes, slots=slots, positions=positions, images=images)


def run_case(runner: Runner, case: Case) -> TargetTrace:
    """Run the case: greedy tokens, the far prompt, then the forced rows in a poisoned cache."""
    greedy = _run_greedy(runner, case)
    far_logits = _run_far(runner, case)
    chunk_logits = _run_chunks(runner, case.chunks)
    decoding = Decoding(_Poisoned(runner, case.images))
    steps = [decoding.prefill(case.prompts, case.images)]
    for tokens in case.forced.T:
        steps.append(decoding.decode(tokens))
    logits = np.stack(steps, axis=1)
    rows = range(len(case.prompts))
    longest = max(len(prompt) for prompt in case.prompts)
    ends = [max(longest, int(length)) for length in decoding.lengths]  # right padding writes up to the longest prompt
    cache: list[list[np.ndarray]] = [[] for _ in rows]
    tail_intact = True
    for index, tensor in enumerate(runner.cache_spec.tensors):
        array = runner.read_cache(index)
        for row in rows:
            if tensor.slot_axis is None:
                cache[row].append(array[row].copy())
                continue
            cache[row].append(tensor.slots(array, row, 0, int(decoding.lengths[row])).copy())
            tail_intact &= _is_poison(tensor.slots(array, row, ends[row], None), runner)
    return TargetTrace(
        logits=list(logits),
        cache=cache,
        far_logits=far_logits,
        chunk_logits=chunk_logits,
        images=_read_images(runner, case.images),
        greedy=greedy,
        tail_intact=tail_intact,
        cache_names=tuple(runner.cache_spec.present_names()),
        image_names=() if runner.vision_spec is None else tuple(runner.vision_spec.names()),
    )


class _Poisoned:
    """A runner that fills its cache with POISON whenever it is reset, and what nobody sees of images when they come."""

    def __init__(self, runner: Runner, images: ImageBatch | None) -> None:
        self._runner = runner
        self._images = images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def reset(self, batch_size: int) -> None:
        self._runner.reset(batch_size)
        poison(self._runner)

    def encode_images(self, feeds: Feeds) -> None:
        self._runner.encode_images(feeds)
        assert self._images is not None
        _poison_unseen(self._runner, self._images.cross_attention_mask)


def _poison_unseen(runner: Runner, sight_BSIT: np.ndarray) -> None:
    """Poison the keys and values of every tile that no token of its row attends to."""
    spec = runner.vision_spec
    assert spec is not None
    blind = ~(sight_BSIT > 0).any(axis=(2, 3), keepdims=True)
    attended_BIT = ((sight_BSIT > 0) | ((sight_BSIT == 0) & blind)).any(axis=1)
    unseen_BV = np.repeat(~attended_BIT.reshape(len(sight_BSIT), -1), spec.patches_per_tile, axis=1)
    for index in range(len(spec.names())):
        array = runner.read_images(index)
        array.swapaxes(1, 2)[unseen_BV] = POISON[spec.dtype]
        runner.write_images(index, array)


def _read_images(runner: Runner, images: ImageBatch | None) -> list[list[np.ndarray]]:
    """Per row, the keys and values of its pictures as the runner encodes them, padding pictures left out."""
    spec = runner.vision_spec
    if images is None or spec is None:
        return []
    runner.reset(len(images.pixel_values))
    runner.encode_images(images.encoder_feeds())
    counts = (images.aspect_ratio_ids > 0).sum(axis=1) * images.pixel_values.shape[2] * spec.patches_per_tile
    tensors = [runner.read_images(index) for index in range(len(spec.names()))]
    return [[tensor[row, :, :count] for tensor in tensors] for row, count in enumerate(counts)]


def poison(runner: Runner) -> None:
    """Fill the cache with a value that would show in any result it touches."""
    runner.fill_cache(POISON[runner.cache_spec.dtype])


def _is_poison(array: np.ndarray, runner: Runner) -> bool:
    dtype = runner.cache_spec.dtype
    return bool(np.all(np.abs(array - POISON[dtype]) <= POISON[dtype] * MACHINE_EPSILON[dtype]))


def _run_greedy(runner: Runner, case: Case) -> list[list[int]]:
    decoding = Decoding(runner)
    tokens = [decoding.prefill(case.prompts, case.images).argmax(axis=-1)]
    for _ in range(case.greedy_steps - 1):
        tokens.append(decoding.decode(tokens[-1]).argmax(axis=-1))
    return np.stack(tokens, axis=1).tolist()


def _run_far(runner: Runner, case: Case) -> np.ndarray:
    """The far prompt, which ends in the last slots of the cache, where only its own slots may be seen."""
    length = len(case.far_prompt)
    positions = np.arange(case.far_position, case.far_position + length, dtype=np.int64)
    mask = np.zeros((1, case.far_position + length), np.int64)
    mask[0, case.far_position :] = 1
    runner.reset(1)
    poison(runner)
    feeds = {
        "input_ids": np.array([case.far_prompt], np.int64),
        "position_ids": positions[None],
        "write_indices": positions[:1],
        "attention_mask": mask,
        "logit_indices": np.array([[length - 1]], np.int64),
    }
    if runner.vision_spec is not None:
        feeds["cross_attention_mask"] = np.full((1, length, 1, 1), -1, np.int64)
    return runner.step(feeds)[0, 0]


def _run_chunks(runner: Runner, chunks: Chunks) -> list[np.ndarray]:
    """Every row's chunks, one call per chunk; logits of all tokens. Before the last one, rows change places."""
    rows = len(chunks.slots)
    held = np.arange(rows)  # which of `chunks` each row of the runner holds
    runner.reset(rows)
    poison(runner)
    if chunks.images is not None:
        runner.encode_images(chunks.images.encoder_feeds())
    logits, start = [], 0
    for size in chunks.sizes:
        written = chunks.slots[:, : start + size]
        seen = np.zeros((rows, int(written.max()) + 1), np.int64)
        np.put_along_axis(seen, written, 1, axis=1)
        feeds = {
            "input_ids": chunks.tokens[:, start : start + size],
            "position_ids": chunks.positions[:, start : start + size],
            "write_indices": chunks.slots[:, start],
            "attention_mask": seen,
            "logit_indices": np.tile(np.arange(size, dtype=np.int64), (rows, 1)),
        }
        if chunks.images is not None:
            feeds["cross_attention_mask"] = chunks.images.cross_attention_mask[:, start : start + size]
        if start + size == chunks.tokens.shape[1]:
            held = np.roll(held, 1)
            runner.reorder_rows(held)
        found = runner.step({name: array[held] for name, array in feeds.items()})
        logits.append(found[np.argsort(held)])
        start += size
    return list(np.concatenate(logits, axis=1))


def measure_eager(truth: Trace, eager: Trace, swapped: Trace | None = None) -> Yardstick:
    """How far eager in the target's precision lies from the truth.

    Args:
        swapped: the truth with every choice that rounding could turn made the other way, for models that choose
            experts or keys; how far it lies from the truth counts as eager's error.
    """

    def errors(pick: Callable[[Trace], Sequence[np.ndarray]]) -> np.ndarray:
        of_eager = _errors(pick(eager), pick(truth))
        if swapped is None:
            return of_eager
        of_swapped = _errors(pick(swapped), pick(truth))
        return np.where(np.abs(of_swapped) > np.abs(of_eager), of_swapped, of_eager)

    def each(pick: Callable[[Trace], list[list[np.ndarray]]]) -> tuple[Spread, ...]:
        def spread(index: int) -> Spread:
            return _spread(errors(lambda trace: [row[index] for row in pick(trace)]))

        return tuple(spread(index) for index in range(len(pick(truth)[0]))) if pick(truth) else ()

    # One position's error says little about another's, so eager's errors at all positions make one yardstick; and a
    # rung may be a single position, so its root mean square is measured against the worst position's.
    of_logits = errors(_all_logits)
    worst_rms = max(_rms(position) for position in of_logits.reshape(-1, truth.far_logits.shape[-1]))
    return Yardstick(
        logits=Spread(_max(of_logits), worst_rms),
        cache=each(lambda trace: trace.cache),
        images=each(lambda trace: trace.images),
    )


def judge(
    case: Case,
    target: TargetTrace,
    truth: Trace,
    yardstick: Yardstick,
    greedy_truth: Sequence[np.ndarray],
    dtype: str,
) -> list[Rung]:
    """Compare the target with the truth, by eager's own error.

    Args:
        greedy_truth: per row [steps, V], the true logits before each token that the target chose, or before the first
            of them only.
        dtype: what the target computes in.
    """

    def rung(name: str, pick: Callable[[Trace], list[np.ndarray]]) -> Rung:
        return _rung(name, pick(target), pick(truth), yardstick.logits, dtype)

    rungs = [
        rung("prefill logits", lambda trace: [logits[:1] for logits in trace.logits]),
        rung("far-end logits", lambda trace: [trace.far_logits]),
        rung("chunked, left-padded rows", lambda trace: trace.chunk_logits),
    ]
    if case.forced.shape[1]:
        decode = rung(f"{case.forced.shape[1]} decode steps", lambda trace: [logits[1:] for logits in trace.logits])
        rungs.append(_with_top1(decode, case, target, truth))
    rungs.append(judge_greedy(case, target, greedy_truth, max(rung.max_limit for rung in rungs)))
    rungs.append(_worst_rung("written cache", target.cache_names, target.cache, truth.cache, yardstick.cache, dtype))
    if truth.images:
        of_images = (target.images, truth.images, yardstick.images)
        rungs.insert(0, _worst_rung("keys and values of images", target.image_names, *of_images, dtype))
    intact = target.tail_intact
    rungs.append(
        Rung(
            name="cache tail untouched",
            **dict.fromkeys(_NUMBERS, 0.0),
            passed=intact,
            note="" if intact else "a slot that no token was written to has changed",
        )
    )
    return rungs


def judge_greedy(case: Case, target: TargetTrace, truth: Sequence[np.ndarray], limit: float) -> Rung:
    """Each greedy token must be the truth's best, or closer to it than rounding can tell (`limit` per logit).

    Args:
        truth: per row [steps, V], the logits before each greedy token, or before the first `steps` of them.
    """
    worst = 0.0
    for row in _rows(case):
        steps = min(len(truth[row]), len(target.greedy[row]))
        chosen = truth[row][np.arange(steps), target.greedy[row][:steps]]
        worst = max(worst, float((truth[row].max(axis=-1) - chosen).max()))
    allowed = TOP1_GAP_MULTIPLE * limit
    passed = math.isfinite(allowed) and worst <= allowed
    return Rung(
        name=f"{case.greedy_steps} greedy tokens",
        **dict.fromkeys(_NUMBERS, 0.0) | {"max_error": worst, "max_limit": allowed},
        passed=passed,
        note="" if passed else "a token was chosen that is not the best",
    )


_NUMBERS = ("max_error", "rms_error", "eager_max_error", "eager_rms_error", "max_limit", "rms_limit")


def _rows(case: Case) -> range:
    return range(len(case.prompts))


def _all_logits(trace: Trace) -> list[np.ndarray]:
    return [*trace.logits, trace.far_logits, *trace.chunk_logits]


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def _errors(arrays: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    return _flat(arrays) - _flat(truth)


def _spread(errors: np.ndarray) -> Spread:
    return Spread(_max(errors), _rms(errors))


def _rung(name: str, target: Sequence[np.ndarray], truth: Sequence[np.ndarray], eager: Spread, dtype: str) -> Rung:
    exact = _flat(truth)
    error = _flat(target) - exact
    finite = bool(np.isfinite(error).all()) and eager.finite
    max_error, rms_error = (_max(error), _rms(error)) if finite else (float("inf"), float("inf"))
    floor = FLOOR_ULPS * MACHINE_EPSILON[dtype]
    max_limit = MAX_MULTIPLE * eager.max + floor * _max(exact)
    rms_limit = RMS_MULTIPLE * eager.rms + floor * _rms(exact)
    note = ""
    if not finite:
        note = "not every number is finite" if eager.finite else f"eager PyTorch itself overflows in {dtype}"
    return Rung(
        name=name,
        max_error=max_error,
        rms_error=rms_error,
        eager_max_error=eager.max,
        eager_rms_error=eager.rms,
        max_limit=max_limit,
        rms_limit=rms_limit,
        passed=finite and max_error <= max_limit and rms_error <= rms_limit,
        note=note,
    )


def compare(name: str, target: np.ndarray, truth: np.ndarray, eager: np.ndarray, dtype: str) -> Rung:
    """One rung from three arrays of one shape: what was computed, the truth, and eager's own result."""
    return _rung(name, [target], [truth], _spread(_errors([eager], [truth])), dtype)


def _worst_rung(
    name: str,
    tensors: Sequence[str],
    target: Sequence[Sequence[np.ndarray]],
    truth: Sequence[Sequence[np.ndarray]],
    eager: Sequence[Spread],
    dtype: str,
) -> Rung:
    """Every tensor (the second index) by its own scale; the worst one stands for all."""
    rungs = []
    for index, tensor in enumerate(tensors):
        ours, theirs = ([row[index] for row in rows] for rows in (target, truth))
        rung = _rung(name, ours, theirs, eager[index], dtype)
        rungs.append(dataclasses.replace(rung, note=f"worst: {tensor}"))
    return max(rungs, key=lambda rung: (not rung.passed, rung.max_error / rung.max_limit if rung.max_limit else 0.0))


def _with_top1(rung: Rung, case: Case, target: Trace, truth: Trace) -> Rung:
    """Fail the rung where the best token differs although the truth's margin is beyond rounding."""
    wrong = 0
    for row in _rows(case):
        ours, theirs = np.asarray(target.logits[row]), np.asarray(truth.logits[row])
        top2 = np.sort(theirs, axis=-1)[:, -2:]
        clear = (top2[:, -1] - top2[:, 0]) > TOP1_GAP_MULTIPLE * rung.max_limit
        wrong += int((clear & (ours.argmax(axis=-1) != theirs.argmax(axis=-1))).sum())
    return dataclasses.replace(rung, passed=False, note=f"{wrong} best tokens differ") if wrong else rung


def _max(array: np.ndarray) -> float:
    return float(np.abs(array).max()) if array.size else 0.0


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
