"""transformers, eager or with torch.compile: the checkpoint as it is, and a loop over its forward."""

import importlib
from pathlib import Path
from typing import Any


class TransformersEngine:
    """See engine.Engine. `compiled`: decoding steps run as torch.compile made them, over a static cache."""

    cache_number_bytes = None

    def __init__(self, model: str, *, threads: int, dtype: str, compiled: bool = False) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        self._torch.set_num_threads(threads)
        self._torch.set_grad_enabled(False)
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(model, dtype=getattr(self._torch, dtype), local_files_only=True).eval()
        # Shapes do not change from step to step; another prompt length has another cache, and is compiled anew.
        self._step = self._torch.compile(self._model, dynamic=False) if compiled else self._model
        self._compiled = compiled
        self._caches: dict[tuple[int, int], Any] = {}
        self._cache: Any = None
        self._tokens: Any = None
        self._length = 0
        embedding = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is embedding
        sizes = sum(parameter.nbytes for parameter in self._model.parameters())
        self.weight_bytes: int | None = sizes if tied else sizes - embedding.nbytes
        how = "torch.compile" if compiled else "eager"
        versions = f"transformers {self._transformers.__version__}, PyTorch {self._torch.__version__}"
        self.description = f"{versions}, {how}, {dtype}"

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """See Engine.prefill."""
        self._cache = self._new_cache(len(prompts), len(prompts[0]) + new_tokens)
        self._length = 0
        return self._forward(self._model, self._torch.tensor(prompts))

    def decode(self, steps: int) -> list[list[int]]:
        """See Engine.decode."""
        return [self._forward(self._step, self._tokens) for _ in range(steps)]

    def close(self) -> None:
        """See Engine.close."""
        self._model = self._step = self._cache = None
        self._caches = {}

    def _new_cache(self, batch_size: int, total: int) -> Any:
        if not self._compiled:
            return self._transformers.DynamicCache(config=self._model.config)
        key = (batch_size, total)
        if key not in self._caches:  # one for each size: compiled code is bound to its tensors
            self._caches[key] = self._transformers.StaticCache(config=self._model.config, max_cache_len=total)
        self._caches[key].reset()
        return self._caches[key]

    def _forward(self, run: Any, tokens: Any) -> list[int]:
        """Feed tokens [B, S] and choose the best next one of each row."""
        positions = self._torch.arange(self._length, self._length + tokens.shape[1])[None]
        logits = run(
            input_ids=tokens, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits
        self._length += tokens.shape[1]
        self._tokens = logits[:, -1].argmax(-1, keepdim=True)
        chosen: list[int] = self._tokens[:, 0].tolist()
        return chosen


def prepare(checkpoint: Path, precision: str, folder: Path) -> Path:
    """transformers reads the checkpoint itself."""
    return checkpoint
