"""A user's mistake is one clear message and exit code 2: no traceback, and nothing written."""

import errno
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import exporter.targets.tensorrt as tensorrt_target
from exporter import cli

Run = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, bytes | None]]

PAGE = resource.getpagesize()
SIGNAL_TIMEOUT_S = 60


@pytest.fixture
def refuses(x_run: Run, x_snapshot: Snapshot, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused with these words, and leave every file of the test as it was."""

    def check(args: list[object], *words: str) -> str:
        before = x_snapshot(tmp_path)
        message: str = x_run(*args).refused(*words)
        assert x_snapshot(tmp_path) == before
        return message

    return check


@pytest.fixture
def refuses_export(refuses: Callable[..., str], x_tiny: Path, tmp_path: Path) -> Callable[..., str]:
    """The same for an export of a checkpoint (the shipped one unless another is given) to a new folder."""

    def check(*options: object, checkpoint: Path = x_tiny, words: tuple[str, ...]) -> str:
        return refuses(["export", checkpoint, "-o", tmp_path / "out", *options], *words)

    return check


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_no_checkpoint(refuses_export: Callable[..., str], tmp_path: Path) -> None:
    """A folder that is not there, a file, and a folder of something else."""
    refuses_export(
        checkpoint=tmp_path / "nowhere", words=("nowhere does not exist", "config.json and model.safetensors")
    )
    (tmp_path / "file").write_text("x")
    refuses_export(checkpoint=tmp_path / "file", words=("file is a file", "config.json and model.safetensors"))
    (tmp_path / "folder").mkdir()
    refuses_export(checkpoint=tmp_path / "folder", words=("folder is not a checkpoint", "holds no config.json"))


def test_no_weights(refuses_export: Callable[..., str], x_copy: Callable[..., Path]) -> None:
    """Without safetensors; and pickled weights are named, and refused for what they are."""
    folder = x_copy()
    (folder / "model.safetensors").unlink()
    refuses_export(checkpoint=folder, words=("holds neither model.safetensors nor model.safetensors.index.json",))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refuses_export(checkpoint=folder, words=("pytorch_model.bin", "unpickled", "convert it to safetensors"))


def test_truncated_safetensors(refuses_export: Callable[..., str], x_copy: Callable[..., Path]) -> None:
    """Cut anywhere: in the data, in the header, in its length, or to nothing."""
    folder = x_copy()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 1000, 8, 5, 0):
        path.write_bytes(data[:length])
        refuses_export(checkpoint=folder, words=("model.safetensors is damaged", "truncated download?"))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_header_that_lies(refuses_export: Callable[..., str], x_copy: Callable[..., Path]) -> None:
    """A shape that does not fit its bytes, bytes beyond the file, two tensors in one place, a header of 2^60 bytes."""
    name = "model.norm.weight"
    for index, change in enumerate(
        (
            lambda header: header[name].update(shape=[129]),
            lambda header: header[name].update(data_offsets=[0, 10**12]),
            lambda header: header[name].update(data_offsets=header["model.embed_tokens.weight"]["data_offsets"]),
            lambda header: header[name].update(dtype="F99"),
        )
    ):
        folder = x_copy(f"lie{index}")
        rewrite_header(folder / "model.safetensors", change)
        refuses_export(checkpoint=folder, words=("model.safetensors is damaged",))
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**60))
    refuses_export(checkpoint=folder, words=("model.safetensors is damaged",))


def test_broken_index(refuses_export: Callable[..., str], x_copy: Callable[..., Path], tmp_path: Path) -> None:
    """A shard that is missing, one outside the folder (although it exists), and an index without a map."""
    folder = x_copy()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refuses_export(checkpoint=folder, words=("lacks 1 of the shards", "model-00001-of-00002.safetensors"))
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/../../outside.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
        refuses_export(checkpoint=folder, words=("model.norm.weight points outside the checkpoint folder", outside))
    index.write_text("{}")
    refuses_export(checkpoint=folder, words=("weight_map must be an object",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ('model_type "gpt2" is not supported', "supported: ", "granite, llama, mistral,")),
        ({"model_type": None}, ("model_type null is not supported",)),
        (
            {"rope_scaling": {"rope_type": "su", "factor": 2.0}},
            ('rope type "su"', "default, linear, dynamic, llama3, yarn, longrope"),
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            ("num_heads (4) must be a multiple of num_kv_heads (3)",),
        ),
        ({"num_attention_heads": 3}, ("hidden_size (128) must be a multiple of num_attention_heads (3)",)),
        ({"hidden_act": "gelu_fast"}, ("hidden_act", '"gelu_fast"', '"silu"', '"gelu_pytorch_tanh"')),
        ({"sliding_window": 64}, ("sliding_window = 64 changes the maths",)),
        ({"num_hidden_layers": 0}, ("num_hidden_layers must be an integer from 1", "found 0")),
        ({"vocab_size": "100"}, ("vocab_size must be an integer", '"100"')),
        ({"layer_types": 5}, ("layer_types",)),
        ({"num_hidden_layers": 4}, ("missing: model.layers.3.mlp.down_proj.weight [128, 256]",)),
        ({"num_hidden_layers": 2}, ("unexpected: model.layers.2.mlp.down_proj.weight [128, 256]",)),
        ({"vocab_size": 101}, ("wrong shape: model.embed_tokens.weight is [100, 128], expected [101, 128]",)),
        ({"tie_word_embeddings": False}, ("missing: lm_head.weight [100, 128]",)),
    ],
)
def test_unsupported_config(
    refuses_export: Callable[..., str], x_copy: Callable[..., Path], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Each message names the key, what was found, and what is supported."""
    refuses_export(checkpoint=x_copy(**changes), words=words)


def test_config_that_is_no_json(refuses_export: Callable[..., str], x_copy: Callable[..., Path]) -> None:
    """Truncated, empty, another type, another encoding, or nested without end."""
    folder = x_copy()
    for content in (b'{"model_type": "lla', b"", b"[]", b"\xff\xfe{}", b"[" * 100_000):
        (folder / "config.json").write_bytes(content)
        refuses_export(checkpoint=folder, words=("config.json",))


def test_overflow_in_a_cast(refuses_export: Callable[..., str], x_one_layer: Callable[..., Path]) -> None:
    """A weight beyond float16's range stops an fp16 export with its name and value; nothing stays."""
    from safetensors.torch import load_file, save_file

    folder = x_one_layer()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][200, 100] = 123456.0
    save_file(tensors, folder / "model.safetensors")
    refuses_export(
        *("--precision", "fp16"),
        checkpoint=folder,
        words=("model.layers.0.mlp.up_proj.weight holds 123456", "65504", "choose another --precision"),
    )


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "int3"], ("precision 'int3' is not supported", "fp32, fp16, bf16")),
        (["--target", "coreml"], ("target 'coreml' is not supported", "onnx, tensorrt-rtx, tensorrt")),
        (["--target", "onnx", "--target", "tflite"], ("target 'tflite'",)),
        (["--layout", "paged"], ("layout 'paged' is not supported", "portable")),
        (["--weights", "link"], ("--weights 'link' is not supported", "copy, reference")),
        (["--max-len", "0"], ("--max-len must be at least 1", "got 0")),
        (["--max-len", "-5"], ("--max-len must be at least 1", "got -5")),
        (["--max-len", "many"], ("--max-len", "'many'")),
        (["--max-len", str(10**20)], ("--max-len",)),
        (["--max-batch", "0"], ("--max-batch must be at least 1", "got 0")),
        (["--gpu-arch", "89"], ("--gpu-arch needs --target tensorrt-rtx",)),
        (["--weights", "reference"], ("--weights reference writes the graph beside", "pass -o")),
        (["--colour"], ("No such option", "--colour")),
    ],
)
def test_wrong_options(refuses_export: Callable[..., str], options: list[str], words: tuple[str, ...]) -> None:
    """Each message names the option, what was found, and what may be given."""
    refuses_export(*options, words=words)


def test_unknown_gpu_arch_lists_the_known(refuses_export: Callable[..., str]) -> None:
    """H100 is sm_90, which TensorRT-RTX does not build for; the message lists what it does."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    message = refuses_export("--target", "tensorrt-rtx", "--gpu-arch", "90", words=("--gpu-arch 90", "SM75", "SM120"))
    assert "SM90" not in message


def test_a_batch_too_large_for_the_engine(refuses_export: Callable[..., str], x_one_layer: Callable[..., Path]) -> None:
    """Shapes that TensorRT-RTX refuses are the user's --max-batch, not a bug."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    refuses_export(
        *("--target", "tensorrt-rtx", "--max-batch", str(10**12), "--no-verify"),
        checkpoint=x_one_layer(),
        words=("--max-batch",),
    )


def test_tensorrt_without_its_library(refuses_export: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which library is missing and how to install it."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refuses_export(
        "--target",
        "tensorrt",
        words=("target tensorrt needs the tensorrt library", "pip install 'export-llm[tensorrt]'"),
    )


def test_tensorrt_placeholder(refuses_export: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `tensorrt` may be an empty package: that is a missing library too."""
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    refuses_export("--target", "tensorrt", words=("needs the tensorrt library",))


def test_tensorrt_without_a_gpu(refuses_export: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds on the GPU that runs the engine; the message offers the library that does not need one."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Builder=object))
    monkeypatch.setattr(tensorrt_target, "cuda_device_count", lambda: 0)
    refuses_export("--target", "tensorrt", words=("CUDA finds none here", "--target tensorrt-rtx"))
    refuses_export(
        *("--target", "tensorrt", "--target", "tensorrt-rtx", "--gpu-arch", "89"),
        words=("--gpu-arch is for tensorrt-rtx",),
    )


def test_missing_arguments(x_run: Run) -> None:
    """What is missing, and where to read about it."""
    x_run("export").refused("Missing argument 'CHECKPOINT'")
    x_run("export", "somewhere").refused("Missing option '-o'")
    x_run("generate", "somewhere").refused("Missing option '--prompt'")
    x_run("exprot").refused("No such command 'exprot'")


# --- where it is written ----------------------------------------------------------------------------------------------


def test_out_exists(refuses: Callable[..., str], x_tiny: Path, x_artifact: Path, tmp_path: Path) -> None:
    """An artifact asks for --force; a folder of the user's, a file and the checkpoint are refused even with it."""
    refuses(["export", x_tiny, "-o", x_artifact], f"OUT ({x_artifact}) exists", "--force")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    refuses(["export", x_tiny, "-o", tmp_path / "mine", "--force"], "is not an artifact, so it is left alone")
    refuses(["export", x_tiny, "-o", tmp_path / "file", "--force"], "exists and is no folder")
    refuses(["export", x_tiny, "-o", x_tiny, "--force"], "is or holds the checkpoint itself", "--weights reference")


def test_out_below_a_file(refuses: Callable[..., str], x_tiny: Path, tmp_path: Path) -> None:
    """A parent that is a file cannot hold OUT; the message names it."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        refuses(["export", x_tiny, "-o", out], str(tmp_path / "file"))


def test_out_where_no_folder_can_be_made(refuses: Callable[..., str], x_tiny: Path) -> None:
    """/proc takes no folders, not even from root."""
    refuses(["export", x_tiny, "-o", "/proc/no-such-place/out"], "/proc/no-such-place")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_parent_is_not_writable(refuses: Callable[..., str], x_tiny: Path, tmp_path: Path) -> None:
    """The message names the folder and the reason."""
    (tmp_path / "closed").mkdir(mode=0o500)
    refuses(["export", x_tiny, "-o", tmp_path / "closed" / "out"], "closed", "Permission denied")


def test_disk_full_is_known_before_work_begins(
    x_run: Run, x_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little room for the weights: said at once, with both numbers, and nothing is traced."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    ran = x_run("export", x_tiny, "-o", tmp_path / "out")
    ran.refused("the disk is full", "needs 1.8 MB, 1.0 MB are free", "nothing was left behind")
    assert "trace" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of a given size; the test is skipped where that is not allowed."""
    mounted: list[Path] = []

    def mount(size: int, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        option = ",".join([f"size={size}", *options])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    yield mount
    gc.collect()
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("full_at", ["weights", "graph", "engine"])
def test_a_disk_that_fills_up_during_the_export(
    full_at: str,
    small_disk: Callable[..., Path],
    x_run: Run,
    x_one_layer: Callable[..., Path],
    x_has_rtx: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A really full disk, found while weights, graph or engine are written: one message, and nothing stays on it."""
    if full_at == "engine" and not x_has_rtx:
        pytest.skip("needs TensorRT-RTX")
    folder = x_one_layer()
    weight_pages = -(-(folder / "model.safetensors").stat().st_size // PAGE)
    pages = {"weights": weight_pages // 2, "graph": weight_pages + 2, "engine": weight_pages + 20}[full_at]
    disk = small_disk(pages * PAGE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))  # someone else takes the room
    target = ["--target", "tensorrt-rtx"] if full_at == "engine" else []
    ran = x_run("export", folder, "-o", disk / "out", "--no-verify", *target)
    ran.refused("the disk is full", os.strerror(errno.ENOSPC), "nothing was left behind")
    stage = {"weights": "write weights", "graph": "write and check graph", "engine": "build"}[full_at]
    assert ran.err.splitlines()[-2] == stage
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(small_disk: Callable[..., Path], x_run: Run, x_tiny: Path) -> None:
    """The message names the place and the reason."""
    disk = small_disk(PAGE * 10, "ro")
    x_run("export", x_tiny, "-o", disk / "out").refused(str(disk), "Read-only file system")


def test_no_memory_for_the_cache(
    refuses: Callable[..., str], x_one_layer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache too large for this machine: the message says which options make it smaller."""
    from runtimes.onnxruntime_runner import OnnxRuntimeRunner

    def no_memory(*args: object) -> None:
        raise MemoryError("Unable to allocate 23.8 GiB for an array with shape (1, 2, 100000000, 32)")

    monkeypatch.setattr(OnnxRuntimeRunner, "reset", no_memory)
    refuses(["export", x_one_layer(), "-o", tmp_path / "out"], "memory", "--max-len")


# --- artifacts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["verify"], ["generate", "--prompt", "1"]])
def test_what_is_no_artifact(refuses: Callable[..., str], x_tiny: Path, tmp_path: Path, command: list[str]) -> None:
    """A checkpoint, a file and nothing at all."""
    name, *rest = command
    refuses([name, x_tiny, *rest], "tiny_llama is not an artifact: it holds no manifest.json")
    (tmp_path / "file").write_text("x")
    refuses([name, tmp_path / "file", *rest], "file is not an artifact")
    refuses([name, tmp_path / "nowhere", *rest], "nowhere does not exist", "export-llm export")


def test_inspect_of_nothing(refuses: Callable[..., str], tmp_path: Path) -> None:
    """inspect takes a checkpoint or an artifact, and says so of anything else."""
    refuses(["inspect", tmp_path / "nowhere"], "nowhere does not exist")
    (tmp_path / "folder").mkdir()
    refuses(["inspect", tmp_path / "folder"], "folder is not a checkpoint")


ARTIFACT_FILES = (
    *("config.json", "decoder.onnx", "generation_config.json", "model.safetensors", "parity.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
)


def test_the_manifest_lists_every_file(x_export: Any) -> None:
    """Whatever lies in the artifact is covered by a hash, but for the manifest itself."""
    names = {path.name for path in x_export.folder.iterdir()}
    assert names - {"manifest.json"} == json.loads((x_export.folder / "manifest.json").read_text())["files"].keys()
    assert names >= {*ARTIFACT_FILES}


@pytest.mark.parametrize("name", [*ARTIFACT_FILES, "decoder.tensorrt-rtx.engine"])
def test_one_changed_byte_is_detected(refuses: Callable[..., str], x_artifact: Path, name: str) -> None:
    """Any file, one bit in the middle, size unchanged; and the same file when it is missing or cut."""
    path = x_artifact / name
    if not path.exists():
        pytest.skip("no engine was built: needs TensorRT-RTX")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refuses(["inspect", x_artifact], "is damaged, export again", f"{name} has changed since the export")
    path.write_bytes(data[:-1])
    refuses(["inspect", x_artifact], f"{name} has {len(data) - 1} bytes, expected {len(data)}")
    path.unlink()
    refuses(["inspect", x_artifact], f"{name} is missing")


@pytest.mark.parametrize("command", [["verify"], ["generate", "--prompt", "1"], ["inspect", "--json"]])
def test_every_command_checks_the_files(refuses: Callable[..., str], x_artifact: Path, command: list[str]) -> None:
    """verify, generate and inspect all refuse a damaged artifact, and list everything that is wrong with it."""
    (x_artifact / "tokenizer.json").unlink()
    (x_artifact / "decoder.onnx").write_bytes(b"")
    name, *rest = command
    refuses([name, x_artifact, *rest], "tokenizer.json is missing", "decoder.onnx has 0 bytes")


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}, indent=1, sort_keys=True) + "\n")


def test_manifest_of_another_version(refuses: Callable[..., str], x_artifact: Path) -> None:
    """The message gives both versions."""
    edit_manifest(x_artifact, lambda manifest: manifest.update(schema_version=99))
    refuses(["inspect", x_artifact], "schema version 99, this program reads 5", "export again")


def test_truncated_manifest(refuses: Callable[..., str], x_artifact: Path) -> None:
    """Cut anywhere, empty, of another type or encoding."""
    path = x_artifact / "manifest.json"
    data = path.read_bytes()
    for content in (data[: len(data) // 2], data[:-3], b"", b"[]", b"{}", b"null", b"\xff\xfe"):
        path.write_bytes(content)
        refuses(["inspect", x_artifact], "manifest.json")


def test_manifest_that_points_elsewhere(refuses: Callable[..., str], x_artifact: Path, tmp_path: Path) -> None:
    """File names with a path in them are refused: an artifact from elsewhere must not make us read other files."""
    (tmp_path / "outside").write_text("x")
    entry = {"sha256": "0" * 64, "bytes": 1}
    for name in ("../outside", str(tmp_path / "outside")):
        edit_manifest(x_artifact, lambda manifest, name=name: manifest["files"].update({name: entry}))
        refuses(["inspect", x_artifact], "not a plain file name")


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "cache without a number": lambda m: m["cache"]["tensors"][0]["shape"].__setitem__(0, "2"),
    "cache of an unknown dtype": lambda m: m["cache"].update(dtype="float8"),
    "cache of another length": lambda m: m["cache"].update(max_len=129),
    "cache of no tensors": lambda m: m["cache"].update(tensors=[]),
    "cache without a tensor": lambda m: m["cache"]["tensors"].pop(),
    "a cache tensor of an unknown dtype": lambda m: m["cache"]["tensors"][0].update(dtype="float8"),
    "a cache tensor of another dtype": lambda m: m["cache"]["tensors"][0].update(dtype="float16"),
    "a cache tensor of another shape": lambda m: m["cache"]["tensors"][0]["shape"].__setitem__(0, 3),
    "a cache tensor without a shape": lambda m: m["cache"]["tensors"][0].update(shape=None),
    "a cache tensor of no layer": lambda m: m["cache"]["tensors"][0].update(layer=99),
    "slots along another axis": lambda m: m["cache"]["tensors"][0].update(slot_axis=0),
    "slots along a text": lambda m: m["cache"]["tensors"][0].update(slot_axis="1"),
    "a limit from a text": lambda m: m["graphs"]["decoder"]["signature"]["limits"].update(input_ids="100"),
    "a limit of no tensor": lambda m: m["graphs"]["decoder"]["signature"]["limits"].update(x=1),
    "no limit for the tokens": lambda m: m["graphs"]["decoder"]["signature"]["limits"].pop("input_ids"),
    "no graphs": lambda m: m.update(graphs={}),
    "graph in no file": lambda m: m["graphs"]["decoder"].update(file="other.onnx"),
    "a dimension without a range": lambda m: m["graphs"]["decoder"]["signature"]["dims"].pop("batch_size"),
    "a dimension from a text": lambda m: m["graphs"]["decoder"]["signature"]["dims"]["n"].update(max="x"),
    "a config that is no object": lambda m: m.update(config=3),
    "a verdict that is no object": lambda m: m.update(parity=[]),
    "a key too many": lambda m: m.update(colour="red"),
    "a key too few": lambda m: m.pop("precision"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_manifest(refuses: Callable[..., str], x_artifact: Path, what: str) -> None:
    """JSON that is no manifest, or contradicts itself, is a damaged artifact and no bug, whatever reads it."""
    edit_manifest(x_artifact, DAMAGE[what])
    refuses(["inspect", x_artifact], "manifest.json")
    refuses(["generate", x_artifact, "--prompt", "1"], "manifest.json")


def test_generate_beyond_the_cache(refuses: Callable[..., str], x_artifact: Path) -> None:
    """A prompt that is too long, too many new tokens, and none at all; with the numbers."""
    command = ["generate", x_artifact, "--prompt"]
    refuses([*command, "1" * 200], "201 tokens", "this artifact holds 128", "--max-len")
    refuses([*command, "1+1=", "--max-new-tokens", "125"], "5 tokens and 125 new ones", "at most 124", "--max-len")
    refuses([*command, "1+1=", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0")


def test_prompt_that_is_no_text(refuses: Callable[..., str], x_artifact: Path) -> None:
    """Bytes that are no UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    refuses(["generate", x_artifact, "--prompt", os.fsdecode(b"caf\xe9")], "prompt")


def test_unknown_runtime_or_device(refuses: Callable[..., str], x_artifact: Path) -> None:
    """The message lists what there is."""
    edit_manifest(x_artifact, lambda manifest: manifest.update(engines={}))
    for command in (["generate", x_artifact, "--prompt", "1"], ["verify", x_artifact]):
        refuses(
            [*command, "--runtime", "openvino"], "unknown runtime 'openvino'", "onnxruntime, tensorrt, tensorrt-rtx"
        )
        refuses([*command, "--device", "tpu"], "unknown device 'tpu'", "cpu, cuda")
        refuses([*command, "--runtime", "tensorrt-rtx", "--device", "cpu"], "--device is not for tensorrt-rtx")
        refuses([*command, "--runtime", "tensorrt-rtx"], "holds no tensorrt-rtx engine", "--target tensorrt-rtx")


def test_engine_without_a_gpu(refuses: Callable[..., str], x_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine cannot run here: that is what the message says."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    monkeypatch.setattr("runtimes.tensorrt_runner.cuda_device_count", lambda: 0)
    refuses(["generate", x_artifact, "--prompt", "1", "--runtime", "tensorrt-rtx"], "needs a CUDA GPU")


def test_missing_tokenizer(refuses: Callable[..., str], x_artifact: Path) -> None:
    """A checkpoint without tokenizer.json exports; generating text from it is what fails."""
    (x_artifact / "tokenizer.json").unlink()
    edit_manifest(x_artifact, lambda manifest: manifest["files"].pop("tokenizer.json"))
    refuses(["generate", x_artifact, "--prompt", "1"], "holds no tokenizer.json", "copy the one of the checkpoint")


def test_verify_against_another_model(
    refuses: Callable[..., str], x_artifact: Path, x_copy: Callable[..., Path], tmp_path: Path
) -> None:
    """The message names what differs; and --reference has to be a checkpoint."""
    other = x_copy("other", rms_norm_eps=1e-4, rope_theta=5000.0)
    refuses(
        ["verify", x_artifact, "--reference", other],
        "other is another model than",
        "layer_kinds.full_attention.rope.theta, norm_eps",
    )
    refuses(["verify", x_artifact, "--reference", tmp_path / "nowhere"], "nowhere does not exist")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "stage", "delay_s", "kept"),
    [
        (signal.SIGINT, 130, "trace", 0.6, True),
        (signal.SIGINT, 130, "verify on onnxruntime: boundary operators", 0.0, True),
        (signal.SIGINT, 130, "build", 0.05, True),
        (signal.SIGTERM, 143, "trace", 0.1, True),
        (signal.SIGTERM, 143, "build", 0.05, True),
    ],
)
def test_a_signal_leaves_no_artifact(
    number: signal.Signals,
    code: int,
    stage: str,
    delay_s: float,
    kept: bool,
    x_one_layer: Callable[..., Path],
    x_has_rtx: bool,
    x_root: Path,
    tmp_path: Path,
) -> None:
    """Ctrl-C and SIGTERM, whatever is being done, C++ included: the shell's exit code, no OUT; what stages have
    finished is kept, and the message says where."""
    if stage == "build" and not x_has_rtx:
        pytest.skip("needs TensorRT-RTX")
    folder = x_one_layer()
    results = tmp_path / "results"
    options = ["--target", "tensorrt-rtx", "--no-verify"] if stage == "build" else []
    command = [sys.executable, "-m", "exporter.cli", "export", str(folder), "-o", str(results / "out"), *options]
    process = subprocess.Popen(command, cwd=x_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if lines[-1] == stage:
            break
    assert lines[-1:] == [stage], lines
    timer = threading.Timer(delay_s, process.send_signal, [number])
    timer.start()
    out, err = process.communicate(timeout=SIGNAL_TIMEOUT_S)
    timer.join()
    # Python may report an interrupt by dying of the signal; a shell shows 128 + its number for that as well
    assert (process.returncode if process.returncode >= 0 else 128 - process.returncode) == code, err
    assert "Traceback" not in err
    assert out == ""
    remains = sorted(path.name for path in results.iterdir()) if results.exists() else []
    assert remains == ([".out.journal", ".out.partial"] if kept else [])
    if number == signal.SIGINT:
        where = f"finished stages are kept in {results / '.out.partial'}: the same export goes on from there"
        assert err.strip().splitlines()[-1] == f"interrupted: {where if kept else 'nothing was left behind'}"


def test_an_unexpected_error_is_reported_as_a_bug(
    x_run: Run, x_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is nobody's mistake but ours keeps its traceback and has an exit code of its own."""
    import exporter.pipeline as pipeline

    def crash(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(pipeline, "trace", crash)
    ran = x_run("export", x_tiny, "-o", tmp_path / "out")
    assert ran.code == cli.EXIT_BUG
    assert "ZeroDivisionError: nobody thought of this" in ran.err
    assert "this is a bug in export-llm" in ran.err
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []
