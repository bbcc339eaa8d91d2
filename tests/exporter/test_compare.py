"""`export-llm compare`: artifacts side by side, and one picture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from exporter.pipeline import ExportRequest, export


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    tiny = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama"
    made = {}
    for name, precision, quantizer in (("int8", "int8", "rtn"), ("int4", "int4", "rtn"), ("better", "int4", "mse")):
        made[name] = folder / name
        export(ExportRequest(checkpoint=tiny, out=made[name], precision=precision, quantizer=quantizer))
    made["plain"] = folder / "plain"
    export(ExportRequest(checkpoint=tiny, out=made["plain"]))
    return made


def test_a_table_and_a_picture(artifacts: dict[str, Path], x_run: Callable[..., Any], tmp_path: Path) -> None:
    ran = x_run("compare", *map(str, artifacts.values()), "-o", str(tmp_path / "quality.png"))
    assert ran.code == 0
    for name, folder in artifacts.items():
        assert name in ran.out
        quality = json.loads((folder / "parity.json").read_text())["quality"]
        assert quality is None or f"{quality['kl_mean']:.3g}" in ran.out
    with Image.open(tmp_path / "quality.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10  # points of several colours


def test_json(artifacts: dict[str, Path], x_run: Callable[..., Any]) -> None:
    ran = x_run("compare", *map(str, artifacts.values()), "--json")
    facts = {each["name"]: each for each in json.loads(ran.out)}
    assert facts["plain"]["quality"] is None
    assert (facts["better"]["precision"], facts["better"]["quantizer"]) == ("int4", "mse")
    assert (
        facts["int4"]["quality"]["kl_mean"]
        > facts["better"]["quality"]["kl_mean"]
        > facts["int8"]["quality"]["kl_mean"]
    )
    assert facts["int8"]["bytes_per_weight"] == pytest.approx(1.06, abs=0.02)


def test_what_cannot_be_compared(artifacts: dict[str, Path], x_run: Callable[..., Any], tmp_path: Path) -> None:
    int8, int4 = str(artifacts["int8"]), str(artifacts["int4"])
    x_run("compare", int8, str(tmp_path / "nowhere")).refused("does not exist")
    x_run("compare", str(artifacts["plain"]), "-o", str(tmp_path / "x.png")).refused("nothing to draw")
    x_run("compare", int8, "-o", str(tmp_path / "x.tiff9")).refused("x.tiff9 cannot be drawn")
    damaged = tmp_path / "damaged"
    shutil.copytree(int4, damaged)
    text = (damaged / "parity.json").read_text()
    (damaged / "parity.json").write_text(text.replace("kl_mean", "kl_meal"))
    x_run("compare", int8, str(damaged)).refused("SHA-256")
    quiet = tmp_path / "quiet"
    tiny = Path(__file__).resolve().parents[2] / "examples" / "tiny_llama"
    export(ExportRequest(checkpoint=tiny, out=quiet, precision="int4", verify=False))
    x_run("compare", int8, str(quiet)).refused("--no-verify")


def test_the_export_prints_what_rounding_costs(x_run: Callable[..., Any], x_tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("27+58=85\nsort 52914=12459\n" * 100)
    options = ["--precision", "int4:lm_head=int4/64", "--quantizer", "mse", "--eval-text", str(text)]
    ran = x_run("export", str(x_tiny), "-o", str(tmp_path / "out"), *options)
    assert ran.code == 0
    for words in (
        "tokens text.txt",
        "KL divergence, 99.9th percentile",
        "task reverse",
        "quantizer mse",
        "bytes a weight",
    ):
        assert words in ran.out
    facts = json.loads(x_run("inspect", str(tmp_path / "out"), "--json").out)
    assert facts["quantization"]["formats"] == {"fp16": 1, "fp32": 7, "int4/32": 21, "int4/64": 1}
    refused = x_run("inspect", str(tmp_path / "out" / "nothing.gguf")).refused("does not exist")
    assert "nothing.gguf" in refused


def test_inspect_names_how_weights_are_stored(
    x_run: Callable[..., Any], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """An artifact's files are a checkpoint."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(artifacts["int4"] / name, checkpoint)
    facts = json.loads(x_run("inspect", str(checkpoint), "--json").out)
    assert facts["stored_as"] == "21 export-llm int4/32, 1 export-llm int8"
    assert facts["refused"] == []
    assert facts["parameters"] == 456_064 + 128 * 100  # the head is no longer tied
