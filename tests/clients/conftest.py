"""Real clients, each a program in an environment of its own, and the artifacts that they are given.

A request is {"artifact": folder, "batches": lists of rows of token ids, "max_new_tokens": N, "pad_id": id}; it may have
"stop_id": id instead of the artifact's own, "in_float32": whether nothing is rounded on the way, "dtype": of
transformers.js, and "texts", "rows" of token ids and "messages", a chat. An answer is {"new": greedy ids of each row of
each batch}, and to messages also "encoded": ids of each text, "decoded": text of each row, "chat": the messages as the
artifact's template renders them. Clients use one thread: on models so small a second one only waits.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_cases import CHAT_TEMPLATE, Drive, absent

from runtimes.artifact import Artifact, open_artifact

CLIENTS = Path(__file__).resolve().parent
ROOT = CLIENTS.parents[1]
TIMEOUT_S = 240


def driver(command: list[str | Path]) -> Drive:
    """A function that sends a request to a program and returns its answer, which is the last line that it prints."""

    def drive(artifact: Artifact, **request: Any) -> dict[str, Any]:
        ran = subprocess.run(
            command,
            input=json.dumps({"artifact": str(artifact.folder), **request}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return answer

    return drive


@pytest.fixture(scope="session")
def optimum() -> Drive:
    """Optimum's ORTModelForCausalLM, with the transformers version that it needs."""
    if not (ROOT / ".venv-optimum" / "made.stamp").is_file():
        absent("optimum")
    return driver([ROOT / ".venv-optimum" / "bin" / "python", CLIENTS / "optimum" / "drive.py"])


@pytest.fixture(scope="session")
def genai() -> Drive:
    """onnxruntime-genai, in this environment."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        absent("onnxruntime-genai")
    return driver([sys.executable, CLIENTS / "genai" / "drive.py"])


@pytest.fixture(scope="session")
def transformers_js() -> Drive:
    """transformers.js under Node.js."""
    folder = CLIENTS / "transformers_js"
    if not (folder / "node_modules" / "made.stamp").is_file():
        absent("transformers.js")
    return driver(["node", folder / "drive.mjs"])


@pytest.fixture(scope="session")
def chat_models(
    tiny_llama: Path, shared_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint by name, with a chat template beside it; skipped where it is absent."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            checkpoint = tiny_llama if name == tiny_llama.name else shared_model(name)
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            shutil.copytree(checkpoint, made[name], copy_function=shutil.copyfile)
            (made[name] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        return made[name]

    return get


@pytest.fixture(scope="session")
def exported(chat_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Exports a checkpoint, without verification; each once per session."""
    made: dict[tuple[str, ...], Artifact] = {}

    def get(model: str, layout: str, precision: str, **options: Any) -> Artifact:
        key = (model, layout, precision, *options)
        if key not in made:
            from exporter.pipeline import ExportRequest, export

            out = tmp_path_factory.mktemp("exported") / "-".join(key)
            export(
                ExportRequest(
                    checkpoint=chat_models(model), out=out, layout=layout, precision=precision, verify=False, **options
                )
            )
            made[key] = open_artifact(out)
        return made[key]

    return get
