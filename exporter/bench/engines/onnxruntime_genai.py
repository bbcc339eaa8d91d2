"""onnxruntime-genai: its own model builder makes the model, its own generator runs it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "genai_config.json"
# Logits of the last token only, in a prefill as well: its own best way.
BUILDER_OPTIONS = ("prune_lm_head=true",)
UNLIKELY_TOKEN = 0


class GenaiEngine:
    """See engine.Engine. Runs any folder that holds a genai_config.json."""

    weight_bytes = cache_number_bytes = None

    def __init__(self, model: str, *, threads: int) -> None:
        self._og: Any = importlib.import_module("onnxruntime_genai")
        config = self._og.Config(model)
        config.clear_providers()  # the CPU
        session_options = {"intra_op_num_threads": threads}
        # A text must not end before the others' do. Only a list of stop ids that holds something can be replaced, so
        # it becomes a token that is hardly ever chosen, and min_length (below) forbids even that.
        overlay = {"model": {"eos_token_id": UNLIKELY_TOKEN, "decoder": {"session_options": session_options}}}
        config.overlay(json.dumps(overlay))
        self._model = self._og.Model(config)
        self._generator: Any = None
        self.description = f"onnxruntime-genai {self._og.__version__}"

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """See Engine.prefill."""
        total = len(prompts[0]) + new_tokens
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(prompts), do_sample=False, min_length=total, max_length=total)
        self._generator = None  # free the old cache first
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(np.array(prompts, np.int32))
        return self._next()

    def decode(self, steps: int) -> list[list[int]]:
        """See Engine.decode."""
        return [self._next() for _ in range(steps)]

    def close(self) -> None:
        """See Engine.close."""
        self._generator = self._model = None

    def _next(self) -> list[int]:
        self._generator.generate_next_token()
        tokens: list[int] = self._generator.get_next_tokens().tolist()
        return tokens


def prepare(checkpoint: Path, precision: str, folder: Path) -> Path:
    """Let the model builder make a model of that precision for the CPU."""
    source, model = folder / "checkpoint", folder / "model"
    _stage(checkpoint, source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
    command += ["-i", str(source), "-o", str(model), "-c", str(folder / "cache"), "--extra_options", *BUILDER_OPTIONS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {done.stdout.strip().splitlines()[-1:]}")
    return model


def graph_of(model: Path) -> Path:
    """The ONNX file of a folder with a genai_config.json; ArtifactError where that names none in the folder."""
    # here, because an interpreter that has no more than its library runs this file as well
    from runtimes.errors import ArtifactError
    from runtimes.files import read_json, shown

    try:
        name = read_json(model / CONFIG)["model"]["decoder"]["filename"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ArtifactError(f"{model / CONFIG}: model.decoder.filename must be a plain file name, found {shown(name)}")
    return model / name


def _stage(checkpoint: Path, folder: Path) -> None:
    """The checkpoint with what the builder insists on: the name of an architecture, and some tokenizer."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if not config.get("architectures"):
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
        config["architectures"] = [auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizers = importlib.import_module("tokenizers")
        words = {f"<{index}>": index for index in range(config["vocab_size"])}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))
        description = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(description), encoding="utf-8")
