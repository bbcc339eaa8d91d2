"""What every runner offers, and the table that opens one by name.

A runner holds the session (or engine, or module) and the key/value cache. It knows tensors; rows, lengths and
positions are runtimes/decoding.py's business.
"""

import importlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from runtimes.artifact import Artifact, open_artifact
from runtimes.errors import RuntimeMissingError
from runtimes.signature import CacheSpec, GraphSignature, VisionSpec

Feeds = Mapping[str, np.ndarray]


class Runner(Protocol):
    """One decoder, ready to run, with its cache. Use it in a `with` block."""

    signature: GraphSignature
    cache_spec: CacheSpec
    vision_spec: VisionSpec | None  # None: it reads text only
    computes_in: str  # the dtype of its arithmetic; cache_spec.dtype, unless it says otherwise
    description: str  # what runs it, for reports: "onnxruntime 1.31.1 (CPUExecutionProvider)"

    def reset(self, batch_size: int) -> None:
        """Make a cache of zeros for `batch_size` rows, which see no images."""

    def encode_images(self, feeds: Feeds) -> None:
        """Show the rows their images: run the vision encoder once, and keep its keys and values on the device.

        Every step until the next reset or call reads them. Feeds are pixel_values float32 [B, I, T, C, H, W],
        aspect_ratio_ids int64 [B, I] and aspect_ratio_mask int64 [B, I, T], as runtimes.images makes them.

        Raises:
            FeedError: an input is missing or wrong, reset was not called, or the model reads text only.
        """

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the graph on every input but the cache, which is updated in place; return logits float32 [B, n, V].

        A model that sees takes cross_attention_mask int64 [B, S, I, T] as well, with the I and T of encode_images;
        before it, of one image of one tile that holds nothing.
        """

    def read_cache(self, index: int) -> np.ndarray:
        """A float32 copy of tensor `index` of CacheSpec.tensors; a cache is [B, kv_heads, max_len, head_dim]."""

    def write_cache(self, index: int, array: np.ndarray) -> None:
        """Put float32 numbers of that shape in its place: the inverse of read_cache.

        Raises:
            FeedError: another shape or dtype, reset was not called, or the runner is closed.
        """

    def fill_cache(self, value: float) -> None:
        """Set every slot of every cache to `value`; sums, which have no slots, keep what they hold."""

    def read_images(self, index: int) -> np.ndarray:
        """A float32 copy of tensor `index` of VisionSpec.names(): [B, kv_heads, vision_tokens, head_dim]."""

    def write_images(self, index: int, array: np.ndarray) -> None:
        """Put float32 numbers of that shape in its place."""

    def reorder_rows(self, rows: np.ndarray) -> None:
        """Let cache row b hold what row rows[b] held, images included; rows are int64 [B], below B, and may repeat.

        Raises:
            FeedError: rows of another shape or dtype, or outside the cache.
        """

    def close(self) -> None:
        """Release memory; the runner cannot be used afterwards."""

    def __enter__(self) -> "Runner": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


# {name: (module, class)}; imported when it is asked for, because each needs a library of its own
RUNNERS: dict[str, tuple[str, str]] = {
    "onnxruntime": ("runtimes.onnxruntime_layouts", "OnnxRuntimeByLayout"),
    "tensorrt": ("runtimes.tensorrt_runner", "TensorRTRunner"),
    "tensorrt-rtx": ("runtimes.tensorrt_runner", "TensorRTRTXRunner"),
    "aoti": ("runtimes.aoti_runner", "AOTIRunner"),
}


def open_runner(artifact: Artifact | str, runtime: str = "onnxruntime", **options: Any) -> Runner:
    """Open an artifact's decoder with one of RUNNERS.

    Args:
        artifact: an opened artifact, or its folder.
        runtime: a key of RUNNERS.
        options: the runner's own, such as `device="cuda"` for onnxruntime.

    Raises:
        ArtifactError: the artifact is damaged, or holds nothing this runtime can run.
        RuntimeMissingError: the runtime's library, provider or device is not there.
    """
    if runtime not in RUNNERS:
        raise RuntimeMissingError(f"unknown runtime {runtime!r}; known: {', '.join(RUNNERS)}")
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(artifact)
    module, name = RUNNERS[runtime]
    runner: Runner = getattr(importlib.import_module(module), name).open(artifact, **options)
    return runner
