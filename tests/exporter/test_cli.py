"""The command's promises: results on stdout, progress on stderr, exit codes, and the same bytes every time."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporter.layouts import LAYOUTS
from exporter.pipeline import ExportRequest, export

Run = Callable[..., Any]

COMMANDS = ("export", "verify", "generate", "inspect")
HEAVY_MODULES = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "tokenizers", "rich")
ESCAPE = "\x1b"


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy(x_root: Path) -> None:
    """--help of the group and of each command, in a fresh interpreter: no torch, nor anything else that is slow."""
    code = f"""
import contextlib, io, sys
from exporter.cli import cli
shown = io.StringIO()
for command in ([], *([name] for name in {COMMANDS!r})):
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"], standalone_mode=False)
assert shown.getvalue().count("Usage:") == {len(COMMANDS) + 1}, shown.getvalue()
print(sorted(set(sys.modules) & set({HEAVY_MODULES!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=x_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_help_lists_the_commands(x_run: Run) -> None:
    """The group's help names every command; -h is the same."""
    ran = x_run("--help")
    assert ran.code == 0
    assert ran.err == ""
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", ran.out, re.MULTILINE), name
    assert x_run("-h").out == ran.out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "export",
            "--out --target --layout --precision --max-len --max-batch --weights --verify --no-verify --gpu-arch"
            " --force --json --quiet",
        ),
        ("verify", "--reference --runtime --device --json --quiet"),
        (
            "generate",
            "--prompt --max-new-tokens --temperature --top-k --top-p --min-p --repetition-penalty --seed --num-beams"
            " --length-penalty --stop --logprobs --runtime --device --json",
        ),
        ("inspect", "--json"),
    ],
)
def test_help_lists_the_options(x_run: Run, command: str, options: str) -> None:
    """Each command's help names its options."""
    ran = x_run(command, "--help")
    assert ran.code == 0
    found = set(re.findall(r"--[a-z-]+", ran.out))
    assert set(options.split()) <= found


def test_version(x_run: Run) -> None:
    """--version is the installed package's."""
    ran = x_run("--version")
    assert ran.code == 0
    assert importlib.metadata.version("export-llm") in ran.out


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_json_is_all_of_stdout(x_export: Any, x_tiny: Path) -> None:
    """stdout is one JSON object that agrees with config.json and with the files on disk."""
    result = json.loads(x_export.ran.out)
    config = json.loads((x_tiny / "config.json").read_text())
    assert result["out"] == str(x_export.folder)
    assert (result["model_type"], result["layout"], result["precision"]) == ("llama", "portable", "fp32")
    assert result["max_len"] == config["max_position_embeddings"]
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    assert result["cache_bytes_per_token"] == per_token
    sizes = {path.name: path.stat().st_size for path in x_export.folder.iterdir() if path.name != "manifest.json"}
    assert result["files"] == sizes
    assert result["parity"]["passed"] is True
    assert result["parity"]["reports"][0]["runtime"].startswith("onnxruntime")
    assert result["tools"]["torch"] == torch.__version__
    assert 0 < result["seconds"] < 600


def test_export_progress_is_plain_lines_on_stderr(x_export: Any) -> None:
    """Without a terminal: one plain line per stage, in order, no escape codes and no bars redrawn."""
    err = x_export.ran.err
    assert ESCAPE not in err
    assert "\r" not in err
    assert ESCAPE not in x_export.ran.out
    lines = err.splitlines()
    stages = [
        *("check", "trace", "write weights", "write and check graph"),
        *("verify on onnxruntime: target", "verify on onnxruntime: boundary operators", "hash files"),
    ]
    assert [line for line in lines if line in stages] == stages
    assert not [line for line in lines if line.startswith(("Traceback", "warning"))]


def test_artifact_passed_its_parity(x_export: Any) -> None:
    """The manifest and parity.json carry the verdict; every rung lies within its limits."""
    manifest = json.loads((x_export.folder / "manifest.json").read_text())
    report = json.loads((x_export.folder / "parity.json").read_text())
    assert manifest["parity"]["passed"] is report["passed"] is True
    rungs = report["reports"][0]["rungs"]
    assert len(rungs) >= 10
    for rung in rungs:
        assert rung["max_error"] <= rung["max_limit"], rung
        assert rung["rms_error"] <= rung["rms_limit"], rung


def test_manifest_hashes_are_sha256(x_export: Any) -> None:
    """Hashes and sizes are those of hashlib and of the file system."""
    manifest = json.loads((x_export.folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (x_export.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}, name


def test_small_files_are_copied_through(x_export: Any, x_tiny: Path) -> None:
    """Configuration and tokenizer are the checkpoint's, byte for byte; nothing else of its folder is taken."""
    copied = {path.name for path in x_export.folder.iterdir()} & {path.name for path in x_tiny.iterdir()}
    assert copied == {
        *("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in copied:
        assert (x_export.folder / name).read_bytes() == (x_tiny / name).read_bytes(), name


def test_two_exports_give_the_same_bytes(
    x_export: Any, x_tiny: Path, tmp_path: Path, x_has_rtx: bool, x_snapshot: Callable[[Path], dict[str, bytes]]
) -> None:
    """Another process, another folder, a relative path: every file is the same but for the engine.

    TensorRT-RTX orders some of its tables by memory address, so its engines differ in a few bytes from run to run
    (measured with 1.7.1: with address randomisation switched off, they are equal). Their size is the same.
    """
    targets = ("tensorrt-rtx",) if x_has_rtx else ("onnx",)
    relative = Path(os.path.relpath(x_tiny))
    export(ExportRequest(checkpoint=relative, out=tmp_path / "again", targets=targets))
    first, second = x_snapshot(x_export.folder), x_snapshot(tmp_path / "again")
    assert first.keys() == second.keys()
    engine = "decoder.tensorrt-rtx.engine"
    assert (engine in first) == x_has_rtx
    if x_has_rtx:
        ours, theirs = (np.frombuffer(files.pop(engine), np.uint8) for files in (first, second))
        assert ours.size == theirs.size
        assert (ours != theirs).mean() < 0.01
        for files, data in ((first, ours), (second, theirs)):  # the engine's hash is all that may follow from it
            digest = hashlib.sha256(data.tobytes()).hexdigest().encode()
            assert files["manifest.json"].count(digest) == 1
            own = json.loads(files["manifest.json"])["sha256"].encode()
            files["manifest.json"] = files["manifest.json"].replace(digest, b"").replace(own, b"")
    assert [name for name in first if first[name] != second[name]] == []


def test_quiet_export_is_silent(x_run: Run, x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """--quiet leaves stderr empty; without --json a table of files and the verdict are printed."""
    ran = x_run("export", x_one_layer(), "-o", tmp_path / "out", "--quiet", "--no-verify", "--precision", "fp16")
    assert ran.code == 0
    assert ran.err == ""
    assert ESCAPE not in ran.out
    for path in (tmp_path / "out").iterdir():
        if path.name != "manifest.json":
            assert re.search(rf"{path.name} +{path.stat().st_size:,} bytes", ran.out), path.name
    assert re.search(r"layout +portable, fp16", ran.out)
    assert re.search(r"parity +not run", ran.out)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parity"] is None


def test_longer_than_trained_is_a_warning(x_run: Run, x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """A cache beyond the trained positions is made, with a warning on stderr that gives both numbers."""
    ran = x_run("export", x_one_layer(), "-o", tmp_path / "out", "--max-len", "300", "--no-verify", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["max_len"] == 300
    (warning,) = [line for line in ran.err.splitlines() if line.startswith("warning:")]
    assert "300" in warning
    assert "128" in warning


def test_failed_parity_is_recorded_and_exits_1(
    x_run: Run, x_one_layer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lowering that pairs the rotary dimensions wrongly: exit 1, and the artifact says that it failed."""
    layout = LAYOUTS["portable"]
    rotary = torch.ops.export_llm.rotary.default
    right = layout.lowerings[rotary]

    def wrong(x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        return right(x, cos, sin, not interleaved)

    broken = dataclasses.replace(layout, lowerings={**layout.lowerings, rotary: wrong})
    monkeypatch.setitem(LAYOUTS, "portable", broken)
    ran = x_run("export", x_one_layer(), "-o", tmp_path / "out", "--json")
    assert ran.code == 1
    result = json.loads(ran.out)
    assert result["parity"]["passed"] is False
    failed = {rung["name"] for rung in result["parity"]["reports"][0]["rungs"] if not rung["passed"]}
    assert {"operator rotary", "prefill logits"} <= failed
    assert "operator rms_norm" not in failed
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parity"]["passed"] is False
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is False
    ran = x_run("inspect", tmp_path / "out")
    assert re.search(r"parity +FAILED", ran.out)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_against_the_checkpoint(x_run: Run, x_export: Any, x_tiny: Path) -> None:
    """Exit 0, and the reference is named."""
    ran = x_run("verify", x_export.folder, "--reference", x_tiny, "--quiet")
    assert ran.code == 0
    assert ran.err == ""
    assert "parity passed on onnxruntime" in ran.out
    assert str(x_tiny) in ran.out


def test_verify_json(x_run: Run, x_export: Any) -> None:
    """One JSON object; without --reference it says whose weights it used."""
    ran = x_run("verify", x_export.folder, "--json")
    assert ran.code == 0
    (report,) = json.loads(ran.out)["reports"]
    assert report["passed"] is True
    assert "the artifact's own weights" in report["reference"]
    assert ran.err.splitlines()[0] == "check hashes"


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"],
)
def test_verify_finds_a_slightly_different_weight(
    x_run: Run, x_export: Any, x_copy: Callable[..., Path], name: str
) -> None:
    """One tensor of the reference, 0.1 % larger than the artifact's: exit 1 and FAILED."""
    other = x_copy("other")
    tensors = load_file(other / "model.safetensors")
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, other / "model.safetensors")
    ran = x_run("verify", x_export.folder, "--reference", other)
    assert ran.code == 1
    assert "parity FAILED on onnxruntime" in ran.out
    assert "Traceback" not in ran.err


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_json(x_run: Run, x_export: Any) -> None:
    """Text, ids and timings; the ids are what the tokenizers library makes of the texts, and the sum is right."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(x_export.folder / "tokenizer.json"))
    ran = x_run("generate", x_export.folder, "--prompt", "27+58=", "--json")
    assert ran.code == 0
    assert ran.err == ""
    result = json.loads(ran.out)
    assert set(result) == {"text", "prompt_ids", "token_ids", "finish_reason", "timings"}
    assert result["text"] == "85"
    assert result["prompt_ids"] == tokenizer.encode("27+58=").ids
    assert tokenizer.decode(result["token_ids"]) == "85"
    assert result["token_ids"][-1] == 2  # eos_token_id
    timings = result["timings"]
    assert set(timings) == {"load_s", "prefill_s", "decode_s", "decode_tokens_per_s"}
    assert all(value > 0 for value in timings.values())


@pytest.mark.parametrize("prompt", ["27+58=", "reverse planet=", "count 3 to 9=", ""])
def test_generate_streams_the_same_text(x_run: Run, x_export: Any, prompt: str) -> None:
    """Plain output, printed token by token, is the text of --json and a line break; nothing goes to stderr."""
    command = ["generate", x_export.folder, "--prompt", prompt, "--max-new-tokens", "12"]
    plain, as_json = x_run(*command), x_run(*command, "--json")
    assert (plain.code, plain.err) == (0, "")
    assert plain.out == json.loads(as_json.out)["text"] + "\n"


def test_generate_stops_where_it_is_told(x_run: Run, x_export: Any) -> None:
    """--max-new-tokens is kept; one token needs no decode step, so there is no speed to report."""
    command = ["generate", x_export.folder, "--prompt", "reverse planet=", "--json", "--max-new-tokens"]
    assert len(json.loads(x_run(*command, "3").out)["token_ids"]) == 3
    one = json.loads(x_run(*command, "1").out)
    assert len(one["token_ids"]) == 1
    assert one["timings"]["decode_tokens_per_s"] is None


def test_the_installed_command_is_the_module(x_export: Any) -> None:
    """`export-llm`, as pip installs it, runs the same main()."""
    script = Path(sys.executable).parent / "export-llm"
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    command = [str(script), "generate", str(x_export.folder), "--prompt", "27+58="]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("85\n", "")


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_checkpoint_json(x_run: Run, x_tiny: Path) -> None:
    """Counts agree with config.json and with what the safetensors library finds."""
    facts = json.loads(x_run("inspect", x_tiny, "--json").out)
    config = json.loads((x_tiny / "config.json").read_text())
    with safe_open(x_tiny / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  (not a dict)
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert facts["weight_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert (facts["dtype"], facts["files"]) == ("F32", 1)
    assert facts["layers"] == config["num_hidden_layers"]
    for key in ("model_type", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"):
        assert facts[key] == config[key], key
    assert "10000" in facts["positions"]
    assert facts["refused"] == []
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert facts["cache_bytes_per_token_fp32"] == per_token * 4
    assert facts["cache_bytes_per_token_fp16"] == facts["cache_bytes_per_token_bf16"] == per_token * 2


def test_inspect_checkpoint_text(x_run: Run, x_tiny: Path) -> None:
    """The same facts as a table, and no progress."""
    facts = json.loads(x_run("inspect", x_tiny, "--json").out)
    ran = x_run("inspect", x_tiny)
    assert (ran.code, ran.err) == (0, "")
    for key, value in (facts | {"refused": "nothing"}).items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        assert re.search(rf"{key.replace('_', ' ')} +{re.escape(shown)}", ran.out), key


def test_inspect_reads_no_weight(x_run: Run, x_copy: Callable[..., Path]) -> None:
    """Only headers are read: with every weight zeroed, the facts are the same."""
    folder = x_copy()
    before = x_run("inspect", folder).out
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert x_run("inspect", folder).out == before


def test_inspect_artifact(x_run: Run, x_export: Any) -> None:
    """As JSON the manifest's facts; as text every tensor with dtype and shape, brackets and all."""
    manifest = json.loads((x_export.folder / "manifest.json").read_text())
    result = json.loads(x_run("inspect", x_export.folder, "--json").out)
    assert result["graphs"]["decoder"] == manifest["graphs"]["decoder"]["signature"]
    assert result["files"] == {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert result["parity"] == manifest["parity"]
    ran = x_run("inspect", x_export.folder)
    assert (ran.code, ran.err) == (0, "")
    signature = manifest["graphs"]["decoder"]["signature"]
    for spec in (*signature["inputs"], *signature["outputs"]):
        shape = "[" + ", ".join(map(str, spec["shape"])) + "]"
        assert re.search(rf"^{re.escape(spec['name'])} +{spec['dtype']} +{re.escape(shape)}", ran.out, re.MULTILINE)
    assert re.search(r"parity +passed", ran.out)
