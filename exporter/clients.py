"""Clients that want an artifact's files under names of their own."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from exporter.errors import ExportError
from exporter.precision import Precision
from graphs.checkpoint import Checkpoint, open_checkpoint
from runtimes.artifact import CLIENT_GRAPH_FILE, Artifact
from runtimes.files import is_file, read_text

WEIGHT_SUFFIX = ".safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
_DATA = re.compile(r"\.onnx_data(_\d+)?$")


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """Where a client wants an artifact's files, and what it wants to read in others."""

    files: dict[str, str]  # {our name: the client's}
    config: dict[str, Any]  # in config.json
    template_in: str | None = None  # the file that is to hold the text of chat_template.jinja

    def json_files(self, folder: Path) -> dict[str, dict[str, Any]]:
        """{file of the artifact: what it is to say as well}."""
        more = {"config.json": self.config}
        template = folder / CHAT_TEMPLATE
        if self.template_in is not None and is_file(template) and is_file(folder / self.template_in):
            more[self.template_in] = {"chat_template": read_text(template)}
        return more


@dataclass(frozen=True, kw_only=True)
class Client:
    """One entry of the --client option."""

    layout: str
    rename: Callable[[Precision, Sequence[str]], Renaming]  # of files; ExportError for a precision without a name


# transformers.js: what it calls weights of that format, by what the graph computes in
_DTYPES = {
    ("", "fp32"): "fp32",
    ("", "fp16"): "fp16",
    ("int8", "fp32"): "int8",
    ("int4", "fp32"): "q4",
    ("int4", "fp16"): "q4f16",
}
_SUFFIXES = {"fp32": ""}  # of the file's name; other dtypes are their own


def _transformers_js_dtype(precision: Precision) -> str:
    weights = "" if precision.weights is None else precision.weights.name
    dtype = _DTYPES.get((weights, precision.compute.name))
    if dtype is None:
        known = ", ".join(f"{weights}:dtype={compute}" if weights else compute for weights, compute in _DTYPES)
        raise ExportError(
            f"--client transformers-js: it has no name for precision {precision.name}, computed in"
            f" {precision.compute.name}; it knows {known}"
        )
    return dtype


def _transformers_js(precision: Precision, names: Sequence[str]) -> Renaming:
    """onnx/model{_dtype}.onnx, and its weights as model{_dtype}.onnx_data, .._data_1 and so on."""
    dtype = _transformers_js_dtype(precision)
    graph = f"model{_SUFFIXES.get(dtype, f'_{dtype}')}.onnx"
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIX)]
    files = {name: f"onnx/{graph}_data" + (f"_{index}" if index else "") for index, name in enumerate(weights)}
    config = {"transformers.js_config": {"dtype": dtype, "use_external_data_format": {graph: len(weights)}}}
    files |= {CLIENT_GRAPH_FILE: f"onnx/{graph}"}
    return Renaming(files=files, config=config, template_in="tokenizer_config.json")


CLIENTS: dict[str, Client] = {
    "transformers-js": Client(layout="dynamic", rename=_transformers_js),
}


def relocate_weights(graph: Path, renamed: Mapping[str, str]) -> None:
    """Let a graph's external data be found under other names; only their last parts, beside the graph, count."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value in renamed:
                entry.value = Path(renamed[entry.value]).name
    graph.write_bytes(model.SerializeToString(deterministic=True))


def artifact_checkpoint(artifact: Artifact) -> Checkpoint:
    """The artifact's own weights, whatever their files are called."""
    renamed = [name for name in artifact.manifest.files if "/" in name and _DATA.search(name)]
    return open_checkpoint(artifact.folder, renamed)
