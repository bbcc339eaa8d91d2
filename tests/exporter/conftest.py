"""What the exporter's tests share: the command (in this process and in another), and exports that are made once."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESS_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> str:
        """Assert exit code 2 and one message that holds all the words, on stderr only; return the message."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        (start,) = [match.start() for match in re.finditer(r"^error:", self.err, re.IGNORECASE | re.MULTILINE)]
        message = self.err[start:]
        for word in words:
            assert word in message, (word, message)
        return message


@dataclasses.dataclass(frozen=True)
class Export:
    """An artifact that the command made in a process of its own, and what it printed."""

    folder: Path
    ran: Ran


@pytest.fixture(scope="session")
def x_root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def x_tiny() -> Path:
    """The shipped checkpoint: float32, tied head, 3 layers."""
    return ROOT / "examples" / "tiny_llama"


@pytest.fixture
def x_copy(x_tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the shipped checkpoint's own files to a new folder, with changes to its config.json."""

    def copy(name: str = "checkpoint", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in x_tiny.iterdir():
            if is_shipped(file.name):
                shutil.copy(file, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.fixture
def x_one_layer(x_copy: Callable[..., Path]) -> Callable[..., Path]:
    """Copies the shipped checkpoint without all layers but the first: it exports faster."""

    def copy(name: str = "one-layer", **changes: Any) -> Path:
        folder = x_copy(name, num_hidden_layers=1, **changes)
        drop_layers(folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def x_one_layer_export(tmp_path_factory: pytest.TempPathFactory, x_tiny: Path) -> Path:
    """The artifact of x_one_layer() in its own precision, fp32, not verified. Do not change it."""
    from exporter.pipeline import ExportRequest, export

    folder = tmp_path_factory.mktemp("one-layer")
    shutil.copytree(x_tiny, folder / "checkpoint", ignore=lambda _, names: {n for n in names if not is_shipped(n)})
    config = json.loads((x_tiny / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    drop_layers(folder / "checkpoint")
    export(ExportRequest(checkpoint=folder / "checkpoint", out=folder / "artifact", verify=False))
    return folder / "artifact"


def is_shipped(name: str) -> bool:
    """True for the files of examples/tiny_llama that belong to the checkpoint."""
    return name.endswith((".json", ".safetensors"))


def drop_layers(folder: Path) -> None:
    """Keep the first layer only."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    dropped = ("model.layers.1.", "model.layers.2.")
    save_file({k: v for k, v in tensors.items() if not k.startswith(dropped)}, folder / "model.safetensors")


@pytest.fixture
def x_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    """Runs the command in this process, error handling included."""
    from exporter.cli import main

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["export-llm", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return Ran(code if isinstance(code, int) else 0, captured.out, captured.err)

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)  # main() sets its own


@pytest.fixture(scope="session")
def x_process() -> Callable[..., Ran]:
    """Runs the command in a process of its own."""

    def run(*args: object) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "exporter.cli", *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PROCESS_TIMEOUT_S,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def x_has_rtx() -> bool:
    """True where engines can be built."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


@pytest.fixture(scope="session")
def x_export(
    tmp_path_factory: pytest.TempPathFactory, x_tiny: Path, x_process: Callable[..., Ran], x_has_rtx: bool
) -> Export:
    """The shipped checkpoint as users export it: verified, with an engine where one can be built. Do not change it."""
    out = tmp_path_factory.mktemp("shared") / "artifact"
    targets = ["--target", "tensorrt-rtx"] if x_has_rtx else []
    ran = x_process("export", x_tiny, "-o", out, "--json", *targets)
    assert ran.code == 0, ran.err
    return Export(out, ran)


@pytest.fixture
def x_artifact(x_export: Export, tmp_path: Path) -> Path:
    """A copy of that artifact, to damage or to replace."""
    return Path(shutil.copytree(x_export.folder, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def x_graphs(tiny_artifacts: Callable[[str], Any]) -> Callable[[str], Path]:
    """The shipped checkpoint as ONNX in a precision, not verified; made once per session. Do not change it."""
    return lambda precision: tiny_artifacts(precision).folder


@pytest.fixture
def x_snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """Reads a folder: {relative path: bytes, or None for a folder}; links are not followed."""

    def read(folder: Path) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = str(path.readlink()).encode()
            else:
                found[name] = path.read_bytes() if path.is_file() else None
        return found

    return read
