"""Broken folders given to the command: exit code 2, one message, no traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.cli import main
from tests.torture.seeds import seal

Run = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command, which must refuse; returns its message."""

    def run(*args: object) -> str:
        monkeypatch.setattr("sys.argv", ["export-llm", *map(str, args)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert caught.value.code == 2, err
        assert "Traceback" not in err
        assert err.count("error:") == 1
        assert not out
        return err

    return run


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "config is a pipe": lambda folder: _pipe(folder / "config.json"),
    "config is nested": lambda folder: (folder / "config.json").write_text("[" * 10**5),
    "config is not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
    "weights are text": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 4096),
    "weights are a device": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").symlink_to("/dev/zero"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_checkpoints(damage: str, seeds: Path, tmp_path: Path, refused: Run) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(seeds / "checkpoint", folder)
    DAMAGE[damage](folder)
    assert str(folder) in refused("inspect", folder)
    assert str(folder) in refused("export", folder, "-o", tmp_path / "out", "--no-verify", "--quiet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["manifest is nested", "names lead out", "tokenizer is a pipe", "graph is text"])
def test_broken_artifacts(damage: str, seeds: Path, tmp_path: Path, refused: Run) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(seeds / "portable", folder)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    if damage == "manifest is nested":
        (folder / "manifest.json").write_text("[" * 10**5)
    elif damage == "names lead out":
        manifest["files"]["../../x"] = {"sha256": "", "bytes": 1}
        seal(folder, manifest)
    elif damage == "tokenizer is a pipe":
        _pipe(folder / "tokenizer.json")
    else:
        (folder / "decoder.onnx").write_bytes(b"x" * 100)
        seal(folder, manifest)
    for args in (("generate", folder, "--prompt", "1"), ("verify", folder, "--quiet")):
        assert str(folder) in refused(*args)


def test_names_from_files_are_shown_as_they_are(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich took [/red] for its markup, and ended in a traceback; \\x1b would reach the terminal."""
    folder = tmp_path / "artifact"
    shutil.copytree(seeds / "portable", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["precision"] = "[/red]\x1b[2J"
    seal(folder, manifest)
    monkeypatch.setattr("sys.argv", ["export-llm", "inspect", str(folder)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    out, _ = capsys.readouterr()
    assert "[/red]\\x1b[2J" in out
    assert "\x1b[2J" not in out
    assert "[batch_size, sequence_length]" in out
