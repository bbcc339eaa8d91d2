"""Weights: casts are torch's, bit for bit; files are what the safetensors library reads; nothing is lost on the way."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import exporter.weights as weights
from exporter.errors import ExportError
from exporter.pipeline import ExportRequest, export
from exporter.precision import FLOAT_TYPES
from exporter.weights import WeightPlan, plan_weights, write_weights
from graphs.checkpoint import TensorRef, open_checkpoint
from runtimes.artifact import open_artifact

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SMALL_CHUNK_BYTES = 64  # so that every tensor below takes several


def make_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder that opens as a checkpoint; its config describes no model, which weights do not need."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path, parts: Iterable[Iterable[str]], extra: dict[str, Tensor] | None = None) -> None:
    """Split a folder's model.safetensors into the named parts, with an index; `extra` goes into a last shard alone."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [{name: tensors[name] for name in names} for names in parts]
    shards += [extra] if extra else []
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refs(names: Iterable[str]) -> list[TensorRef]:
    """Parameters that are whole tensors each."""
    return [TensorRef(name) for name in names]


def write(
    folder: Path, out: Path, precision: str, mode: str = "copy", names: Iterable[str] | None = None
) -> tuple[WeightPlan, list[str], list[int]]:
    """Plan and write; (plan, names of the files written, bytes reported to the progress display)."""
    checkpoint = open_checkpoint(folder)
    plan = plan_weights(checkpoint, refs(checkpoint.tensors if names is None else names), FLOAT_TYPES[precision], mode)
    out.mkdir()
    reported: list[int] = []
    files = write_weights(plan, lambda name, write: write(out / name), reported.append)
    return plan, files, reported


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def rounding_cases(dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers where casts differ if anything does: ties, subnormals, zeros of both signs, infinities, extremes."""
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -(1 + 2.0**-8), 1 + 2.0**-8 + 2.0**-20]
    small = [0.0, -0.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, -(2.0**-14), 2.0**-15, 2.0**-126, 2.0**-133, 1e-45]
    large = [65504.0, -65504.0, 65519.9, 60000.0, float("inf"), float("-inf")]
    rng = torch.Generator().manual_seed(0)
    return {
        "special": torch.tensor(ties + small + large).to(dtype),
        "matrix": (torch.randn(37, 29, generator=rng) * 3).to(dtype),
        "norm": torch.rand(101, generator=rng).to(dtype),
        "scalar": torch.tensor(0.1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }


@pytest.mark.parametrize("target", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_casts_equal_torchs_bit_for_bit(
    source: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From every stored dtype to every precision, in several chunks, each tensor is torch's cast of the whole."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
    tensors = rounding_cases(DTYPES[source])
    if target == "fp16":  # bfloat16 rounds 65504 up to 65536, which is an overflow and has its own test
        tensors["special"] = torch.where(tensors["special"].abs() == 65536, 0, tensors["special"])
    folder = make_checkpoint(tmp_path / "source", tensors)
    write(folder, tmp_path / "out", target)
    found = load_file(tmp_path / "out" / "model.safetensors")
    dtype = getattr(torch, FLOAT_TYPES[target].dtype)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.to(dtype)
        assert found[name].dtype == dtype
        assert found[name].shape == expected.shape
        assert bits(found[name]) == bits(expected), name


def test_nan_stays_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN is no overflow: it is cast to NaN, and the numbers beside it are not disturbed."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
    tensor = torch.linspace(-2, 2, 100)
    tensor[[3, 50, 99]] = float("nan")
    folder = make_checkpoint(tmp_path / "source", {"t": tensor})
    write(folder, tmp_path / "out", "fp16")
    found = load_file(tmp_path / "out" / "model.safetensors")["t"]
    torch.testing.assert_close(found, tensor.half(), rtol=0, atol=0, equal_nan=True)


def test_the_chunks_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than CHUNK_BYTES of a tensor is held at once: progress arrives in pieces of that size at most."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
    folder = make_checkpoint(tmp_path / "source", {"t": torch.ones(100)})
    plan, _, reported = write(folder, tmp_path / "out", "fp16")
    header, *chunks = reported
    assert chunks == [32] * 6 + [8]  # 400 bytes read in pieces of 64, each half as long when it is written
    assert header + sum(chunks) == plan.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cast_file_is_aligned_and_complete(precision: str, tmp_path: Path, x_tiny: Path) -> None:
    """Data starts at a multiple of 64, tensors follow without holes, and names and shapes are the checkpoint's."""
    _, files, _ = write(x_tiny, tmp_path / "out", precision)
    path = tmp_path / "out" / "model.safetensors"
    assert files == ["model.safetensors"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == files
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert (8 + length) % 64 == 0
    assert header.pop("__metadata__") == {"format": "pt"}  # what transformers asks for
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert path.stat().st_size == 8 + length + ends[-1][1]
    with safe_open(path, framework="pt") as ours, safe_open(x_tiny / "model.safetensors", framework="pt") as theirs:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in ours.keys():  # noqa: SIM118  (not a dict)
            expected = theirs.get_tensor(name).to(getattr(torch, FLOAT_TYPES[precision].dtype))
            assert bits(ours.get_tensor(name)) == bits(expected), name


def test_the_plan_says_where_the_bytes_will_lie(tmp_path: Path) -> None:
    """Offsets and sizes of the plan, taken from the finished file, give torch's casts."""
    tensors = rounding_cases(torch.float32)
    folder = make_checkpoint(tmp_path / "source", tensors)
    plan, _, _ = write(folder, tmp_path / "out", "bf16")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert plan.nbytes == len(data)
    assert plan.placed.keys() == tensors.keys()
    for name, placed in plan.placed.items():
        assert str(placed.path) == "model.safetensors"
        assert data[placed.offset : placed.offset + placed.nbytes] == bits(tensors[name].bfloat16()), name


def test_unused_tensors_are_left_out_of_a_cast(tmp_path: Path) -> None:
    """Only the named tensors are written."""
    folder = make_checkpoint(tmp_path / "source", {"used": torch.ones(4), "unused": torch.ones(4)})
    write(folder, tmp_path / "out", "fp16", names=["used", "used"])
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["used"]


def test_copy_is_byte_identical(tmp_path: Path, x_tiny: Path) -> None:
    """In the stored precision the file is copied as it is, odd header and all."""
    plan, files, reported = write(x_tiny, tmp_path / "out", "fp32")
    source = (x_tiny / "model.safetensors").read_bytes()
    assert files == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == source
    assert plan.nbytes == sum(reported) == len(source)


@pytest.mark.parametrize("refused_after", [None, 0, 3])
def test_a_copy_in_chunks_is_byte_identical(
    refused_after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_tiny: Path
) -> None:
    """By the kernel, through memory where its file systems are of two kinds, or when it stops half way."""
    in_kernel, calls = os.copy_file_range, []

    def copy(*args: Any) -> int:
        if len(calls) == refused_after:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        calls.append(args)
        return in_kernel(*args)

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(weights, "COPY_BYTES", 100_000)
    _, _, reported = write(x_tiny, tmp_path / "out", "fp32")
    source = (x_tiny / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == source
    assert max(reported) == 100_000
    assert sum(reported) == len(source)


def test_a_full_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x_tiny: Path) -> None:
    """What the kernel cannot write cannot be written otherwise."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        write(x_tiny, tmp_path / "out", "fp32")


def test_a_copy_does_not_change_with_its_source(tmp_path: Path) -> None:
    """The copy is no link: writing to the checkpoint afterwards leaves it alone."""
    folder = make_checkpoint(tmp_path / "source", {"t": torch.ones(8)})
    write(folder, tmp_path / "out", "fp32")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    copied = tmp_path / "out" / "model.safetensors"
    assert copied.read_bytes() == before
    assert not copied.is_symlink()
    assert copied.stat().st_nlink == 1


def test_shards_are_copied_with_their_index(tmp_path: Path) -> None:
    """A sharded checkpoint keeps its shards and its index, byte for byte."""
    folder = make_checkpoint(tmp_path / "source", {name: torch.randn(5) for name in "abc"})
    shard(folder, [["c", "a"], ["b"]])
    plan, files, _ = write(folder, tmp_path / "out", "fp32")
    expected = [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    ]
    assert files == expected
    for name in expected:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert str(plan.placed["b"].path) == "model-00002-of-00002.safetensors"


def test_shards_become_one_file_in_a_cast(tmp_path: Path) -> None:
    """A cast of a sharded checkpoint is one model.safetensors and no index."""
    tensors = {name: torch.randn(5) for name in "abc"}
    folder = make_checkpoint(tmp_path / "source", tensors)
    shard(folder, [["c", "a"], ["b"]])
    _, files, _ = write(folder, tmp_path / "out", "fp16")
    assert files == ["model.safetensors"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t.half()) for n, t in tensors.items()}


@pytest.mark.parametrize("source", ["F32", "BF16"])
def test_fp16_overflow_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number beyond 65504 is an error that names the tensor and the number, wherever in the tensor it lies."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", SMALL_CHUNK_BYTES)
    tensor = torch.ones(200)
    tensor[150] = -70144.0  # exact in bfloat16
    folder = make_checkpoint(tmp_path / "source", {"fine": torch.ones(3), "too.big": tensor.to(DTYPES[source])})
    with pytest.raises(ExportError, match=r"too\.big holds 70144, which F16 cannot express .*65504.*--precision"):
        write(folder, tmp_path / "out", "fp16")


def test_a_checkpoint_that_shrinks_is_noticed(tmp_path: Path) -> None:
    """A file that is cut short between opening and reading is an error, not garbage."""
    folder = make_checkpoint(tmp_path / "source", {"t": torch.ones(1000)})
    checkpoint = open_checkpoint(folder)
    plan = plan_weights(checkpoint, refs(["t"]), FLOAT_TYPES["fp16"], "copy")
    os.truncate(folder / "model.safetensors", 500)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"ended while t was being read"):
        write_weights(plan, lambda name, write: write(tmp_path / "out" / name), lambda _: None)


# --- reference mode ---------------------------------------------------------------------------------------------------


def test_reference_plans_nothing_to_write(x_tiny: Path) -> None:
    """Nothing is copied or cast, and the tensors lie where the safetensors library finds them."""
    checkpoint = open_checkpoint(x_tiny)
    plan = plan_weights(checkpoint, refs(checkpoint.tensors), FLOAT_TYPES["fp32"], "reference")
    assert (plan.copies, plan.jobs, plan.nbytes) == ((), (), 0)
    data = (x_tiny / "model.safetensors").read_bytes()
    for name, tensor in load_file(x_tiny / "model.safetensors").items():
        placed = plan.placed[name]
        assert data[placed.offset : placed.offset + placed.nbytes] == bits(tensor)


def test_reference_refuses_casts(x_tiny: Path) -> None:
    """The message counts and names the tensors that would have to be cast, and says what to do."""
    checkpoint = open_checkpoint(x_tiny)
    with pytest.raises(ExportError) as error:
        plan_weights(checkpoint, refs(checkpoint.tensors), FLOAT_TYPES["fp16"], "reference")
    message = str(error.value)
    assert "29 of 29 tensors differ" in message
    assert "model.embed_tokens.weight is F32" in message
    assert "--weights copy" in message


def test_reference_refuses_links(tmp_path: Path, x_tiny: Path) -> None:
    """A model.safetensors that is a symbolic link (as in a hub cache) cannot be external data."""
    shutil.copy(x_tiny / "config.json", tmp_path)
    (tmp_path / "model.safetensors").symlink_to(x_tiny / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ExportError, match=r"model\.safetensors is a symbolic link.*--weights copy"):
        plan_weights(checkpoint, refs(checkpoint.tensors), FLOAT_TYPES["fp32"], "reference")


def test_links_are_copied_by_content(tmp_path: Path, x_tiny: Path) -> None:
    """In copy mode a linked file is followed, so that a hub cache can be exported."""
    folder = tmp_path / "linked"
    folder.mkdir()
    shutil.copy(x_tiny / "config.json", folder)
    (folder / "model.safetensors").symlink_to(x_tiny / "model.safetensors")
    write(folder, tmp_path / "out", "fp32")
    copied = tmp_path / "out" / "model.safetensors"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (x_tiny / "model.safetensors").read_bytes()


# --- whole exports ----------------------------------------------------------------------------------------------------


def run_export(checkpoint: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export without verification; the manifest, read back and checked."""
    export(ExportRequest(checkpoint=checkpoint, out=out, **{"verify": False} | options))
    open_artifact(out)
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def logits(artifact: Path) -> np.ndarray:
    """Logits of a short prompt on ONNX Runtime's CPU provider, with nothing of ours in between."""
    import onnxruntime as ort

    session = ort.InferenceSession(artifact / "decoder.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[1, 21, 26, 14]], np.int64)
    feeds = {
        "input_ids": ids,
        "position_ids": np.arange(4)[None],
        "write_indices": np.zeros(1, np.int64),
        "attention_mask": np.ones_like(ids),
        "logit_indices": np.arange(4)[None],
    }
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
            feeds[value.name] = np.zeros((1, *value.shape[1:]), dtype)
    return session.run(["logits"], feeds)[0]


def test_an_artifact_is_itself_a_checkpoint(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """What a cast wrote can be exported again: same weights, same graph, and fp16 without being asked."""
    first = run_export(x_one_layer(), tmp_path / "first", precision="fp16")
    second = run_export(tmp_path / "first", tmp_path / "second")
    assert second["precision"] == first["precision"] == "fp16"
    assert second["files"] == first["files"]


def test_a_sharded_export_computes_the_same(
    x_one_layer: Callable[..., Path], x_one_layer_export: Path, tmp_path: Path
) -> None:
    """Shards and a single file give the same logits on ONNX Runtime, and the artifact opens as a checkpoint again."""
    folder = x_one_layer()
    names = sorted(load_file(folder / "model.safetensors"))
    shard(folder, [names[:4], names[4:]])
    manifest = run_export(folder, tmp_path / "from-shards")
    assert [name for name in manifest["files"] if "safetensors" in name] == [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    ]
    np.testing.assert_array_equal(logits(tmp_path / "from-shards"), logits(x_one_layer_export))
    assert open_checkpoint(tmp_path / "from-shards").tensors.keys() == set(names)


def test_a_shard_that_is_not_needed_leaves_a_whole_artifact(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """A shard of ignorable tensors alone (old rotary tables): the artifact is still a checkpoint that opens."""
    folder = x_one_layer()
    names = sorted(load_file(folder / "model.safetensors"))
    shard(folder, [names], extra={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    run_export(folder, tmp_path / "out")
    assert set(names) <= open_checkpoint(tmp_path / "out").tensors.keys()


def test_mixed_dtypes_are_cast_to_the_commonest(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """float16 matrices with float32 norms export as fp16, norms rounded as torch rounds them."""
    folder = x_one_layer()
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.half() for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    manifest = run_export(folder, tmp_path / "out")
    assert manifest["precision"] == "fp16"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(t) for name, t in found.items()} == {name: bits(t.half()) for name, t in tensors.items()}


def test_a_stored_tied_head_and_old_tables_do_no_harm(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """Tensors that the graph does not need may be there: a cast drops them."""
    folder = x_one_layer()
    tensors = load_file(folder / "model.safetensors")
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    }
    save_file(tensors | more, folder / "model.safetensors")
    run_export(folder, tmp_path / "out", precision="fp16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(t) for name, t in found.items()} == {name: bits(t.half()) for name, t in tensors.items()}


def test_reference_writes_no_weight(
    x_one_layer: Callable[..., Path],
    x_one_layer_export: Path,
    x_snapshot: Callable[[Path], dict[str, bytes | None]],
) -> None:
    """The graph is written beside the checkpoint's own file, uses it, and computes what a copy computes."""
    folder = x_one_layer()
    before = x_snapshot(folder)
    stat = (folder / "model.safetensors").stat()
    manifest = run_export(folder, folder, weights="reference")
    after = x_snapshot(folder)
    assert sorted(after.keys() - before.keys()) == ["decoder.onnx", "manifest.json"]
    assert {name: after[name] for name in before} == before
    now = (folder / "model.safetensors").stat()
    assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert "model.safetensors" in manifest["files"]  # so that a change of the checkpoint is noticed
    assert after["decoder.onnx"] == (x_one_layer_export / "decoder.onnx").read_bytes()
    np.testing.assert_array_equal(logits(folder), logits(x_one_layer_export))
