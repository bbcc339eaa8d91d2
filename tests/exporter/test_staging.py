"""Whole or not at all: an export appears complete at OUT, or leaves everything as it was."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exporter.pipeline as pipeline
import exporter.staging as staging_module
from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.staging import check_destination, hold_destination, stage
from runtimes.artifact import file_entry, open_artifact

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
    with hold_destination(out, in_place=False), stage(out, in_place=False) as staging:
        staging.path("a").write_text("1")
        assert staging.folder.parent == out.parent  # so that the rename does not cross file systems
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]  # noqa: PTH208


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_artifact_is_replaced_whole(
    make_artifact: MakeArtifact, tmp_path: Path, x_snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """No file of the old one stays; until the end it is untouched; also where names cannot be exchanged."""
    if not exchange:
        monkeypatch.setattr(staging_module, "_exchange", lambda first, second: False)
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
    monkeypatch.setattr(staging_module, "_exchange", lambda first, second: False)
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


def test_an_exchange_is_one_step(tmp_path: Path) -> None:
    """Both names are there all the time; where one is missing, nothing happens."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was-{name}").touch()
    if not staging_module._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["was-b"]
    with pytest.raises(FileNotFoundError):
        staging_module._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_an_artifact_that_was_moved_aside_returns(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Killed between two renames, where names cannot be exchanged: the next export finds the old one again."""
    make_artifact(tmp_path / ".out.partial.old")
    with pytest.raises(CrashError), stage(tmp_path / "out", in_place=False):
        raise CrashError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "decoder.onnx").read_bytes() == b"old"


def test_remains_are_removed(tmp_path: Path) -> None:
    """What a killed export to the same OUT left, if it was not the same export; nothing else."""
    keep = [".out2.partial", ".xout.partial", ".out.partial.bak", "out.partial", ".o.t.partial"]
    for name in (".out.partial", *keep):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with stage(tmp_path / "out", in_place=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "out"])


def test_remains_beside_a_checkpoint_are_removed(checkpoint: Path, x_snapshot: Snapshot) -> None:
    """A killed export in place leaves hidden files in the checkpoint's folder, which the next one removes."""
    for name in (
        *("decoder.onnx", "decoder.tensorrt-rtx.engine", "vision_encoder.onnx", "vision_encoder.tensorrt.engine"),
        *("manifest.json", "parity.json", "parity.golden", "genai_config.json"),
    ):
        (checkpoint / f".{name}.partial").write_text("half")
    (checkpoint / ".notes.partial").write_text("the user's own")
    with stage(checkpoint, in_place=True) as staging:
        staging.path("decoder.onnx").write_text("whole")
    assert sorted(x_snapshot(checkpoint)) == sorted([".notes.partial", "config.json", "decoder.onnx"])


# --- going on ---------------------------------------------------------------------------------------------------------


class Work:
    """Stages a and b, which count how often they are done; b can be made to fail."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(
        self, place: Path, *, in_place: bool = False, key: str = "k", fail: BaseException | None = None
    ) -> list[str]:
        """What was done this time."""
        self.done = []
        with stage(place, in_place=in_place, key=key) as staging:
            assert staging.stages.run("a", lambda: self._make(staging, "decoder.onnx", {"n": 1}))[1] == {"n": 1}
            if fail is not None:
                staging.path("parity.json").write_text("half")
                raise fail
            staging.stages.run("b", lambda: self._make(staging, "parity.json", None))
        return self.done

    def _make(self, staging: Any, name: str, result: Any) -> tuple[list[str], Any]:
        self.done.append(name)
        staging.path(name).write_text(f"whole {name}")
        return [name], result


@pytest.mark.parametrize("in_place", [False, True])
def test_an_interrupted_export_goes_on(checkpoint: Path, tmp_path: Path, x_snapshot: Snapshot, in_place: bool) -> None:
    """Ctrl-C keeps what was finished, and says so; the same export does only the rest, and nothing remains."""
    place, work = (checkpoint if in_place else tmp_path / "out"), Work()
    before = x_snapshot(tmp_path)
    interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        work.run(place, in_place=in_place, fail=interrupt)
    assert "finished stages are kept in" in interrupt.__notes__[0]
    visible = {name: data for name, data in x_snapshot(tmp_path).items() if "/." not in f"/{name}"}
    assert visible == before
    assert work.run(place, in_place=in_place) == ["parity.json"]
    after = {
        f"{place.relative_to(tmp_path)}/{name}": f"whole {name}".encode() for name in ("decoder.onnx", "parity.json")
    }
    assert x_snapshot(tmp_path) == before | after | ({} if in_place else {"out": None})


@pytest.mark.parametrize("change", ["key", "file", "journal"])
def test_what_is_not_the_same_is_done_again(tmp_path: Path, change: str) -> None:
    """Another export, a file that was changed meanwhile, a journal that is half written: nothing is taken over."""
    work = Work()
    with pytest.raises(KeyboardInterrupt):
        work.run(tmp_path / "out", fail=KeyboardInterrupt())
    if change == "file":
        (tmp_path / ".out.partial" / "decoder.onnx").write_text("whole decoder.onnY")
    if change == "journal":
        journal = tmp_path / ".out.journal"
        journal.write_text(journal.read_text()[:-9])
    key = "other" if change == "key" else "k"
    assert work.run(tmp_path / "out", key=key) == ["decoder.onnx", "parity.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_files_take_their_names(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, between two renames: no artifact; the next run refuses nothing, and does nothing twice."""
    work = Work()
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == checkpoint / "parity.json":
            os._exit(9)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", killed)
        work.run(checkpoint, in_place=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (checkpoint / "decoder.onnx").exists()
    assert not (checkpoint / "parity.json").exists()
    check(checkpoint, checkpoint, reference=True)
    assert work.run(checkpoint, in_place=True) == []
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "decoder.onnx", "parity.json"]


# --- whole exports ----------------------------------------------------------------------------------------------------


def request(folder: Path, out: Path, **options: Any) -> ExportRequest:
    return ExportRequest(checkpoint=folder, out=out, **options)


STEPS = ("trace", "write_weights", "save_checked", "_verify", "config_as_json")


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
    if step == "config_as_json":
        monkeypatch.setattr(pipeline, "_verify", lambda *args: (pipeline.ParitySummary(reports=(), not_run={}), []))
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


def test_reference_adds_four_files_and_replaces_them(x_one_layer: Callable[..., Path], x_snapshot: Snapshot) -> None:
    """In place, an export adds graph, manifest and report; the next one, unverified and with no engine, leaves neither
    the old report to vouch for it nor the old engine."""
    folder = x_one_layer()
    before = x_snapshot(folder)
    export(request(folder, folder, weights="reference"))
    after = x_snapshot(folder)
    assert after.keys() - before.keys() == {"decoder.onnx", "manifest.json", "parity.json", "parity.golden"}
    assert {name: after[name] for name in before} == before
    assert open_artifact(folder).manifest.parity is not None

    (folder / "decoder.tensorrt-rtx.engine").write_text("")
    manifest = open_artifact(folder).manifest
    engine = {"decoder.tensorrt-rtx.engine": file_entry(folder / "decoder.tensorrt-rtx.engine")}
    manifest = dataclasses.replace(manifest, files={**manifest.files, **engine})
    (folder / "manifest.json").write_text(manifest.to_json())
    export(request(folder, folder, weights="reference", verify=False, force=True))
    assert open_artifact(folder).manifest.parity is None
    assert x_snapshot(folder).keys() - before.keys() == {"decoder.onnx", "manifest.json"}


def test_a_killed_export_goes_on(x_one_layer: Callable[..., Path], x_root: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: no OUT, only hidden remains; the same command then takes over what was finished."""
    folder, parent = x_one_layer(), tmp_path / "results"
    command = [sys.executable, "-m", "exporter.cli", "export", str(folder), "-o", str(parent / "out")]
    process = subprocess.Popen(command, cwd=x_root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("verify on"):  # weights and graph are written
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert sorted(path.name for path in parent.iterdir()) == [".out.journal", ".out.lock", ".out.partial"]
    weights = (parent / ".out.partial" / "model.safetensors").stat()
    done = subprocess.run(command, cwd=x_root, capture_output=True, text=True, check=True)
    taken = "taken over from an export that was stopped: weights model.safetensors, graph decoder"
    assert done.stderr.splitlines()[-1] == taken
    assert "trace" not in done.stderr
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert (parent / "out" / "model.safetensors").stat().st_ino == weights.st_ino
    again = subprocess.run(command, cwd=x_root, capture_output=True, text=True, check=True)
    assert "is this very export already, and whole: nothing was done" in again.stderr
    assert again.stdout == done.stdout


def test_an_unchanged_export_does_nothing(
    x_one_layer: Callable[..., Path], tmp_path: Path, x_snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files and options: OUT is as it was, whatever the checkpoint is called; another option is not the same,
    nor is an artifact that was damaged, nor one whose checkpoint has changed by a byte."""
    folder, out = x_one_layer(), tmp_path / "out"
    made = export(request(folder, out, verify=False))
    before = x_snapshot(out)
    renamed = folder.rename(tmp_path / "renamed")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_write", None)
        again = export(request(renamed, out, verify=False))
    assert again.unchanged
    assert again.manifest == made.manifest
    assert x_snapshot(out) == before
    with monkeypatch.context() as patched, pytest.raises(ExportError, match="pass --force"):  # noqa: PT012
        patched.setattr(pipeline, "read_inputs", None)  # it is not worth reading a large checkpoint for
        export(request(renamed, out, verify=False, max_len=64))
    with pytest.raises(ExportError, match="pass --force"):
        export(request(renamed, out))
    (out / "decoder.onnx").write_bytes(before["decoder.onnx"][:-1] + b"x")
    with pytest.raises(ExportError, match="pass --force"):
        export(request(renamed, out, verify=False))
    (out / "decoder.onnx").write_bytes(before["decoder.onnx"])
    weights = renamed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    weights.write_bytes(data)
    with pytest.raises(ExportError, match="pass --force"):
        export(request(renamed, out, verify=False))
    assert not export(request(renamed, out, verify=False, force=True)).unchanged


HOLD = """
import sys
from pathlib import Path
from exporter.staging import hold_destination, stage
place, in_place = Path(sys.argv[1]), sys.argv[2] == "True"
with hold_destination(place, in_place=in_place), stage(place, in_place=in_place) as s:
    s.path("decoder.onnx").write_text("x"); print("ready", flush=True); sys.stdin.readline()
"""


@pytest.mark.parametrize("in_place", [False, True])
def test_two_exports_to_one_place(checkpoint: Path, tmp_path: Path, in_place: bool) -> None:
    """While another process writes to the same OUT, an export to it is refused; the other is not disturbed."""
    place = checkpoint if in_place else tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), str(in_place)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with (
        pytest.raises(ExportError, match=r"another export is writing to .*: wait for it, or choose another OUT"),
        hold_destination(place, in_place=in_place),
    ):
        pass
    other.communicate("go\n", timeout=30)
    assert other.returncode == 0
    assert (place / "decoder.onnx").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", *([] if in_place else ["out"])]


def test_force_deletes_nothing_but_the_artifact(make_artifact: MakeArtifact, tmp_path: Path, checkpoint: Path) -> None:
    """The user's notes, or another artifact, inside OUT: they are named and left alone."""
    out = make_artifact(tmp_path / "out")
    (out / "notes.txt").write_text("the user's own")
    (out / "fp16").mkdir()
    with pytest.raises(ExportError, match=r"no export made, and would be lost: .*fp16, .*notes\.txt: move it"):
        check(out, checkpoint, force=True)


def test_an_artifact_that_appears_meanwhile_is_left_alone(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Who comes second without --force does not replace the first."""
    with pytest.raises(ExportError, match="appeared while this export ran"), stage(tmp_path / "out", in_place=False):
        first = make_artifact(tmp_path / "out")
    assert (first / "decoder.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
