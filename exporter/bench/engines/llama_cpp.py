"""llama.cpp by way of llama-cpp-python, on a GGUF file that is made of the checkpoint."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

CACHE_TYPES = {4: 0, 2: 1}  # {bytes of a number: what ggml calls float32 and float16}


class LlamaCppEngine:
    """See engine.Engine. One row; a float32 model has a float32 cache, any other llama.cpp's default of float16."""

    def __init__(self, model: str, *, threads: int, context_tokens: int) -> None:
        self._llama: Any = importlib.import_module("llama_cpp")
        kind = Path(model).stem
        self.cache_number_bytes: int | None = 4 if kind == "F32" else 2
        cache = CACHE_TYPES[self.cache_number_bytes]
        self._model = self._llama.Llama(
            model, n_ctx=context_tokens, n_threads=threads, n_threads_batch=threads, type_k=cache, type_v=cache,
            n_gpu_layers=0, verbose=False,
        )  # fmt: skip
        self._vocab_size = self._model.n_vocab()
        self._token = 0
        self.weight_bytes: int | None = (
            Path(model).stat().st_size
        )  # and of a table of embeddings, where the output projection is another
        self.description = f"llama-cpp-python {self._llama.__version__}, {kind}"

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """See Engine.prefill."""
        (prompt,) = prompts
        self._model.reset()
        return self._feed(prompt)

    def decode(self, steps: int) -> list[list[int]]:
        """See Engine.decode."""
        return [self._feed([self._token]) for _ in range(steps)]

    def close(self) -> None:
        """See Engine.close."""
        self._model.close()

    def _feed(self, tokens: list[int]) -> list[int]:
        self._model.eval(tokens)
        pointer = self._llama.llama_get_logits_ith(self._model.ctx, -1)
        self._token = int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())
        return [self._token]


def prepare(checkpoint: Path, precision: str, folder: Path) -> Path:
    """Write the GGUF file; this needs our own packages, and gguf."""
    path = folder / f"{precision}.gguf"
    importlib.import_module("exporter.bench.llama_gguf").write_gguf(checkpoint, precision, path)
    return path
