"""Our own artifacts, run by our own runners."""

import importlib
from typing import Any

import numpy as np

DEVICE = "cpu"


class ArtifactEngine:
    """See engine.Engine. The whole logits come to numpy, as in `generate`."""

    weight_bytes = cache_number_bytes = None

    def __init__(self, model: str, *, threads: int, runtime: str) -> None:
        self._runner = _open(model, runtime, threads)
        self._decoding = importlib.import_module("runtimes.decoding").Decoding(self._runner)
        self._tokens = np.zeros(0, np.int64)
        self.description = self._runner.description

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """See Engine.prefill."""
        return self._choose(self._decoding.prefill(prompts))

    def decode(self, steps: int) -> list[list[int]]:
        """See Engine.decode."""
        return [self._choose(self._decoding.decode(self._tokens)) for _ in range(steps)]

    def close(self) -> None:
        """See Engine.close."""
        self._runner.close()

    def _choose(self, logits: np.ndarray) -> list[int]:
        self._tokens = logits.argmax(-1)
        tokens: list[int] = self._tokens.tolist()
        return tokens


def _open(model: str, runtime: str, threads: int) -> Any:
    """The runner. PyTorch's take their threads from the environment, and engines for GPUs have none."""
    artifact = importlib.import_module("runtimes.artifact").open_artifact(model, check_hashes=False)
    runner = importlib.import_module("runtimes.runner")
    if runtime in runner.RUNNERS:
        options = {"device": DEVICE, "threads": threads} if runtime == "onnxruntime" else {}
        return runner.open_runner(artifact, runtime, **options)
    return importlib.import_module("exporter.torch_runners").MODULE_RUNNERS[runtime](artifact, DEVICE)
