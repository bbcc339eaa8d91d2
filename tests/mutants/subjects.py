"""The artifacts that mutants are made of: small checkpoints of several families, each exported once."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import test_families
from mllama_cases import CASES as VISION_CASES
from mllama_cases import MAX_LEN as VISION_MAX_LEN
from mllama_cases import save
from safetensors.numpy import load_file, save_file

from exporter.pipeline import ExportRequest, export
from runtimes.artifact import Artifact, open_artifact

TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama"
OUTLIER_CHANNEL, OUTLIER = 17, 400.0  # its square is beyond float16's 65504


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """An artifact: which checkpoint, and how it is exported."""

    checkpoint: str
    precision: str = "fp32"
    layout: str = "portable"
    max_len: int | None = None  # None: the checkpoint's own


SUBJECTS: dict[str, Subject] = {
    "llama-fp32": Subject(checkpoint="llama"),
    "llama-fp16": Subject(checkpoint="llama", precision="fp16"),
    "llama-bf16": Subject(checkpoint="llama", precision="bf16"),
    "llama-int8": Subject(checkpoint="llama", precision="int8"),
    "llama-int4": Subject(checkpoint="llama", precision="int4"),
    "llama-dynamic": Subject(checkpoint="llama", layout="dynamic"),
    "llama-genai": Subject(checkpoint="llama", layout="genai"),
    "long-fp16": Subject(checkpoint="llama", precision="fp16", max_len=4096),  # angles are large at the far end
    "outlier-fp16": Subject(checkpoint="outlier", precision="fp16"),
    "mistral-fp32": Subject(checkpoint="mistral"),
    "mistral-dynamic": Subject(checkpoint="mistral", layout="dynamic"),
    "gemma2-fp32": Subject(checkpoint="gemma2"),
    "gemma3-fp32": Subject(checkpoint="gemma3_text"),
    "qwen2-fp32": Subject(checkpoint="qwen2"),
    "qwen3_moe-fp32": Subject(checkpoint="qwen3_moe"),
    "phi3-longrope": Subject(checkpoint="phi3, longrope"),
    "granite-fp32": Subject(checkpoint="granite"),
    "smollm3-fp32": Subject(checkpoint="smollm3"),
    "vision-fp32": Subject(checkpoint="vision"),
}


def _outlier(folder: Path) -> Path:
    """tiny_llama with a channel of the residual stream as large as large models have some.

    As there, the weights of norms hold it down, and lift the others to where they would be without it.
    """
    shutil.copytree(TINY_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    table = weights["model.embed_tokens.weight"].copy()
    table[:, OUTLIER_CHANNEL] = OUTLIER * (1 + 0.1 * np.cos(np.arange(len(table))))
    lift = np.full(table.shape[1], OUTLIER / table.shape[1] ** 0.5, np.float32)
    lift[OUTLIER_CHANNEL] = 0.1
    weights |= {name: weight * lift for name, weight in weights.items() if "norm" in name}
    save_file(weights | {"model.embed_tokens.weight": table}, folder / "model.safetensors", {"format": "pt"})
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: TINY_LLAMA,
    "outlier": _outlier,
    "vision": lambda folder: save(VISION_CASES["4 tiles"].make_model(), folder),
}


MAX_LENS = {"llama": None, "outlier": None, "vision": VISION_MAX_LEN}  # by checkpoint; others: the families' tests' own


def make_checkpoint(name: str, folder: Path) -> Path:
    """One of MAKERS, or of tests/test_families.py's cases."""
    if name in MAKERS:
        return MAKERS[name](folder)
    test_families.CASES[name].make_model().save_pretrained(folder)
    return folder


class Workshop:
    """Makes each checkpoint and each artifact once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checkpoints: dict[str, Path] = {}
        self._artifacts: dict[str, Artifact] = {}

    def checkpoint(self, name: str) -> Path:
        """What the artifact is compared with."""
        if name not in self._checkpoints:
            self._checkpoints[name] = make_checkpoint(name, self.folder / f"{name} checkpoint")
        return self._checkpoints[name]

    def reference(self, artifact: str) -> Path:
        """The checkpoint of one of SUBJECTS."""
        return self.checkpoint(SUBJECTS[artifact].checkpoint)

    def artifact(self, name: str) -> Artifact:
        """One of SUBJECTS, not verified."""
        if name not in self._artifacts:
            self._artifacts[name] = self.export(SUBJECTS[name], self.folder / name)
        return self._artifacts[name]

    def export(self, subject: Subject, out: Path) -> Artifact:
        """The artifact, in `out`."""
        max_len = subject.max_len or MAX_LENS.get(subject.checkpoint, test_families.MAX_LEN)
        request = ExportRequest(
            checkpoint=self.checkpoint(subject.checkpoint),
            out=out,
            precision=subject.precision,
            layout=subject.layout,
            max_len=max_len,
            verify=False,
        )
        export(request)
        return open_artifact(out)
