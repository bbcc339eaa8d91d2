"""Whole or not at all: an export appears complete at OUT, or leaves everything as it was."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exporter.pipeline as pipeline
from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.staging import check_destination, stage
from runtimes.artifact import open_artifact

Snapshot = Callable[[Path], dict[str, bytes | None]]
MakeArtifact = Callable[[Path], Path]


class CrashError(Exception):
    """What a test throws into the middle of an export."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def dead_pid() -> int:
    """A process id that was in use and is no longer."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def make_artifact(x_one_layer_export: Path) -> MakeArtifact:
    """Puts an artifact's manifest, and a graph that is none, into a folder."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(x_one_layer_export / "manifest.json", folder)
        (folder / "decoder.onnx").write_text("old")
        return folder

    return make


def check(out: Path, checkpoint: Path, *, reference: bool = False, force: bool = False) -> None:
    check_destination(out, checkpoint, reference=reference, force=force)


# --- where an export may go -------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_free(tmp_path: Path, checkpoint: Path) -> None:
    """Neither needs --force."""
    check(tmp_path / "new" / "deep", checkpoint)
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", checkpoint)


def test_an_artifact_is_replaced_with_force_only(make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path) -> None:
    """The message names the folder and the option."""
    out = make_artifact(tmp_path / "out")
    with pytest.raises(ExportError, match=rf"OUT \({out}\) exists: pass --force"):
        check(out, checkpoint)
    check(out, checkpoint, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_artifact_is_left_alone(tmp_path: Path, checkpoint: Path, force: bool) -> None:
    """A folder of the user's own files is refused whatever is asked for."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(ExportError, match="is not an artifact, so it is left alone: choose another folder"):
        check(tmp_path / "photos", checkpoint, force=force)


@pytest.mark.parametrize("text", ['{"name": "my app", "version": "1.0", "icons": []}', "[]", '{"manifest_version": 3}'])
def test_another_programs_manifest_makes_no_artifact(tmp_path: Path, checkpoint: Path, text: str) -> None:
    """manifest.json is a common name (browser extensions, web apps): --force must not delete such a folder."""
    folder = tmp_path / "extension"
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    (folder / "source.js").write_text("x")
    with pytest.raises(ExportError, match="not an artifact"):
        check(folder, checkpoint, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_is_no_folder(
    make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path, force: bool
) -> None:
    """A file, a link to an artifact and a dangling link are all refused."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(make_artifact(tmp_path / "real"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(ExportError, match="exists and is no folder: choose another name"):
            check(tmp_path / name, checkpoint, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_the_checkpoint_is_never_replaced(
    make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """OUT may not be the checkpoint or a folder that holds it, however it is spelled."""
    (tmp_path / "link").symlink_to(checkpoint)
    make_artifact(checkpoint.parent)
    monkeypatch.chdir(checkpoint)
    spellings = [checkpoint, checkpoint.parent, tmp_path, Path("/"), tmp_path / "link", Path(), Path("..")]
    for out in [*spellings, checkpoint / ".." / "checkpoint"]:
        with pytest.raises(ExportError, match="is or holds the checkpoint itself: choose another folder"):
            check(out, checkpoint, force=force)


def test_reference_goes_beside_the_weights(make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path) -> None:
    """--weights reference wants OUT to be the checkpoint, and --force where there is an artifact already."""
    with pytest.raises(ExportError, match=rf"pass -o {checkpoint}$"):
        check(tmp_path / "out", checkpoint, reference=True)
    check(checkpoint, checkpoint, reference=True)
    make_artifact(checkpoint)
    with pytest.raises(ExportError, match="already holds an artifact: pass --force"):
        check(checkpoint, checkpoint, reference=True)
    check(checkpoint, checkpoint, reference=True, force=True)


@pytest.mark.parametrize("name", ["decoder.onnx", "parity.json"])
def test_reference_overwrites_nothing_of_the_users(checkpoint: Path, name: str) -> None:
    """A file of that name that no export of ours made (there is no manifest) is not overwritten unasked."""
    (checkpoint / name).write_text("the user's own")
    with pytest.raises(ExportError, match=name):
        check(checkpoint, checkpoint, reference=True)


# --- the rename -------------------------------------------------------------------------------------------------------


def test_everything_appears_at_once(tmp_path: Path) -> None:
    """Inside the block OUT does not exist; afterwards it holds all files and there is nothing beside it."""
    out = tmp_path / "deep" / "out"
    with stage(out, in_place=False) as staging:
        staging.path("a").write_text("1")
        assert staging.folder.parent == out.parent  # so that the rename does not cross file systems
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]  # noqa: PTH208


def test_an_old_artifact_is_replaced_whole(make_artifact: MakeArtifact, tmp_path: Path, x_snapshot: Snapshot) -> None:
    """No file of the old one stays; until the end it is untouched."""
    out = make_artifact(tmp_path / "out")
    before = x_snapshot(out)
    with stage(out, in_place=False) as staging:
        staging.path("new").write_text("1")
        assert x_snapshot(out) == before
    assert x_snapshot(tmp_path) == {"out": None, "out/new": b"1"}


@pytest.mark.parametrize("error", [CrashError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_nothing(
    make_artifact: MakeArtifact, tmp_path: Path, x_snapshot: Snapshot, existing: bool, error: type[BaseException]
) -> None:
    """No partial sibling; an old artifact is as it was."""
    if existing:
        make_artifact(tmp_path / "out")
    before = x_snapshot(tmp_path)
    with pytest.raises(error), stage(tmp_path / "out", in_place=False) as staging:  # noqa: PT012
        staging.path("a").write_text("1")
        raise error
    assert x_snapshot(tmp_path) == before


def test_an_error_between_the_renames_brings_the_old_one_back(
    make_artifact: MakeArtifact, tmp_path: Path, x_snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new artifact cannot take its place, the old one, already moved aside, returns."""
    out = make_artifact(tmp_path / "out")
    before = x_snapshot(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"), stage(out, in_place=False) as staging:
        staging.path("new").write_text("1")
    assert x_snapshot(tmp_path) == before


def test_remains_of_dead_processes_are_removed(tmp_path: Path, dead_pid: int) -> None:
    """Of a killed export to the same OUT, both the new half and a displaced old artifact; nothing else."""
    live, other = os.getppid(), "1"
    remains = [f".out.partial-{dead_pid}", f".out.old.partial-{dead_pid}"]
    keep = [
        *(f".out.partial-{live}", f".out.partial-{other}", f".out2.partial-{dead_pid}", f".xout.partial-{dead_pid}"),
        *(f"out.partial-{dead_pid}", f".out.partial-{dead_pid}.bak", ".out.partial-", f".o.t.partial-{dead_pid}"),
    ]
    for name in (*remains, *keep):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with stage(tmp_path / "out", in_place=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "out"])


def test_remains_beside_a_checkpoint_are_removed(checkpoint: Path, dead_pid: int, x_snapshot: Snapshot) -> None:
    """A killed export in place leaves hidden files in the checkpoint's folder, which the next one removes."""
    for name in (
        *("decoder.onnx", "decoder.tensorrt-rtx.engine", "vision_encoder.onnx", "vision_encoder.tensorrt.engine"),
        *("manifest.json", "parity.json"),
    ):
        (checkpoint / f".{name}.partial-{dead_pid}").write_text("half")
    live = f".decoder.onnx.partial-{os.getppid()}"
    (checkpoint / live).write_text("another export, at work")
    with stage(checkpoint, in_place=True) as staging:
        staging.path("decoder.onnx").write_text("whole")
    assert sorted(x_snapshot(checkpoint)) == sorted(["config.json", "decoder.onnx", live])


# --- whole exports ----------------------------------------------------------------------------------------------------


def request(folder: Path, out: Path, **options: Any) -> ExportRequest:
    return ExportRequest(checkpoint=folder, out=out, **options)


STEPS = ("trace", "write_weights", "save_checked", "_verify", "file_entry")


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_nothing(
    make_artifact: MakeArtifact,
    step: str,
    x_copy: Callable[..., Path],
    x_one_layer_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    x_snapshot: Snapshot,
) -> None:
    """Fresh or with --force over an artifact: after an error in any step, the disk is as it was before."""
    folder = x_copy()
    out = make_artifact(tmp_path / "out")
    before = x_snapshot(tmp_path)
    crash_in(step, x_one_layer_export, monkeypatch)
    for target, options in ((out, {"force": True}), (tmp_path / "fresh", {}), (folder, {"weights": "reference"})):
        with pytest.raises(CrashError):
            export(request(folder, target, **options))
        assert x_snapshot(tmp_path) == before, target


def crash_in(step: str, traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline run up to `step` and raise there; steps before it that take long are replaced."""

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise CrashError(step)

    def quick_trace(*args: Any, **kwargs: Any) -> Any:
        import onnx_ir as ir

        return ir.load(traced / "decoder.onnx")

    monkeypatch.setattr(pipeline, "trace", quick_trace)
    monkeypatch.setattr(pipeline, "attach_weights", lambda *args: None)
    monkeypatch.setattr(pipeline, "save_checked", lambda model, path: path.write_bytes(b"graph"))
    if step == "file_entry":
        monkeypatch.setattr(pipeline, "_verify", lambda *args: pipeline.ParitySummary(reports=(), not_run={}))
    monkeypatch.setattr(pipeline, step, crash)


def test_force_replaces_and_no_force_does_not(
    x_one_layer: Callable[..., Path], x_artifact: Path, x_snapshot: Snapshot
) -> None:
    """An artifact of another model is replaced by one of this; without --force it is not touched."""
    folder = x_one_layer()
    before = x_snapshot(x_artifact)
    with pytest.raises(ExportError, match="--force"):
        export(request(folder, x_artifact, verify=False))
    assert x_snapshot(x_artifact) == before
    export(request(folder, x_artifact, verify=False, force=True))
    assert open_artifact(x_artifact).manifest.cache.past_names() == [f"past_key_values.0.{x}" for x in ("key", "value")]
    assert "parity.json" not in x_snapshot(x_artifact)


def test_reference_adds_three_files_and_replaces_them(x_one_layer: Callable[..., Path], x_snapshot: Snapshot) -> None:
    """In place, an export adds graph, manifest and report; the next one, unverified and with no engine, leaves neither
    the old report to vouch for it nor the old engine."""
    folder = x_one_layer()
    before = x_snapshot(folder)
    export(request(folder, folder, weights="reference"))
    after = x_snapshot(folder)
    assert after.keys() - before.keys() == {"decoder.onnx", "manifest.json", "parity.json"}
    assert {name: after[name] for name in before} == before
    assert open_artifact(folder).manifest.parity is not None

    (folder / "decoder.tensorrt-rtx.engine").write_text("")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["decoder.tensorrt-rtx.engine"] = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export(request(folder, folder, weights="reference", verify=False, force=True))
    assert open_artifact(folder).manifest.parity is None
    assert x_snapshot(folder).keys() - before.keys() == {"decoder.onnx", "manifest.json"}


def test_a_killed_export_leaves_no_out_and_the_next_succeeds(
    x_one_layer: Callable[..., Path], x_root: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle: no OUT, only hidden remains, which the next export removes."""
    folder, parent = x_one_layer(), tmp_path / "results"
    command = [sys.executable, "-m", "exporter.cli", "export", str(folder), "-o", str(parent / "out")]
    process = subprocess.Popen(command, cwd=x_root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("verify on"):  # weights and graph are written
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (remains,) = parent.iterdir()
    assert remains.name == f".out.partial-{process.pid}"
    assert (remains / "decoder.onnx").stat().st_size > 0
    export(request(folder, parent / "out", verify=False))
    assert [path.name for path in parent.iterdir()] == ["out"]
    open_artifact(parent / "out")


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    """While another process is writing to the same OUT, its folder is left alone."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom exporter.staging import stage\n"
        "with stage(Path(sys.argv[1]), in_place=False) as s:\n"
        "    s.path('theirs').write_text('x'); print('ready', flush=True); sys.stdin.readline()\n"
    )
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with stage(out, in_place=False) as staging:
        staging.path("ours").write_text("y")
    assert [path.name for path in out.iterdir()] == ["ours"]
    theirs = tmp_path / f".out.partial-{other.pid}" / "theirs"
    assert theirs.read_text() == "x"
    deadline_s = time.monotonic() + 30
    other.communicate("go\n", timeout=deadline_s - time.monotonic())
    assert other.returncode != 0
    assert [path.name for path in out.iterdir()] == ["ours"]  # the first one to finish wins, whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_deletes_nothing_but_the_artifact(make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path) -> None:
    """The user's notes, or another artifact, inside OUT: they are named and left alone."""
    out = make_artifact(tmp_path / "out")
    (out / "notes.txt").write_text("the user's own")
    (out / "fp16").mkdir()
    with pytest.raises(ExportError, match=r"no export made, and would be lost: .*fp16, .*notes\.txt: move it"):
        check(out, checkpoint, force=True)


def test_two_exports_to_one_out(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Who comes second without --force does not replace the first."""
    with pytest.raises(ExportError, match="appeared while this export ran"), stage(tmp_path / "out", in_place=False):
        first = make_artifact(tmp_path / "out")
    assert (first / "decoder.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
