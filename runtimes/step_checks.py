"""The checks that every runner makes before a reset and a step."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from runtimes.errors import FeedError
from runtimes.signature import CacheSpec, GraphSignature, VisionPart, VisionSpec

NEVER = 2**63 - 1  # a slot, or a position, beyond all


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldImages:
    """What the rows of a runner were shown."""

    spec: VisionSpec
    count: int = 1  # images a row, padding included
    tiles: int = 1  # an image, padding included


def require_vision(vision: VisionPart | None) -> VisionPart:
    """FeedError for a model that reads text only."""
    if vision is None:
        raise FeedError("this model reads text only: it has no vision encoder to show images to")
    return vision


def check_reset(batch_size: int, signature: GraphSignature) -> None:
    """FeedError unless the artifact takes that many rows."""
    allowed = signature.dims["batch_size"]
    if not allowed.min <= batch_size <= allowed.max:
        raise FeedError(
            f"batch_size {batch_size}: this artifact takes {allowed.min} to {allowed.max} rows (set by --max-batch)"
        )


def check_step(
    feeds: Mapping[str, np.ndarray],
    signature: GraphSignature,
    cache_spec: CacheSpec,
    batch_size: int,
    images: "HeldImages | None" = None,
) -> dict[str, int]:
    """Check the inputs of one step against the signature and the cache; return the dynamic dimensions' sizes.

    Args:
        batch_size: rows the cache was made for; 0 when reset was not called.
        images: what the rows were shown, of a decoder that sees.

    Raises:
        FeedError: a missing or wrong input, or tokens that would be written beyond the cache (runtimes drop those
            in silence).
    """
    require_reset(batch_size, "the first step")
    held = {*cache_spec.past_names(), *(() if images is None else images.spec.names())}
    expected = {spec.name for spec in signature.inputs} - held
    if missing := expected - feeds.keys():
        raise FeedError(f"missing inputs: {', '.join(sorted(missing))}")
    sizes = signature.check_feeds(feeds)
    if sizes["batch_size"] != batch_size:
        raise FeedError(f"batch_size is {sizes['batch_size']}, but reset made a cache for {batch_size}")
    limits = signature.limits
    _check_range(feeds, "input_ids", limits["input_ids"], "the vocabulary")
    _check_range(feeds, "logit_indices", sizes["sequence_length"], "this call's tokens")
    _check_range(feeds, "position_ids", limits.get("position_ids", NEVER), "the positions")
    if images is not None:
        shown, found = (images.count, images.tiles), (sizes["num_images"], sizes["num_tiles"])
        if found != shown:
            raise FeedError(
                f"cross_attention_mask speaks of {found[0]} images with {found[1]} tiles, but the rows were shown"
                f" {shown[0]} with {shown[1]} (before encode_images, it is one of one tile that holds nothing)"
            )
        _check_values(feeds, "cross_attention_mask", (-1, 0, 1))
    mask = feeds["attention_mask"] != 0
    first_seen = np.where(mask.any(axis=1), mask.argmax(axis=1), NEVER)
    if (blind := first_seen > feeds["position_ids"].min(axis=1)).any():  # softmax over nothing: NaN, or anything else
        raise FeedError(
            f"rows {np.flatnonzero(blind).tolist()} hold a token that sees no cache slot: attention_mask must be 1 for"
            " a slot at or before every position"
        )
    first = int(feeds["write_indices"].min())
    last = int(feeds["write_indices"].max()) + sizes["sequence_length"]
    if first < 0 or last > cache_spec.max_len:
        raise FeedError(
            f"tokens would be written to slots {first} to {last - 1}, but the cache holds {cache_spec.max_len}"
        )
    return sizes


def check_images(feeds: Mapping[str, np.ndarray], signature: GraphSignature, batch_size: int) -> tuple[int, int]:
    """Check the vision encoder's inputs; return how many images of how many tiles they are.

    Args:
        signature: the vision encoder's.
        batch_size: rows the cache was made for; 0 when reset was not called.

    Raises:
        FeedError: a missing or wrong input, or an image without a tile.
    """
    require_reset(batch_size, "images are shown")
    if missing := {spec.name for spec in signature.inputs} - feeds.keys():
        raise FeedError(f"missing inputs: {', '.join(sorted(missing))}")
    sizes = signature.check_feeds(feeds)
    if sizes["batch_size"] != batch_size:
        raise FeedError(f"batch_size is {sizes['batch_size']}, but reset made a cache for {batch_size}")
    _check_range(feeds, "aspect_ratio_ids", signature.limits["aspect_ratio_ids"], "the aspect ratios")
    _check_values(feeds, "aspect_ratio_mask", (0, 1))
    if not feeds["aspect_ratio_mask"].any(axis=-1).all():
        raise FeedError(
            "aspect_ratio_mask must be 1 for a tile of every image at least, of padding images for the first"
        )
    return sizes["num_images"], sizes["num_tiles"]


def _check_values(feeds: Mapping[str, np.ndarray], name: str, allowed: tuple[int, ...]) -> None:
    """FeedError unless every number is one of these."""
    if (wrong := feeds[name][~np.isin(feeds[name], allowed)]).size:
        raise FeedError(f"{name} holds {wrong[0]}, expected one of {', '.join(map(str, allowed))}")


def require_reset(batch_size: int, before: str) -> None:
    """FeedError unless reset made a cache; `before` says in words what may not come first."""
    if not batch_size:
        raise FeedError(f"reset(batch_size) must be called before {before}")


def check_index(index: int, names: Sequence[str]) -> None:
    """FeedError unless there is a tensor of that index; `names` are those of all."""
    if not 0 <= index < len(names):
        raise FeedError(f"there is no tensor {index}: they are {names[0]} (0) to {names[-1]} ({len(names) - 1})")


def check_cache_array(array: np.ndarray, index: int, cache_spec: CacheSpec, batch_size: int) -> None:
    """FeedError unless it is float32 numbers for tensor `index` of a cache that reset made."""
    require_reset(batch_size, "the cache is written")
    names = cache_spec.past_names()
    check_index(index, names)
    _check_float32(array, names[index], cache_spec.tensors[index].array_shape(batch_size))


def check_image_array(array: np.ndarray, index: int, held: HeldImages, batch_size: int) -> None:
    """FeedError unless it is float32 numbers for tensor `index` of the images that the rows were shown."""
    names = held.spec.names()
    check_index(index, names)
    _check_float32(array, names[index], held.spec.array_shape(batch_size, held.count, held.tiles))


def _check_float32(array: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise FeedError(f"{name} must be float32 {list(shape)}, got {array.dtype} {list(array.shape)}")


def check_rows(rows: np.ndarray, batch_size: int) -> None:
    """FeedError unless `rows` is int64 [batch_size] and names rows of a cache that reset made."""
    require_reset(batch_size, "rows are reordered")
    if rows.dtype != np.int64 or rows.shape != (batch_size,):
        raise FeedError(f"rows must be int64 [{batch_size}], got {rows.dtype} {list(rows.shape)}")
    _check_range({"rows": rows}, "rows", batch_size, "the cache's rows")


def _check_range(feeds: Mapping[str, np.ndarray], name: str, end: int, what: str) -> None:
    """FeedError unless every number lies in 0 .. end - 1: a graph would read something else there, in silence."""
    low, high = int(feeds[name].min()), int(feeds[name].max())
    if low < 0 or high >= end:
        raise FeedError(f"{name} holds {low if low < 0 else high}, outside {what} (0 to {end - 1})")
