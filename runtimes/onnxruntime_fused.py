"""The ONNX Runtime runner of the genai layout, whose attention operator counts a row's tokens and has no mask."""

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import FeedError
from runtimes.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.onnxruntime_session import ERRORS_ONLY
from runtimes.runner import Feeds
from runtimes.signature import CacheSpec, GraphSignature, VisionPart, step_signature
from runtimes.step_checks import check_step


class FusedOnnxRuntimeRunner(OnnxRuntimeRunner):
    """Runs a decoder graph of the genai layout; see runtimes.runner.Runner for the interface.

    A row's tokens lie in its cache from slot 0 on without gaps, and a token's position is its slot; steps that say
    otherwise are refused.
    """

    def __init__(
        self,
        model: Path,
        signature: GraphSignature,
        cache_spec: CacheSpec,
        *,
        vision: VisionPart | None = None,
        **options: Any,
    ) -> None:
        """Load `model`; signature is the graph's own. Options are those of OnnxRuntimeRunner."""
        # It warns of what the layout does on purpose: logit_indices has a default, and asks for other logits than the
        # one row that the output's shape promises to clients which do not know it.
        super().__init__(model, signature, cache_spec, vision=vision, **{"log_severity": ERRORS_ONLY, **options})
        self.signature = step_signature(signature, cache_spec)
        self.description = f"{self.description}, genai layout"

    def step(self, feeds: Feeds) -> np.ndarray:
        """Run the graph; see Runner.step."""
        self._open_session()
        sizes = check_step(feeds, self.signature, self.cache_spec, self._batch_size)
        begins, length = feeds["write_indices"], sizes["sequence_length"]
        _check_gapless(feeds, length)
        # GroupQueryAttention takes several new tokens of several rows in their first call only
        if len(begins) == 1 or length == 1 or not begins.any():
            return self._run_graph(self._own_feeds(feeds, slice(0, length), feeds["logit_indices"]))
        first = np.zeros((len(begins), 1), np.int64)
        steps = [self._run_graph(self._own_feeds(feeds, slice(at, at + 1), first)) for at in range(length)]
        result: np.ndarray = np.take_along_axis(
            np.concatenate(steps, axis=1), feeds["logit_indices"][..., None], axis=1
        )
        return result

    def _own_feeds(self, feeds: Feeds, part: slice, logit_indices: np.ndarray) -> dict[str, np.ndarray]:
        """The graph's inputs for some of a call's tokens."""
        ends = feeds["write_indices"] + part.stop
        if not feeds["write_indices"].any():  # only then may rows be padded
            ends = (feeds["attention_mask"][:, : part.stop] != 0).sum(axis=1).clip(min=1)
        return {
            "input_ids": feeds["input_ids"][:, part],
            "attention_mask": (np.arange(ends.max()) < ends[:, None]).astype(np.int64),
            "logit_indices": logit_indices,
        }


def _check_gapless(feeds: Feeds, length: int) -> None:
    """FeedError where a row hides a slot before its new tokens, or one of those has another position than its slot."""
    begins, mask = feeds["write_indices"], feeds["attention_mask"] != 0
    slots, rows = begins[:, None] + np.arange(length), np.arange(len(begins))[:, None]
    own = mask[rows, slots.clip(max=mask.shape[1] - 1)] & (slots < mask.shape[1])
    before = np.arange(mask.shape[1]) < begins[:, None]
    gaps = (before & ~mask).any(axis=1) | (begins > mask.shape[1])
    if (gaps & own.any(axis=1)).any():
        raise FeedError(
            "this artifact's layout (genai) hides no slots of a row: attention_mask must be 1 from slot 0 on"
        )
    if (own & (feeds["position_ids"] != slots)).any():
        raise FeedError(
            "this artifact's layout (genai) takes a token's slot as its position: position_ids must be write_indices,"
            " counted on"
        )
