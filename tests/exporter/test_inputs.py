"""Weights that are no numbers are named, wherever in a file they lie; and what makes two exports the same."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import ExportError
from exporter.inputs import inputs_key, read_inputs, refuse_nonfinite
from exporter.pipeline import ExportRequest, export
from exporter.progress import Quiet
from exporter.source import read_source
from runtimes.hashing import PIECE_BYTES


def poisoned(folder: Path, name: str, index: int, value: float) -> Path:
    """The checkpoint with one number of one tensor replaced."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 17, -1])
def test_a_weight_that_is_no_number_is_refused(
    x_one_layer: Callable[..., Path], tmp_path: Path, x_run: Any, value: float, index: int
) -> None:
    """By name, before anything is written."""
    folder = poisoned(x_one_layer(), NAME, index, value)
    ran = x_run("export", folder, "-o", tmp_path / "out")
    ran.refused(f"1 weights are not finite: {NAME} holds NaN or infinity", "--allow-nonfinite exports it")
    assert not (tmp_path / "out").exists()


def test_it_can_be_allowed(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """With a warning; parity then fails, for nothing can be proven of such a model."""
    folder = poisoned(x_one_layer(), NAME, 3, float("nan"))
    result = export(ExportRequest(checkpoint=folder, out=tmp_path / "out", allow_nonfinite=True))
    assert NAME in result.warnings[0]
    assert result.parity is not None
    assert not result.parity.passed


NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def safetensors_at(path: Path, dtype: str, numbers: np.ndarray, pad: int) -> Path:
    """A safetensors file of one tensor, whose data begin at an offset that `pad` moves by so many bytes."""
    end = numbers.nbytes
    header = json.dumps({"x": {"dtype": dtype, "shape": list(numbers.shape), "data_offsets": [0, end]}}).encode()
    header += b" " * pad
    path.write_bytes(struct.pack("<Q", len(header)) + header + numbers.tobytes())
    return path


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_no_place_is_overlooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, pad: int) -> None:
    """One number that is none, at the ends and around the borders of what is read together, aligned or not."""
    from exporter import inputs
    from graphs.checkpoint import read_header
    from runtimes.hashing import sha256_of_chunks

    bad_bits = {
        "F64": 0x7FF8 << 48,
        "F32": 0xFFC0_0000,
        "F16": 0x7C00,
        "BF16": 0xFF80,
        "F8_E4M3": 0xFF,
        "F8_E5M2": 0x7C,
    }
    kind = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}.get(dtype, "u1")
    size = np.dtype(kind).itemsize
    count = (PIECE_BYTES + 4096) // size
    good = np.full(count, {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}.get(dtype, 0), kind)  # the largest numbers are numbers
    header = len(safetensors_at(tmp_path / "x.safetensors", dtype, good[:0], pad).read_bytes())
    border = (PIECE_BYTES - header) // size
    for at in [None, 0, count - 1, *range(max(0, border - 4), border + 4)]:
        numbers = good.copy()
        if at is not None:
            numbers[at] = bad_bits[dtype]
        path = safetensors_at(tmp_path / "x.safetensors", dtype, numbers, pad)
        found: dict[str, str] = {}
        tensors = list(read_header(path).values())
        sha256_of_chunks(path, inputs._Look(tensors, found))
        assert list(found) == ([] if at is None else ["x"]), at


def test_scales_of_quantized_weights_are_looked_at(tmp_path: Path) -> None:
    """Of a GPTQ checkpoint as of any other: its scales are floats of the file."""
    packed = pytest.importorskip("packed_cases")
    assert packed is not None
    tensors = {"a.scales": torch.tensor([1.0, float("inf")]), "a.qweight": torch.tensor([-1], dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    from exporter.inputs import _floats, _Look
    from runtimes.hashing import sha256_of_chunks

    found: dict[str, str] = {}
    path = tmp_path / "model.safetensors"
    sha256_of_chunks(path, _Look(_floats(None, path), found))  # type: ignore[arg-type]
    assert list(found) == ["a.scales"]


def test_many_are_counted(x_one_layer: Callable[..., Path]) -> None:
    """The first eight are named."""
    folder = x_one_layer()
    tensors = {name: tensor * float("nan") for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = read_inputs(read_source(folder, None), Quiet())
    with pytest.raises(ExportError, match=rf"{len(tensors)} weights are not finite: .* and {len(tensors) - 8} more"):
        refuse_nonfinite(found, allowed=False)
    assert refuse_nonfinite(dataclasses.replace(found, nonfinite={}), allowed=False) == ()


def test_what_makes_exports_the_same(x_one_layer: Callable[..., Path], tmp_path: Path) -> None:
    """Where the files lie and whether an artifact is replaced does not matter; everything else does."""
    folder = x_one_layer()
    text = tmp_path / "text.txt"
    text.write_text("words")
    source = read_source(folder, None)
    found = read_inputs(source, Quiet())
    request = ExportRequest(checkpoint=folder, out=tmp_path / "out")

    def key(tools: dict[str, str] | None = None, precision: str = "fp32", **changes: Any) -> str:
        return inputs_key(dataclasses.replace(request, **changes), found, tools or {"torch": "2"}, precision)

    same = [key(), key(out=tmp_path / "elsewhere"), key(checkpoint=tmp_path), key(force=True), key(precision="fp32")]
    assert len(set(same)) == 1
    changes = [
        {"max_len": 64},
        {"max_batch": 2},
        {"targets": ("tensorrt-rtx",)},
        {"layout": "genai"},
        {"verify": False},
    ]
    changes += [{"eval_text": text}, {"calibration": text}, {"quantizer": "mse"}, {"weights": "reference"}]
    others = [key(**change) for change in changes] + [key({"torch": "3"}), key(precision="fp16")]
    text.write_text("other words")
    others.append(key(eval_text=text))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    others.append(inputs_key(request, read_inputs(source, Quiet()), {"torch": "2"}, "fp32"))
    assert len({*others, key()}) == len(others) + 1
