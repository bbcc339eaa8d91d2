"""The exporters that ours is measured beside: what command each takes to make a decoder of a checkpoint."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIMUM_PYTHON = ROOT / ".venv-optimum" / "bin" / "python"  # `make test-clients` makes it
OURS = "export-llm"


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One contestant."""

    precisions: tuple[str, ...]
    command: Callable[[Path, Path, str], list[str]]  # (checkpoint, out, precision)
    python: Path = Path(sys.executable)


def _ours(checkpoint: Path, out: Path, precision: str, *more: str) -> list[str]:
    options = ["--precision", precision, "--no-verify", *more]
    return [sys.executable, "-m", "exporter.cli", "export", str(checkpoint), "-o", str(out), *options]


def _ours_for_genai(checkpoint: Path, out: Path, precision: str) -> list[str]:
    return _ours(checkpoint, out, precision, "--layout", "genai")


def _builder(checkpoint: Path, out: Path, precision: str) -> list[str]:
    folders = ["-i", str(checkpoint), "-o", str(out), "-c", str(out.with_name("builder-cache"))]
    return [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision, *folders]


def _optimum(checkpoint: Path, out: Path, precision: str) -> list[str]:
    options = ["--task", "text-generation-with-past", "--no-post-process"]  # which would load what was made, to compare
    module = ["-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", str(checkpoint)]
    return [str(OPTIMUM_PYTHON), *module, *options, str(out)]


EXPORTERS: Mapping[str, Exporter] = {
    OURS: Exporter(precisions=("fp32", "fp16", "bf16", "int8", "int4"), command=_ours),
    f"{OURS} --layout genai": Exporter(precisions=("fp32", "int4"), command=_ours_for_genai),
    "onnxruntime-genai builder": Exporter(precisions=("fp32", "int4"), command=_builder),
    "optimum": Exporter(precisions=("fp32",), command=_optimum, python=OPTIMUM_PYTHON),
}


def dress(checkpoint: Path) -> None:
    """Add what peers insist on: the architecture's name, and some tokenizer."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    path.write_text(json.dumps(config))
    vocabulary = {f"<{index}>": index for index in range(config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"},
    }
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
