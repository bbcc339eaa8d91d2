"""Prefixes: what a row's first tokens left in the cache, for prompts that begin with the same tokens."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from runtimes.errors import FeedError
from runtimes.runner import Runner
from runtimes.signature import CacheSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """What one row's first tokens left in the cache.

    Attributes:
        tensors: by input name, float32: of a cache the slots of those tokens, of a sum the whole; without batch axis.
        dtypes: by input name, what the runner that made them kept them in.
    """

    token_ids: tuple[int, ...]
    tensors: Mapping[str, np.ndarray]
    dtypes: Mapping[str, str]

    def shapes(self, spec: CacheSpec) -> dict[str, tuple[int, ...]]:
        """What the tensors' shapes must be for such a cache, by input name."""
        slots = len(self.token_ids)
        shapes = [
            tuple(slots if axis == tensor.slot_axis else size for axis, size in enumerate(tensor.shape))
            for tensor in spec.tensors
        ]
        return dict(zip(spec.past_names(), shapes, strict=True))


def read_prefix(runner: Runner, token_ids: Sequence[int], row: int) -> Prefix:
    """What these tokens, the first of that row, left in the runner's cache."""
    spec, tensors = runner.cache_spec, {}
    for index, (name, tensor) in enumerate(zip(spec.past_names(), spec.tensors, strict=True)):
        array = runner.read_cache(index)
        one = array[row] if tensor.slot_axis is None else tensor.slots(array, row, 0, len(token_ids))
        tensors[name] = one.copy()  # a view would keep the whole cache
    return Prefix(token_ids=tuple(map(int, token_ids)), tensors=tensors, dtypes=kept_dtypes(runner))


def write_prefix(runner: Runner, prefix: Prefix, rows: int) -> None:
    """Put a prefix into every row of a cache that was reset for `rows` rows.

    Raises:
        FeedError: it is another model's, or was made by a runner that computes in another dtype.
    """
    spec = runner.cache_spec
    if prefix.shapes(spec) != {name: array.shape for name, array in prefix.tensors.items()}:
        raise FeedError("the prefix was made with another model: its tensors are not those of this cache")
    if (kept := kept_dtypes(runner)) != prefix.dtypes:
        found, here = (", ".join(sorted(set(dtypes.values()))) for dtypes in (prefix.dtypes, kept))
        raise FeedError(
            f"the prefix holds {found} numbers, but {runner.description} keeps {here}: it was saved with another"
            " runtime or device; save it again with this one"
        )
    for index, (name, tensor) in enumerate(zip(spec.past_names(), spec.tensors, strict=True)):
        array = np.zeros(tensor.array_shape(rows), np.float32)
        for row in range(rows):
            own = array[row] if tensor.slot_axis is None else tensor.slots(array, row, 0, len(prefix.token_ids))
            own[...] = prefix.tensors[name]
        runner.write_cache(index, array)


def kept_dtypes(runner: Runner) -> dict[str, str]:
    """In what the runner keeps each tensor, by input name: float32 where it computes a 16-bit graph in float32."""
    spec = runner.cache_spec
    widened = runner.computes_in != spec.dtype
    dtypes = [runner.computes_in if widened else tensor.dtype for tensor in spec.tensors]
    return dict(zip(spec.past_names(), dtypes, strict=True))


def check_prompts(prefix: Prefix, prompts: Sequence[Sequence[int]]) -> None:
    """FeedError unless every prompt begins with the prefix."""
    size = len(prefix.token_ids)
    for row, prompt in enumerate(prompts):
        pairs = zip(prompt, prefix.token_ids, strict=False)
        place = next((place for place, (ours, saved) in enumerate(pairs) if ours != saved), None)
        if place is not None:
            raise FeedError(
                f"prompt {row} does not begin with the prefix: its token {place} is {prompt[place]}, the prefix's"
                f" {prefix.token_ids[place]} (where a text goes on, its last word may be split otherwise: end a prefix"
                " with a whole word or line)"
            )
        if len(prompt) < size:
            raise FeedError(f"prompt {row} has {len(prompt)} tokens, fewer than the prefix, which has {size}")
